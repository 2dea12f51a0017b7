"""How much each routed expert matters: the calibration loss with only that expert removed (MoE-I², section 3.1).

Legend: B texts of a block, S their padded length, T real tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.layerwise import Cache, lacking, layerwise
from recondense.methods.search.leave_out import Replay
from recondense.methods.search.rerun import Climb, Start
from recondense.models import decoder, views
from recondense.models.tensor_store import Shelf
from recondense.models.views import SparseBlock
from recondense.progress import progress

KINDS = ("layer_output", "lm_loss")
LOGIT_BYTES = 12  # of one logit: as the head gives it, in fp32, and its logarithmic softmax


def expert_importances(
    model: PreTrainedModel,
    tape: Callable[[], Tape],
    cache: Cache,
    blocks: Mapping[int, SparseBlock],
    kind: str,
    normalize: bool,
    max_scratch_bytes: int,
    description: str,
) -> tuple[dict[int, list[float]], int]:
    """`expert_importance` of some layers, as far as the cache lacks it; and how many came out of the cache."""
    names = {layer: f"importance-{layer:03d}" for layer in blocks}
    wanted = lacking(cache, names)
    by_loss = [layer for layer in wanted if _by_loss(kind, blocks[layer])]
    reused = len(names) - len(wanted)
    if by_loss:
        with progress(f"{description}: the loss without each", len(by_loss)) as bar:
            for layer in by_loss:  # on the way to the top, all processes go through each layer with their own texts
                values = _losses(model, tape(), blocks[layer], normalize, max_scratch_bytes)
                cache[names[layer]] = {"importance": values}
                bar.advance()

    def work(own: Tape, layer: int, *_: Any) -> dict[str, Any]:
        return {"importance": _changes(model, own, blocks[layer], normalize, max_scratch_bytes)}

    found, _ = layerwise(model, tape, cache, names, work, description)
    return {layer: list(record["importance"]) for layer, record in found.items()}, reused


def expert_importance(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, kind: str, normalize: bool, max_scratch_bytes: int
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

    Returns:
        E values.

    Reference: arXiv 2411.01016, section 3.1.
    """
    of = _losses if _by_loss(kind, block) else _changes
    return of(model, tape, block, normalize, max_scratch_bytes)


def _by_loss(kind: str, block: SparseBlock) -> bool:
    return kind == "lm_loss" and block.num_experts > block.routing.top_k


@torch.no_grad()
def _changes(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, normalize: bool, max_scratch_bytes: int
) -> list[float]:
    """What each expert alone changes of the layer's output."""
    if block.num_experts == 1:
        return [1.0]
    replay = Replay(model, tape, block, 1, max_scratch_bytes, least_retained=1)
    errors: list[float] = replay.errors(torch.eye(block.num_experts, dtype=torch.bool)).tolist()
    return [error / max(replay.output_norm, 1e-300) for error in errors] if normalize else errors


@torch.no_grad()
def _losses(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, normalize: bool, max_scratch_bytes: int
) -> list[float]:
    """Mean next-token loss in nats without each expert; as many at a time as the tape has layers."""
    everything = range(block.num_experts)

    def without(expert: int) -> nn.Module:
        return views.masked_block(views.sparse_blocks(model)[block.layer], [e for e in everything if e != expert])

    starts = [Start(block.layer), *(Start(block.layer, partial(without, expert)) for expert in everything)]
    climb = Climb(model, tape)
    losses: list[float] = []
    for first in range(0, len(starts), tape.num_layers):
        for final in climb.final(starts[first : first + tape.num_layers]):
            losses.append(_loss_of(model, tape, final, max_scratch_bytes))
    least, *others = losses
    return [max(0.0, loss - least) if normalize else loss for loss in others]


def _loss_of(model: PreTrainedModel, tape: Tape, final: Shelf, max_scratch_bytes: int) -> float:
    """From the states leaving the last layer; summed over blocks of texts in their order."""
    parts = tape.texts.in_order([
        (
            _next_token_loss(model, hidden_BSD, texts.input_ids_BS, texts.mask_BS, max_scratch_bytes),
            int(texts.mask_BS[:, 1:].sum()),
        )
        for texts, hidden_BSD in zip(tape.texts.local, final, strict=True)
    ])  # fmt: skip
    return sum(loss for loss, _ in parts) / max(1, sum(count for _, count in parts))


def _next_token_loss(
    model: PreTrainedModel, hidden_BSD: Tensor, input_ids_BS: Tensor, mask_BS: Tensor, max_scratch_bytes: int
) -> float:
    """Sum of the losses of the real tokens but each text's first, logits of a few tokens at a time."""
    head = cast(nn.Linear, model.get_output_embeddings())
    wanted_BS = mask_BS[:, 1:]
    normed_TD = decoder.final_norm(model)(hidden_BSD)[:, :-1][wanted_BS]
    rows = max(1, max_scratch_bytes // (LOGIT_BYTES * head.weight.shape[0]))
    parts = zip(normed_TD.split(rows), input_ids_BS[:, 1:][wanted_BS].split(rows), strict=True)
    losses = (nn.functional.cross_entropy(head(x_TD).float(), ids_T, reduction="none") for x_TD, ids_T in parts)
    return sum(float(each_T.double().sum()) for each_T in losses)
