"""The importance of each routed expert: the calibration loss with only that expert removed (MoE-I², section 3.1).

Legend: B texts of a batch, S their padded length, T real tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.methods.search.rerun import Change, Rerun
from recondense.methods.step import Record
from recondense.models import decoder, moe_blocks
from recondense.models.moe_blocks import SparseBlock
from recondense.models.tensor_store import TensorList
from recondense.progress import progress

KINDS = ("layer_output", "lm_loss")
LOGIT_BYTES = 12  # per logit: as returned by the head, in fp32, and as log softmax


def expert_importances(
    search: LayerwiseSearch,
    blocks: Mapping[int, SparseBlock],
    kind: str,
    normalize: bool,
    title: str,
) -> dict[int, list[float]]:
    """Compute the `expert_importance` of some layers, or read it from the cache.

    Args:
        search: the layer-wise search, with the model, its tape and the cache.
        blocks: the layers.
        kind, normalize: as in `expert_importance`.
        title: the description of the progress bar.

    Returns:
        E values for each layer.
    """
    model, scratch = search.context.model, search.context.max_scratch_bytes
    names = {layer: f"importance-{layer:03d}" for layer in blocks}
    by_loss = {layer: name for layer, name in names.items() if _uses_loss(kind, blocks[layer])}
    records = _search_losses(search, by_loss, blocks, kind, normalize, title) if by_loss else {}

    def work(task: LayerTask) -> Record:
        return {"importance": expert_importance(model, task.tape, blocks[task.layer], kind, normalize, scratch)}

    by_output = {layer: name for layer, name in names.items() if layer not in by_loss}
    if by_output:
        records |= search.per_layer(by_output, work, title)
    return {layer: list(records[layer]["importance"]) for layer in blocks}


def _search_losses(
    search: LayerwiseSearch,
    names: Mapping[int, str],
    blocks: Mapping[int, SparseBlock],
    kind: str,
    normalize: bool,
    title: str,
) -> dict[int, Record]:
    """Return the records of lm_loss. All processes work on the same layer, each on its share of the texts."""
    context = search.context
    records: dict[int, Record] = {}
    with progress(f"{title}: the loss without each expert", len(names)) as bar:
        for layer, name in names.items():
            cached = context.cache.get(name)
            if cached is None:
                tape, scratch = context.tape(), context.max_scratch_bytes
                values = expert_importance(context.model, tape, blocks[layer], kind, normalize, scratch)
                context.cache[name] = cached = {"importance": values}
            else:
                search.reused += 1
            records[layer] = cached
            bar.advance()
    return records


def expert_importance(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, kind: str, normalize: bool, max_scratch_bytes: int
) -> list[float]:
    """Compute I_j of each expert of one layer: the loss on the calibration set if only expert j is removed.

    The logit of expert j is set to −∞ before the softmax. If the layer has only top_k experts, no other expert is
    selected instead. The paper does not say which loss it means; both kinds are interpretations of it.

    Args:
        model: the recorded model; it stays bit-identical.
        tape: its hidden states.
        block: the layer.
        kind: "layer_output" is ‖F(X) − F^{−j}(X)‖_F of the MoE block. "lm_loss" is the model's next-token loss, the
            mean over all predicted tokens; only this layer and the layers above it run again. A layer with only top_k
            experts always uses "layer_output", because its router cannot run with fewer.
        normalize: for "layer_output", divide by ‖F(X)‖_F, because norms grow with depth as the residual stream does.
            For "lm_loss", subtract the loss of the full model, but not below 0; otherwise all importances are nearly
            equal. If no expert's removal increases the loss, all importances of the layer are then 0.
        max_scratch_bytes: bound on temporary tensors, including logits.

    Returns:
        E values.

    Reference: arXiv 2411.01016, section 3.1.
    """
    compute = _losses if _uses_loss(kind, block) else _output_changes
    return compute(model, tape, block, normalize, max_scratch_bytes)


def _uses_loss(kind: str, block: SparseBlock) -> bool:
    return kind == "lm_loss" and block.num_experts > block.routing.top_k


@torch.no_grad()
def _output_changes(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, normalize: bool, max_scratch_bytes: int
) -> list[float]:
    """Compute the change of the layer's output without each expert."""
    if block.num_experts == 1:
        return [1.0]
    scorer = LeaveOutScorer.prepare(model, tape, block, 1, max_scratch_bytes, least_retained=1)
    errors: list[float] = scorer.errors(torch.eye(block.num_experts, dtype=torch.bool)).tolist()
    return [error / max(scorer.output_norm, 1e-300) for error in errors] if normalize else errors


@torch.no_grad()
def _losses(
    model: PreTrainedModel, tape: Tape, block: SparseBlock, normalize: bool, max_scratch_bytes: int
) -> list[float]:
    """Compute the mean next-token loss (nats) without each expert, for as many experts at once as there are layers."""
    everything = range(block.num_experts)

    def without(expert: int) -> nn.Module:
        return moe_blocks.masked_block(
            moe_blocks.sparse_blocks(model)[block.layer], [e for e in everything if e != expert]
        )

    changes = [Change(block.layer), *(Change(block.layer, partial(without, expert)) for expert in everything)]
    rerun = Rerun(model, tape)
    losses: list[float] = []
    for first in range(0, len(changes), tape.num_layers):
        for final in rerun.final_states(changes[first : first + tape.num_layers]):
            losses.append(_mean_loss(model, tape, final, max_scratch_bytes))
    original, *others = losses
    return [max(0.0, loss - original) if normalize else loss for loss in others]


def _mean_loss(model: PreTrainedModel, tape: Tape, final: TensorList, max_scratch_bytes: int) -> float:
    """Compute the mean next-token loss from the states that leave the last layer; summed in text order."""
    parts = tape.texts.in_order(
        [
            (
                _next_token_loss(model, hidden_BSD, texts.input_ids_BS, texts.mask_BS, max_scratch_bytes),
                int(texts.mask_BS[:, 1:].sum()),
            )
            for texts, hidden_BSD in zip(tape.texts.local, final, strict=True)
        ]
    )
    return sum(loss for loss, _ in parts) / max(1, sum(count for _, count in parts))


def _next_token_loss(
    model: PreTrainedModel, hidden_BSD: Tensor, input_ids_BS: Tensor, mask_BS: Tensor, max_scratch_bytes: int
) -> float:
    """Sum the losses of all real tokens except each text's first, computing the logits of a few tokens at a time."""
    predicted_BS = mask_BS[:, 1:]
    normed_TD = decoder.final_norm(model)(hidden_BSD)[:, :-1][predicted_BS]
    with decoder.lm_head(model) as head:
        rows = max(1, max_scratch_bytes // (LOGIT_BYTES * len(head.weight_VD)))
        parts = zip(normed_TD.split(rows), input_ids_BS[:, 1:][predicted_BS].split(rows), strict=True)
        losses = (
            nn.functional.cross_entropy(head.logits(x_TD).float(), ids_T, reduction="none") for x_TD, ids_T in parts
        )
        return sum(float(loss_T.double().sum()) for loss_T in losses)
