"""Low-rank experts, refits and what searches score on every family: against transformers' blocks and plain torch."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support.plain_moe import (
    FOUR,
    PAIRS,
    RANKS,
    ROUTING,
    STEEP,
    VARIANTS,
    PlainMoE,
    Ranks,
    Standing,
    block_of,
    run,
    tokens,
    variant,
)
from support.tiny_models import EVERY, recorded, texts
from torch import Tensor

from recondense.methods.cdmoe import CDMoE
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.methods.step import SearchContext
from recondense.models import compressed, low_rank, views
from recondense.models.low_rank import LowRankExperts
from recondense.operations import Condense, Factorize, Merge, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import apply

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# ---------------------------------------------------------------------------------------------- low-rank experts

NAMES = ("gate_proj", "up_proj", "down_proj")
ALIKE: Ranks = dict.fromkeys(NAMES, (4,) * 6)
# Ranks, tokens, and which of low_rank.py's ways they take on a CPU.
WAYS: dict[str, tuple[Ranks, int, str]] = {
    "one bucket, one token": (ALIKE, 1, "_row_by_row"),
    "several buckets, one token": (dict.fromkeys(NAMES, (4, 4, 3, 5, 5, 7)), 1, "_row_by_row"),
    "one bucket": (ALIKE, 23, "_padded"),
    "odd ranks, one bucket": (dict.fromkeys(NAMES, (3,) * 6), 23, "_padded"),
    "two buckets of three": (dict.fromkeys(NAMES, (4, 8, 4, 8, 4, 8)), 23, "grouped_linear"),
    "down whole": ({**ALIKE, "down_proj": (None,) * 6}, 23, "grouped_linear"),
    "odd ranks, two buckets of three": (dict.fromkeys(NAMES, (3, 5, 3, 5, 3, 5)), 23, ""),
    "gate whole, odd ranks": ({"gate_proj": (None,) * 6, "up_proj": (3,) * 6, "down_proj": (5,) * 6}, 23, ""),
    "one expert a bucket": (dict.fromkeys(NAMES, (1, 2, 3, 4, 5, 6)), 23, ""),
}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_computing_low_rank_experts(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are those of transformers' own experts with the products as weights."""
    ranks, number, way = WAYS[name]
    taken: set[str] = set()
    for owner, each in ((LowRankExperts, "_row_by_row"), (low_rank._Bucket, "_padded"), (low_rank, "grouped_linear")):
        own = getattr(owner, each)
        monkeypatch.setattr(owner, each, lambda *a, own=own, each=each, **k: (taken.add(each), own(*a, **k))[1])
    model = EVERY[family]()
    whole = copy.deepcopy(block_of(model, 1))
    whole.load_state_dict(PlainMoE(whole, ROUTING[family]).truncated(ranks).state)
    apply.execute(model, Plan("tiny", (Factorize(1, ranks),)))
    block = block_of(model, 1)
    found = []
    for each in (block, whole):
        each.experts.requires_grad_(True)
        x_TD = tokens(2.0, number).requires_grad_(True)
        output = views.block_output(each(x_TD[None]))[0]
        (output * torch.linspace(-1, 1, 32)).sum().backward()
        found.append((output.detach(), x_TD.grad))
    assert taken == ({way} if way else set())
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    if family == "gpt_oss":
        _same_bias_gradients(block.experts, whole.experts)


def _same_bias_gradients(mine: LowRankExperts, theirs: Any) -> None:
    for expert in range(6):
        bucket, position = mine.place_of(expert)
        both, down = theirs.gate_up_proj_bias.grad[expert], theirs.down_proj_bias.grad[expert]
        for bias, grad in zip(bucket.biases() or (), (both[::2], both[1::2], down), strict=True):
            own = torch.zeros_like(bias) if bias.grad is None else bias.grad  # no token selects its bucket
            torch.testing.assert_close(own[position], grad, **CLOSE)


# ---------------------------------------------------------------------------------------------- refits, replay


