"""Leave-out errors under the router of every family, against plain torch."""

from __future__ import annotations

import pytest
import torch
from support.plain_moe import (
    STEEP,
    VARIANTS,
    PlainMoE,
    run,
    variant,
)
from support.tiny_models import recorded

from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.models import moe_blocks


@pytest.mark.parametrize("name", [*VARIANTS, *STEEP])
@torch.no_grad()
def test_replay_equals_the_masked_block(name: str) -> None:
    """For sets of every size; also against plain torch."""
    model, routing = variant(name)
    layer = list(moe_blocks.sparse_blocks(model))[-1]
    view, tape = moe_blocks.sparse_blocks(model)[layer], recorded(model)
    if routing.num_groups > 1:
        with pytest.raises(ValueError, match="groups of experts"):
            LeaveOutScorer.prepare(model, tape, view, 4, 1 << 30)
        return
    generator = torch.Generator().manual_seed(5)
    sets = [torch.randperm(6, generator=generator)[:number].tolist() for number in (1, 1, 2, 2, 3, 3, 4, 4)]
    dropped_PE = torch.tensor([[expert in dropped for expert in range(6)] for dropped in sets])
    plain, x_TD = PlainMoE(view.module, routing), torch.cat([trace.x_TD for trace in tape.trace(model, layer)])
    original = plain(x_TD.double())
    for dropped, error in zip(
        sets, LeaveOutScorer.prepare(model, tape, view, 4, 1 << 30).errors(dropped_PE).tolist(), strict=True
    ):
        masked = moe_blocks.masked_block(view, [expert for expert in range(6) if expert not in dropped])
        change = (run(masked, x_TD) - run(view.module, x_TD)).double().norm()
        assert error == pytest.approx(float(change), rel=1e-3, abs=1e-4), dropped
        assert error == pytest.approx(float((plain(x_TD.double(), dropped) - original).norm()), rel=1e-3, abs=1e-4), (
            dropped
        )
