"""Every method of conf/method through train.py to its export, and runs killed while factors or adapters train."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import Forks
from support.runs import ROOT, arguments, model_folder, text_files
from support.searched import BUDGETS, METHODS
from support.tiny_models import FAMILIES, recorded
from torch import Tensor
from transformers import AutoModelForCausalLM

from recondense.models import families
from recondense.operations import Refit
from recondense.plan import Plan
from recondense.surgery import execute

Command = Callable[..., tuple[int, str]]
Case = tuple[str, str]  # family, method

CASES: list[Case] = [
    *(("qwen2_moe", method) for method in METHODS),
    *(("deepseek_v2", method) for method in ("cdmoe", "moei2", "block_drop")),
]
# Routed experts have fewer of this model's parameters, so factors cannot save as much.
CHANGES = {("deepseek_v2", "moei2"): ("method.memory_ratio=0.8",)}
IDS = torch.arange(1, 41).reshape(2, 20)

# Runs without recondense: the logits and the number of parameters of every folder.
ELSEWHERE = """
import sys
sys.modules["recondense"] = None
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
results = {}
ids = torch.load(sys.argv[1], weights_only=True)
for folder in map(Path, sys.argv[3:]):
    trust = {"trust_remote_code": True} if (folder / "modeling_recondense.py").exists() else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        results[str(folder)] = model.eval()(input_ids=ids).logits, num_parameters
assert sys.modules["recondense"] is None
torch.save(results, sys.argv[2])
"""


def name_of(case: Case) -> str:
    return "-".join(case)


pytestmark = pytest.mark.usefixtures("as_one_command")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every")
    for family, make in FAMILIES.items():
        model_folder(folder / family, make)
    text_files(folder / "texts")
    return folder


def budget(case: Case) -> dict[str, str]:
    """The budget of a case: values by setting."""
    settings = [*BUDGETS[case[1]], *CHANGES.get(case, ())]
    return dict(setting.removeprefix("method.").split("=") for setting in settings)


def finished(command: Command, base: Path, case: Case) -> Path:
    """The folder of a case's run; the first call runs it."""
    family, method = case
    folder = base / "out" / name_of(case)
    if not (folder / "summary.json").exists():
        refit = () if method == "none" else ("method.refit=true",)
        settings = (f"method={method}", *(f"method.{name}={value}" for name, value in budget(case).items()), *refit)
        code, err = command(*arguments(base / family, text_files(base / "texts"), base / "out", folder.name, *settings))
        assert code == 0, err
    return folder


def numbers(value: Any) -> Iterator[float]:
    """All values of a part of summary.json; fails if one is not a number."""
    for inner in value.values():
        if isinstance(inner, dict):
            yield from numbers(inner)
        else:
            assert isinstance(inner, int | float), value
            yield inner


def routed_at_most(case: Case, facts: families.Facts) -> float:
    """The largest fraction of routed experts that may remain under the budget of a case."""
    limits, method = budget(case), case[1]
    total = len(facts.moe_layers) * facts.num_experts
    if "removed_expert_ratio" in limits:
        return 1 - round(float(limits["removed_expert_ratio"]) * total) / total
    if method in ("cdmoe", "cdmoe_s"):  # one layer is condensed
        return 1 - (facts.num_experts - {"cdmoe": 2, "cdmoe_s": 0}[method]) / total
    return 1.0


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_run_finishes_and_meets_its_budget(command: Command, base: Path, case: Case) -> None:
    folder = finished(command, base, case)
    summary = json.loads((folder / "summary.json").read_text())
    stages, ratios, sizes = summary["stages"], summary["ratios"], summary["parameters"]
    assert all(map(math.isfinite, [*numbers(stages), *numbers(ratios)]))
    if case[1] == "none":
        assert list(stages) == ["original", "recovered"] and set(ratios) == {"routed_expert_parameters"}
        return
    refits = any(isinstance(operation, Refit) for operation in Plan.load(folder / "plan.json").operations)
    assert refits == (case[1] not in ("layer_drop", "block_drop"))
    assert list(stages) == ["original", "compressed", *(["refitted"] if refits else []), "recovered"]
    expected = {"routed_expert_parameters", "memory", "prefill_speedup", "decode_speedup", "gap_closed"}
    assert set(ratios) == expected | ({"refit_gap_closed"} if refits else set())
    assert 0 < ratios["memory"] < 1
    facts = families.facts(FAMILIES[case[0]]().config)
    assert 0 < ratios["routed_expert_parameters"] <= routed_at_most(case, facts) + 1e-9
    # An export folds the scales of condensed layers, so they do not count.
    memory_ratio = float(budget(case).get("memory_ratio", 1))
    assert sizes["total"]["compressed"] <= memory_ratio * sizes["total"]["original"]


