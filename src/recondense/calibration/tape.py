"""The Tape: the hidden states that enter each decoder layer on the calibration set.

With a tape, the layers above any point can be rerun without the layers below it.

Legend: B texts of a batch, S their padded length, T real tokens of a batch (without padding), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.text_batches import TextBatch, TextBatches
from recondense.calibration.trace import LayerTrace, Traces, record_calls
from recondense.data.calibration_set import CalibrationSet
from recondense.errors import UserError
from recondense.models import decoder, forward, moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import DiskTensorList, Memory, Storage, TensorList, nbytes

TEXTS_PER_BATCH = 8
TRACE_BYTES = 1 << 30  # if the traces of all layers fit, they are kept; otherwise a layer is rerun for its trace


class Tape:
    """The hidden states of a model on the calibration set.

    Args:
        model: the recorded model.
        texts: the calibration set.
        storage: where the hidden states are kept.

    Attributes:
        states: for the batches of this process, `states[layer][batch]` (B, S, D) enters decoder layer `layer`;
            `states[num_layers]` leaves the last layer, before the final norm.
        traces: `traces[layer][batch]`, the input and output of each sparse MoE block; empty if they are larger than
            TRACE_BYTES.
        traced: whether all processes keep traces.
        layer_runs: number of decoder layers that have run so far, in passes over all batches; a measure of work.
        calibration_set: the token ids of the texts, also of their parts that are not on the tape; None if the tape was
            recorded from batches.
    """

    def __init__(self, model: PreTrainedModel, texts: TextBatches, storage: Storage) -> None:
        self.model = model
        self.texts = texts
        self.storage = storage
        self.states: list[TensorList] = [[] for _ in range(len(decoder.decoder_layers(model)) + 1)]
        self.traces: dict[int, list[LayerTrace]] = {}
        self.traced = False
        self.layer_runs = 0.0
        self.calibration_set: CalibrationSet | None = None
        self._arguments = forward.LayerArguments(model)

    @property
    def num_layers(self) -> int:
        return len(self.states) - 1

    @property
    def num_tokens(self) -> int:
        """Real tokens of all texts."""
        return self.texts.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states of this process."""
        return sum(map(nbytes, self.states))

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        model: PreTrainedModel,
        batches: Iterable[tuple[Tensor, Tensor]],
        advance: Callable[[], None] = lambda: None,
        storage: Storage | None = None,
        split: bool = False,
    ) -> Tape:
        """Run the texts through the model once, layer by layer, and keep the states that enter each layer.

        Args:
            model: a causal LM; it stays bit-identical.
            batches: (input_ids (B, S), mask (B, S)) of each batch, padded on the right, with the texts in order.
            advance: called after each decoder layer.
            storage: where the states are kept; states that it has from an earlier run are not computed again. None
                keeps them in memory.
            split: divide the batches among the processes; all processes must call this method.

        Returns:
            The tape.

        Raises:
            UserError: a hidden state is not finite; the message names the layer.
        """
        device = decoder.device(model)
        texts = (TextBatch(ids_BS.to(device), mask_BS.to(device).bool()) for ids_BS, mask_BS in batches)
        tape = cls(model, TextBatches(texts, split), storage or Memory())
        sparse = moe_blocks.sparse_blocks(model)
        room = TRACE_BYTES if isinstance(tape.storage, Memory) else -1
        with eval_mode(model):
            tape._keep(0, (tape._arguments.enter(_inputs(batch)) for batch in tape.texts.local))
            for layer in range(tape.num_layers):
                with record_calls(model, [layer] if room >= 0 and layer in sparse else []) as calls:
                    tape._keep(layer + 1, tape._leaving(layer, calls))
                room -= sum(trace.nbytes for trace in tape.traces.get(layer, ()))
                if room < 0:
                    tape.traces.clear()
                advance()
        tape.traced = all(tape.texts.gather(room >= 0))
        return tape

    def _keep(self, layer: int, states: Iterator[Tensor]) -> None:
        """Keep the states that enter a layer and check that they are finite; states that the storage has are reused.

        If the processes share the texts, the stored states are reused only if every process has its share of them. A
        process without batches counts as having its share.
        """
        share = f"{processes.rank()}-of-{processes.world_size() if self.texts.split else 1}"
        tensors = self.storage.tensor_list(f"states-{layer:03d}-{share}")
        self.states[layer] = tensors
        on_disk = tensors if isinstance(tensors, DiskTensorList) and tensors.named else None
        if on_disk is not None:
            finished = on_disk.finished
            if all(self.texts.gather(finished)):
                assert len(on_disk) == len(self.texts.local)
                return
            if finished:
                on_disk.start_anew()
        finite = True
        for batch, state_BSD in zip(self.texts.local, states, strict=True):
            finite = finite and bool(torch.isfinite(state_BSD[batch.mask_BS]).all())
            tensors.append(state_BSD)
        if not all(self.texts.gather(finite)):
            where = "the embedding" if layer == 0 else f"decoder layer {layer - 1}"
            raise UserError(
                f"calibration: a hidden state leaving {where} is NaN or infinite; check the weights of that layer, "
                "or use model.dtype=float32 if the model overflows in half precision"
            )
        if on_disk is not None:
            on_disk.finish()

    def _leaving(self, layer: int, calls: dict[int, dict[str, Any]]) -> Iterator[Tensor]:
        """Yield the states that leave a layer, batch by batch; keep traces if the layer's calls are recorded."""
        for index, batch in enumerate(self.texts.local):
            yield self.run_layer(self.model, layer, index, self.states[layer][index])
            if layer in calls:
                self.traces.setdefault(layer, []).append(LayerTrace.from_call(calls[layer], batch))

    def run_layer(self, model: PreTrainedModel, layer: int, batch: int, hidden_BSD: Tensor) -> Tensor:
        """Run one decoder layer on the hidden states of one local batch.

        Args:
            model: the recorded model, possibly with changed blocks.
            layer: decoder-layer index.
            batch: index of the local batch, which gives the attention mask and positions.
            hidden_BSD: the states that enter the layer (B, S, D).

        Returns:
            The states that leave the layer (B, S, D).
        """
        self.layer_runs += 1 / len(self.texts.local)
        arguments = self._arguments.get(layer, _inputs(self.texts.local[batch]))
        return forward.run_layer(model, layer, hidden_BSD, arguments)

    def real_tokens(self, batch: int, hidden_BSD: Tensor) -> Tensor:
        """Return the rows of a local batch's real tokens (T, D), in text order."""
        return hidden_BSD[self.texts.local[batch].mask_BS]

    @torch.no_grad()
    def trace(self, model: PreTrainedModel, layer: int, states: TensorList | None = None) -> Sequence[LayerTrace]:
        """Return the trace of a sparse MoE layer for each local batch; the layer is rerun if no trace was kept.

        Args:
            model: the recorded model, possibly with changed blocks.
            layer: decoder-layer index.
            states: other states that enter the layer, for each local batch; None for those of the tape.
        """
        if states is None and layer in self.traces:
            return self.traces[layer]
        entering = self.states[layer] if states is None else states
        traces = Traces(self.storage)
        with eval_mode(model), layer_store(model).resident(layer), record_calls(model, [layer]) as calls:
            for index, batch in enumerate(self.texts.local):
                self.run_layer(model, layer, index, entering[index])
                traces.append(LayerTrace.from_call(calls[layer], batch))
        return traces

    def excerpt(self, layers: Sequence[int]) -> Tape | None:
        """Give each of the first processes a tape of one layer on all texts.

        Args:
            layers: one layer for each of the first processes, in order of rank. All processes must call this method
                with the same layers.

        Returns:
            A tape with the states that enter and leave this process's layer, and its traces; None on the other
            processes. If the processes do not share the texts, the tape itself.
        """
        if not self.texts.split:
            return self
        shapes = [(*batch.input_ids_BS.shape, self.model.config.hidden_size) for batch in self.texts.all]
        excerpt = None
        if processes.rank() < len(layers):
            excerpt = Tape(self.model, TextBatches(self.texts.all), self.storage)
        for owner, layer in enumerate(layers):
            is_owner = excerpt is not None and processes.rank() == owner
            for state in (layer, layer + 1):
                received = processes.collect(self.states[state], shapes, self.model.dtype, owner)
                if excerpt is not None and is_owner:
                    excerpt.states[state] = self.storage.tensor_list()
                    for state_BSD in received:
                        excerpt.states[state].append(state_BSD.to(self.texts.device))
                else:
                    assert not list(received)
            if self.traced:
                traces = self._traces_on(owner, layer)
                if excerpt is not None and is_owner:
                    excerpt.traces[layer] = traces
        return excerpt

    def _traces_on(self, owner: int, layer: int) -> list[LayerTrace]:
        """Return the traces of a layer on all batches in text order on process `owner`; empty on the others."""
        local = [{name: value.cpu() for name, value in vars(trace).items()} for trace in self.traces.get(layer, [])]
        shares = processes.gather_to(owner, local)
        return [
            LayerTrace(**{name: value.to(self.texts.device) for name, value in trace.items()})
            for trace in (self.texts.interleave(shares) if shares else ())
        ]


def _inputs(batch: TextBatch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids_BS}
