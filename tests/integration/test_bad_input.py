"""Bad input through the real train.py: its message, exit code 2 and no traceback, before any weight is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.forks import Forks
from support.runs import model_folder, text_files

from recondense.errors import UserError

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
    """Makes inputs in a temporary folder."""

    folder: Path

    def model(self, files: tuple[str, ...] = ("model.safetensors", "tokenizer.json"), **changes: object) -> str:
        """A folder that looks like a model; its weights are empty, for nothing may load them."""
        folder = self.folder / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MOE | changes))
        for name in files:
            (folder / name).touch()
        return f"model.path={folder}"

    def text(self, content: str | bytes, name: str = "texts.jsonl") -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def calibration(self, content: str | bytes, name: str = "texts.jsonl") -> tuple[str, ...]:
        return ("data=texts", f"data.calibration.path={self.text(content, name)}", "data.calibration.num_samples=2")

    def task_folder(self, contents: dict[str, str]) -> str:
        folder = self.folder / "tasks"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_text(content)
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

WHOLE, FINITE = "expected a whole number", "expected a finite number"

# what it is: (arguments, parts of the message). recovery=none is added where no recovery is named.
STATIC: dict[str, tuple[list[str], list[str]]] = {
    "unknown method": (
        ["method=cdmoee"],
        ["method=cdmoee", "no such method", "Did you mean cdmoe?"],
    ),
    "sizes of what is not recorded": (
        ["plan_only=true", "model.path=Qwen/Qwen9"],
        ["model.path=Qwen/Qwen9", "looks nothing up", "openai/gpt-oss-20b", "config.json"],
    ),
    "sizes, perhaps": (["plan_only=maybe"], ["plan_only=maybe", "true or false"]),
    "sizes beyond a budget": (
        ["plan_only=true", "method=reap", "method.memory_ratio=0.05"],
        ["method.memory_ratio=0.05", "still has 0.3449 of its size"],
    ),
    "unknown refit": (["method.refit=weights"], ["method.refit=weights", "coefficients"]),
    "smaller than the model without its experts": (
        ["method=reap", "method.memory_ratio=0.05"],
        ["method.memory_ratio=0.05", "still has 0.3449 of its size", "layer_drop"],
    ),
    "two budgets": (
        ["method=moei2", "method.memory_ratio=0.6", "method.removed_expert_ratio=0.5"],
        ["removed_expert_ratio and method.memory_ratio are both given"],
    ),
    "a rank that saves nothing": (
        ["method=moei2", "method.average_rank=50"],
        ["method.average_rank=50", "below 42.67", "null factorizes nothing"],
    ),
    "nothing asked of the factors": (
        ["method=svd_llm", "method.removed_expert_ratio=null"],
        ["both null: set one of them"],
    ),
    "no children": (["method=moei2", "method.parents=100"], ["must be below method.population=100"]),
    "coefficients where nothing is condensed": (
        ["method=moei2", "method.refit=coefficients"],
        ["method.refit=coefficients", "method=moei2 condenses no layer", "method.refit=true"],
    ),
    "part of an iteration": (["method=moei2", "method.iterations=2.5"], ["method.iterations=2.5", WHOLE]),
    "part of a candidate": (["method=moei2", "method.num_candidates=1.5"], ["method.num_candidates=1.5", WHOLE]),
    "part of a layer": (["method=moei2", "method.block_size=2.5"], ["method.block_size=2.5", WHOLE]),
    "parents in words": (["method=moei2", "method.parents=abc"], ["method.parents=abc", WHOLE]),
    "seed of a method": (["method=moei2", "method.seed=abc"], ["method.seed=abc", WHOLE]),
    "alpha that is no number": (["method=moei2", "method.alpha=nan"], ["method.alpha=nan", FINITE]),
    "alpha in words": (["method=moei2", "method.alpha=abc"], ["method.alpha=abc", FINITE]),
    "no alpha": (["method=moei2", "method.alpha=null"], ["method.alpha=null", FINITE]),
    "no prune ratio": (["method=moei2", "method.prune_ratio=null"], ["method.prune_ratio=null", FINITE]),
    "whitening in words": (["method=moei2", "method.whitening=maybe"], ["method.whitening=maybe", "true or false"]),
    "normalize in words": (["method=moei2", "method.normalize=maybe"], ["method.normalize=maybe", "true or false"]),
    "search that is no word": (["method=naee", "method.search=3"], ["method.search=3", "expected a text"]),
    "one option for a list": (
        ["method=cdmoe_moei2", "method.num_experts=4"],
        ["method.num_experts=4", "expected a list (each a whole number)", "Write method.num_experts=[4]"],
    ),
    "wrong option in a list": (
        ["method=cdmoe_moei2", "method.prune_ratios=[0.5,half]"],
        ["method.prune_ratios[1]=half", FINITE],
    ),
    "half a round": (["method=cdmoe_moei2", "method.rounds=1.5"], ["method.rounds=1.5", WHOLE]),
    "value of a step alone": (
        ["method=none", "method.steps=[{_target_:recondense.methods.cdmoe.CDMoE,num_experts:x}]"],
        ["method.steps[0].num_experts=x", WHOLE],
    ),
    "setting that no step has": (
        ["method=moei2", "+method.populatoin=9"],
        ["method.populatoin", "no such setting", "Did you mean method.population?"],
    ),
    "steps that are no list": (["method.steps=3"], ["method.steps=3", "expected a list of steps"]),
    "step that is no step": (["method.steps=[3]"], ["method.steps[0]=3", "a class's name", "_target_"]),
    "rank of adapters": (["recovery=lora", "recovery.lora.rank=0"], ["recovery.lora.rank=0", "at least 1"]),
    "scale of adapters": (["recovery=lora", "recovery.lora.alpha=0"], ["recovery.lora.alpha=0", "above 0"]),
    "dropout of one": (["recovery=lora", "recovery.lora.dropout=1"], ["recovery.lora.dropout=1:", "[0, 1)"]),
    "dropout of experts' adapters": (
        ["recovery=lora", "recovery.lora.dropout=0.1"],
        ["recovery.lora.dropout=0.1", "recovery.lora.target=both", "target=attention or recovery.lora.dropout=0"],
    ),
    "adapters elsewhere": (
        ["recovery=lora", "recovery.lora.target=router"],
        ["recovery.lora.target=router", "no such choice", "attention, both, experts"],
    ),
    "adapters that do not train": (
        ["recovery=lora", "recovery.trainable=experts"],
        ["recovery.trainable=experts", "recovery=lora trains adapters", "recovery=finetune"],
    ),
    "unknown trainable": (
        ["recovery=finetune", "recovery.trainable=router"],
        ["recovery.trainable=router", "no such choice", "all, experts, lora"],
    ),
    "unknown model": (["model=qwen_mo"], ["model=qwen_mo", "Did you mean qwen_moe?"]),
    "unknown experiment": (["experiment=demmo"], ["experiment=demmo", "Did you mean demo?"]),
    "recipe without its folder": (
        ["experiment=cdmoe_qwen_e4"],
        ["experiment=cdmoe_qwen_e4", "Did you mean paper/cdmoe_qwen_e4?"],
    ),
    "part of recipes": (
        ["experiment=paper/_moei2x", "evaluation=none"],
        ["no such experiment", "Did you mean paper/moei2_"],
    ),
    "no choice": (["logger=null"], ["logger=null", "Choices: default"]),
    "unknown setting": (["recovery.stepz=3"], ["recovery.stepz", "no such setting", "Did you mean recovery.steps?"]),
    "setting of another group": (["num_experts=3"], ["num_experts", "no such setting", "method.num_experts"]),
    "unknown group": (["metod=cdmoe"], ["metod", "no such setting", "Did you mean method?"]),
    "added setting": (["+recovery.momentum=1"], ["recovery.momentum", "no such setting", "learning_rate"]),
    "no setting at all": (["a=["], ["a=[", "Write key=value"]),
    "wrong type": (["recovery.steps=many"], ["recovery.steps=many", "expected a whole number"]),
    "unknown dtype": (["model.dtype=bf16"], ["model.dtype=bf16", "Did you mean bfloat16?", "float32"]),
    "more experts than there are": (["method.num_experts=99"], ["method.num_experts=99", "16 routed experts"]),
    "negative experts": (["method.num_experts=-1"], ["method.num_experts=-1", "at least 0"]),
    "layer that is not there": (["method.num_layers=[2,7]"], ["layer 7", "0 to 5", "did you mean 5?"]),
    "layer twice": (["method.num_layers=[1,1]"], ["method.num_layers=[1, 1]", "twice"]),
    "more layers than there are": (["method.num_layers=9"], ["method.num_layers=9", "6 MoE layers"]),
    "unknown value of a step": (["method.shared_gate=men"], ["method.shared_gate=men", "mean or token"]),
    "step that is not there": (
        ["method._target_=recondense.methods.cdmoe.Absent"],
        ["method._target_=recondense.methods.cdmoe.Absent: "],
    ),
    "one of several that is not there": (
        ["method.steps=[recondense.methods.cdmoe.CDMoE,recondense.methods.cdmoe.Absent]"],
        ["method.steps[1]=recondense.methods.cdmoe.Absent: "],
    ),
    "wrong built-in architecture": (
        ["model.pretrain.config.hidden_size=wide"],
        ["model.pretrain.config", "hidden_size"],
    ),
    "no such model folder": (["model.path=./nowhere"], ["model.path=./nowhere", "no such folder"]),
    "hub out of reach": (["model.path=nobody/nothing"], ["nobody/nothing", "hub cannot be reached"]),
    "no such calibration file": (
        ["data=texts", "data.calibration.path=/nowhere.jsonl"],
        ["data.calibration.path=/nowhere.jsonl", "no such file"],
    ),
    "no calibration text": (["data=texts"], ["data.calibration.path=null", "the method searches on it"]),
    "no training text": (
        ["data=texts", "method=none", "recovery=finetune"],
        ["data.train.path=null", "recovery=finetune trains on it"],
    ),
    "share beside a budget": (
        ["method=svd_llm", "method.ratio=0.5"],
        ["method.ratio=0.5", "method.removed_expert_ratio=0.25", "set one to null"],
    ),
    "rank beside a budget": (
        ["method=moei2", "method.memory_ratio=0.7", "method.average_rank=20"],
        ["method.average_rank=20", "a budget", "default"],
    ),
    "importance that is none": (
        ["method=svd_llm", "method.alpha=1"],
        ["method.alpha=1", "no effect", "method.importance=uniform"],
    ),
    "layers beside a budget": (
        ["method=cdmoe", "method.num_layers=1", "method.memory_ratio=0.8"],
        ["method.num_layers=1", "a budget decides"],
    ),
    "length below one": (["data.calibration.max_length=0"], ["data.calibration.max_length=0", "at least 1"]),
    "samples below one": (["data.calibration.num_samples=0"], ["data.calibration.num_samples=0", "at least 1"]),
    "no learning": (["recovery=finetune", "recovery.learning_rate=0"], ["recovery.learning_rate=0:", "above 0"]),
    "warm-up without end": (
        ["recovery=distill", "recovery.steps=5", "recovery.warmup_steps=5"],
        ["recovery.warmup_steps=5", "below recovery.steps=5"],
    ),
    "no epochs": (["recovery=finetune", "recovery.epochs=0"], ["recovery.epochs=0:", "above 0"]),
    "stage that is misspelt": (
        ["recovery=finetune", "recovery.stages=[{name:lm,step:3}]"],
        ["recovery.stages[0].step", "Did you mean recovery.stages[0].steps?"],
    ),
    "stage of the published two": (
        ["recovery=two_stage", "recovery.stages.1.data.form=alpacca"],
        ["recovery.stages[1].data.form=alpacca", "no such choice", "Did you mean alpaca?"],
    ),
    "stage without its file": (
        ["recovery=finetune", "recovery.stages=[{name:a,data:{source:texts,train:{path:/nowhere}}}]"],
        ["recovery.stages[0].data.train.path=/nowhere", "no such file"],
    ),
    "stages of no recovery": (
        ["recovery=none", "recovery.stages=[{name:lm}]"],
        ["recovery.objective=none: recovery.stages are given"],
    ),
    "no such form": (["data=instruct", "data.form=alpacca"], ["data.form=alpacca", "Did you mean alpaca?"]),
    "records of the standard library": (["data.form=auto"], ["data.form=auto", "holds no records"]),
    "hub data without a split to train on": (
        ["data=instruct", "data.splits.train=null", "recovery=finetune"],
        ["data.splits.train=null", "recovery=finetune trains on it", "Name a split of tatsu-lab/alpaca"],
    ),
    "source that is not there": (
        ["data.calibration.sources=[{path:/nowhere}]"],
        ["data.calibration.sources[0].path=/nowhere", "no such file"],
    ),
    "source without weight": (
        ["data=c4_alpaca", "data.calibration.sources.1.weight=0"],
        ["data.calibration.sources[1].weight=0:", "above 0"],
    ),
    "temperature": (["recovery=distill", "recovery.temperature=0"], ["recovery.temperature=0:", "above 0"]),
    "hidden states of predictions on disk": (
        ["recovery=distill", "recovery.teacher=cached", "recovery.hidden_share=0.25"],
        ["recovery.hidden_share=0.25", "not hidden states", "recovery.teacher=shared"],
    ),
    "nothing kept": (["recovery=distill", "recovery.teacher_top_k=0"], ["recovery.teacher_top_k=0", "at least 1"]),
    "another model, which?": (["recovery=distill", "recovery.teacher=model"], ["recovery.teacher_path=null"]),
    "a teacher that is not there": (
        ["recovery=distill", "recovery.teacher=model", "recovery.teacher_path=./nowhere"],
        ["recovery.teacher_path=./nowhere", "there is no such folder"],
    ),
    "a teacher that nobody asks": (
        ["recovery=distill", "recovery.teacher_path=some/model"],
        ["recovery.teacher_path=some/model", "recovery.teacher=shared does not read it"],
    ),
    "a divergence": (["recovery=distill", "recovery.divergence=kl"], ["recovery.divergence=kl", "forward_kl"]),
    "share": (["recovery=distill", "recovery.hidden_share=-0.5"], ["recovery.hidden_share=-0.5", "[0, 1]"]),
    "shares together": (
        ["recovery=distill", "recovery.hidden_share=0.6", "recovery.cross_entropy_share=0.6"],
        ["recovery.hidden_share=0.6", "makes 1.2", "at most 1"],
    ),
    "unknown task": (["evaluation.tasks=[piqqa]"], ["evaluation.tasks", "piqqa", "did you mean piqa"]),
    "no such task folder": (
        ["evaluation.include_path=/nowhere"],
        ["evaluation.include_path=/nowhere", "no such folder"],
    ),
    "local tasks of no folder": (
        ["evaluation=local"],
        ["evaluation.include_path: must be given (evaluation=local)", "`include_path: ???`"],
    ),
    "export that is no choice": (["export.enabled=maybe"], ["export.enabled=maybe", "true, false or auto"]),
    "format that is no choice": (["export.format=stok"], ["export.format=stok", "Did you mean stock?"]),
    "padding beyond all": (["export.max_padding=1.5"], ["export.max_padding=1.5", "[0, 1]"]),
    "stock where it cannot be": (
        ["method=moei2", "export.format=stock"],
        ["export.format=stock", "low-rank experts", "no config of qwen2_moe says", "export.format=auto"],
    ),
    "repository that is none": (["export.push_to_hub=mine"], ["export.push_to_hub=mine", "owner/name"]),
    "push by nobody": (["export.push_to_hub=me/mine"], ["no token", "hf auth login"]),
    "no such device": (["model.device=gpu"], ["model.device=gpu", "cuda:N"]),
    "slow experts": (["model.device=cpu", "model.experts=batched_mm"], ["batched_mm", "60 times slower", "grouped_mm"]),
    "scratch that is no size": (["max_scratch_bytes=lots"], ["max_scratch_bytes", "'lots'", "512MiB"]),
    "scratch too small": (["max_scratch_bytes=1MiB"], ["max_scratch_bytes=1MiB", "at least 16MiB"]),
    "sweep without -m": (["method.num_layers=2,4"], ["method.num_layers=2,4", "Add -m", "method.num_layers=[2,4]"]),
    "one bad run of a sweep": (["-m", "method.num_layers=2,9"], ["method.num_layers=9", "6 MoE layers"]),
    "sweep into one folder": (
        ["-m", "method.num_layers=2,4", "run_dir=/nowhere/run"],
        ["run_dir=/nowhere/run", "several runs", "run_dir=null"],
    ),
}

# These read lm-eval's list of tasks, half a minute on a busy machine; tests/unit/test_evaluate.py has a short one.
SLOW = dict.fromkeys(
    ("unknown task", "task that the folder has not", "recipe without its folder"),
    pytest.mark.slow,
)

MADE: dict[str, tuple[Callable[[Files], tuple[str, ...]], list[str]]] = {
    "folder without a model": (lambda f: (f"model.path={f.empty_folder()}",), ["has no config.json"]),
    "model without MoE layers": (lambda f: (f.model(mlp_only_layers=[0, 1, 2, 3]),), ["4 layers", "no MoE layers"]),
    "unsupported model": (lambda f: (f.model(model_type="llama"),), ["'llama' is not supported", "qwen2_moe"]),
    "pickles": (
        lambda f: (f.model(("pytorch_model.bin", "tokenizer.json")),),
        ["pickles (pytorch_model.bin)", "never loaded", "safetensors"],
    ),
    "another quantisation": (
        lambda f: (f.model(quantization_config={"quant_method": "awq", "bits": 4}),),
        ["stored in awq", "mxfp4 and fp8", "dequantise it first"],
    ),
    "fp8 without blocks": (
        lambda f: (f.model(quantization_config={"quant_method": "fp8"}),),
        ["fp8 without weight_block_size"],
    ),
    "experts that are low-rank already": (
        lambda f: (f.model(model_type="recondense_qwen2_moe", compressed_layers={"2": LOW_RANK}), "method=reap"),
        ["experts of layers 2 are low-rank already", "layer_drop", "export.format=dense"],
    ),
    "attention that a family lacks": (
        lambda f: (f.model(model_type="gpt_oss", num_local_experts=6, head_dim=8), "method.num_experts=2"),
        ["model.attention=sdpa", "gpt_oss has no such attention", "eager"],
    ),
    "condensed layers that a family cannot say": (
        lambda f: (f.model(model_type="mixtral", num_local_experts=6), "method.num_experts=2", "export.format=stock"),
        ["export.format=stock", "no config of mixtral says"],
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
    "too few texts": (lambda f: f.calibration(LINE), ["has 1 texts", "num_samples=2"]),
    "text below one token": (lambda f: f.calibration(LINE + '{"text": ""}\n'), ["line 2", "shorter than one token"]),
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
        ["line 1 is no chat record", "its fields: text", "set data.form"],
    ),
    "folder of something else": (
        lambda f: (f"run_dir={f.foreign_folder()}",),
        ["foreign", "holds no run of recondense"],
    ),
}


def _check(code: int, err: str, parts: list[str]) -> None:
    assert code == 2, err
    assert "Traceback" not in err
    assert "recondense: " in err
    for part in parts:
        assert part in err, err


def _with_recovery(arguments: tuple[str, ...]) -> list[str]:
    named = any(argument.startswith("recovery=") for argument in arguments)
    return [*arguments, *(() if named else ("recovery=none",))]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in STATIC])
def test_bad_command(command: Command, kind: str) -> None:
    arguments, parts = STATIC[kind]
    _check(*command(*_with_recovery(tuple(arguments))), parts)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in MADE])
def test_bad_files(command: Command, files: Files, kind: str) -> None:
    make, parts = MADE[kind]
    _check(*command(*_with_recovery(make(files))), parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(command: Command) -> None:
    _check(*command("model.device=cuda:1", "recovery=none"), ["model.device=cuda:1", "no CUDA device", "cpu"])


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
    """Other programs write a config.yaml too."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, err = command(f"run_dir={folder}", "recovery=none", "overwrite=true")
    _check(code, err, ["not empty", "holds no run of recondense"])
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("model.path=/nowhere/at/all", "there is no such folder"),
        ("model.path=[a,b]", "expected a text"),
        ("model.path=/a(b", "is no setting"),
        ("model.path=~/x", "'model.path=\"~/x\"'"),
        ("model.pth=/a", "Did you mean model.path?"),
    ],
)
def test_an_unusable_path_is_the_only_problem(command: Command, argument: str, part: str) -> None:
    """The hub id that stands in its place is not looked for."""
    code, err = command("model=qwen_moe", "data=stdlib", argument, "recovery=none")
    _check(code, err, [part])
    assert len(err.strip().splitlines()) == 1, err


