"""The score of each channel of each routed expert: what the model loses without it.

A channel of an expert is a row of its gate and up projections and the same column of its down projection. Its part of
the expert's output for a token is h_f(x) · d_f, with h_f the gated activation and d_f the column.

Legend: T tokens, t tokens of one expert, D hidden size, F expert width, E routed experts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.moments import tokens_of
from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.methods.search.gradients import gradients_below, loss_gradients
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.routing import routing_totals
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.layer_store import layer_store
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import MoEWeights, expert_inner
from recondense.models.tensor_store import TensorList
from recondense.progress import progress

SCORES = {
    "heapr": "the expected increase of the model's loss, to second order",
    "norms": "the norm of routing weight x activation, times the norm of the column of down_proj",
}


def channel_scores(context: SearchContext, blocks: Mapping[int, SparseBlock], score: str) -> dict[int, Tensor]:
    """Compute the score of each channel, or read it from the cache.

    "norms": s_f = sqrt(Σ (w h_f)²) · ‖d_f‖, with w the routing weight, over the expert's tokens.

    "heapr": s_f = ½ · Σ h_f² · d_fᵀ G d_f / T,  G = mean g gᵀ,  with g the gradient of the loss with respect to the
    expert's output: the routing weight times the gradient with respect to the block's output. G stands for the Hessian
    of the loss. It is the same for all channels of an expert, and its factor Σ h_f² does not see it, so it needs one
    mean over the expert's tokens. dᵀGd is the mean of (g·d)², so G itself is not computed. The paper's score is a mean
    over the expert's tokens. Here it is a sum, divided by all tokens, so that channels of different experts can be
    compared: removing a channel of an expert that few tokens select costs little. Within an expert, the order is that
    of the paper.

    Args:
        context: the model, its tape and the cache.
        blocks: the layers.
        score: one of `SCORES`.

    Returns:
        The scores (E, F) of each layer, fp32.

    Reference: HEAPr, arXiv 2509.22299, section 3 (ICLR 2026).
    """
    names = {layer: f"channels-{score}-{layer:03d}" for layer in blocks}
    if score == "heapr":
        records = _by_gradients(context, blocks, names)
    else:

        def work(task: LayerTask) -> Record:
            return _encode(_norms(task.tape, task.tape.trace(context.model, task.layer), blocks[task.layer]))

        records = LayerwiseSearch(context).per_text(names, work, "scores of channels")
    return {layer: _decode(records[layer]) for layer in blocks}


@torch.no_grad()
def _norms(tape: Tape, traces: Sequence[LayerTrace], block: SparseBlock) -> Tensor:
    """Compute the scores of "norms" of one layer."""
    squares_EF = tape.texts.total(_inner_squares(block.weights, trace, weighted=True) for trace in traces)
    down_norms_EF = torch.stack([down_DF.double().norm(dim=0) for down_DF in block.weights.down_EDF])
    return squares_EF.sqrt() * down_norms_EF.cpu()


def _inner_squares(weights: MoEWeights, trace: LayerTrace, weighted: bool) -> Tensor:
    """Sum the squares of the activations over a text batch's tokens of each expert; (E, F) in fp64."""
    sums = []
    for expert in range(len(weights.down_EDF)):
        rows, weight_t = tokens_of(trace, expert)
        inner_tF = expert_inner(trace.x_TD[rows], weights, expert).double()
        sums.append(((weight_t[:, None] * inner_tF if weighted else inner_tF) ** 2).sum(dim=0))
    return torch.stack(sums)


def _by_gradients(
    context: SearchContext, blocks: Mapping[int, SparseBlock], names: Mapping[int, str]
) -> dict[int, Record]:
    """Return the records of "heapr". The layers are visited from the last one down, and only one is in memory."""
    model, cache = context.model, context.cache
    cached = {layer: cache.get(name) for layer, name in names.items()}
    records = {layer: record for layer, record in cached.items() if record is not None}
    missing = [layer for layer in blocks if layer not in records]
    with progress("scores of channels, by gradients", len(blocks)) as bar:
        bar.advance(len(records))
        if not missing:
            return records
        tape = context.tape()
        gradients = loss_gradients(model, tape, context.max_scratch_bytes)
        for layer in reversed(range(min(missing), tape.num_layers)):
            with layer_store(model).resident(layer):
                if layer in missing:
                    # A block adds its output to the residual stream, so both have the same gradient.
                    records[layer] = cache[names[layer]] = _encode(_second_order(model, tape, layer, gradients))
                    bar.advance()
                if layer > min(missing):
                    gradients = gradients_below(model, tape, layer, gradients)
    return records


@torch.no_grad()
def _second_order(model: PreTrainedModel, tape: Tape, layer: int, gradients: TensorList) -> Tensor:
    """Compute the scores of "heapr" of one layer, see `channel_scores`."""
    block = moe_blocks.sparse_blocks(model)[layer]
    traces = tape.trace(model, layer)
    counts_E, _ = routing_totals(tape, traces, block.num_experts)
    squares_EF = tape.texts.total(_inner_squares(block.weights, trace, weighted=False) for trace in traces)
    slopes_EF = tape.texts.total(
        _slopes(block.weights, trace, tape.real_tokens(index, gradients[index])) for index, trace in enumerate(traces)
    )
    return squares_EF * slopes_EF / counts_E.clamp_min(1)[:, None] / (2 * tape.num_tokens)


def _slopes(weights: MoEWeights, trace: LayerTrace, gradient_TD: Tensor) -> Tensor:
    """Sum (g·d_f)² over a text batch's tokens of each expert; (E, F) in fp64."""
    sums = []
    for expert, down_DF in enumerate(weights.down_EDF):
        rows, weight_t = tokens_of(trace, expert)
        slope_tF = (gradient_TD[rows].float() @ down_DF.float()).double()
        sums.append(((weight_t[:, None] * slope_tF) ** 2).sum(dim=0))
    return torch.stack(sums)


def _encode(scores_EF: Tensor) -> Record:
    """Return scores as JSON values; the text is half as long as that of a list of numbers."""
    values = scores_EF.float().cpu().numpy().astype("<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def _decode(record: Record) -> Tensor:
    values = np.frombuffer(base64.b64decode(record["float32"]), dtype="<f4").reshape(record["shape"])
    return torch.from_numpy(values.copy())
