"""The damage of changed layers: the divergence of the model's final hidden state from the original's on a Tape.

Legend: B texts of a batch, S their padded length, T real tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.divergence import Reference, js_from_difference
from recondense.methods.search.rerun import Change, Rerun
from recondense.models import decoder
from recondense.models.tensor_store import TensorList


class Damage:
    """Jensen-Shannon divergence after the final norm, for any changed blocks.

    Args:
        model: as it was taped. Blocks are swapped in while measuring and out again.
        tape: its hidden states.

    Reference: the layer search of CD-MoE, arXiv 2412.00069, section 3.3.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self._rerun = Rerun(model, tape)
        self._references: dict[int, Reference] = {}

    def put(self, blocks: Mapping[int, nn.Module]) -> None:
        """Put blocks into the model, by layer, for all later measurements. Other layers keep theirs."""
        self._rerun.put(blocks)

    def replace(self, blocks: Mapping[int, nn.Module]) -> float:
        """Put these blocks into the original model for all later measurements; return their damage together."""
        self._rerun.reset()
        self._rerun.put(blocks)
        self._rerun.final_states([])
        return self.score(self._rerun.states[-1])

    def measure(self, changes: Sequence[Change]) -> list[float]:
        """The damage under each change, with the present blocks in all other layers."""
        return [self.score(final) for final in self._rerun.final_states(changes)]

    @torch.no_grad()
    def score(self, final: TensorList) -> float:
        """The divergence of the states (B, S, D) that leave the last layer, one for each text batch."""
        js = []
        for index, hidden_BSD in enumerate(final):
            reference = self._reference(index)
            js.append(js_from_difference(reference, (self._normed(index, hidden_BSD) - reference.logits_TD)[None]))
        return float(self.tape.texts.mean_over_texts(js)[0])

    def _reference(self, index: int) -> Reference:
        """The original's side for one text batch; not kept if the tape is on disk, where it can be computed again."""
        if index in self._references:
            return self._references[index]
        reference = Reference.prepare(self._normed(index, self.tape.states[-1][index]))
        if isinstance(self.tape.states[-1], list):
            self._references[index] = reference
        return reference

    def _normed(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """The real tokens after the final norm, (T, D) in fp32."""
        normed_TD: Tensor = decoder.final_norm(self.model)(self.tape.real_tokens(index, hidden_BSD))
        return normed_TD.float()