def test_folder_of_another_run(command: Command, tmp_path: Path) -> None:
    from recondense.config.schema import Config

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(Config(seed=5).to_yaml())
    code, err = command(f"run_dir={tmp_path}/run", "recovery=none")
    _check(code, err, ["another config", "different: ", "overwrite=true"])


def test_several_at_once_are_reported_together(command: Command) -> None:
    code, err = command(
        "method=cdmoee", "recovery.stepz=3", "recovery.steps=many", "data=texts", "method.num_experts=99", "seed=-1",
        "data.calibration.path=/nowhere.jsonl", "model.experts=batched_mm", "model.device=cpu", "recovery=none",
    )  # fmt: skip
    _check(code, err, ["recondense: 6 problems", " 1. ", " 6. "])
    assert len(err.strip().splitlines()) == 7, err
    parts = ("method=cdmoee", "recovery.stepz", "recovery.steps=many", "/nowhere.jsonl", "batched_mm", "seed=-1")
    for part in parts:
        assert part in err


def test_what_needs_the_model_is_reported_together_once_nothing_else_is_wrong(command: Command) -> None:
    words = ("method.num_experts=99", "method.memory_ratio=0.01", "trainer.num_nodes=2", "recovery=none")
    code, err = command(*words)
    _check(code, err, ["recondense: 3 problems", "method.num_experts=99", "method.memory_ratio=0.01", "num_nodes=2"])
    code, err = command(*words, "seed=-1")
    _check(code, err, ["recondense: seed=-1: must be at least 0."])
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("setting", ["seed=x", "method.normalize=maybe"])
def test_a_wrong_setting_of_two_steps_is_reported_once(command: Command, setting: str) -> None:
    """What a step's own check says of the others is not reported too: the step is not made."""
    code, err = command("method=moei2", setting, "recovery=none")
    _check(code, err, [f"recondense: {setting}: expected"])
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["method=cdmoee"], ["recondense: method=cdmoee: there is no such method. Did you mean cdmoe?"]),
        pytest.param(
            ["-m", "method.num_experts=1,99", "seed=x", "recovery=none"],
            ["2 problems", "num_experts=99", "seed=x"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_as_a_process(root: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "train.py"), *arguments],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    _check(done.returncode, done.stderr, parts)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def _raising(error: BaseException) -> Callable[..., None]:
    def run(*args: object, **kwargs: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ValueError("layer 3: a hidden state is NaN"), None, "layer 3"),
        (UserError("layer 3: a hidden state is NaN"), 2, "recondense: layer 3"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "The same command resumes"),
        (SystemExit(143), 143, "stopped by SIGTERM. The same command resumes"),
    ],
)
def test_errors_of_a_run(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int | None, part: str
) -> None:
    """What is raised on purpose is a message; any other ValueError is a defect and keeps its traceback."""
    from recondense.run import pipeline

    monkeypatch.setattr(pipeline, "run", _raising(error))
    found, err = command("recovery=none")
    assert found == (1 if code is None else code)
    assert err.count(part) == 1 or code is None, err
    assert part in err
    assert ("Traceback" in err or "Error executing job" in err) == (code is None)


