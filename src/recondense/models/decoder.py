"""The decoder of a causal LM: its layers, norm and head, and the arguments of each layer.

Legend: B batch, S sequence, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from recondense.models.families import family_of
from recondense.models.removed_blocks import SkippedLayer


def cache_layers(config: PretrainedConfig) -> set[int]:
    """Return the first decoder layer of each attention type; transformers reads the cached length from these layers."""
    types = getattr(config, "layer_types", None) or ["full_attention"]
    return {0, *(types.index(kind) for kind in set(types))}


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions that the model is made for; None if its config does not say it."""
    return getattr(config, "max_position_embeddings", None)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers  # type: ignore[return-value,union-attr]


def final_norm(model: PreTrainedModel) -> nn.Module:
    return model.model.norm  # type: ignore[return-value,union-attr]


def outer_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules with weights outside the decoder layers, by name: embedding, final norm and head."""
    return {
        "embed_tokens": model.model.embed_tokens,  # type: ignore[dict-item,union-attr]
        "norm": final_norm(model),
        "lm_head": model.lm_head,  # type: ignore[dict-item]
    }


def set_outer_module(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Set one of the `outer_modules`."""
    setattr(model if name == "lm_head" else decoder(model), name, module)


@contextmanager
def swap_outer_modules(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace some of the `outer_modules` inside the context; no weight is copied."""
    before = {name: module for name, module in outer_modules(model).items() if name in modules}
    for name, module in modules.items():
        set_outer_module(model, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            set_outer_module(model, name, module)


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the causal LM without its head."""
    return model.model  # type: ignore[return-value]


def device(model: PreTrainedModel) -> torch.device:
    """Return the device on which the model computes, that of its embedding."""
    return model.get_input_embeddings().weight.device  # type: ignore[return-value,union-attr]


class _Recorder(nn.Module):
    """Replaces a decoder layer and records its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "a decoder layer is called with more positional arguments than its hidden states"
        self.arguments, self.hidden_states = kwargs, hidden_states
        return hidden_states


def arguments_of_layers(model: PreTrainedModel, arguments: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the arguments of each decoder layer, and the hidden states (B, S, D) that enter the first layer.

    No layer is run. If the model gets only token ids, the layers' arguments depend only on the shape of the ids.

    Args:
        model: the causal LM.
        arguments: the arguments of the model.

    Returns:
        For each layer, its arguments except the hidden states; and the hidden states that enter the first layer.
    """
    layers = decoder_layers(model)
    recorders = [_Recorder() for _ in layers]
    decoder(model).layers = nn.ModuleList(recorders)
    try:
        decoder(model)(**{**arguments, "use_cache": False})
    finally:
        decoder(model).layers = layers
    assert recorders[0].hidden_states is not None
    return [recorder.arguments for recorder in recorders], recorders[0].hidden_states


@contextmanager
def bypass_head(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Make the model return the hidden states after the final norm instead of logits, inside the context.

    Callers still call the causal LM itself, because engines that shard it have their hooks on it.
    """
    head = model.lm_head
    model.lm_head = nn.Identity()
    try:
        yield model
    finally:
        model.lm_head = head


@contextmanager
def lm_head(model: PreTrainedModel) -> Iterator[Head]:
    """Yield the unsharded weights of the LM head, for use inside the context.

    FSDP2 keeps them in the root unit, which is gathered for the entire step. ZeRO-3 gathers a weight when the attribute
    of its module is read, and releases it with the root.
    """
    head: Any = model.lm_head
    yield Head(head.weight, head.bias)


@contextmanager
def checkpoint_layers(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Use activation checkpointing inside the context: layers keep only their inputs and recompute the rest."""
    if enabled:
        model.activation_checkpointing_enable()
    try:
        yield
    finally:
        if enabled:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()  # transformers does this only for models of peft


@contextmanager
def compile_layers(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Compile the decoder layers with torch.compile inside the context."""
    if not enabled:
        yield
        return
    layers = [layer for layer in decoder_layers(model) if not isinstance(layer, SkippedLayer)]
    for layer in layers:
        layer.compile()
    try:
        # All layers share one code object. It needs a compiled version for the student's and the teacher's blocks, with
        # and without gradients, which is more than the compiler keeps by default.
        with torch._dynamo.config.patch(recompile_limit=8 + 8 * len(layers)):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def is_random_in_training(config: PretrainedConfig) -> bool:
    """Return whether a model's forward pass is random in training, by dropout or by noise on its routers."""
    values = config.to_dict()
    return any(bool(values[name]) for name in values if "dropout" in name or "jitter" in name)


def packed_masks(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor) -> dict[str, Any] | None:
    """Make attention masks that separate packed examples, by attention type; None if transformers makes them itself."""
    if not family_of(model.config).needs_packed_masks:
        return None
    shape = torch.empty(*input_ids_BS.shape, 0, dtype=model.dtype, device=input_ids_BS.device)
    settings: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": shape,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids_BS,
    }
    return {
        "full_attention": create_causal_mask(**settings),
        "sliding_attention": create_sliding_window_causal_mask(**settings),
    }


def attention_linears(model: PreTrainedModel) -> list[str]:
    """Return the names of all Linear layers in the attention of all decoder layers."""
    return [
        f"model.layers.{index}.self_attn.{name}"
        for index, layer in enumerate(decoder_layers(model))
        if not isinstance(layer, SkippedLayer)
        for name, module in layer.self_attn.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.Linear)
    ]


def attention_parameters(model: PreTrainedModel, layer: int) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer's attention by name in the model, with biases and sinks, but without norms."""
    attention = getattr(decoder_layers(model)[layer], "self_attn", nn.Module())
    norms = norm_parameters(model, layer)
    names = {f"{layer_prefix(layer)}self_attn.{name}": value for name, value in attention.named_parameters()}
    return {name: value for name, value in names.items() if name not in norms}


def norm_parameters(model: PreTrainedModel, layer: int) -> dict[str, nn.Parameter]:
    """Return the weights of all norms of a decoder layer by name in the model, those in its attention too."""
    return {
        f"{layer_prefix(layer)}{name}.{leaf}": value
        for name, module in decoder_layers(model)[layer].named_modules()
        if is_norm(module)
        for leaf, value in module.named_parameters(recurse=False)
    }


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def layers_prefix() -> str:
    """Return the state-dict prefix of all decoder layers, including the last dot."""
    return "model.layers."


def layer_prefix(layer: int) -> str:
    """Return the state-dict prefix of a decoder layer, including the last dot."""
    return f"model.layers.{layer}."


def disable_router_loss(model: PreTrainedModel) -> None:
    """Switch off the router's auxiliary loss, with which transformers' forward fails if no routed layer remains."""
    model.config.output_router_logits = False


class Head(NamedTuple):
    """The weights of an LM head."""

    weight_VD: Tensor
    bias_V: Tensor | None = None

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Compute the logits (T, V) of hidden states (T, D), in the head's dtype."""
        return F.linear(hidden_TD, self.weight_VD, self.bias_V)