@torch.no_grad()
def student(folder: Path, original: Path) -> tuple[Tensor, Tensor]:
    """Logits of a run's student before and after training, from the original, the plan and the final checkpoint.

    Whitened factors, least squares and constants come from other texts here, and refits are not computed: all of them
    train afterwards, so the checkpoint has them.
    """
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    operations = Plan.load(folder / "plan.json").operations if (folder / "plan.json").exists() else ()
    execute.execute(model, Plan("", operations), lambda: recorded(model))
    before = model(IDS).logits
    state = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in state.items()}
    assert state and model.load_state_dict(state, strict=False).unexpected_keys == []
    return before, model(IDS).logits


def test_every_export_is_the_student_and_loads_without_recondense(command: Command, base: Path, tmp_path: Path) -> None:
    folders = {case: finished(command, base, case) for case in CASES}
    torch.save(IDS, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "ids.pt"), str(tmp_path / "results.pt")]
        + [str(folder / "model") for folder in folders.values()],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, cwd=tmp_path, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    exported = torch.load(tmp_path / "results.pt", weights_only=True)
    for case, folder in folders.items():
        logits, num_parameters = exported[str(folder / "model")]
        before, after = student(folder, base / case[0])
        assert (logits - after).abs().max() < 1e-4, case
        assert (logits - before).abs().max() > 1e-2, case  # so that other logits would be noticed
        summary = json.loads((folder / "summary.json").read_text())
        assert num_parameters == summary["parameters"]["total"]["compressed"], case


# ------------------------------------------------------------------------------------------------ interruptions


DROPOUT = (
    "recovery=lora",
    "recovery.lora.target=attention",
    "recovery.lora.dropout=0.1",
)  # so that random numbers matter
INTERRUPTED = {
    "moei2-dropout": ("method=moei2", *BUDGETS["moei2"], "method.refit=true", *DROPOUT),
    "moei2-lora": ("method=moei2", *BUDGETS["moei2"], "method.refit=true", "recovery=lora"),
    "svd_llm": ("method=svd_llm", *BUDGETS["svd_llm"], "method.refit=true"),
    "cdmoe-dropout": ("method=cdmoe", *BUDGETS["cdmoe"], *DROPOUT),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "moei2-dropout")) for name in INTERRUPTED]
)
def test_a_killed_recovery_ends_like_an_uninterrupted_one(forks: Forks, base: Path, name: str) -> None:
    """Uninterrupted in one folder; killed and then resumed in another."""
    texts = text_files(base / "texts")

    def run(output: str, phase: str = "never") -> subprocess.CompletedProcess[str]:
        settings = (*INTERRUPTED[name], "callbacks.profile.enabled=false")
        words = arguments(base / "qwen2_moe", texts, base / output, name, *settings)
        return forks.run(ROOT / "train.py", *words, folder=base, kill_at=phase)

    processes = [run("uninterrupted"), run("killed", "recovery"), run("killed")]
    log = processes[2].stderr
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL, 0], log
    assert "plan: loaded from" in log and "resuming from" in log
    folders = base / "uninterrupted" / name, base / "killed" / name
    plans = [Plan.load(folder / "plan.json") for folder in folders]
    assert plans[0].operations == plans[1].operations
    stages = [json.loads((folder / "summary.json").read_text())["stages"] for folder in folders]
    for stage in stages[0]:
        for figure in {"loss", "kl_to_original"} & set(stages[0][stage]):
            assert stages[0][stage][figure] == stages[1][stage][figure], (stage, figure)
    assert stages[0]["recovered"]["loss"] != stages[0]["compressed"]["loss"]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
