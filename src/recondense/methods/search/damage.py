"""What changing layers does to a model: the divergence of its final hidden state from the original's on the Tape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.divergence import Reference, js_from_difference
from recondense.methods.search.rerun import Climb, Start
from recondense.models import decoder
from recondense.models.tensor_store import Shelf


class Damage:
    """Jensen-Shannon divergence after the final norm, as CD-MoE's layer search measures it, for any changed blocks.

    Args:
        model: as the tape saw it; blocks are swapped in while measuring and out again.
        tape: its hidden states.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self._climb = Climb(model, tape)
        self._references: dict[int, Reference] = {}

    def stand(self, blocks: Mapping[int, nn.Module]) -> None:
        """Let these blocks stand in the model from now on, beside those that do already."""
        self._climb.stand(blocks)

    def choose(self, blocks: Mapping[int, nn.Module]) -> float:
        """Let these blocks alone stand in the model from now on; the damage that they do together."""
        self._climb.clear()
        self._climb.stand(blocks)
        self._climb.final([])
        return self.score(self._climb.states[-1])

    def of(self, starts: Sequence[Start]) -> list[float]:
        """The damage with each change, in place of what stands in its layer."""
        return [self.score(final) for final in self._climb.final(starts)]

    @torch.no_grad()
    def score(self, final: Shelf) -> float:
        """The divergence of states leaving the last layer, one a block of texts."""
        js = []
        for index, hidden_BSD in enumerate(final):
            reference = self._reference(index)
            js.append(js_from_difference(reference, (self._normed(index, hidden_BSD) - reference.logits_TD)[None]))
        return float(self.tape.texts.mean_over_texts(js)[0])

    def _reference(self, index: int) -> Reference:
        """The original's side; on the disk nothing is held that can be computed again."""
        if index in self._references:
            return self._references[index]
        found = Reference.of(self._normed(index, self.tape.states[-1][index]))
        if isinstance(self.tape.states[-1], list):
            self._references[index] = found
        return found

    def _normed(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """The real tokens after the final norm, (T, D) in fp32."""
        normed_TD: Tensor = decoder.final_norm(self.model)(self.tape.real_tokens(index, hidden_BSD))
        return normed_TD.float()
