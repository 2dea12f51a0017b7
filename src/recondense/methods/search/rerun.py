"""Reruns from a changed layer to the top of the model, of many changes at a time, on the states of a Tape.

Legend: B texts of a batch, S their padded length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.models import views
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import TensorList


@dataclass(frozen=True)
class Change:
    """A block to try in one layer.

    Args:
        layer: decoder-layer index.
        block: makes the block; called when the layer has its weights. None: the original block.
    """

    layer: int
    block: Callable[[], nn.Module | None] = lambda: None


class Rerun:
    """A model with other blocks in some layers, and the states that enter its layers then.

    Nothing below a changed layer runs again. All changes go through a layer before the next layer is needed, so that
    each layer's weights are read once for all changes. In memory beside the tape: the states under the present blocks,
    and one layer's states for each change.

    Args:
        model: as it was taped. Blocks are swapped in while it runs and out again.
        tape: its hidden states.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self.blocks: dict[int, nn.Module] = {}
        self.states: list[TensorList] = list(tape.states)
        self._valid = tape.num_layers  # the states up to this layer are those under the present blocks

    def put(self, blocks: Mapping[int, nn.Module]) -> None:
        """Put blocks into the model, by layer. Other layers keep theirs."""
        self.blocks |= blocks
        self._valid = min([self._valid, *blocks])

    def reset(self) -> None:
        """Put all original blocks back."""
        self.blocks = {}
        self.states, self._valid = list(self.tape.states), self.tape.num_layers

    @torch.no_grad()
    def final_states(self, changes: Sequence[Change]) -> list[TensorList]:
        """Compute the states (B, S, D) that leave the last layer under each change, one shelf of batches a change."""
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
        """All texts through one layer with a block in it; None: the original one."""
        outputs = self.tape.storage.tensor_list()
        with views.swap_blocks(self.model, {} if block is None else {layer: block}), eval_mode(self.model):
            for index, hidden_BSD in enumerate(states):
                outputs.append(self.tape.run_layer(self.model, layer, index, hidden_BSD))
        return outputs
