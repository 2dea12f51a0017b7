"""Runs that compress in several rounds: one is the plain run, several meet the same budget, and all resume exactly."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.forks import Forks
from support.runs import config, model_folder, text_files
from support.tiny_models import bits, same_bits
from transformers import AutoModelForCausalLM

from recondense.config.schema import Config
from recondense.errors import UserError
from recondense.methods.cdmoe import CDMoE
from recondense.methods.combined import Combined
from recondense.methods.decompose import Decompose
from recondense.methods.dropping import Dropping
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.search.cdmoe_search import CondenseSearch
from recondense.methods.search.layerwise import LayerTask
from recondense.models.loading import weights_fingerprint
from recondense.plan import Plan
from recondense.run import pipeline
from recondense.surgery.student import Student

RUNS = Path(__file__).resolve().parents[1] / "support" / "runs.py"
STEP = SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.5))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    model_folder(folder / "model")
    return folder


def settings(base: Path, name: str, method: dict[str, Any], **recovery: Any) -> Config:
    made = config(base / "model", text_files(base / "texts"), base / name, **recovery)
    return replace(made, method={"name": "reap", "steps": ["a step"], **method})


def finished(base: Path, name: str, method: dict[str, Any], **recovery: Any) -> tuple[Path, dict[str, Any]]:
    folder = base / name / "run"
    if not folder.exists():
        pipeline.run(settings(base, name, method, **recovery), [STEP])
    return folder, json.loads((folder / "summary.json").read_text())


def test_one_round_is_the_plain_run(base: Path) -> None:
    plain, summary = finished(base, "plain", {})
    one, again = finished(base, "one", {"rounds": 1})
    assert settings(base, "x", {}).run_hash() == settings(base, "x", {"rounds": 1}).run_hash()
    assert settings(base, "x", {}).run_hash() != settings(base, "x", {"rounds": 2}).run_hash()
    assert (one / "plan.json").read_bytes() == (plain / "plan.json").read_bytes()
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (plain, one)]
    assert names[0] == names[1] and "checkpoints/final.ckpt" in names[0] and "rounds" not in names[0]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (plain, one)]
    assert weights[0] == weights[1] and summary["stages"] == again["stages"] and "rounds" not in again


def test_two_rounds_meet_the_budget_of_one(base: Path) -> None:
    _, summary = finished(base, "plain", {})
    folder, twice = finished(base, "two", {"rounds": 2}, steps=7, control=True)
    assert twice["parameters"] == summary["parameters"] and twice["operations"] == summary["operations"]
    plan = Plan.load(folder / "plan.json")
    parts = [Plan.load(folder / "rounds" / str(number) / "plan.json") for number in (1, 2)]
    assert plan.operations == (*parts[0].operations, *parts[1].operations)
    assert [len(part.operations) for part in parts] == [3, 3]
    assert plan.search["rounds"] == [part.search for part in parts]
    assert parts[0].fingerprint["weights"] == plan.fingerprint["weights"] != parts[1].fingerprint["weights"]
    first, last = twice["rounds"]
    assert first["parameters"] > last["parameters"] == twice["parameters"]["total"]["compressed"]
    assert first["kl_to_original"] > 0 and last["perplexity"] == twice["stages"]["recovered"]["perplexity"]
    assert "gap_closed" in summary["ratios"] and not any(name.endswith("gap_closed") for name in twice["ratios"])
    checkpoints = {str(path.relative_to(folder / "checkpoints")) for path in folder.rglob("final.ckpt")}
    assert checkpoints == {"round-1/final.ckpt", "round-2/final.ckpt", "control/final.ckpt"}
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    stages = "round-1/recovery", "round-2/recovery", "control"
    steps = [max(int(row["step"]) for row in rows if row.get(f"{stage}/loss")) for stage in stages]
    assert steps == [3, 4, 7], "equal shares, and the rest in the last round"
    original = AutoModelForCausalLM.from_pretrained(base / "model")
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert exported.config.num_experts == 3 and not same_bits(bits(original), bits(exported))


def test_no_plan_of_the_rounds_is_edited_in_place(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit is refused by a start that resumes, and in a run that is done; without it the run ends as it would."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    folder, made = base / "edited" / "run", settings(base, "edited", {"rounds": 2})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Stages, "collect", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(made, [STEP])
    for name in ("plan.json", "rounds/1/plan.json", "rounds/2/plan.json"):
        path = folder / name
        with edited(path), pytest.raises(UserError, match=rf"the {name} of this run changed.* delete {path}"):
            pipeline.run(made, [STEP])
    (folder / "plan.json").unlink()
    pipeline.run(made, [STEP])
    for name in ("plan.json", "rounds/1/plan.json", "rounds/2/plan.json"):
        with edited(folder / name), pytest.raises(UserError, match=f"{folder / name} changed since this run began"):
            pipeline.run(made, [STEP])


@contextmanager
def edited(path: Path) -> Iterator[None]:
    """Leave out the last operation of a plan until the context ends."""
    before = path.read_text()
    plan = Plan.load(path)
    replace(plan, operations=plan.operations[:-1]).save(path)
    yield
    path.write_text(before)


@pytest.fixture(scope="module")
def uninterrupted(forks: Forks, base: Path) -> Path:
    done = forks.run(RUNS, str(base), str(base / "uninterrupted"), "rounds", folder=base)
    assert done.returncode == 0, done.stderr
    return base / "uninterrupted" / "run"


@pytest.mark.parametrize("phase", ["recovery", "second round", "export"])
def test_a_killed_run_of_rounds_ends_like_an_uninterrupted_one(
    forks: Forks, base: Path, uninterrupted: Path, phase: str
) -> None:
    output = base / phase.replace(" ", "-")
    killed = forks.run(RUNS, str(base), str(output), "rounds", folder=base, kill_at=phase)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = forks.run(RUNS, str(base), str(output), "rounds", folder=base)
    assert resumed.returncode == 0, resumed.stderr
    if phase != "recovery":
        assert "round-1/recovery: already trained, in" in resumed.stderr
    if phase != "export":
        assert f"{'round-1' if phase == 'recovery' else 'round-2'}/recovery: resuming from" in resumed.stderr
    folders = output / "run", uninterrupted
    for name in ("plan.json", "model/model.safetensors"):
        one, other = ((folder / name).read_bytes() for folder in folders)
        assert one == other, name
    stages = [json.loads((folder / "summary.json").read_text())["stages"] for folder in folders]
    assert stages[0] == stages[1]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose experts are searched, in order."""
    layers: list[int] = []
    search_layer = CondenseSearch._search_layer

    def counted(self: CondenseSearch, task: LayerTask, *arguments: Any) -> Any:
        layers.append(task.layer)
        return search_layer(self, task, *arguments)

    monkeypatch.setattr(CondenseSearch, "_search_layer", counted)
    return layers


