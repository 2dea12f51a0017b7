"""The tape of a local recovery: hidden states of the training windows at one layer, of the student and of its original.

The tape moves upwards through the model one layer at a time and keeps only the states at the current layer: there is no
head and no pass through the whole model. The windows run in the same batches however many processes share them.

Legend: N windows, b windows of a batch, S tokens of a window, T real tokens (without padding), D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import processes
from recondense.data.labels import MASKED
from recondense.data.loader import Table, num_rows
from recondense.models import decoder, forward, moe_blocks
from recondense.models.compressed_classes import returns_pair
from recondense.models.layer_store import layer_store
from recondense.models.removed_blocks import Zeros
from recondense.models.tensor_store import Storage, TensorList
from recondense.recovery import shared_passes
from recondense.surgery.student import Student


@dataclass(frozen=True)
class BlockData:
    """What a block is trained on.

    Args:
        inputs: the inputs of the block, (S, D) for each window.
        targets: the outputs that it should have, (S, D) for each window.
        mask_NS: the real tokens (bool); None if there is no padding.
    """

    inputs: TensorList
    targets: TensorList
    mask_NS: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs (T, D) and targets (T, D) of the real tokens of some windows."""
        x_TD = torch.cat([self._real(self.inputs[window], window) for window in windows])
        return x_TD, torch.cat([self.target(window) for window in windows])

    def target(self, window: int) -> Tensor:
        """Return the targets (T, D) of the real tokens of a window."""
        return self._real(self.targets[window], window)

    def num_tokens(self, windows: Sequence[int]) -> int:
        """Return the number of real tokens of some windows."""
        if self.mask_NS is None:
            return len(windows) * len(self.inputs[0])
        return int(self.mask_NS[list(windows)].sum())

    def _real(self, tensor_SD: Tensor, window: int) -> Tensor:
        return tensor_SD if self.mask_NS is None else tensor_SD[self.mask_NS[window].to(tensor_SD.device)]


