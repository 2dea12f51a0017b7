"""Super experts: what they do to a model, and that they are found where massive activations are and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.super_expert import CHANNEL, LAYER, with_super_expert
from support.tiny_models import EVERY, logits, recorded, texts, unchanged, windows

from recondense.calibration import tape as tape_module
from recondense.calibration.super_experts import find_super_experts
from recondense.models import moe_blocks
from recondense.models.tensor_store import Disk
from recondense.operations import Factorize, Prune
from recondense.plan import Plan
from recondense.surgery import execute


@pytest.mark.parametrize("family", EVERY)
def test_a_model_without_massive_activations_has_no_super_experts(family: str) -> None:
    model = EVERY[family]()
    assert find_super_experts(recorded(model)) == {}
    with torch.no_grad():  # one expert is much stronger than the others, but its outputs are not massive
        moe_blocks.sparse_blocks(model)[LAYER].weights.down_EDF[2] *= 50
    assert find_super_experts(recorded(model)) == {}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_super_expert_wrecks_the_model_when_it_is_removed_and_is_found(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    model, super_expert = with_super_expert(family)
    ids = windows(8, 16)
    original = logits(model, ids)
    losses = []
    for expert in range(6):
        prune = Prune.from_dropped(LAYER, 6, [expert])
        originals = execute.execute(model, Plan("tiny", (prune,)))
        losses.append(float(torch.nn.functional.cross_entropy(logits(model, ids).mT, original.argmax(-1))))
        moe_blocks.set_block(model, LAYER, originals[LAYER])
    before = float(torch.nn.functional.cross_entropy(original.mT, original.argmax(-1)))
    others = [loss - before for expert, loss in enumerate(losses) if expert != super_expert]
    assert losses[super_expert] - before > 1.4 * max(others) and losses[super_expert] - before > 1
    # Against every text alone, by the model's own forward: the largest output of each expert.
    block: Any = moe_blocks.get_block(model, LAYER)
    seen: list[torch.Tensor] = []
    handle = block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in texts():
            model(input_ids=torch.tensor([text]))
        handle.remove()
        _, _, index_TK = (block.gate if hasattr(block, "gate") else block.router)(torch.cat(seen))
        x_tD = torch.cat(seen)[(index_TK == super_expert).any(dim=1)]
        one = torch.full((len(x_tD), 1), super_expert)
        largest = float(block.experts(x_tD, one, torch.ones(len(x_tD), 1)).abs().max())
    expected = {LAYER: {super_expert: pytest.approx(largest, rel=1e-4)}}
    with unchanged(model):
        assert find_super_experts(recorded(model)) == expected
    monkeypatch.setattr(tape_module, "TRACE_BYTES", 0)
    assert find_super_experts(recorded(model, storage=Disk(tmp_path, keeps=False))) == expected
    ranks = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (16,) * 6)
    execute.execute(model, Plan("tiny", (Factorize(LAYER, ranks),)))  # also of factorized experts
    assert list(find_super_experts(recorded(model))[LAYER]) == [super_expert]


def test_massive_activations_of_the_shared_expert_make_no_routed_expert_super() -> None:
    model = EVERY["qwen2_moe"]()
    block: Any = moe_blocks.get_block(model, LAYER)
    with torch.no_grad():
        block.shared_expert.down_proj.weight[CHANNEL] *= 2e5
    tape = recorded(model)
    assert float(tape.states[LAYER + 1][0].abs().max()) > 1e4
    assert find_super_experts(tape) == {}
