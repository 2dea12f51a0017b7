"""`apply`: the plan is executed, the original is kept, and a model is compressed once."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, bits, logits, qwen2_moe, recorded, same_bits, windows

from recondense.errors import UserError
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery.apply import apply

IDS = windows(2, 9)
PRUNED = Plan("tiny", (Prune(1, (0, 2, 3, 5)), Refit(1, "down_proj", 1e-2)))
EXPERTS = tuple(range(6))
STRUCTURAL: list[Operation] = [
    Condense(1, (0, 2), (0.5, 0.5)),
    Prune(1, (0, 2, 3, 5)),
    Factorize(1, {name: (3,) * 6 for name in ("gate_proj", "up_proj", "down_proj")}),
    Merge(1, tuple((expert,) for expert in EXPERTS), ((1.0,),) * 6),
    Constant(1, (0, 2, 3, 5)),
    Drop(1, "moe"),
    Drop(1, "layer"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_executes_the_plan_and_keeps_the_original(family: str) -> None:
    model = FAMILIES[family]()
    before = logits(model, IDS)
    student = apply(model, PRUNED, lambda: recorded(model))
    assert student.model is model and student.plan is PRUNED and student.originals.keys() == {1}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    compressed = logits(model, IDS)
    for _ in range(2):
        with student.original() as original:
            assert original is model and torch.equal(logits(original, IDS), before)
        assert torch.equal(logits(model, IDS), compressed)
    other = FAMILIES[family]()
    late = apply(other, PRUNED, lambda: recorded(other), refit=False)
    assert not torch.equal(logits(other, IDS), compressed)
    errors = late.refit(lambda: recorded(other))
    assert errors[1]["error_after"] < errors[1]["error_before"] and torch.equal(logits(other, IDS), compressed)


def test_a_refit_needs_the_calibration_set() -> None:
    model = qwen2_moe()
    before = bits(model)
    with pytest.raises(UserError, match="refit needs the calibration set"):
        apply(model, PRUNED)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize(
    "operation", STRUCTURAL, ids=lambda operation: f"{operation.kind}-{vars(operation).get('part')}"
)
def test_a_compressed_model_is_refused(operation: Operation) -> None:
    """Its config still describes the original. Inside `original()` it is the original, and afterwards it is not."""
    model = qwen2_moe()
    student = apply(model, Plan("tiny", (operation,)), lambda: recorded(model))
    with student.original():
        assert apply(model, Plan("tiny")).model is model
    with pytest.raises(UserError, match="compressed since it was loaded"):
        apply(model, Plan("tiny"))


def test_a_plan_without_operations_leaves_the_model_uncompressed() -> None:
    model = qwen2_moe()
    apply(model, Plan("tiny"))
    assert apply(model, PRUNED, lambda: recorded(model)).originals.keys() == {1}
