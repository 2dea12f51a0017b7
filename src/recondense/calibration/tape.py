"""The Tape: hidden states entering each decoder layer for the calibration set.

Anything above a layer can be rerun from it without anything below. Texts go through in blocks of a fixed number, so
that results do not depend on how much memory there is, nor on how many processes share the blocks.

Legend: B texts of a block, S their padded length, T real tokens of a block (padding left out), D hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.trace import LayerTrace, TextBlock, Traces, tracing
from recondense.errors import UserError
from recondense.models import decoder, views
from recondense.models.hooks import evaluating
from recondense.models.streaming import resident
from recondense.models.tensor_store import DiskShelf, Memory, Shelf, Storage, nbytes

TEXTS_PER_BLOCK = 8
TOTAL_BYTES = 1 << 25  # of what processes send each other at a time to add it up
TRACE_BYTES = 1 << 30  # traces of all layers up to this are kept while taping; above it a layer is rerun when asked for
SHAPES = 8  # of blocks of texts, whose masks and positions are kept


class Tape:
    """Hidden states of a model on the calibration set.

    Args:
        everything: all blocks of texts.
        storage: where the hidden states lie.
        num_layers: decoder layers.
        split: whether the processes share the blocks, one after another in turn.

    Attributes:
        blocks: those of this process.
        states: `states[layer][block]` (B, S, D) enters decoder layer `layer`; `states[num_layers]` leaves the last one,
            before the final norm.
        traces: `traces[layer][block]`, what each sparse MoE layer saw; empty where that was more than TRACE_BYTES.
        traced: whether all processes keep traces.
        layer_runs: decoder layers run on all blocks so far, a count of the work done.
    """

    def __init__(self, everything: Sequence[TextBlock], storage: Storage, num_layers: int, split: bool = False) -> None:
        self.everything = list(everything)
        self.storage = storage
        self.split = split and processes.world_size() > 1
        self.blocks = list(processes.share(self.everything)) if self.split else self.everything
        self.states: list[Shelf] = [[] for _ in range(num_layers + 1)]
        self.traces: dict[int, list[LayerTrace]] = {}
        self.traced = False
        self.layer_runs = 0.0
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._shapes: list[tuple[int, ...]] = []  # of the states of all blocks
        self._dtype = torch.float32

    @property
    def num_layers(self) -> int:
        return len(self.states) - 1

    @property
    def num_tokens(self) -> int:
        """Of all processes."""
        return sum(int(block.mask_BS.sum()) for block in self.everything)

    @property
    def nbytes(self) -> int:
        """Of the hidden states of this process."""
        return sum(map(nbytes, self.states))

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        model: PreTrainedModel,
        blocks: Iterable[tuple[Tensor, Tensor]],
        advance: Callable[[], None] = lambda: None,
        storage: Storage | None = None,
        split: bool = False,
    ) -> Tape:
        """Run the texts through the model once, layer after layer, and keep the states entering each.

        Args:
            model: a causal LM; left bit-identical.
            blocks: (input_ids (B, S), mask (B, S)), padded on the right, texts in order.
            advance: called after each decoder layer.
            storage: where the states go; what a folder has already is not computed again. None: in memory.
            split: every process takes its share of the blocks; all must call this.

        Raises:
            UserError: a hidden state that is not finite; the message names the layer.
        """
        device = decoder.device(model)
        texts = [TextBlock(ids_BS.to(device), mask_BS.to(device).bool()) for ids_BS, mask_BS in blocks]
        tape = cls(texts, storage or Memory(), len(decoder.decoder_layers(model)), split)
        tape._shapes = [(*text.input_ids_BS.shape, model.config.hidden_size) for text in texts]
        tape._dtype = model.dtype
        sparse = views.sparse_blocks(model)
        room = TRACE_BYTES if isinstance(tape.storage, Memory) else -1
        with evaluating(model):
            tape._keep(0, (tape._enter(model, block) for block in tape.blocks))
            for layer in range(tape.num_layers):
                traced = [layer] if room >= 0 and layer in sparse else []
                with tracing(model, traced) as seen:
                    tape._keep(layer + 1, tape._leaving(model, layer, seen))
                room -= sum(trace.nbytes for trace in tape.traces.get(layer, ()))
                if room < 0:
                    tape.traces.clear()
                advance()
        tape.traced = all(processes.gather(room >= 0)) if tape.split else room >= 0
        return tape

    def _keep(self, layer: int, states: Iterator[Tensor]) -> None:
        """The states entering a layer, each checked; those that lie finished in the storage are taken from there.

        Of a split tape only where those of all processes do: all go the same way. One without blocks has finished, too.
        """
        shared = f"{processes.rank()}-of-{processes.world_size() if self.split else 1}"
        shelf = self.storage.shelf(f"states-{layer:03d}-{shared}")
        self.states[layer] = shelf
        kept = shelf if isinstance(shelf, DiskShelf) and shelf.named else None
        if kept is not None:
            finished = kept.finished
            if all(processes.gather(finished) if self.split else [finished]):
                assert len(kept) == len(self.blocks)
                return
            if finished:
                kept.start_anew()
        finite = True
        for block, state_BSD in zip(self.blocks, states, strict=True):
            finite = finite and bool(torch.isfinite(state_BSD[block.mask_BS]).all())
            shelf.append(state_BSD)
        if not all(processes.gather(finite) if self.split else [finite]):
            where = "the embedding" if layer == 0 else f"decoder layer {layer - 1}"
            raise UserError(
                f"calibration: a hidden state leaving {where} is NaN or infinite; check the weights of that layer, "
                "or use model.dtype=float32 if the model overflows in half precision"
            )
        if kept is not None:
            kept.finish()

    def _leaving(self, model: PreTrainedModel, layer: int, seen: dict[int, dict[str, Any]]) -> Iterator[Tensor]:
        for index, block in enumerate(self.blocks):
            yield self.run_layer(model, layer, index, self.states[layer][index])
            for traced, found in seen.items():
                self.traces.setdefault(traced, []).append(LayerTrace.of(found, block))

    def _enter(self, model: PreTrainedModel, block: TextBlock) -> Tensor:
        """What enters the first decoder layer; what the layers are called with besides is kept by the block's shape."""
        taken, entered = decoder.arguments_of_layers(model, {"input_ids": block.input_ids_BS})
        shape = tuple(block.input_ids_BS.shape)
        if shape not in self._arguments and len(self._arguments) >= SHAPES:
            del self._arguments[next(iter(self._arguments))]
        self._arguments[shape] = taken
        return entered

    def arguments(self, model: PreTrainedModel, layer: int, block: TextBlock) -> dict[str, Any]:
        """What a decoder layer is called with besides hidden states: blocks of one shape have the same."""
        shape = tuple(block.input_ids_BS.shape)
        if shape not in self._arguments:
            self._enter(model, block)
        return self._arguments[shape][layer]

    def run_layer(self, model: PreTrainedModel, layer: int, block: int, hidden_BSD: Tensor) -> Tensor:
        """One decoder layer on the hidden states of one block; (B, S, D) to (B, S, D)."""
        self.layer_runs += 1 / len(self.blocks)
        arguments = self.arguments(model, layer, self.blocks[block])
        with resident(model, layer):
            output = decoder.decoder_layers(model)[layer](hidden_BSD, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def real_tokens(self, block: int, hidden_BSD: Tensor) -> Tensor:
        """The rows of real tokens, (T, D), in text order."""
        return hidden_BSD[self.blocks[block].mask_BS]

    @torch.no_grad()
    def trace(self, model: PreTrainedModel, layer: int) -> Sequence[LayerTrace]:
        """What one sparse MoE layer saw, block by block: kept, or from a rerun of the layer on its taped input."""
        if layer in self.traces:
            return self.traces[layer]
        found = Traces(self.storage)
        with evaluating(model), resident(model, layer), tracing(model, [layer]) as seen:
            for index, block in enumerate(self.blocks):
                self.run_layer(model, layer, index, self.states[layer][index])
                found.append(LayerTrace.of(seen[layer], block))
        return found

    def excerpt(self, layers: Sequence[int]) -> Tape | None:
        """The states around one layer on all texts, and what it saw, for this process; the tape itself if it has all.

        Args:
            layers: one for each of the first processes, in the order of ranks; all must call this with the same.

        Returns:
            a tape that knows the states entering and leaving this process's layer; None where there is none for it.
        """
        if not self.split:
            return self
        found = None
        for owner, layer in enumerate(layers):
            for each in (layer, layer + 1):
                sent = processes.collect(self.states[each], self._shapes, self._dtype, owner)
                if processes.rank() == owner:
                    found = found or Tape(self.everything, self.storage, self.num_layers)
                    found.states[each] = self.storage.shelf()
                    for state_BSD in sent:
                        found.states[each].append(state_BSD.to(self.everything[0].input_ids_BS.device))
                else:
                    assert not list(sent)
            if self.traced:
                traces = self._traces_on(owner, layer)
                if found is not None and processes.rank() == owner:
                    found.traces[layer] = traces
        return found

    def _traces_on(self, owner: int, layer: int) -> list[LayerTrace]:
        """The traces of a layer, of all blocks in their order, on one process; nothing on the others."""
        own = [{name: value.cpu() for name, value in vars(trace).items()} for trace in self.traces.get(layer, [])]
        shares = processes.gather_on(owner, own)
        device = self.everything[0].input_ids_BS.device
        return [
            LayerTrace(**{name: value.to(device) for name, value in each.items()})
            for each in (self._interleaved(shares) if shares else ())
        ]

    def in_order(self, own: Sequence[Any]) -> list[Any]:
        """What every block of texts gave, in their order, from what this process's own gave; plain data or tensors."""
        if not self.split:
            return list(own)
        return self._interleaved(
            processes.gather([value.cpu() if isinstance(value, Tensor) else value for value in own])
        )

    def _interleaved(self, shares: Sequence[Sequence[Any]]) -> list[Any]:
        """From each process's blocks to all in their order."""
        return [shares[index % len(shares)][index // len(shares)] for index in range(len(self.everything))]

    def total(self, own: Iterable[Tensor]) -> Tensor:
        """Sum over all blocks of texts in their order, from what this process's own give; on the CPU."""
        values = (value.cpu() for value in own)
        first = next(values, None)
        size = 0 if first is None else first.nbytes
        at_once = max(1, TOTAL_BYTES // max(1, *(processes.gather(size) if self.split else [size])))
        rest = chain([] if first is None else [first], values)
        total: Tensor | None = None
        for _ in range(0, len(self.everything), at_once * (processes.world_size() if self.split else 1)):
            mine = list(islice(rest, at_once))
            for each in zip_longest(*(processes.gather(mine) if self.split else [mine])):
                for value in each:
                    if value is not None:
                        total = value if total is None else total + value
        assert total is not None
        return total

    def mean_over_texts(self, values_CT: Iterable[Tensor]) -> Tensor:
        """Mean over the tokens of each text, then over texts in their order: each text weighs the same.

        Args:
            values_CT: one tensor a block, (candidates, real tokens).

        Returns:
            (candidates,) in fp64.
        """
        per_text = [
            torch.segment_reduce(values.double().T.contiguous(), "mean", lengths=block.lengths_B, axis=0)
            for values, block in zip(values_CT, self.blocks, strict=True)
        ]
        return torch.cat(self.in_order(per_text)).mean(dim=0)
