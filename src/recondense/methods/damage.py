"""What changing layers does to a model: the divergence of its final hidden state from the original's on the Tape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import families
from recondense.losses import Reference, js_from_difference
from recondense.modes import evaluating

if TYPE_CHECKING:
    from recondense.calibrate import Tape


class Damage:
    """Jensen-Shannon divergence after the final norm, as CD-MoE's layer search measures it, for any changed blocks.

    Nothing below a changed layer runs again; beside the tape, one set of states under the chosen blocks is held.

    Args:
        model: as the tape saw it; blocks are swapped in while measuring and out again.
        tape: its hidden states.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self.references = [Reference.of(self._normed(index, state)) for index, state in enumerate(tape.states[-1])]
        self.chosen: dict[int, nn.Module] = {}
        self.states = tape.states

    def choose(self, blocks: Mapping[int, nn.Module]) -> float:
        """Let these blocks stand in the model from now on; the damage that they do together."""
        self.chosen = dict(blocks)
        states = [list(each) for each in self.tape.states]
        for index in range(len(self.tape.blocks)):
            for layer, hidden_BSD in self._climb(min(blocks, default=self.tape.num_layers), index, self.tape.states):
                states[layer + 1][index] = hidden_BSD
        self.states = states
        return self._score([each for each in states[-1]])

    def of(self, layer: int, block: nn.Module | None) -> float:
        """The damage with one layer's block in place of what is chosen for it; None: the original's."""
        before = self.chosen
        self.chosen = {other: module for other, module in before.items() if other != layer}
        if block is not None:
            self.chosen[layer] = block
        try:
            final = []
            for index in range(len(self.tape.blocks)):
                *_, (_, hidden_BSD) = self._climb(layer, index, self.states)
                final.append(hidden_BSD)
            return self._score(final)
        finally:
            self.chosen = before

    @torch.no_grad()
    def _climb(self, first: int, index: int, states: list[list[Tensor]]) -> list[tuple[int, Tensor]]:
        """Run one block of texts from a layer's input to the end; the state leaving each layer."""
        found = []
        with families.swapped(self.model, self.chosen), evaluating(self.model):
            hidden_BSD = states[first][index]
            for layer in range(first, self.tape.num_layers):
                hidden_BSD = self.tape.run_layer(self.model, layer, index, hidden_BSD)
                found.append((layer, hidden_BSD))
        return found

    @torch.no_grad()
    def _score(self, final: list[Tensor]) -> float:
        js = [
            js_from_difference(reference, (self._normed(index, hidden_BSD) - reference.logits_TD).unsqueeze(0))
            for index, (reference, hidden_BSD) in enumerate(zip(self.references, final, strict=True))
        ]
        return float(self.tape.mean_over_texts(js)[0])

    @torch.no_grad()
    def _normed(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """The real tokens after the final norm, (T, D) in fp32."""
        normed_TD: Tensor = families.final_norm(self.model)(self.tape.real_tokens(index, hidden_BSD))
        return normed_TD.float()
