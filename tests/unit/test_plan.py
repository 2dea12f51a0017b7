"""A plan is plain data: it is read as it was written, invalid data is refused, and files are never half written."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recondense.errors import UserError
from recondense.operations import OPERATIONS, Condense, Constant, Drop, Factorize, Merge, Narrow, Prune, Refit
from recondense.plan import History, Plan

PLAN = Plan(
    model="Qwen/Qwen1.5-MoE-A2.7B",
    operations=(
        Condense(layer=5, experts=(7, 0, 3), coefficients=(0.1, 1 / 3, 2.5e-7), shared_gate=0.123456789012345678),
        Condense(layer=2, experts=(), coefficients=(), shared_gate=None),
    ),
    fingerprint={"weights": "ab", "calibration": "cd", "method": "ef"},
    search={"expert_search": {"5": {"order": [7, 0, 3], "js": [0.3, 0.2, 0.1], "coefficients": [0.5, None]}}},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_dict(PLAN.to_dict()) == PLAN
    assert isinstance(Plan.load(path).operations[0].experts, tuple)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_the_form_of_the_file() -> None:
    """The keys, and the order in which operations were chosen."""
    data = json.loads(PLAN.to_json())
    assert list(data) == ["schema", "model", "fingerprint", "operations", "search"]
    assert data["schema"] == 1
    assert data["operations"][0] == {
        "kind": "condense", "layer": 5, "experts": [7, 0, 3], "coefficients": [0.1, 1 / 3, 2.5e-7],
        "shared_gate": 0.12345678901234568,
    }  # fmt: skip
    assert data["operations"][1]["shared_gate"] is None
    assert PLAN.layers == (2, 5)
    assert Plan("m").layers == ()


def test_needs_only_the_standard_library(root: Path) -> None:
    """In an interpreter without site-packages."""
    code = (
        f"import sys; sys.path.insert(0, {str(root / 'src')!r}); from recondense.plan import Plan; "
        "assert Plan.from_json(sys.stdin.read()).layers == (2, 5)"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", code], input=PLAN.to_json(), text=True, check=True)


def plan_data(**changes: Any) -> dict[str, Any]:
    return {**PLAN.to_dict(), **changes}


OPERATION = PLAN.to_dict()["operations"][0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (plan_data(schema=2), "schema 2 is not supported"),
        ({}, "schema None"),
        (plan_data(operations=[{**OPERATION, "kind": "shrink"}]), "'shrink'.*condense"),
        (plan_data(operations=[{"layer": 1}]), "unknown kind of operation None"),
        (plan_data(operations=[{"kind": "condense", "layer": 1}]), "lacks"),
        (plan_data(operations=[{**OPERATION, "experts": [7, 7, 3]}]), "distinct"),
        (plan_data(operations=[{**OPERATION, "experts": [7, -1, 3]}]), ">= 0"),
        (plan_data(operations=[{**OPERATION, "layer": -1}]), "negative"),
        (plan_data(operations=[{**OPERATION, "coefficients": [0.1]}]), "3 experts but 1 coefficients"),
    ],
)
def test_invalid_data_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(data)


FACTORIZE = {"kind": "factorize", "layer": 1}
NARROW = {"kind": "narrow", "layer": 1, "compensate": False}
FILES: dict[str, tuple[str, str]] = {
    "a list": ("[1]", r"the plan must be an object of JSON, but it is \[1\]"),
    "null": ("null", "the plan must be an object"),
    "empty": ("", "not JSON, or is cut off"),
    "cut": (PLAN.to_json()[:-40], "not JSON, or is cut off"),
    "deep": ("[" * 100_000, "not JSON"),
    "a word as operations": (json.dumps(plan_data(operations="condense")), "operations of the plan must be a list"),
    "a number as an operation": (json.dumps(plan_data(operations=[3])), "an operation must be an object"),
    "a kind that is no word": (json.dumps(plan_data(operations=[{**OPERATION, "kind": [1]}])), "kind of an operation"),
    "a layer": (json.dumps(plan_data(operations=[{**OPERATION, "layer": "a"}])), "condense operation .* 'a'"),
    "experts": (json.dumps(plan_data(operations=[{**OPERATION, "experts": 3}])), "condense operation .* wrong type"),
    "ranks": (json.dumps(plan_data(operations=[{**FACTORIZE, "ranks": [1]}])), "factorize .* wrong"),
    "masks": (json.dumps(plan_data(operations=[{**NARROW, "masks": [3]}])), "narrow .* wrong type"),
    "infinity": (json.dumps(plan_data(operations=[{**OPERATION, "layer": float("inf")}])), "condense .* wrong type"),
    "negative": (json.dumps(plan_data(operations=[{**OPERATION, "layer": -1}])), "layer -1 is negative"),
    "search": (json.dumps(plan_data(search=[1])), "search of the plan must be a dict"),
    "fingerprint": (json.dumps(plan_data(fingerprint="abc")), "fingerprint of the plan must be a dict"),
    "history": (json.dumps(plan_data(history=[])), "history of the plan must be a dict"),
    "layers": (json.dumps(plan_data(history={"operations": [], "layers": ["a"]})), "layers of the history are not"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_plan_is_named(name: str, tmp_path: Path) -> None:
    text, message = FILES[name]
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"other\.json: .*{message}"):
        Plan.load(path)
    path.rename(tmp_path / "plan.json")
    assert History.load(tmp_path) == History()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "binary.json"):
        with pytest.raises(UserError, match=rf"{path.name}: the plan cannot be read"):
            Plan.load(path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    """NaN is not JSON, so other tools could not read it."""
    path = tmp_path / "plan.json"
    PLAN.save(path)
    with pytest.raises(ValueError, match="JSON"):
        Plan("m", (Condense(0, (1,), (float("nan"),)),)).save(path)
    assert Plan.load(path) == PLAN


OF_EVERY_KIND = (
    Condense(0, (2, 0), (0.5, 0.25), 0.75),
    Prune(1, (0, 3)),
    Constant(2, (0, 3)),
    Factorize(1, {"gate_proj": (3, None), "up_proj": (3, None), "down_proj": (2, None)}, whitening=True),
    Narrow.from_channels(1, ((0, 2, 900), (1,)), compensate=True),
    Merge(2, ((1, 0), (2,)), ((0.25, 0.75), (1.0,)), align=True),
    Drop(3, "moe"),
    Drop(4, "layer"),
    Refit(0, "coefficients", 0.01),
    Refit(1, "down_proj", "auto"),
)


def test_every_kind_survives_json() -> None:
    plan = Plan("m", OF_EVERY_KIND)
    assert Plan.from_json(plan.to_json()) == plan
    assert {operation.kind for operation in OF_EVERY_KIND} == set(OPERATIONS)
    assert plan.layers == (0, 1, 2, 3, 4)


def test_masks_are_bits_of_channels() -> None:
    operation = Narrow.from_channels(0, ((0, 1, 9), [4]))
    assert operation.masks == ("203", "10")
    assert operation.channels == ((0, 1, 9), (4,)) and operation.widths == (3, 1)


def test_an_earlier_word_for_a_decoder_layer_is_read() -> None:
    data = Plan("m", (Drop(4, "layer"),)).to_dict()
    assert data["operations"] == [{"kind": "drop", "layer": 4, "part": "layer"}]
    earlier = {**data, "operations": [{"kind": "drop", "layer": 4, "part": "block"}]}
    assert Plan.from_dict(earlier) == Plan.from_dict(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(1, ()), "not empty"),
        (lambda: Prune(1, (3, 0)), "ascending"),
        (lambda: Prune(-1, (0,)), "negative"),
        (lambda: Constant(1, ()), "constant, layer 1: .* not empty"),
        (lambda: Constant(1, (2, 1)), "ascending"),
        (lambda: Factorize(1, {"gate_proj": (1,), "up_proj": (1,)}), "down_proj"),
        (lambda: Factorize(1, {"gate_proj": (1,), "up_proj": (1,), "down_proj": (1, 2)}), "must be equal"),
        (lambda: Factorize(1, {"gate_proj": (0,), "up_proj": (1,), "down_proj": (1,)}), "at least 1"),
        (lambda: Merge(1, ((0,), (2,)), ((1.0,), (1.0,))), "partition the experts"),
        (lambda: Merge(1, ((0, 1),), ((1.0,),)), "one weight for each"),
        (lambda: Merge(1, ((0, 1),), ((0.5, 0.6),)), "sum to 1"),
        (lambda: Narrow.from_channels(1, ((0,), ())), "above 0"),
        (lambda: Narrow(1, ("0x3",)), "hexadecimal"),
        (lambda: Narrow(1, ()), "one for each expert"),
        (lambda: Drop(1, "attention"), "moe or layer"),  # type: ignore[arg-type]
        (lambda: Refit(1, "router", 0.1), "down_proj"),  # type: ignore[arg-type]
        (lambda: Refit(1, "down_proj", 0.0), "above 0"),
        (lambda: Refit(1, "coefficients", "auto"), "need a number"),
    ],
)
def test_invalid_operations_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------ several runs in a row


@pytest.mark.parametrize("seed", range(20))
def test_a_history_uses_the_layer_numbers_of_the_first_model(tmp_path: Path, seed: int) -> None:
    """Against names that move with the layers."""
    draw = random.Random(seed)
    names, history, expected = list(range(8)), History(), []
    for _ in range(4):
        dropped = draw.sample(range(len(names)), draw.choice((0, 1)))
        pruned = [layer for layer in range(len(names)) if layer not in dropped and draw.random() < 0.4]
        operations = [*(Drop(layer, "layer") for layer in dropped), *(Prune(layer, (0, 1)) for layer in pruned)]
        remaining = [layer for layer in range(len(names)) if layer not in dropped]
        expected += [(operation.kind, names[operation.layer]) for operation in operations]
        names = [names[layer] for layer in remaining]
        Plan("tiny", tuple(operations), history=history.extend(operations, remaining)).save(tmp_path / "plan.json")
        history = History.load(tmp_path)
    assert [(operation.kind, operation.layer) for operation in history.operations] == expected
    changed = [layer for layer, name in enumerate(names) if name in {name for _, name in expected}]
    assert history.changed_layers(len(names)) == tuple(changed)


def test_a_folder_without_a_plan_of_recondense_has_no_history(tmp_path: Path) -> None:
    assert History.load(None) == History.load(tmp_path) == History()
    for text in ("[]", "no JSON", '{"schema": 1, "history": 3}', '{"schema": 7}'):
        (tmp_path / "plan.json").write_text(text)
        assert History.load(tmp_path) == History()
