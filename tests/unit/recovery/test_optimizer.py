"""AdamW's parameter groups."""

from __future__ import annotations

from support.recoveries import prepared
from support.tiny_models import qwen2_moe

from recondense.operations import Constant
from recondense.plan import Plan


def test_constants_in_place_of_experts_have_no_weight_decay() -> None:
    """They are biases of the output."""
    module = prepared(qwen2_moe(), Plan("tiny", (Constant(1, (0, 2, 3, 5)),)))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decay = {names[id(one)]: group["weight_decay"] for group in module.parameter_groups() for one in group["params"]}
    constants = [name for name in decay if name.endswith(".constants")]
    assert len(constants) == 1 and decay[constants[0]] == 0.0
    assert decay[constants[0].replace("constants", "down_proj")] == 0.1
