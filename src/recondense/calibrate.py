"""The Tape: hidden states entering each decoder layer for the calibration set.

Anything above a layer can be rerun from it without anything below. Texts go through in blocks of a fixed number, so
that results do not depend on how much memory there is.

Legend: B texts of a block, S their padded length, T real tokens of a block (padding left out), D hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import families
from recondense.modes import evaluating

TEXTS_PER_BLOCK = 8
TRACE_BYTES = 1 << 30  # traces of all layers up to this are kept while taping; above it a layer is rerun when asked for


@dataclass(frozen=True)
class TextBlock:
    """A few calibration texts, padded on the right: with causal attention no real token sees a pad."""

    input_ids_BS: Tensor
    mask_BS: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BS.sum(dim=1)


@dataclass(frozen=True)
class LayerTrace:
    """What one sparse MoE layer saw and gave for one block; real tokens only, in text order.

    Args:
        x_TD: input of the MoE layer (after its norm).
        output_TD: output of the original MoE layer, without the residual.
        top_k_index_TK, top_k_weights_TK: what the router returned.
    """

    x_TD: Tensor
    output_TD: Tensor
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor

    @classmethod
    def of(cls, seen: Mapping[str, Any], block: TextBlock) -> LayerTrace:
        """From what hooks caught (x and output (B, S, D), the router's output) to real tokens."""
        _, weights, chosen = seen["router"]
        real = block.mask_BS.flatten()
        return cls(
            x_TD=seen["x"][block.mask_BS],
            output_TD=seen["output"][block.mask_BS],
            top_k_index_TK=chosen.reshape(real.numel(), -1)[real],
            top_k_weights_TK=weights.reshape(real.numel(), -1)[real],
        )

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values())


@dataclass
class Tape:
    """Hidden states of a model on the calibration set.

    Args:
        blocks: the texts.
        states: states[layer][block] (B, S, D) enters decoder layer `layer`; states[num_layers] leaves the last one,
            before the final norm.
        arguments: arguments[block][layer], what a decoder layer is called with besides the hidden states.
        traces: traces[layer][block], what each sparse MoE layer saw; empty where that was more than TRACE_BYTES.
        layer_runs: decoder layers run on all blocks so far, a count of the work done.
    """

    blocks: list[TextBlock]
    states: list[list[Tensor]]
    arguments: list[list[dict[str, Any]]]
    traces: dict[int, list[LayerTrace]] = field(default_factory=dict)
    layer_runs: float = field(default=0.0, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.states) - 1

    @property
    def num_tokens(self) -> int:
        return sum(int(block.mask_BS.sum()) for block in self.blocks)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for layer in self.states for state in layer)

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        model: PreTrainedModel,
        blocks: Iterable[tuple[Tensor, Tensor]],
        advance: Callable[[], None] = lambda: None,
    ) -> Tape:
        """Run the model once over the texts and keep the hidden states entering every decoder layer.

        Args:
            model: a causal LM; left bit-identical.
            blocks: (input_ids (B, S), mask (B, S)), padded on the right, texts in order.
            advance: called after each block.

        Raises:
            ValueError: a hidden state that is not finite; the message names the layer.
        """
        device = next(model.parameters()).device
        layers = families.decoder_layers(model)
        text_blocks: list[TextBlock] = []
        states: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
        arguments: list[list[dict[str, Any]]] = []

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states[layer].append(args[0] if args else kwargs["hidden_states"])
                arguments[-1].append({name: value for name, value in kwargs.items() if name != "hidden_states"})

            return hook

        handles = [module.register_forward_pre_hook(keep(i), with_kwargs=True) for i, module in enumerate(layers)]
        handles.append(layers[-1].register_forward_hook(lambda module, args, output: states[-1].append(output)))
        traces: dict[int, list[LayerTrace]] = {layer: [] for layer in families.sparse_blocks(model)}
        room = TRACE_BYTES
        try:
            with evaluating(model), _tracing(model, traces) as seen:
                for input_ids_BS, mask_BS in blocks:
                    block = TextBlock(input_ids_BS.to(device), mask_BS.to(device).bool())
                    text_blocks.append(block)
                    arguments.append([])
                    families.decoder(model)(input_ids=block.input_ids_BS, use_cache=False)
                    _check_finite([state[-1][block.mask_BS] for state in states])
                    for layer, found in traces.items():
                        found.append(LayerTrace.of(seen[layer], block))
                        room -= found[-1].nbytes
                    if room < 0:
                        traces.clear()
                    advance()
        finally:
            for handle in handles:
                handle.remove()
        return cls(text_blocks, states, arguments, traces, layer_runs=float(len(layers)))

    def run_layer(self, model: PreTrainedModel, layer: int, block: int, hidden_BSD: Tensor) -> Tensor:
        """One decoder layer on the hidden states of one block; (B, S, D) to (B, S, D)."""
        self.layer_runs += 1 / len(self.blocks)
        output = families.decoder_layers(model)[layer](hidden_BSD, **self.arguments[block][layer])
        return output[0] if isinstance(output, tuple) else output

    def real_tokens(self, block: int, hidden_BSD: Tensor) -> Tensor:
        """The rows of real tokens, (T, D), in text order."""
        return hidden_BSD[self.blocks[block].mask_BS]

    @torch.no_grad()
    def trace(self, model: PreTrainedModel, layer: int) -> Iterator[LayerTrace]:
        """What one sparse MoE layer saw, block by block: kept, or from a rerun of the layer on its taped input."""
        if layer in self.traces:
            yield from self.traces[layer]
            return
        with evaluating(model), _tracing(model, [layer]) as seen:
            for index, block in enumerate(self.blocks):
                self.run_layer(model, layer, index, self.states[layer][index])
                yield LayerTrace.of(seen[layer], block)

    def mean_over_texts(self, values_CT: list[Tensor]) -> Tensor:
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
        return torch.cat(per_text).mean(dim=0)


@contextmanager
def _tracing(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, dict[str, Any]]]:
    """Inside, each forward leaves here what these sparse layers and their routers got and gave."""
    seen: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    handles = []
    for layer, found in seen.items():
        sparse = families.sparse_blocks(model)[layer]

        def keep(module: nn.Module, args: Any, output: Any, found: dict[str, Any] = found) -> None:
            found.update(x=args[0], output=families.output_of(output))

        def keep_router(module: nn.Module, args: Any, output: Any, found: dict[str, Any] = found) -> None:
            found.update(router=output)

        handles += [sparse.module.register_forward_hook(keep), sparse.router.register_forward_hook(keep_router)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(states: list[Tensor]) -> None:
    if bool(torch.isfinite(states[-1]).all()):  # what is not finite stays so through the residual stream
        return
    layer = next(index for index, state in enumerate(states) if not bool(torch.isfinite(state).all()))
    where = "the embedding" if layer == 0 else f"decoder layer {layer - 1}"
    raise ValueError(
        f"calibration: a hidden state leaving {where} is NaN or infinite; check the weights of that layer, or use "
        "model.dtype=float32 if the model overflows in half precision"
    )