def test_what_nothing_below_has_changed_is_not_searched_again(
    base: Path, searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round condenses one layer. Only above it, the second round searches for experts again."""
    locks: list[Path] = []

    @contextmanager
    def counted_lock(path: Path, doing: str) -> Iterator[None]:
        locks.append(path)
        yield

    monkeypatch.setattr("recondense.run.search.hold_lock", counted_lock)
    made = settings(base, "inherited", {"name": "cdmoe", "rounds": 2})
    pipeline.run(made, [CDMoE(num_experts=2, num_layers=2)])
    first, second = (Plan.load(base / "inherited" / "run" / "rounds" / str(number) / "plan.json") for number in (1, 2))
    [condensed] = first.layers
    assert condensed > 0, "otherwise nothing below it is unchanged"
    assert searched == [0, 1, 2, *range(condensed + 1, 3)]
    assert len(locks) == len(set(locks)) == 2, "no run waits for another one that inherits the same records"
    orders = [plan.search["expert_search"] for plan in (first, second)]
    assert set(orders[1]) == {"0", "1", "2"} - {str(condensed)}
    assert all(orders[1][str(layer)] == orders[0][str(layer)] for layer in range(condensed))


def test_the_last_round_inherits_what_does_not_depend_on_its_further_options(base: Path, searched: list[int]) -> None:
    """Only the last round of cdmoe_moei2 factorizes, but it has the same orders of experts as the first."""
    step = Combined(Budget(0.3), num_experts=(2,), prune_ratios=(), kept_ratios=(0.5,), width_ratios=())
    pipeline.run(settings(base, "combined", {"name": "cdmoe_moei2", "rounds": 2}), [step])
    lowest = min(Plan.load(base / "combined" / "run" / "rounds" / "1" / "plan.json").layers)
    assert lowest > 0, "otherwise nothing below it is unchanged"
    assert set(searched) == {0, 1, 2} and all(searched.count(layer) == 1 for layer in range(lowest))


VARIANTS: dict[str, tuple[dict[str, Any], list[Any], dict[str, Any]]] = {
    "local, then everything": (
        {"refit": True},
        [CDMoE(num_experts=2, num_layers="all")],
        {"stages": [{"name": "a", "objective": "local", "steps": 6}, {"name": "b", "trainable": "all"}]},
    ),
    "adapters, a cached teacher": ({}, [STEP, Decompose(ratio=0.8)], {"trainable": "lora", "teacher": "cached"}),
    "layers dropped after pruning": (
        {},
        [SaliencyPruning("random", budget=Budget(0.2)), Dropping("layer", Budget(0.6))],
        {"trainable": "all"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_original_stays_the_first_one(base: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Whatever trains in between: at the end, the teacher has the weights that were loaded."""
    method, steps, recovery = VARIANTS[variant]
    originals: list[tuple[str, str]] = []
    collect = pipeline._Stages.collect

    def checked(self: Any, student: Student, *arguments: Any) -> Any:
        with student.original() as original:
            originals.append((weights_fingerprint(original), self.record.inputs["weights"]))
        assert weights_fingerprint(student.model) not in originals[0]
        return collect(self, student, *arguments)

    monkeypatch.setattr(pipeline._Stages, "collect", checked)
    made = settings(base, variant, {**method, "rounds": 2}, **recovery)
    pipeline.run(made, steps)
    assert originals[0][0] == originals[0][1]
    summary = json.loads((base / variant / "run" / "summary.json").read_text())
    assert summary["stages"]["recovered"]["kl_to_original"] < 3 * summary["rounds"][0]["kl_to_original"] + 0.5
