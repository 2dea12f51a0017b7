"""What CD-MoE's coefficients and mean gates come from: the routing of whole texts, or of their beginnings.

The searches compare hidden states on the tape, whose texts are truncated. The authors take the coefficients from whole
texts, which need one more forward pass. Of that pass only sums are kept.

Legend: B texts of a batch, S their padded length, T real tokens of a batch, D hidden size, E routed experts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.text_batches import TextBatch, TextBatches
from recondense.calibration.trace import LayerTrace, record_calls
from recondense.data.calibration_set import CalibrationSet
from recondense.errors import UserError
from recondense.methods.search.routing import count_and_sum
from recondense.methods.step import Record, SearchContext
from recondense.models import decoder, forward, moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.moe_blocks import SparseBlock
from recondense.progress import progress

log = logging.getLogger(__name__)
TOKENS_PER_BATCH = 2048  # with padding, as on a tape of 256 tokens per text; longer texts are batches of their own


@dataclass(frozen=True)
class LayerRouting:
    """The decisions of one layer's router on some texts.

    Args:
        selected: for each expert, the number of tokens that select it.
        weights: for each expert, the sum of its routing weights over these tokens.
        gate_mean: the mean of the shared experts' gate over all tokens; None without a gate.
        num_tokens: the number of all tokens.
    """

    selected: list[int]
    weights: list[float]
    gate_mean: float | None
    num_tokens: int


@dataclass(frozen=True)
class CoefficientTexts:
    """The texts that the coefficients come from, where they are not those of the tape.

    Args:
        ids: the token ids of each text.
        max_length: the setting `coefficient_max_length`.
        cut: the number of texts that were cut because they are longer than the model's positions.
    """

    ids: list[list[int]]
    max_length: int | None
    cut: int

    @property
    def suffix(self) -> str:
        """The end of the names of all cached results that depend on these texts."""
        return f"-{CalibrationSet(self.ids).fingerprint()[:16]}"

    def describe(self) -> Record:
        """Return an entry for the plan."""
        return {"max_length": self.max_length, "tokens": sum(map(len, self.ids))}


def coefficient_texts(context: SearchContext, max_length: int | None) -> CoefficientTexts | None:
    """Return the texts that the coefficients come from; None if they are exactly those of the tape.

    Texts longer than the model's positions are cut there, but never shorter than on the tape.

    Args:
        context: the model, and the token ids of its calibration set.
        max_length: maximum number of tokens per text; None for whole texts.
    """
    texts = context.calibration_set
    if texts is None:
        return None
    positions = decoder.max_positions(context.model.config)
    limit = None if positions is None else max(positions, *map(len, texts.ids))
    lengths = [length for length in (max_length, limit) if length is not None]
    ids = texts.up_to(min(lengths, default=None))
    if ids is texts.ids:
        return None
    cut = sum(limit is not None and len(text) > limit for text in texts.up_to(max_length))
    return CoefficientTexts(ids, max_length, cut)


def measure_routing(context: SearchContext, texts: CoefficientTexts) -> dict[int, LayerRouting]:
    """Return the routing of each sparse layer on some texts, or read it from the cache.

    All processes must call this function together if they share the texts.

    Raises:
        UserError: a routing weight is not finite; the message names the layer.
    """
    name = f"routing{texts.suffix}"
    record = context.cache.get(name)
    if record is None:
        if texts.cut:
            text = "coefficients: %d of %d texts are cut at the %d positions of the model"
            log.info(text, texts.cut, len(texts.ids), max(map(len, texts.ids)))
        routing = _run(context.model, texts.ids, context.split)
        record = {str(layer): asdict(entry) for layer, entry in routing.items()}
        context.cache[name] = record
    return {int(layer): LayerRouting(**entry) for layer, entry in record.items()}


def shared_gate(block: SparseBlock, x_TD: Tensor) -> Tensor | None:
    """Compute the sigmoid of the shared experts' gate (T, 1), fp32; None without a gate."""
    if block.shared_expert_gate is None:
        return None
    return torch.sigmoid(block.shared_expert_gate(x_TD).float())