@pytest.mark.parametrize("expression", ["max([])", "int('x')", "[].index(1)", "list(zip([1], [], strict=True))"])
def test_a_defect_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    """The last frame of a ValueError that a builtin raises is ours: it must not pass for a message to users."""
    from recondense.run import pipeline

    code = compile(expression, pipeline.__file__, "eval")
    monkeypatch.setattr(pipeline, "run", lambda *args, **kwargs: eval(code))
    exit_code, err = command("recovery=none")
    assert exit_code == 1
    assert "recondense: " not in err
    assert "Error executing job" in err


def test_user_errors_are_messages(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from recondense.config.types import parse_bytes
    from recondense.run import pipeline

    monkeypatch.setattr(pipeline, "run", lambda *args, **kwargs: parse_bytes("lots"))
    code, err = command("recovery=none")
    _check(code, err, ["recondense: 'lots' is not a number of bytes"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run in seconds, with so little calibration that some experts are never selected."""
    folder = tmp_path_factory.mktemp("small")
    texts = text_files(folder / "texts")
    return [
        f"model.path={model_folder(folder / 'model')}", "model.device=cpu", "data=texts", "data.sequence_length=32",
        *(f"data.{split}.path={path}" for split, path in texts.items() if split != "train"),
        "data.calibration.num_samples=1", "data.calibration.max_length=1", "recovery=none", "evaluation.tasks=null",
        "evaluation.heldout=null", "evaluation.perplexity_windows=4", "callbacks.profile.enabled=false",
        "export.enabled=false", "logger.wandb.mode=disabled",
    ]  # fmt: skip


def _process(root: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(root / "train.py"), *arguments, f"output_dir={folder}/out"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_sweep_outlives_a_job_that_the_user_can_mend(
    forks: Forks, root: Path, tmp_path: Path, small: list[str]
) -> None:
    words = ("-m", "method.num_experts=1,6,2", *small, f"output_dir={tmp_path}/out")
    done = forks.run(root / "train.py", *words, folder=tmp_path)
    out, err = done.stdout, done.stderr
    _check(done.returncode, err, ["job 1 of the sweep failed: layer ", "recondense: method.num_experts=6: layer "])
    [table] = (tmp_path / "out").glob("default/sweeps/*/comparison.json")
    rows = json.loads(table.read_text())
    assert [row["settings"] for row in rows] == [{"method.num_experts": number} for number in "162"]
    assert [row["status"].partition(":")[0] for row in rows] == ["done", "failed", "done"]
    assert "routed experts were ever selected" in rows[1]["status"]
    assert rows[2]["compressed_perplexity"] > 0
    assert "comparison" in out and "DeepSpeed" not in out and "accelerator" not in out + err


def test_sigterm_outside_a_fit(root: Path, tmp_path: Path, small: list[str]) -> None:
    """In a fit callbacks/graceful_stop.py takes over; here nothing is trained, and the profile would take minutes."""
    profile = ["callbacks.profile.enabled=true", "callbacks.profile.repetitions=10000", "method.num_experts=1"]
    with _process(root, tmp_path, *small, *profile) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not list(tmp_path.glob("out/default/*/.lock")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    said = "recondense: stopped by SIGTERM. The same command resumes where this run stopped."
    assert err.count("SIGTERM") == 1 and said in err.splitlines(), err
    assert "Traceback" not in err


def test_a_right_command_runs(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And leaves no folder of Hydra's own."""
    from recondense.run import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda config, steps, *rest: seen.append((config, steps)) or 1.0)
    monkeypatch.chdir(tmp_path)
    code, err = command("recovery=none", "method.num_layers=2")
    assert (code, err) == (0, "")
    [(config, steps)] = seen
    assert config.method["num_layers"] == 2 and steps[0].num_layers == 2
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_every_job(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One folder a sweep, named by its command; the jobs get no folders of Hydra's."""
    from recondense.run import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda config, steps, *rest: seen.append(config) or 1.0)
    monkeypatch.chdir(tmp_path)
    code, err = command("-m", "recovery=none", "method.num_layers=2,4", f"output_dir={tmp_path}/here")
    assert code == 0, err
    assert [config.method["num_layers"] for config in seen] == [2, 4]
    assert len({config.run_folder() for config in seen}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    [sweep] = (tmp_path / "here" / "default" / "sweeps").iterdir()
    assert not [path for path in sweep.iterdir() if path.is_dir()]