def listened(model: Any, layer: int, ids: list[list[int]], block: Any) -> Any:
    """The residual stream after a layer with another block in it, text by text."""
    with views.swap_blocks(model, {layer: block}):
        return bf.states_after(model, [layer], ids, lm_head=False)[layer]


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_the_search_of_cdmoe_by_plain_torch(family: str) -> None:
    """Coefficients from the routing of every token, and every candidate's score with the whole model run."""
    model, ids = EVERY[family](), texts()
    tape, step = recorded(model, ids), CDMoE(num_experts=2, num_layers="all", shared_gate="token")
    _, record = step.search(SearchContext(model, lambda: tape, {}, 1 << 30))
    for layer in (1, 2):
        own, found = block_of(model, layer), record["expert_search"][str(layer)]
        plain = PlainMoE(own, ROUTING[family])
        weights_TE = plain.routing_weights(torch.cat([trace.x_TD for trace in tape.trace(model, layer)]).double())
        means = [float(column[column > 0].mean()) if bool(column.any()) else None for column in weights_TE.T]
        assert found["selected"] == (weights_TE > 0).sum(dim=0).tolist()
        assert found["coefficients"] == pytest.approx(means, rel=1e-4)

        def condensed(x_TD: Tensor, experts: list[int], plain: Any = plain, means: Any = means) -> Tensor:
            return plain.shared(x_TD) + sum(means[expert] * plain.expert(expert, x_TD) for expert in experts)

        original, pair = listened(model, layer, ids, own), compressed.returns_pair(own)
        assert len(found["candidates"]) == 2
        for position, candidates in enumerate(found["candidates"]):
            for expert, score in candidates:
                experts = [*found["order"][:position], expert]
                stand_in = Standing(partial(condensed, experts=experts), pair)
                assert score == pytest.approx(bf.score(original, listened(model, layer, ids, stand_in)), rel=1e-3)
            assert found["order"][position] == min(candidates, key=lambda each: each[1])[0]


@torch.no_grad()
def leaving(model: Any, layer: int) -> Tensor:
    """Hidden states leaving a decoder layer, all calibration texts one after another."""
    seen: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    for text in texts():
        model(input_ids=torch.tensor([text]), use_cache=False)
    handle.remove()
    return torch.cat([(each[0] if isinstance(each, tuple) else each)[0] for each in seen]).double()


REFITS: dict[str, tuple[Operation, Operation]] = {
    "prune": (Prune(1, FOUR), Refit(1, "down_proj", 1e-3)),
    "merge": (Merge(1, *PAIRS), Refit(1, "down_proj", 1e-3)),
    "factorize": (Factorize(1, RANKS), Refit(1, "down_proj", 1e-3)),
    "condense": (Condense(1, (3, 0), (0.4, 0.2)), Refit(1, "down_proj", 1e-3)),
    "coefficients": (Condense(1, (3, 0), (0.4, 0.2)), Refit(1, "coefficients", 1e-3)),
}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("name", REFITS)
def test_a_refit_brings_hidden_states_nearer(name: str, family: str) -> None:
    """By as much as it says."""
    model, (operation, refit) = EVERY[family](), REFITS[name]
    original = leaving(model, 1)
    originals = apply.execute(model, Plan("tiny", (operation,)))
    before = (leaving(model, 1) - original).norm()
    report = apply.refit(model, Plan("tiny", (refit,)), originals, lambda: recorded(model))[1]
    after = (leaving(model, 1) - original).norm()
    assert after < 0.999 * before
    assert report["error_after"] / report["error_before"] == pytest.approx(float(after / before), rel=1e-3)


@pytest.mark.parametrize("name", [*VARIANTS, *STEEP])
@torch.no_grad()
def test_replay_is_the_masked_block(name: str) -> None:
    """For sets of every size; also against plain torch."""
    model, routing = variant(name)
    layer = list(views.sparse_blocks(model))[-1]
    view, tape = views.sparse_blocks(model)[layer], recorded(model)
    if routing.num_groups > 1:
        with pytest.raises(ValueError, match="groups of experts"):
            LeaveOutScorer.prepare(model, tape, view, 4, 1 << 30)
        return
    generator = torch.Generator().manual_seed(5)
    sets = [torch.randperm(6, generator=generator)[:number].tolist() for number in (1, 1, 2, 2, 3, 3, 4, 4)]
    dropped_PE = torch.tensor([[expert in each for expert in range(6)] for each in sets])
    plain, x_TD = PlainMoE(view.module, routing), torch.cat([trace.x_TD for trace in tape.trace(model, layer)])
    whole = plain(x_TD.double())
    for each, error in zip(
        sets, LeaveOutScorer.prepare(model, tape, view, 4, 1 << 30).errors(dropped_PE).tolist(), strict=True
    ):
        masked = views.masked_block(view, [expert for expert in range(6) if expert not in each])
        change = (run(masked, x_TD) - run(view.module, x_TD)).double().norm()
        assert error == pytest.approx(float(change), rel=1e-3, abs=1e-4), each
        assert error == pytest.approx(float((plain(x_TD.double(), each) - whole).norm()), rel=1e-3, abs=1e-4), each