def batches_by_length(ids: Sequence[Sequence[int]]) -> list[TextBatch]:
    """Put texts into padded batches of at most TOKENS_PER_BATCH positions, longest first.

    The batches depend on the texts alone, so sums over them do not depend on the number of processes.
    """
    groups: list[list[list[int]]] = []
    for text in sorted(map(list, ids), key=len, reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= TOKENS_PER_BATCH:
            groups[-1].append(text)
        else:
            groups.append([text])
    padded = (next(CalibrationSet(group).batches(len(group))) for group in groups)
    return [TextBatch(ids_BS, mask_BS) for ids_BS, mask_BS in padded]


@torch.no_grad()
def _run(model: PreTrainedModel, ids: Sequence[Sequence[int]], split: bool) -> dict[int, LayerRouting]:
    """Run texts through the model up to its last sparse layer, and sum up what its routers and gates return."""
    device, blocks = decoder.device(model), moe_blocks.sparse_blocks(model)
    on_device = [TextBatch(batch.input_ids_BS.to(device), batch.mask_BS.to(device)) for batch in batches_by_length(ids)]
    texts = TextBatches(on_device, split)
    # A streamed model reads each layer once, for all batches; otherwise the states of one batch are enough.
    groups = [texts.local] if layer_store(model).streamed else [[batch] for batch in texts.local]
    sums: list[Tensor] = []  # one per batch: for each sparse layer the counts, weights and gate
    with eval_mode(model), progress("coefficients from whole texts", len(groups)) as bar:
        for group in groups:
            sums += [torch.cat(parts) for parts in _run_group(model, blocks, group)]
            bar.advance()
    sizes = [2 * block.num_experts + 1 for block in blocks.values()]
    totals = texts.total(sums).split(sizes)
    return {
        layer: _layer_routing(block, total, texts.num_tokens)
        for (layer, block), total in zip(blocks.items(), totals, strict=True)
    }


def _run_group(
    model: PreTrainedModel, blocks: dict[int, SparseBlock], batches: Sequence[TextBatch]
) -> list[list[Tensor]]:
    """Run some batches layer by layer; return for each batch the sums (2E + 1,) of each sparse layer, fp64."""
    sums: list[list[Tensor]] = [[] for _ in batches]
    storage, arguments = layer_store(model).tensor_storage(), forward.LayerArguments(model)
    inputs = [{"input_ids": batch.input_ids_BS} for batch in batches]
    states = storage.tensor_list()
    for entry in inputs:
        states.append(arguments.enter(entry))
    for layer in range(max(blocks) + 1):
        entering, states = states, storage.tensor_list()
        sparse = [layer] if layer in blocks else []
        with layer_store(model).resident(layer), record_calls(model, sparse) as calls:
            for index, hidden_BSD in enumerate(entering):
                states.append(forward.run_layer(model, layer, hidden_BSD, arguments.get(layer, inputs[index])))
                for call in calls.values():
                    sums[index].append(_sums(blocks[layer], LayerTrace.from_call(call, batches[index])))
    return sums


def _sums(block: SparseBlock, trace: LayerTrace) -> Tensor:
    """Return how many tokens select each expert, the sums of their weights, and the sum of the gate (2E + 1,), fp64."""
    counts_E, weights_E = count_and_sum(trace, block.num_experts)
    gate_T1 = shared_gate(block, trace.x_TD)
    gate = weights_E.new_zeros(1) if gate_T1 is None else gate_T1.double().sum().reshape(1)
    return torch.cat([counts_E.double(), weights_E, gate])


def _layer_routing(block: SparseBlock, total: Tensor, num_tokens: int) -> LayerRouting:
    if not bool(total.isfinite().all()):
        raise UserError(
            f"calibration: a routing weight of decoder layer {block.layer} is NaN or infinite on the whole texts; "
            "check the model's weights, use model.dtype=float32 if it overflows in half precision, or limit the texts "
            "with method.coefficient_max_length"
        )
    counts_E, weights_E, gate = total.split([block.num_experts, block.num_experts, 1])
    gate_mean = None if block.shared_expert_gate is None else float(gate) / num_tokens
    return LayerRouting([int(count) for count in counts_E], weights_E.tolist(), gate_mean, num_tokens)
