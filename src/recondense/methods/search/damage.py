"""Measure the damage of changed layers: the divergence of the final hidden state from the original's, on a Tape.

Legend: B texts of a batch, S their padded length, T real tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.divergence import Reference, jensen_shannon
from recondense.methods.search.rerun import Change, Rerun
from recondense.models import decoder
from recondense.models.tensor_store import TensorList


class Damage:
    """Measures the Jensen-Shannon divergence after the final norm for any changed blocks.

    Args:
        model: the recorded model. Changed blocks are in it only while it runs.
        tape: its hidden states.

    Reference: the layer search of CD-MoE, arXiv 2412.00069, section 3.3.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self._rerun = Rerun(model, tape)
        self._references: dict[int, Reference] = {}

    def put(self, blocks: Mapping[int, nn.Module]) -> None:
        """Use these blocks, by layer, in all later measurements. The blocks of other layers do not change."""
        self._rerun.put(blocks)

    def replace(self, blocks: Mapping[int, nn.Module]) -> float:
        """Use these blocks in the otherwise original model in all later measurements, and return their total damage."""
        self._rerun.reset()
        self._rerun.put(blocks)
        self._rerun.final_states([])
        return self.score(self._rerun.states[-1])

    def measure(self, changes: Sequence[Change]) -> list[float]:
        """Return the damage of each change, with the current blocks in all other layers."""
        return [self.score(final) for final in self._rerun.final_states(changes)]

    @torch.no_grad()
    def score(self, final: TensorList) -> float:
        """Compute the mean divergence of the states that leave the last layer, given as (B, S, D) per text batch."""
        js = []
        for index, hidden_BSD in enumerate(final):
            reference = self._reference(index)
            js.append(jensen_shannon(reference, (self._normed(index, hidden_BSD) - reference.logits_TD)[None]))
        return float(self.tape.texts.mean_over_texts(js)[0])

    def _reference(self, index: int) -> Reference:
        """Return the original's part of the divergence for a text batch; kept in memory unless the tape is on disk."""
        if index in self._references:
            return self._references[index]
        reference = Reference.prepare(self._normed(index, self.tape.states[-1][index]))
        if isinstance(self.tape.states[-1], list):
            self._references[index] = reference
        return reference

    def _normed(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """Apply the final norm to the real tokens; (T, D), fp32."""
        normed_TD: Tensor = decoder.final_norm(self.model)(self.tape.real_tokens(index, hidden_BSD))
        return normed_TD.float()
