"""How much each routed expert matters: the calibration loss with only that expert removed (MoE-I², section 3.1).

Legend: B texts of a block, S their padded length, T real tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import families
from recondense.families import SparseBlock
from recondense.methods.replay import Replay
from recondense.modes import evaluating

if TYPE_CHECKING:
    from recondense.calibrate import Tape

KINDS = ("layer_output", "lm_loss")
LOGIT_BYTES = 12  # of one logit: as the head gives it, in fp32, and its logarithmic softmax


@torch.no_grad()
def expert_importance(
    model: PreTrainedModel,
    tape: Tape,
    block: SparseBlock,
    kind: str,
    normalize: bool,
    max_scratch_bytes: int,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """I_j of each expert of one layer: the loss on the calibration set when only expert j is missing.

    Its logit is −∞ before the softmax. Which loss the paper means is open; both are its readings. Where only top_k
    experts are left, nothing is selected in its stead.

    Args:
        model: as the tape saw it; left bit-identical.
        tape: its hidden states.
        block: the layer.
        kind: "layer_output": ‖F(X) − F^{−j}(X)‖_F of the MoE layer. "lm_loss": the model's next-token loss, mean over
            all predicted tokens; only this layer and those above run again. A layer with only top_k experts, whose
            router cannot do without one, is measured by its output all the same.
        normalize: of a layer_output, divide it by ‖F(X)‖_F: residual streams grow with depth, and so do raw norms. Of
            an lm_loss, take the loss of the whole model off, not below 0: else all importances are nearly equal. Where
            no expert is missed the layer's importance is then 0.
        max_scratch_bytes: bound on temporaries of scoring, logits included.
        advance: called after each expert, or once for all of them.

    Returns:
        E values.

    Reference: arXiv 2411.01016, section 3.1.
    """
    if kind == "lm_loss" and block.num_experts > block.routing.top_k:
        least = _loss_without(model, tape, block, None, max_scratch_bytes) if normalize else 0.0
        losses = []
        for expert in range(block.num_experts):
            losses.append(max(0.0, _loss_without(model, tape, block, expert, max_scratch_bytes) - least))
            advance()
        return losses
    if block.num_experts == 1:
        return [1.0]
    replay = Replay(model, tape, block, 1, max_scratch_bytes, least_retained=1)
    errors = replay.errors(torch.eye(block.num_experts, dtype=torch.bool)).tolist()
    advance()
    return [error / max(replay.output_norm, 1e-300) for error in errors] if normalize else errors


def _loss_without(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, expert: int | None, max_scratch_bytes: int
) -> float:
    """Mean next-token loss in nats with one expert dropped, or none; the layers below are taken from the tape."""
    retained = [each for each in range(block.num_experts) if each != expert]
    masked = block.module if expert is None else families.masked_block(block, retained)
    total, count = 0.0, 0
    with families.swapped(model, {block.layer: masked}), evaluating(model):
        for index, texts in enumerate(tape.blocks):
            hidden_BSD = tape.states[block.layer][index]
            for layer in range(block.layer, tape.num_layers):
                hidden_BSD = tape.run_layer(model, layer, index, hidden_BSD)
            total += _next_token_loss(model, hidden_BSD, texts.input_ids_BS, texts.mask_BS, max_scratch_bytes)
            count += int(texts.mask_BS[:, 1:].sum())
    return total / max(1, count)


def _next_token_loss(
    model: PreTrainedModel, hidden_BSD: Tensor, input_ids_BS: Tensor, mask_BS: Tensor, max_scratch_bytes: int
) -> float:
    """Sum of the losses of the real tokens but each text's first, logits of a few tokens at a time."""
    head = cast(nn.Linear, model.get_output_embeddings())
    wanted_BS = mask_BS[:, 1:]
    normed_TD = families.final_norm(model)(hidden_BSD)[:, :-1][wanted_BS]
    rows = max(1, max_scratch_bytes // (LOGIT_BYTES * head.weight.shape[0]))
    parts = zip(normed_TD.split(rows), input_ids_BS[:, 1:][wanted_BS].split(rows), strict=True)
    losses = (nn.functional.cross_entropy(head(x_TD).float(), ids_T, reduction="none") for x_TD, ids_T in parts)
    return sum(float(each_T.double().sum()) for each_T in losses)
