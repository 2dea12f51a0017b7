"""README and docs are true: their commands are valid, their settings have these defaults, their files exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from support.forks import Forks
from support.hollow import hollow_weights
from support.runs import ROOT, model_folder, text_files
from support.small import byte_tokenizer
from transformers import AutoConfig, PreTrainedConfig

import recondense as rc
from recondense.config.schema import ModelConfig
from recondense.errors import ConfigError
from recondense.models.model_classes import on_meta
from recondense.models.parameters import weights_bytes
from recondense.plan import Plan
from recondense.recovery.trainable import trainable_parameters
from recondense.run.command_line import validate
from recondense.run.model_checks import planned_config
from recondense.surgery.execute import restructure

PAGES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "python3", ".venv/bin/python")
OURS = "recondense"  # the command of the installed package, the same as train.py
# Qwen1.5-MoE-A2.7B as far as checking goes: its layers and experts.
QWEN = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
}  # fmt: skip


def commands() -> list[list[str]]:
    """The words of every command on the pages, in code blocks and in sentences."""
    commands_shown: list[list[str]] = []
    for page in PAGES.values():
        blocks = "\n".join(BLOCK.findall(page)).replace("\\\n", " ").splitlines()
        sentences = re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))
        for line in (line.strip() for line in (*blocks, *sentences)):
            if re.match(r"(make|\S*python3?|recondense(?= \S+=))\s", line):
                words = shlex.split(line, comments=True)
                commands_shown += [words] if words not in commands_shown else []
    return commands_shown


MAKES = [words[1:] for words in commands() if words[0] == "make"]
SCRIPTS = [list(words) for words in dict.fromkeys(tuple(words[1:]) for words in commands() if words[0] in PYTHON)]
TRAINS = [words[1:] for words in SCRIPTS if words[0] == "train.py"]
TRAINS += [words[1:] for words in commands() if words[0] == OURS and words[1:] not in TRAINS]
BENCHMARKS = [words for words in SCRIPTS if words[0] != "train.py"]


def test_commands_are_found() -> None:
    """Else the tests below would pass on nothing."""
    assert len(MAKES) >= 5 and len(TRAINS) >= 25 and len(BENCHMARKS) >= 10
    assert ["demo"] in MAKES and ["docs"] in MAKES and any("-m" in words for words in TRAINS)
    assert {words[0] for words in commands()} == {"make", "python", OURS}


def test_readme_is_short() -> None:
    assert len(PAGES[Path("README.md")].splitlines()) <= 250


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("words", MAKES, ids=" ".join)
def test_make_target(words: list[str]) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Files that replace those that a command names, by setting or by the end of the name."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN))
    byte_tokenizer().save_pretrained(model)
    hollow_weights(model / "model.safetensors", on_meta(AutoConfig.for_model(**QWEN)))
    texts = [f"text number {index}" for index in range(100)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "texts.txt").write_text("\n\n".join(texts) + "\n")
    return {"model.path": str(model), ".jsonl": str(tmp_path / "texts.jsonl"), ".txt": str(tmp_path / "texts.txt")}


def _mark(words: list[str]) -> Any:
    """The papers' evaluations read lm-eval's list of tasks, which takes ten seconds and more."""
    slow = any(word.startswith("evaluation=paper") for word in words)
    return pytest.param(words, id=" ".join(words), marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("words", [_mark(words) for words in TRAINS])
def test_train_command(words: list[str], stand_in: dict[str, str], tmp_path: Path) -> None:
    """With local files in place of a model on the hub and of files that exist only in README."""
    arguments = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "model" and "model.path" not in " ".join(words):
            arguments.append(f"model.path={stand_in['model.path']}")
        if key == "model.path":
            word = f"{key}={stand_in[key]}"
        elif key.startswith("data.") and key.endswith(".path"):
            word = f"{key}={stand_in[Path(value).suffix]}"
        if word.startswith("experiment=paper/"):
            arguments.append("plan_only=true")  # on the published shapes, which are recorded here
        arguments.append(word)
    arguments.append(f"output_dir={tmp_path}/out")
    sweep = ["method=none,cdmoe", "method.memory_ratio=0.673", "seed=0"]  # ninety runs take Hydra a minute to compose
    arguments += sweep if "experiment=compare" in words else []
    validate(get_args_parser().parse_args(arguments))
    if words == TRAINS[0]:  # so that the check is known to run
        with pytest.raises(ConfigError, match="there is no such setting"):
            validate(get_args_parser().parse_args([*arguments, "method.of_another_name=1"]))


@pytest.mark.parametrize("words", BENCHMARKS, ids=" ".join)
def test_benchmark(forks: Forks, words: list[str], tmp_path: Path) -> None:
    script, options = words[0], [word for word in words[1:] if word.startswith("--")]
    assert script.startswith("benchmarks/")
    done = forks.run(ROOT / script, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(options) <= set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_own_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/recovery.md runs, with few steps on a tiny model."""
    section = PAGES[Path("docs/recovery.md")].partition("\n## In your own Trainer\n")[2].partition("\n## ")[0]
    [code] = BLOCK.findall(section)
    assert code.count("steps=200") == 1 and code.count("256") == 3
    code = code.replace("steps=200", "steps=2").replace(" 256,", " 32,").replace("speed()", "speed(prompt_length=8)")
    monkeypatch.chdir(tmp_path)
    paths = text_files(tmp_path / "texts")
    texts = {
        split: [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
        for split, path in paths.items()
    }
    model, tokenizer = rc.load(model_folder(tmp_path / "model"))
    tape = rc.calibrate(model, tokenizer, texts["calibration"], num_samples=4, max_length=16)
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "tape": tape, "train_texts": texts["train"]}
    names |= {"plan": rc.search(tape, rc.CDMoE(num_experts=2)), "validation_texts": texts["validation"]}
    exec(code, names)
    assert names["trainer"].global_step == 2 and (tmp_path / "condensed" / "config.json").is_file()


