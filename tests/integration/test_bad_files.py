"""Files and folders that train.py refuses, with a message and exit code 2, before it loads any weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.checkpoints import POINTER, Change, checkpoint, config, content, cut
from support.composed import composed
from support.refusals import assert_refused, without_recovery

from recondense.config.schema import Config

Command = Callable[..., tuple[int, str]]

MOE = {
    "model_type": "qwen2_moe",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "intermediate_size": 16,
    "mlp_only_layers": [1],
}


@dataclass
class Files:
    """Writes inputs to a temporary folder."""

    folder: Path

    def model(self, files: tuple[str, ...] = ("model.safetensors", "tokenizer.json"), **changes: object) -> str:
        """A folder that looks like a model. Its weights are empty files, because nothing may load them."""
        folder = self.folder / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MOE | changes))
        for name in files:
            (folder / name).touch()
        return f"model.path={folder}"

    def damaged(self, *changes: Change) -> str:
        """A tiny model with weights and tokenizer, changed."""
        return f"model.path={checkpoint(self.folder / 'model', 'qwen2_moe', *changes)}"

    def tokenizer(self, *changes: Change) -> Path:
        """Another such folder."""
        return checkpoint(self.folder / "other", "qwen2_moe", *changes)

    def text(self, content: str | bytes, name: str = "texts.jsonl") -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def calibration(self, content: str | bytes, name: str = "texts.jsonl") -> tuple[str, ...]:
        return ("data=texts", f"data.calibration.path={self.text(content, name)}", "data.calibration.num_samples=2")

    def task_folder(self, contents: dict[str, str]) -> str:
        folder = self.folder / "tasks"
        folder.mkdir()
        for name, text in contents.items():
            (folder / name).write_text(text)
        return str(folder)

    def empty_folder(self) -> str:
        folder = self.folder / "empty"
        folder.mkdir()
        return str(folder)

    def foreign_folder(self) -> str:
        folder = self.folder / "foreign"
        folder.mkdir()
        (folder / "thesis.tex").touch()
        return str(folder)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


RANKS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), [2] * 6)
LOW_RANK = {"kind": "sparse", "num_experts": 6, "router_rows": 6, "ranks": RANKS}
LINE = json.dumps({"text": "some words"}) + "\n"

# By name: a function that writes files and returns arguments, and parts of the message.
BAD_FILES: dict[str, tuple[Callable[[Files], tuple[str, ...]], list[str]]] = {
    "folder without a model": (lambda f: (f"model.path={f.empty_folder()}",), ["has no config.json"]),
    "model without MoE layers": (lambda f: (f.model(mlp_only_layers=[0, 1, 2, 3]),), ["4 layers", "no MoE layers"]),
    "unsupported model": (lambda f: (f.model(model_type="llama"),), ["'llama' is not supported", "qwen2_moe"]),
    "pickles": (
        lambda f: (f.model(("pytorch_model.bin", "tokenizer.json")),),
        ["pickles (pytorch_model.bin)", "never loaded", "safetensors"],
    ),
    "another quantisation": (
        lambda f: (f.model(quantization_config={"quant_method": "awq", "bits": 4}),),
        ["stored in awq", "mxfp4 and fp8", "dequantize it first"],
    ),
    "fp8 without blocks": (
        lambda f: (f.model(quantization_config={"quant_method": "fp8"}),),
        ["fp8 without weight_block_size"],
    ),
    "experts that are low-rank already": (
        lambda f: (f.model(model_type="recondense_qwen2_moe", compressed_layers={"2": LOW_RANK}), "method=reap"),
        ["experts of layers 2 are already low-rank", "layer_drop", "export.format=dense"],
    ),
    "attention that a family lacks": (
        lambda f: (f.model(model_type="gpt_oss", num_local_experts=6, head_dim=8), "model.attention=sdpa"),
        ["model.attention=sdpa", "gpt_oss does not support it", "eager"],
    ),
    "condensed layers that a family cannot say": (
        lambda f: (f.model(model_type="mixtral", num_local_experts=6), "method.num_experts=2", "export.format=stock"),
        ["export.format=stock", "a config of mixtral cannot express"],
    ),
    "more experts for a token than there are": (
        lambda f: (f.model(num_experts_per_tok=9), "method=reap"),
        ["model: the config says that each token selects 9 of the 6 experts of a layer."],
    ),
    "a damaged checkpoint": (
        lambda f: (
            f.damaged(content("model.safetensors", POINTER), cut("tokenizer.json"), config(eos_token_id=999)),
            "model.streaming=true",
        ),
        [
            "recondense: 3 problems",
            "model: config.json has eos_token_id=999, but the embedding has 300 rows",
            "model: model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull`",
            "model: tokenizer.json is not valid JSON",
        ],
    ),
    "a damaged tokenizer of its own": (
        lambda f: (f.damaged(), f"model.tokenizer={f.tokenizer(cut('tokenizer_config.json'))}"),
        ["recondense: model.tokenizer=", "tokenizer_config.json is not valid JSON"],
    ),
    "a damaged teacher": (
        lambda f: (
            *(f.damaged(), "method=none", "recovery=finetune", "recovery.objective=distill", "recovery.teacher=model"),
            f"recovery.teacher_path={f.tokenizer(content('model.safetensors', b''))}",
        ),
        ["recondense: recovery.teacher_path=", "model.safetensors is empty"],
    ),
    "a config that cannot compute": (
        lambda f: (f.damaged(config(num_attention_heads=3)),),
        [
            "model: the model of config.json (vocab_size=300, hidden_size=32,",
            "num_attention_heads=3,",
            "cannot compute",
        ],
    ),
    "sizes of such a config": (
        lambda f: (f.damaged(config(num_attention_heads=3)), "plan_only=true"),
        ["model: the model of config.json (vocab_size=300, hidden_size=32,", "cannot compute"],
    ),
    "no weights": (lambda f: (f.model(("tokenizer.json",)),), ["no weights (*.safetensors)"]),
    "no tokenizer": (lambda f: (f.model(("model.safetensors",)),), ["no tokenizer", "model.tokenizer"]),
    "dense layer of a model": (
        lambda f: (f.model(), "method.num_experts=2", "method.num_layers=[1]"),
        ["layer 1 is not a MoE layer", "did you mean"],
    ),
    "experts of a model": (lambda f: (f.model(), "method.num_experts=7"), ["method.num_experts=7", "6 routed experts"]),
    "empty calibration file": (lambda f: f.calibration(""), ["texts.jsonl", "empty"]),
    "calibration that is no JSON": (lambda f: f.calibration("some words\n" * 3), ["line 1 is not JSON"]),
    "calibration without the field": (
        lambda f: f.calibration('{"body": "x"}\n' * 3),
        ["'text'", "body", "data.text_field"],
    ),
    "calibration that is no UTF-8": (lambda f: f.calibration(b"\xff\xfe\x00", "texts.txt"), ["not UTF-8"]),
    "compressed calibration": (lambda f: f.calibration(b"\x1f\x8b\x08\x00", "texts.jsonl.gz"), ["gzip", "gunzip"]),
    "calibration that is JSON by another name": (
        lambda f: f.calibration(LINE * 3, "texts.txt"),
        ["is JSON, but its name is that of plain text", "rename it to .jsonl"],
    ),
    "calibration with null": (
        lambda f: f.calibration(LINE + '{"text": null}\n'),
        ["line 2 has no text in 'text', but null", "give it a text or remove it"],
    ),
    "calibration nested too deep": (
        lambda f: f.calibration(LINE + '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n"),
        ["line 2 is nested too deep"],
    ),
    "too few texts": (lambda f: f.calibration(LINE), ["has 1 texts", "num_samples=2"]),
    "text below one token": (lambda f: f.calibration(LINE + '{"text": ""}\n'), ["the text of line 2 is empty"]),
    "folder without task files": (
        lambda f: ("evaluation=local", f"evaluation.include_path={f.task_folder({})}"),
        ["tasks: the folder has no task YAML (*.yaml)"],
    ),
    "task files without a task": (
        lambda f: ("evaluation=local", f"evaluation.include_path={f.task_folder({'_base.yaml': 'test_split: x'})}"),
        ["evaluation.include_path=", "none of its YAML files defines a task", "`task: <name>`"],
    ),
    "task file that is no YAML": (
        lambda f: ("evaluation=local", f"evaluation.include_path={f.task_folder({'a.yaml': 'task: ['})}"),
        ["evaluation.include_path: ", "a.yaml cannot be read"],
    ),
    "task that the folder has not": (
        lambda f: (
            "evaluation=local",
            f"evaluation.include_path={f.task_folder({'a.yaml': 'task: my_capitals'})}",
            "evaluation.tasks=[my_capital]",
        ),
        ["evaluation.tasks", "'my_capital'", "did you mean my_capitals"],
    ),
    "records of another form": (
        lambda f: ("data=instruct", "data.source=texts", "data.form=chat", f"data.calibration.path={f.text(LINE)}"),
        ["line 1 is not a record of form chat", "its fields: text", "set data.form"],
    ),
    "folder of something else": (
        lambda f: (f"run_dir={f.foreign_folder()}",),
        ["foreign", "contains no run of recondense"],
    ),
}

# It reads lm-eval's list of tasks, which takes half a minute on a busy machine.
SLOW = ("task that the folder has not",)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in BAD_FILES]
)
def test_bad_files(command: Command, files: Files, kind: str) -> None:
    make_arguments, parts = BAD_FILES[kind]
    assert_refused(*command(*without_recovery(make_arguments(files))), parts)


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "- a list",
        "layers: 3\n",
        "model: {}\nmethod: {}\n",
        "model: {}\nmethod: {}\nrecovery: {}\nmine: 1\n",
        b"\xff",
    ],
)
def test_a_foreign_folder_is_never_overwritten(command: Command, tmp_path: Path, content: str | bytes) -> None:
    """Other programs also write a config.yaml."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, err = command(f"run_dir={folder}", "recovery=none", "overwrite=true")
    assert_refused(code, err, ["not empty", "contains no run of recondense"])
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_folder_of_another_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(Config(seed=5).to_yaml())
    code, err = command(f"run_dir={tmp_path}/run", "recovery=none")
    assert_refused(code, err, ["another config", "different: ", "overwrite=true"])


def test_a_run_of_a_version_with_other_defaults(command: Command, tmp_path: Path) -> None:
    """The same command as that of the run, of which the config.yaml lacks a setting."""
    settings = ["method=reap", "recovery=none", f"run_dir={tmp_path}/run", f"output_dir={tmp_path}"]
    values = composed(*settings)
    del values["method"]["memory_ratio"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    for name in ("inputs.json", "summary.json"):
        (tmp_path / "run" / name).write_text("{}")
    names = "of a version of recondense with other defaults (different: method.memory_ratio). Choose another run_dir"
    assert_refused(*command(*settings), [names])
    assert_refused(
        *command(*settings, "seed=3"), ["(different: seed).", "version of recondense differ too (method.mem"]
    )
