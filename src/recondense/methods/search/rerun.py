"""Rerun a model from a changed layer upwards, for many changes at a time, on the states of a Tape.

Legend: B texts of a batch, S their padded length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.models import moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import TensorList


@dataclass(frozen=True)
class Change:
    """A block to try in one layer.

    Args:
        layer: decoder-layer index.
        block: makes the block; called while the layer's weights are in memory. If it returns None, the original block
            is used.
    """

    layer: int
    block: Callable[[], nn.Module | None] = lambda: None


class Rerun:
    """A model with replaced blocks in some layers, and the states that enter its layers.

    Layers below a changed layer never run again. All changes run through a layer before the next layer is needed, so
    that each layer's weights are read once for all changes. Apart from the tape, the states with the current blocks are
    in memory, and the states of one layer for each change.

    Args:
        model: the recorded model. Replaced blocks are in it only while it runs.
        tape: its hidden states.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self.blocks: dict[int, nn.Module] = {}
        self.states: list[TensorList] = list(tape.states)
        self._valid = tape.num_layers  # the states up to this layer are valid for the current blocks

    def put(self, blocks: Mapping[int, nn.Module]) -> None:
        """Use these blocks, by layer. The blocks of other layers do not change."""
        self.blocks |= blocks
        self._valid = min([self._valid, *blocks])

    def reset(self) -> None:
        """Use the original blocks in all layers again."""
        self.blocks = {}
        self.states, self._valid = list(self.tape.states), self.tape.num_layers

    @torch.no_grad()
    def final_states(self, changes: Sequence[Change]) -> list[TensorList]:
        """Compute the states that leave the last layer with each change: one list of (B, S, D) batches per change."""
        live: dict[int, TensorList] = {}
        lowest = min([self._valid, *(change.layer for change in changes)])
        with eval_mode(self.model):
            for layer in range(lowest, self.tape.num_layers):
                block = self.blocks.get(layer)
                for number in live:
                    live[number] = self._run_layer(layer, block, live[number])
                for number, change in enumerate(changes):
                    if change.layer == layer:
                        with layer_store(self.model).resident(layer):
                            live[number] = self._run_layer(layer, change.block(), self.states[layer])
                if layer >= self._valid:
                    self.states[layer + 1] = self._run_layer(layer, block, self.states[layer])
        self._valid = self.tape.num_layers
        return [live[number] for number in range(len(changes))]

    def _run_layer(self, layer: int, block: nn.Module | None, states: TensorList) -> TensorList:
        """Run all texts through one layer with a replaced block; None uses the original one."""
        outputs = self.tape.storage.tensor_list()
        with moe_blocks.swap_blocks(self.model, {} if block is None else {layer: block}), eval_mode(self.model):
            for index, hidden_BSD in enumerate(states):
                outputs.append(self.tape.run_layer(self.model, layer, index, hidden_BSD))
        return outputs