# ------------------------------------------------------------------------------------------------------- the files


def tree() -> set[str]:
    """Paths that the tree of docs/design.md names; folders end with a slash."""
    section = PAGES[Path("docs/design.md")].partition("\n## Files\n")[2].partition("\n## ")[0]
    [block] = BLOCK.findall(section)
    paths: set[str] = set()
    folders = [(-1, "")]  # the folders that contain the current line, with their indents
    for line in block.splitlines():
        words = line.split()
        names = list(takewhile(lambda word: word.endswith((".py", "/")), words))
        assert names, f"the tree has a line without a file: {line}"
        indent = len(line) - len(line.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1]
        paths.update(parent + name for name in names)
        if names[0].endswith("/"):
            folders.append((indent, parent + names[0]))
        paths.update(folders[-1][1] + name for name in re.findall(r"\b\w+\.py\b", " ".join(words[len(names) :])))
    return paths


def test_files_that_the_tree_names_exist() -> None:
    missing = {path for path in tree() if not (ROOT / path).exists()}
    assert missing - {"outputs/"} == set(), "only outputs/ may be missing: the first run makes it"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths in backticks, from the repository or from the package."""
    paths = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|md))(?:::\w+)?`", PAGES[page])
    assert [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "src/recondense"))] == []


def test_every_module_is_in_the_tree() -> None:
    source = ROOT / "src" / "recondense"
    # A method needs no line: it is one file and one YAML.
    paths = [path for path in source.rglob("*.py") if path.name != "__init__.py" and path.parent != source / "methods"]
    modules = {path.relative_to(ROOT).as_posix() for path in paths}
    assert len(modules) > 30
    assert sorted(modules - tree()) == []


def test_every_top_folder_is_in_the_tree() -> None:
    assert {"conf/", "callbacks/", "tests/", "benchmarks/", "docs/", "src/recondense/"} <= tree()
    kinds = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("__")}
    line = next(line for line in PAGES[Path("docs/design.md")].splitlines() if line.startswith("tests/ "))
    assert sorted(kind for kind in kinds if kind not in line) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_targets_of_links_exist(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page for entry in settings["nav"] for value in entry.values() for page in _pages(value)}
    assert pages == {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"} | {path.name for path in ROOT.glob("docs/*.md")}


def _pages(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]


# ---------------------------------------------------------------------------------------------------- the pictures

PICTURES = ROOT / "docs" / "pictures"


def test_pictures_are_drawn_from_their_figures(forks: Forks, tmp_path: Path) -> None:
    """Drawing again gives the same text with the pinned matplotlib."""
    pinned = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if matplotlib.__version__ != pinned[1]:
        pytest.skip(f"matplotlib {matplotlib.__version__} is not the pinned {pinned[1]}")
    done = forks.run(PICTURES / "draw.py", "--folder", str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == sorted(path.name for path in PICTURES.glob("*.svg"))
    assert [name for name in drawn if (tmp_path / name).read_text() != (PICTURES / name).read_text()] == []


def test_pictures_are_small_and_shown() -> None:
    pages = "".join(PAGES.values())
    for path in PICTURES.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert len(text.encode()) < 60_000 and "<image" not in text and f"pictures/{path.name})" in pages
        ElementTree.fromstring(text)


# ---------------------------------------------------------------------------------------------------- the settings


TABLES = {
    "\n## Settings\n": ("docs/configuration.md", [], 15),
    "\n### Settings of `moei2`\n": ("docs/methods.md", ["method=moei2"], 5),
}


def settings(title: str) -> list[tuple[str, str]]:
    """(setting, default) of every row of a table; a row may name several, the later ones by their last part."""
    section = PAGES[Path(TABLES[title][0])].partition(title)[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    settings_and_defaults: list[tuple[str, str]] = []
    for names, defaults, _ in rows:
        vary = "..." in defaults  # the defaults depend on another setting
        values = [] if vary else [value.strip().strip("`") for value in defaults.split(",")]
        first = ""
        for index, name in enumerate(re.findall(r"`([^`]+)`", names)):
            first = first if name.startswith(".") else name
            full = f"{first.rpartition('.')[0]}{name}" if name.startswith(".") else name
            settings_and_defaults.append((full, values[index] if index < len(values) else "..."))
    return settings_and_defaults


@pytest.mark.parametrize("title", TABLES, ids=lambda title: title.strip("# `\n"))
def test_settings_have_these_defaults(title: str) -> None:
    page, overrides, least = TABLES[title]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        values = cast(dict[str, Any], OmegaConf.to_container(compose("train", overrides), resolve=True))
    table = settings(title)
    assert len(table) > least
    wrong = []
    for name, default in table:
        value: Any = values
        for part in name.split("."):
            assert part in value, f"{page} names {name}, which is no setting"
            value = value[part]
        value = value["name"] if isinstance(value, dict) else value
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        if default not in ("...", shown):
            wrong.append(f"{name}: {page} says {default}, it is {value}")
    assert wrong == []


def test_memory_of_a_run() -> None:
    """The table of docs/larger_than_memory.md follows from shapes, by the arithmetic that stands below it."""
    section = PAGES[Path("docs/larger_than_memory.md")].partition("\n## How much memory a run needs\n")[2]
    rows = [re.findall(r"[^|]+", line) for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    rows = [row for row in rows if "=" not in row[0]]
    assert len(rows) == 9
    for name, *figures in rows:
        model = on_meta(published_config(name.strip(" `")), torch.bfloat16)
        original = weights_bytes(model)
        tape = 100 * 256 * model.config.hidden_size * 2 * (model.config.num_hidden_layers + 1)
        plan = Plan("", tuple(rc.CDMoE(num_experts=4, num_layers=9).outline(model)))
        restructure(model, plan)
        compressed = weights_bytes(model)
        trained = sum(value.numel() for value in trainable_parameters(model, plan.layers, "experts").values())
        sizes = [original + tape, original + 16 * trained, compressed + 14 * trained]
        shown = [f"{original / 1e9:.1f} GB", f"{compressed / 1e9:.1f} GB", f"{trained / 1e9:.3f} billion"]
        assert [figure.strip() for figure in figures] == [*shown, *(f"{size / 1e9:.0f} GB" for size in sizes)], name


def published_config(name: str) -> PreTrainedConfig:
    """The config of a `model=` entry, without the hub."""
    entry = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
    return planned_config(ModelConfig(name=name, path=entry["path"]), plan_only=True)


def test_choices_exist() -> None:
    """Everything that the pages write as `group=choice`."""
    pairs = re.findall(r"`(model|data|method|recovery|evaluation|experiment)=(\w+)`", "".join(PAGES.values()))
    assert pairs
    assert [pair for pair in pairs if not (ROOT / "conf" / pair[0] / f"{pair[1]}.yaml").is_file()] == []
