"""Precision: trained weights in fp32 while they train, whatever kind of experts a model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.recoveries import QUIET, data, prepared
from support.tiny_models import qwen2_moe

from recondense.operations import Constant, Narrow, Operation
from recondense.plan import Plan
from recondense.recovery.fit import fit

OPERATIONS: dict[str, Operation] = {
    "constants": Constant(0, (0, 2, 3, 5)),
    "narrow": Narrow.from_channels(0, (range(8),) * 6),
    "narrow unlike": Narrow.from_channels(0, (range(8), *(range(4),) * 5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_experts_of_every_kind_train_in_bf16_with_weights_in_fp32(name: str, tmp_path: Path) -> None:
    module = prepared(qwen2_moe().to(torch.bfloat16), Plan("tiny", (OPERATIONS[name],)), steps=2, warmup_steps=0)
    before = {name: value.detach().clone() for name, value in module.model.named_parameters() if value.requires_grad}
    fit(module, data(module), tmp_path, QUIET, seed=0)
    after = dict(module.model.named_parameters())
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())
