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
from recondense.models.replacement_blocks import SkippedLayer


def cache_layers(config: PretrainedConfig) -> set[int]:
    """Decoder layers whose cache gives the length for all layers of their attention type: the first of each type."""
    types = getattr(config, "layer_types", None) or ["full_attention"]
    return {0, *(types.index(kind) for kind in set(types))}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers  # type: ignore[return-value,union-attr]


def final_norm(model: PreTrainedModel) -> nn.Module:
    return model.model.norm  # type: ignore[return-value,union-attr]


def decoder(model: PreTrainedModel) -> nn.Module:
    """The causal LM without its head."""
    return model.model  # type: ignore[return-value]


def device(model: PreTrainedModel) -> torch.device:
    """The device that the model computes on: that of its embedding."""
    return model.get_input_embeddings().weight.device  # type: ignore[return-value,union-attr]


class _Recorder(nn.Module):
    """Takes the place of a decoder layer, and keeps its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "a decoder layer is called with more than its hidden states by position"
        self.arguments, self.hidden_states = kwargs, hidden_states
        return hidden_states


def arguments_of_layers(model: PreTrainedModel, arguments: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """The arguments of each decoder layer besides hidden states, and the states entering the first, (B, S, D).

    No layer runs. If the model gets token ids alone, the layers' arguments depend on the shape of the ids only.

    Args:
        arguments: of the model.
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
    """Inside, the model returns the hidden states after the final norm in place of logits.

    Callers still call the whole model: engines that shard it have their hooks on it.
    """
    head = model.lm_head
    model.lm_head = nn.Identity()
    try:
        yield model
    finally:
        model.lm_head = head


@contextmanager
def lm_head(model: PreTrainedModel) -> Iterator[Head]:
    """The unsharded weights of the LM head, for use inside.

    FSDP2 has them in the root unit, which is gathered for a whole step. ZeRO-3 gathers a weight when a module's
    attribute is read, and releases it with the root.
    """
    head: Any = model.lm_head
    yield Head(head.weight, head.bias)


@contextmanager
def checkpoint_layers(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Inside, decoder layers in training keep their inputs only, and backward computes the rest again."""
    if enabled:
        model.activation_checkpointing_enable()
    try:
        yield
    finally:
        if enabled:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()  # transformers does so for peft's models alone


@contextmanager
def compile_layers(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Inside, decoder layers are compiled, each for every block that it holds."""
    if not enabled:
        yield
        return
    layers = [layer for layer in decoder_layers(model) if not isinstance(layer, SkippedLayer)]
    for layer in layers:
        layer.compile()
    try:
        # The compiler sees one piece of code in all layers. It needs a version for the teacher's blocks and for the
        # student's, with gradients and without: more than it keeps by default.
        with torch._dynamo.config.patch(recompile_limit=8 + 8 * len(layers)):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def is_random_in_training(config: PretrainedConfig) -> bool:
    """Whether a model computes at random in training: dropout, or noise on its routers."""
    values = config.to_dict()
    return any(bool(values[name]) for name in values if "dropout" in name or "jitter" in name)


def packed_masks(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor) -> dict[str, Any] | None:
    """Attention masks that keep packed examples apart, by attention type; None if transformers makes them itself."""
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
    """The names of all Linear layers of the attention."""
    return [
        f"model.layers.{index}.self_attn.{name}"
        for index, layer in enumerate(decoder_layers(model))
        if not isinstance(layer, SkippedLayer)
        for name, module in layer.self_attn.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.Linear)
    ]


def layers_prefix() -> str:
    """The state-dict prefix of all decoder layers, with the last dot."""
    return "model.layers."


def layer_prefix(layer: int) -> str:
    """The state-dict prefix of a decoder layer, with the last dot."""
    return f"model.layers.{layer}."


def disable_router_loss(model: PreTrainedModel) -> None:
    """Switch off the router's auxiliary loss: transformers' forward fails on it once no routed layer is left."""
    model.config.output_router_logits = False


class Head(NamedTuple):
    """The weights of an LM head."""

    weight_VD: Tensor
    bias_V: Tensor | None = None

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V), in the head's dtype."""
        return F.linear(hidden_TD, self.weight_VD, self.bias_V)
