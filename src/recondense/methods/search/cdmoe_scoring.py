"""How candidates for the experts of one layer are scored against the original model on a Tape.

Legend: C candidates, T real tokens of a block, D hidden size, E routed experts, K top-k, n experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.divergence import Reference, js_from_difference
from recondense.methods.search.routing import routing_totals
from recondense.models import decoder
from recondense.models.blocks import expert_outputs
from recondense.models.tensor_store import nbytes
from recondense.models.views import SparseBlock

SCORE_TEMPORARIES = 6  # fp32 tensors of a chunk's size that scoring holds at once
APART_ABOVE = 1e-4  # a layer whose shared experts alone are further than this is scored by the shorter computation
CPU_CHUNK = 2**18  # elements: larger chunks leave a CPU's cache and take longer


class LayerScorer:
    """Scores candidates of one MoE layer: JS between the original's hidden state after the layer and a candidate's.

    A candidate's hidden state differs from the original's by g·Shared(x) + Σ w̄_i·E_i(x) - MoE(x), which is computed
    directly, never as the difference of two hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, tape: Tape, block: SparseBlock, mean_gate: bool, max_scratch_bytes: int
    ) -> None:
        self.tape = tape
        self.block = block
        self.max_scratch_bytes = max_scratch_bytes
        last = block.layer == tape.num_layers - 1
        self.norm: nn.Module | None = decoder.final_norm(model) if last else None
        traces = tape.trace(model, block.layer)
        self.x = tape.storage.shelf()
        for trace in traces:
            self.x.append(trace.x_TD)
        self.counts_E, self.sums_E = routing_totals(tape, traces, block.num_experts)
        used = self.counts_E > 0
        self.coefficients: list[float | None] = [
            float(total / count) if hit else None
            for total, count, hit in zip(self.sums_E, self.counts_E, used, strict=True)
        ]
        gates = [_shared_gate(block, x_TD) for x_TD in self.x]
        self.gate_mean = None if gates[0] is None else float(torch.cat(gates).double().mean())  # type: ignore[arg-type]
        self.differences = tape.storage.shelf()
        self.hidden = tape.storage.shelf()
        self._references: dict[int, Reference] = {}
        for index, (trace, gate_T1) in enumerate(zip(traces, gates, strict=True)):
            shared_TD = torch.zeros_like(trace.output_TD, dtype=torch.float32)
            if block.shared_expert is not None:
                shared_TD += block.shared_expert(trace.x_TD)
                if gate_T1 is not None:
                    shared_TD *= gate_T1 if self.gate_mean is None or not mean_gate else self.gate_mean
            self.differences.append(shared_TD - trace.output_TD)
            self.hidden.append(tape.real_tokens(index, tape.states[block.layer + 1][index]).float())
        self._device = traces[0].x_TD.device
        self._hold = self._experts_bytes() <= max_scratch_bytes // 2
        self._held: dict[int, Tensor] = {}
        self.apart = False
        self.js_shared_only = float(self.score([None])[0])
        self.apart = self.js_shared_only > APART_ABOVE

    def statistics(self) -> dict[str, Any]:
        """What the plan keeps of the routing: JSON values, one entry a routed expert."""
        return {
            "coefficients": self.coefficients,
            "selected": self.counts_E.tolist(),
            "mean_routing_weight": (self.sums_E / self.tape.num_tokens).tolist(),
            "shared_gate_mean": self.gate_mean,
        }

    def add(self, expert: int) -> None:
        """Retain an expert: every later candidate contains it."""
        weight = self.coefficients[expert]
        assert weight is not None
        for index in range(len(self.x)):
            added_TD = weight * self._outputs(index, [expert])[0].float()
            self.differences[index] = self.differences[index] + added_TD

    def score(self, candidates: Sequence[int | None]) -> Tensor:
        """JS when one more expert is retained, for each candidate; None is the layer as it is. (C,) in fp64."""
        return self.tape.texts.mean_over_texts(self._score_block(index, candidates) for index in range(len(self.x)))

    def _score_block(self, index: int, candidates: Sequence[int | None]) -> Tensor:
        """JS (C, T) of one block of texts."""
        difference_TD = self.differences[index]
        js_CT = difference_TD.new_empty(len(candidates), difference_TD.shape[0], dtype=torch.float32)
        of_block = self._reference(index), difference_TD, None if self.norm is None else self.hidden[index]
        groups, rows_of = self._chunks(len(difference_TD), difference_TD.shape[1], candidates)
        for group in groups:
            experts = [expert for expert in candidates[group] if expert is not None]
            outputs_CTD = self._outputs(index, experts) if experts else None
            for rows in rows_of:
                js_CT[group, rows] = self._score_chunk(*of_block, rows, experts, outputs_CTD)
        return js_CT

    def _reference(self, index: int) -> Reference:
        """The original's side of a block of texts; on the disk nothing is held that can be computed again."""
        if index in self._references:
            return self._references[index]
        hidden_TD = self.hidden[index]
        found = Reference.of(hidden_TD if self.norm is None else self.norm(hidden_TD))
        if isinstance(self.hidden, list):
            self._references[index] = found
        return found

    def _score_chunk(
        self,
        of_block: Reference,
        differences_TD: Tensor,
        hidden_TD: Tensor | None,
        rows: slice,
        experts: list[int],
        outputs_CTD: Tensor | None,
    ) -> Tensor:
        """JS (C, rows) of the layer with each of some experts added, or as it is if there are none."""
        reference = Reference(*(tensor[rows] for tensor in of_block))
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
        return js_from_difference(reference, difference_CTD, self.apart)

    def _outputs(self, index: int, experts: list[int]) -> Tensor:
        """Outputs of consecutive experts for the tokens of a block, (n, T, D); held throughout if they fit."""
        block = self.block
        if not self._hold:
            return expert_outputs(self.x[index], block.weights, experts)
        if index not in self._held:
            self._held[index] = expert_outputs(self.x[index], block.weights, range(block.num_experts))
        return self._held[index][experts[0] : experts[-1] + 1]  # a view

    def _experts_bytes(self) -> int:
        return self.block.num_experts * nbytes(self.x)

    def _chunks(self, num_tokens: int, width: int, candidates: Sequence[int | None]) -> tuple[list[slice], list[slice]]:
        """Cut candidates, into consecutive experts, and tokens so that temporaries fit half the scratch bound.

        The other half is for experts' outputs: held, or those of one group. Every row is scored on its own: its bits do
        not depend on the chunk.
        """
        elements = self.max_scratch_bytes // (2 * 4 * SCORE_TEMPORARIES)
        if self._device.type == "cpu":
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


def _shared_gate(block: SparseBlock, x_TD: Tensor) -> Tensor | None:
    """sigmoid of the shared experts' gate, (T, 1) in fp32; None without one."""
    if block.shared_expert_gate is None:
        return None
    return torch.sigmoid(block.shared_expert_gate(x_TD).float())
