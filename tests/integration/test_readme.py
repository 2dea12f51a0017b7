"""README.md tells the truth: its commands are valid, its settings have these defaults, its files are there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from forks import Forks
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from integration.runs import ROOT
from recondense.command_line import validate
from recondense.errors import ConfigError
from train import job

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "python3", ".venv/bin/python")
# Qwen1.5-MoE-A2.7B as far as checking goes: its layers and experts.
QWEN = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
}  # fmt: skip


def commands() -> list[list[str]]:
    """The words of every command that README shows, in blocks and in sentences."""
    blocks = "\n".join(BLOCK.findall(README)).replace("\\\n", " ").splitlines()
    sentences = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README))
    lines = [line.strip() for line in (*blocks, *sentences)]
    found = []
    for line in lines:
        if re.match(r"(make|\S*python3?)\s", line) and (words := shlex.split(line, comments=True)) not in found:
            found.append(words)
    return found


MAKES = [words[1:] for words in commands() if words[0] == "make"]
SCRIPTS = [list(words) for words in dict.fromkeys(tuple(words[1:]) for words in commands() if words[0] in PYTHON)]
TRAINS = [words[1:] for words in SCRIPTS if words[0] == "train.py"]
BENCHMARKS = [words for words in SCRIPTS if words[0] != "train.py"]


def test_commands_are_found() -> None:
    """Else the tests below would pass on nothing."""
    assert len(MAKES) >= 2 and len(TRAINS) >= 3 and len(BENCHMARKS) >= 2
    assert ["demo"] in MAKES and any("-m" in words for words in TRAINS)
    assert {words[0] for words in commands()} <= {"make", *PYTHON}


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
    """Files in place of those that a command names: values by setting."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN))
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).touch()
    texts = [f"text number {index}" for index in range(100)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "texts.txt").write_text("\n\n".join(texts) + "\n")
    return {"model.path": str(model), ".jsonl": str(tmp_path / "texts.jsonl"), ".txt": str(tmp_path / "texts.txt")}


@pytest.mark.parametrize("words", TRAINS, ids=" ".join)
def test_train_command(words: list[str], stand_in: dict[str, str], tmp_path: Path) -> None:
    """With local stand-ins for a model of the hub and for files that only exist in README."""
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
    validate(job, ROOT / "conf", "train", arguments)
    if words == TRAINS[0]:  # that something is checked at all
        with pytest.raises(ConfigError, match="there is no such setting"):
            validate(job, ROOT / "conf", "train", [*arguments, "method.of_another_name=1"])


@pytest.mark.parametrize("words", BENCHMARKS, ids=" ".join)
def test_benchmark(forks: Forks, words: list[str], tmp_path: Path) -> None:
    script, options = words[0], [word for word in words[1:] if word.startswith("--")]
    assert script.startswith("benchmarks/")
    done = forks.run(ROOT / script, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(options) <= set(re.findall(r"--[\w-]+", done.stdout))


# ------------------------------------------------------------------------------------------------------- the files


def tree() -> dict[str, set[str]]:
    """Paths that the section Files names, by the folder that they stand under; folders end with a slash."""
    section = README.partition("\n## Files\n")[2].partition("\n## ")[0]
    [block] = BLOCK.findall(section)
    found: dict[str, set[str]] = {"": set()}
    parent = ""
    for line in block.splitlines():
        words = line.split()
        leading = words[: next((index for index, word in enumerate(words) if not word.endswith((".py", "/"))), None)]
        assert leading, f"README's tree has a line without a file: {line}"
        if not line.startswith(" "):
            parent = leading[0] if leading[0].endswith("/") else ""
            found[""].update(leading)
        else:
            found.setdefault(parent, set()).update(leading)
        folder = leading[0] if leading[0].endswith("/") else ""
        within = folder if folder == parent else f"{parent}{folder}"
        inside = re.findall(r"\b\w+\.py\b", line.partition(leading[-1])[2])
        if inside:
            found.setdefault(within, set()).update(inside)
    return found


def test_files_that_the_tree_names_are_there() -> None:
    missing = [
        f"{folder}{name}" for folder, names in tree().items() for name in names if not (ROOT / folder / name).exists()
    ]
    assert sorted(set(missing) - {"outputs/"}) == [], "outputs/ alone is made by the first run"


def test_every_module_is_in_the_tree() -> None:
    source = ROOT / "src" / "recondense"
    modules = {path.relative_to(ROOT).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"}
    assert len(modules) > 30
    named = {f"{folder}{name}" for folder, names in tree().items() for name in names}
    assert sorted(modules - named) == []


def test_every_top_folder_is_in_the_tree() -> None:
    folders = {"conf/", "callbacks/", "tests/", "benchmarks/", "src/recondense/"}
    assert folders <= tree()[""]
    kinds = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("__")}
    line = next(line for line in README.splitlines() if line.startswith("tests/ "))
    assert sorted(kind for kind in kinds if kind not in line) == []


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


# ---------------------------------------------------------------------------------------------------- the settings


TABLES = {"\n## Settings that matter\n": ([], 15), "\n### Settings of `moei2`\n": (["method=moei2"], 5)}


def settings(title: str) -> list[tuple[str, str]]:
    """(setting, default) of every row of a table; a row may name several, the later ones by their last part."""
    section = README.partition(title)[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    found: list[tuple[str, str]] = []
    for names, defaults, _ in rows:
        vague = "..." in defaults  # the row says that they differ
        values = [] if vague else [value.strip().strip("`") for value in defaults.split(",")]
        first = ""
        for index, name in enumerate(re.findall(r"`([^`]+)`", names)):
            first = first if name.startswith(".") else name
            full = f"{first.rpartition('.')[0]}{name}" if name.startswith(".") else name
            found.append((full, values[index] if index < len(values) else "..."))
    return found


@pytest.mark.parametrize("title", TABLES, ids=lambda title: title.strip("# `\n"))
def test_settings_have_these_defaults(title: str) -> None:
    overrides, least = TABLES[title]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        values = cast(dict[str, Any], OmegaConf.to_container(compose("train", overrides), resolve=True))
    table = settings(title)
    assert len(table) > least
    wrong = []
    for name, default in table:
        value: Any = values
        for part in name.split("."):
            assert part in value, f"README names {name}, which is no setting"
            value = value[part]
        value = value["name"] if isinstance(value, dict) else value
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        if default not in ("...", shown):
            wrong.append(f"{name}: README says {default}, it is {value}")
    assert wrong == []


def test_choices_exist() -> None:
    """What the table and the text write as group=choice."""
    pairs = re.findall(r"`(model|data|method|recovery|evaluation|experiment)=(\w+)`", README)
    assert pairs
    assert [pair for pair in pairs if not (ROOT / "conf" / pair[0] / f"{pair[1]}.yaml").is_file()] == []
