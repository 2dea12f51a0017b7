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
        self.states = [list(each) for each in tape.states]

    def choose(self, blocks: Mapping[int, nn.Module]) -> float:
        """Let these blocks stand in the model from now on; the damage that they do together."""
        self.chosen = {}
        self.states = [list(each) for each in self.tape.states]
        if not blocks:
            return self.score(self.states[-1])
        first = min(blocks)
        self.chosen = dict(blocks)
        self.keep(first, blocks[first], self.above(first, blocks[first]))
        return self.score(self.states[-1])

    def keep(self, layer: int, block: nn.Module, above: list[list[Tensor]]) -> None:
        """Let a block stand in the model from now on, with the states that `above` gave for it."""
        self.chosen[layer] = block
        for index, states in enumerate(above):
            for offset, state in enumerate(states, start=layer + 1):
                self.states[offset][index] = state

    def of(self, layer: int, block: nn.Module | None) -> float:
        """The damage with one layer's block in place of what is chosen for it; None: the original's."""
        return self.score([self._climb(layer, block, index)[-1] for index in range(len(self.tape.blocks))])

    def above(self, layer: int, block: nn.Module | None) -> list[list[Tensor]]:
        """For each block of texts, the states leaving a layer with this block in it, and every layer above."""
        return [self._climb(layer, block, index) for index in range(len(self.tape.blocks))]

    @torch.no_grad()
    def score(self, final: list[Tensor]) -> float:
        """The divergence of states leaving the last layer, one a block of texts."""
        js = [
            js_from_difference(reference, (self._normed(index, hidden_BSD) - reference.logits_TD).unsqueeze(0))
            for index, (reference, hidden_BSD) in enumerate(zip(self.references, final, strict=True))
        ]
        return float(self.tape.mean_over_texts(js)[0])

    @torch.no_grad()
    def _climb(self, layer: int, block: nn.Module | None, index: int) -> list[Tensor]:
        """One block of texts, from a layer's input to the end."""
        others = {other: module for other, module in self.chosen.items() if other != layer}
        found = [self.states[layer][index]]
        with (
            families.swapped(self.model, others if block is None else {**others, layer: block}),
            evaluating(self.model),
        ):
            for each in range(layer, self.tape.num_layers):
                found.append(self.tape.run_layer(self.model, each, index, found[-1]))
        return found[1:]

    @torch.no_grad()
    def _normed(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """The real tokens after the final norm, (T, D) in fp32."""
        normed_TD: Tensor = families.final_norm(self.model)(self.tape.real_tokens(index, hidden_BSD))
        return normed_TD.float()
