"""Runs from a changed layer to the top of the model, of many changes at a time, on the states of a Tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.models import views
from recondense.models.hooks import evaluating
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Shelf


@dataclass(frozen=True)
class Start:
    """A change of one layer that is to be tried.

    Args:
        layer: decoder-layer index.
        block: makes what stands in its place, when the layer has its weights; None: the layer as it is.
    """

    layer: int
    block: Callable[[], nn.Module | None] = lambda: None


class Climb:
    """The model with some blocks in place of its own, and the states that enter its layers then.

    Nothing below a changed layer runs again. All that is tried goes through a layer before the next one is needed, so
    that each layer's weights are read once, whatever is tried. Beside the tape it holds the states under the blocks
    that stand, and one layer's states for each change that is tried.

    Args:
        model: as the tape saw it; blocks are swapped in while running and out again.
        tape: its hidden states.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self.standing: dict[int, nn.Module] = {}
        self.states: list[Shelf] = list(tape.states)
        self._valid = tape.num_layers  # up to this layer the states are those under the blocks that stand

    def stand(self, blocks: Mapping[int, nn.Module]) -> None:
        """Let these blocks stand from now on, beside those that do already."""
        self.standing |= blocks
        self._valid = min([self._valid, *blocks])

    def clear(self) -> None:
        """Let the original stand again."""
        self.standing = {}
        self.states, self._valid = list(self.tape.states), self.tape.num_layers

    @torch.no_grad()
    def final(self, starts: Sequence[Start]) -> list[Shelf]:
        """The states leaving the last layer with each change, in place of what stands in its layer."""
        live: dict[int, Shelf] = {}
        lowest = min([self._valid, *(start.layer for start in starts)])
        with evaluating(self.model):
            for layer in range(lowest, self.tape.num_layers):
                stands = self.standing.get(layer)
                for number in live:
                    live[number] = self._through(layer, stands, live[number])
                for number, start in enumerate(starts):
                    if start.layer == layer:
                        with layer_store(self.model).resident(layer):
                            live[number] = self._through(layer, start.block(), self.states[layer])
                if layer >= self._valid:
                    self.states[layer + 1] = self._through(layer, stands, self.states[layer])
        self._valid = self.tape.num_layers
        return [live[number] for number in range(len(starts))]

    def _through(self, layer: int, block: nn.Module | None, states: Shelf) -> Shelf:
        """All blocks of texts through one layer, with another block in it."""
        found = self.tape.storage.shelf()
        with views.swapped(self.model, {} if block is None else {layer: block}), evaluating(self.model):
            for index, hidden_BSD in enumerate(states):
                found.append(self.tape.run_layer(self.model, layer, index, hidden_BSD))
        return found