class _Probe(Zeros):
    """Takes the place of a block: it keeps its input and adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        self.entering = hidden_states
        return super().forward(hidden_states)


class LocalTape:
    """The states of a student and its original that enter one decoder layer, for the windows of this process.

    Args:
        student: the student.
        trained: the layers that are or were trained.
        table: the windows of all processes.
        batch_size: windows that run together.
        storage: where the states are kept.
        from_student: whether the inputs of a block are those that the student gives it; otherwise the original's.

    Attributes:
        layer: the decoder layer that the states enter.
    """

    def __init__(
        self,
        student: Student,
        trained: Sequence[int],
        table: Table,
        batch_size: int,
        storage: Storage,
        from_student: bool,
    ) -> None:
        self.student = student
        self.storage = storage
        self.layer = 0
        self._table = table
        self._from_student = from_student
        self._model: PreTrainedModel = student.model
        self._batches = [
            {name: column[start : start + batch_size] for name, column in table.items()}
            for start in range(0, num_rows(table), batch_size)
        ]
        self._local = [self._arguments_of(batch) for batch in processes.take_share(self._batches)]
        self._sizes = [num_rows(batch) for batch in processes.take_share(self._batches)]
        self._layer_arguments = forward.LayerArguments(self._model)
        self._first = min({*student.changed_layers(), *trained})  # below it, both models compute the same
        with student.original():
            self._original = self._keep(self._layer_arguments.enter(arguments) for arguments in self._local)
        self._shapes = [state.shape for state in self._original]
        self._student = self._original
        if self._first == 0 and from_student:  # an earlier training may have changed the embedding
            self._student = self._keep(self._layer_arguments.enter(arguments) for arguments in self._local)
        self._after: TensorList | None = None  # the original's states after the layer, once it is recorded
        self._rest: tuple[TensorList, TensorList] | None = None  # the residual, and the inputs of the block, by window

    def move_to(self, layer: int) -> None:
        """Move up to a layer, through the student's layers as they are now."""
        while self.layer < layer:
            self._move()

    @torch.no_grad()
    def record(self) -> BlockData:
        """Record the inputs and targets of the current layer's block, for the windows of this process.

        With inputs of the original, the target is the output of the original's block. With inputs of the student, it is
        the original's state after the layer minus the student's residual before its block.
        """
        if self._from_student:
            return self._record_student()
        with self.student.original() as model:
            inputs, residuals = self._probe(model, self._original)
            targets, after = self.storage.tensor_list(), self.storage.tensor_list()
            for index, output in enumerate(self._block_outputs(model, inputs)):
                _append_windows(targets, output, self._sizes[index])
                after.append(residuals[index] + output)
        self._after = after
        return BlockData(inputs, targets)

    def gather(self, data: BlockData, to: int) -> BlockData | None:
        """Send what all processes have recorded of a layer to one of them; return None on the others."""
        complete = []
        for windows in (data.inputs, data.targets):
            if processes.world_size() > 1:
                windows = self._collect(windows, to)
            complete.append(windows)
        if processes.rank() != to:
            return None
        return BlockData(complete[0], complete[1], real_tokens(self._table))

    def _collect(self, windows: TensorList, to: int) -> TensorList:
        length = self._table["input_ids"].shape[1]
        shapes = [(num_rows(batch), length, self._model.config.hidden_size) for batch in self._batches]
        local = self._stacked(windows)
        collected = self.storage.tensor_list()
        for batch_bSD in processes.collect(local, shapes, self._model.dtype, to):
            _append_windows(collected, batch_bSD.to(decoder.device(self._model)), len(batch_bSD))
        return collected

    def _record_student(self) -> BlockData:
        self._after = self._leaving_original()
        inputs, residuals = self._probe(self._model, self._student)
        targets = self.storage.tensor_list()
        for index, residual in enumerate(residuals):
            _append_windows(targets, self._after[index] - residual, self._sizes[index])
        self._rest = residuals, inputs
        return BlockData(inputs, targets)

    @torch.no_grad()
    def _move(self) -> None:
        """Move up by one layer."""
        apart = self._from_student and self.layer >= self._first
        if apart:
            self._student = self._leaving_student()
        self._original = self._leaving_original() if self._after is None else self._after
        if not apart:
            self._student = self._original
        self._after = self._rest = None
        self.layer += 1

    def _leaving_student(self) -> TensorList:
        if self._rest is None:
            return self._leaving(self._model, self._student)
        residuals, inputs = self._rest
        outputs = self._block_outputs(self._model, inputs)
        return self._keep(residuals[index] + output for index, output in enumerate(outputs))

    def _leaving_original(self) -> TensorList:
        with self.student.original() as model:
            return self._leaving(model, self._original)

    def _leaving(self, model: PreTrainedModel, entering: TensorList) -> TensorList:
        """Run the current layer."""
        with layer_store(model).resident(self.layer):
            return self._keep(
                forward.run_layer(model, self.layer, state, self._layer_arguments.get(self.layer, arguments))
                for state, arguments in zip(entering, self._local, strict=True)
            )

    def _probe(self, model: PreTrainedModel, entering: TensorList) -> tuple[TensorList, TensorList]:
        """Return the inputs of the current layer's block, by window, and the residuals beside it, by batch."""
        probe = _Probe(returns_pair(moe_blocks.get_block(model, self.layer)))
        inputs, residuals = self.storage.tensor_list(), self.storage.tensor_list()
        with moe_blocks.swap_blocks(model, {self.layer: probe}), layer_store(model).resident(self.layer):
            for index, (state, arguments) in enumerate(zip(entering, self._local, strict=True)):
                of_layer = self._layer_arguments.get(self.layer, arguments)
                residuals.append(forward.run_layer(model, self.layer, state, of_layer))
                _append_windows(inputs, probe.entering, self._sizes[index])
        return inputs, residuals

    def _block_outputs(self, model: PreTrainedModel, inputs: TensorList) -> Iterator[Tensor]:
        """Yield the outputs of the current layer's block for the batches, in the shape of their states."""
        block: nn.Module = moe_blocks.get_block(model, self.layer)
        with layer_store(model).resident(self.layer):
            for index, x_bSD in enumerate(self._stacked(inputs)):
                yield moe_blocks.block_output(block(x_bSD.reshape(self._shapes[index])))

    def _stacked(self, windows: TensorList) -> Iterator[Tensor]:
        """Yield the windows of each batch of this process (b, S, D)."""
        start = 0
        for size in self._sizes:
            yield torch.stack([windows[window] for window in range(start, start + size)])
            start += size

    def _arguments_of(self, batch: Table) -> dict[str, Any]:
        device = decoder.device(self._model)
        ids_BS, positions_BS = batch["input_ids"].to(device), batch.get("position_ids")
        positions_BS = None if positions_BS is None else positions_BS.to(device)
        return shared_passes.forward_arguments(self._model, ids_BS, positions_BS)

    def _keep(self, states: Iterator[Tensor]) -> TensorList:
        tensors = self.storage.tensor_list()
        for state in states:
            tensors.append(state)
        return tensors


def _append_windows(tensors: TensorList, batch: Tensor, windows: int) -> None:
    """Append a batch to a list of windows; flash attention gets packed windows as one row (1, b·S, D)."""
    for window_SD in batch.reshape(windows, -1, batch.shape[-1]):
        tensors.append(window_SD)


def real_tokens(table: Table) -> Tensor | None:
    """Return a mask (N, S) of the tokens up to the last target of each window; None if the windows have no labels.

    Behind the last target there is padding.
    """
    labels_NS = table.get("labels")
    if labels_NS is None:
        return None
    targets_NS = (labels_NS != MASKED).long()
    return targets_NS.flip(1).cumsum(1).flip(1) > 0
