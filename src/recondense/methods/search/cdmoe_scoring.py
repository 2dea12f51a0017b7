"""Score candidates for the retained experts of a condensed layer against the original model, on a Tape.

Legend: C candidates, T real tokens of a text batch, D hidden size, E routed experts, n experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.methods.search.coefficients import LayerRouting, shared_gate
from recondense.methods.search.divergence import Reference, jensen_shannon
from recondense.methods.search.routing import routing_totals
from recondense.models import decoder
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import expert_outputs
from recondense.models.tensor_store import nbytes

SCORE_TEMPORARIES = 6  # fp32 tensors of a chunk's size that exist at once while scoring
APART_ABOVE = 1e-4  # if the JS of the shared experts alone is above this, the shorter computation is precise enough
CPU_CHUNK = 2**18  # elements; larger chunks do not fit into a CPU's cache and take longer


class LayerScorer:
    """Scores candidates of one MoE layer: the JS between the hidden states after the original and the candidate layer.

    A candidate's hidden state differs from the original's by g·Shared(x) + Σ w̄_i·E_i(x) - MoE(x). This difference is
    computed directly, never by subtracting two hidden states. Use `prepare` to make a scorer.

    Attributes:
        coefficients: w̄_i, the mean routing weight of each expert over the tokens that select it; None if no token does.
        gate_mean: the mean of the shared experts' gate over all tokens; None without a gate.
        js_shared_only: the score with only the shared experts.
    """

    def __init__(self, tape: Tape, block: SparseBlock, norm: nn.Module | None, max_scratch_bytes: int) -> None:
        self.tape = tape
        self.block = block
        self.norm = norm  # the final norm, if the layer is the last one
        self.max_scratch_bytes = max_scratch_bytes
        self.coefficients: list[float | None] = []
        self.gate_mean: float | None = None
        self.js_shared_only = math.nan
        # One entry per text batch:
        self.x = tape.storage.tensor_list()
        self.differences = tape.storage.tensor_list()  # g·Shared(x) + Σ w̄_i·E_i(x) - MoE(x), experts added so far
        self.hidden = tape.storage.tensor_list()
        self._references: dict[int, Reference] = {}
        self._held: dict[int, Tensor] = {}  # outputs of all experts
        self._holds_outputs = False
        self._apart = False

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        tape: Tape,
        block: SparseBlock,
        mean_gate: bool,
        max_scratch_bytes: int,
        routing: LayerRouting | None = None,
    ) -> LayerScorer:
        """Compute the coefficients and the outputs of the shared experts, and score the shared experts alone.

        Args:
            model: the recorded model; it stays bit-identical.
            tape: its hidden states before and after the layer, on all texts.
            block: the layer.
            mean_gate: replace the shared experts' gate by its mean over the calibration tokens.
            max_scratch_bytes: bound on temporary tensors.
            routing: the layer's routing on the texts that the coefficients come from; None for those of the tape.
        """
        last = block.layer == tape.num_layers - 1
        scorer = cls(tape, block, decoder.final_norm(model) if last else None, max_scratch_bytes)
        traces = tape.trace(model, block.layer)
        gates = [shared_gate(block, trace.x_TD) for trace in traces]
        scorer._set_routing(routing or _routing_on_tape(tape, traces, gates, block.num_experts))
        constant = scorer.gate_mean if mean_gate else None
        for index, (trace, gate_T1) in enumerate(zip(traces, gates, strict=True)):
            shared_TD = torch.zeros_like(trace.output_TD, dtype=torch.float32)
            if block.shared_expert is not None:
                shared_TD += block.shared_expert(trace.x_TD)
                if gate_T1 is not None:
                    shared_TD *= gate_T1 if constant is None else constant
            scorer.x.append(trace.x_TD)
            scorer.differences.append(shared_TD - trace.output_TD)
            scorer.hidden.append(tape.real_tokens(index, tape.states[block.layer + 1][index]).float())
        scorer._holds_outputs = block.num_experts * nbytes(scorer.x) <= max_scratch_bytes // 2
        scorer.js_shared_only = float(scorer.score([None])[0])
        scorer._apart = scorer.js_shared_only > APART_ABOVE
        return scorer

    def _set_routing(self, routing: LayerRouting) -> None:
        self.routing = routing
        self.gate_mean = routing.gate_mean
        self.coefficients = [
            total / count if count > 0 else None for total, count in zip(routing.weights, routing.selected, strict=True)
        ]

    def statistics(self) -> dict[str, Any]:
        """Return the routing statistics for the plan: JSON values, one entry per routed expert."""
        return {
            "coefficients": self.coefficients,
            "selected": self.routing.selected,
            "mean_routing_weight": [weight / self.routing.num_tokens for weight in self.routing.weights],
            "shared_gate_mean": self.gate_mean,
        }

    def add(self, expert: int) -> None:
        """Add an expert to all later candidates."""
        weight = self.coefficients[expert]
        assert weight is not None
        for index in range(len(self.x)):
            added_TD = weight * self._outputs(index, [expert])[0].float()
            self.differences[index] = self.differences[index] + added_TD

    def score(self, candidates: Sequence[int | None]) -> Tensor:
        """Compute the JS (C,), fp64, with each candidate retained in addition. The candidate None adds no expert."""
        return self.tape.texts.mean_over_texts(self._score_batch(index, candidates) for index in range(len(self.x)))

    def _score_batch(self, index: int, candidates: Sequence[int | None]) -> Tensor:
        """Compute the JS (C, T) of one text batch."""
        difference_TD = self.differences[index]
        js_CT = difference_TD.new_empty(len(candidates), difference_TD.shape[0], dtype=torch.float32)
        batch = self._reference(index), difference_TD, None if self.norm is None else self.hidden[index]
        groups, chunks = self._chunks(difference_TD, candidates)
        for group in groups:
            experts = [expert for expert in candidates[group] if expert is not None]
            outputs_CTD = self._outputs(index, experts) if experts else None
            for rows in chunks:
                js_CT[group, rows] = self._score_chunk(*batch, rows, experts, outputs_CTD)
        return js_CT

    def _reference(self, index: int) -> Reference:
        """Return the original's part of the divergence for a text batch; kept in memory unless the tape is on disk."""
        if index in self._references:
            return self._references[index]
        hidden_TD = self.hidden[index]
        reference = Reference.prepare(hidden_TD if self.norm is None else self.norm(hidden_TD))
        if isinstance(self.hidden, list):
            self._references[index] = reference
        return reference

    def _score_chunk(
        self,
        batch: Reference,
        differences_TD: Tensor,
        hidden_TD: Tensor | None,
        rows: slice,
        experts: list[int],
        outputs_CTD: Tensor | None,
    ) -> Tensor:
        """Compute the JS (C, rows) with each of the experts added, or without an added expert if there are none."""
        reference = Reference(*(tensor[rows] for tensor in batch))
        difference_TD = differences_TD[rows]
        if outputs_CTD is None:
            difference_CTD = difference_TD.unsqueeze(0).clone()
        else:
            weights_C = torch.tensor([self.coefficients[expert] for expert in experts], device=difference_TD.device)
            weights_C11 = weights_C.float()[:, None, None]
            difference_CTD = torch.addcmul(difference_TD, outputs_CTD[:, rows].float(), weights_C11)
        if self.norm is not None:
            assert hidden_TD is not None
            difference_CTD = self.norm(difference_CTD.add_(hidden_TD[rows])) - reference.logits_TD
        return jensen_shannon(reference, difference_CTD, self._apart)

    def _outputs(self, index: int, experts: list[int]) -> Tensor:
        """Compute the outputs (n, T, D) of consecutive experts for a text batch; kept if those of all batches fit."""
        block = self.block
        if not self._holds_outputs:
            return expert_outputs(self.x[index], block.weights, experts)
        if index not in self._held:
            self._held[index] = expert_outputs(self.x[index], block.weights, range(block.num_experts))
        return self._held[index][experts[0] : experts[-1] + 1]  # a view

    def _chunks(self, difference_TD: Tensor, candidates: Sequence[int | None]) -> tuple[list[slice], list[slice]]:
        """Split the candidates into groups of consecutive experts, and the tokens into chunks.

        Temporaries then fit into half of the scratch bound; the other half is for the experts' outputs. Each row is
        scored independently, so its bits do not depend on the chunk.
        """
        num_tokens, width = difference_TD.shape
        elements = self.max_scratch_bytes // (2 * 4 * SCORE_TEMPORARIES)
        if difference_TD.device.type == "cpu":
            elements = min(elements, CPU_CHUNK)
        rows = min(num_tokens, max(1, elements // width))
        size = max(1, elements // (rows * width))
        groups, first = [], 0
        for position in range(1, len(candidates) + 1):
            previous = candidates[position - 1]
            follows = position < len(candidates) and previous is not None and candidates[position] == previous + 1
            if position - first == size or not follows:
                groups.append(slice(first, position))
                first = position
        return groups, [slice(row, row + rows) for row in range(0, num_tokens, rows)]


def _routing_on_tape(
    tape: Tape, traces: Sequence[LayerTrace], gates: Sequence[Tensor | None], num_experts: int
) -> LayerRouting:
    counts_E, sums_E = routing_totals(tape, traces, num_experts)
    present = [gate_T1 for gate_T1 in gates if gate_T1 is not None]
    gate_mean = float(torch.cat(present).double().mean()) if present else None
    return LayerRouting(counts_E.tolist(), sums_E.tolist(), gate_mean, tape.num_tokens)
