"""The decoder of a causal LM: its layers, norm and head, and what each layer is called with.

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

from recondense.models.blocks import SkippedLayer
from recondense.models.families import family_of


def cache_layers(config: PretrainedConfig) -> set[int]:
    """Decoder layers whose cache says how long all of one attention type are: the first, and the first of each type."""
    types = getattr(config, "layer_types", None) or ["full_attention"]
    return {0, *(types.index(each) for each in set(types))}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers  # type: ignore[return-value,union-attr]


def final_norm(model: PreTrainedModel) -> nn.Module:
    return model.model.norm  # type: ignore[return-value,union-attr]


def decoder(model: PreTrainedModel) -> nn.Module:
    """The causal LM without its head."""
    return model.model  # type: ignore[return-value]


def device(model: PreTrainedModel) -> torch.device:
    """Where the model computes: where its embedding lies."""
    return model.get_input_embeddings().weight.device  # type: ignore[return-value,union-attr]


class _Taken(nn.Module):
    """Stands in for a decoder layer, and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "a decoder layer is called with more than its hidden states by position"
        self.arguments, self.hidden_states = kwargs, hidden_states
        return hidden_states


def arguments_of_layers(model: PreTrainedModel, arguments: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """What the decoder calls each of its layers with besides hidden states, and what enters the first (B, S, D).

    No layer runs. With ids alone the former is the same for all of one shape.

    Args:
        arguments: of the model.
    """
    layers = decoder_layers(model)
    taken = [_Taken() for _ in layers]
    decoder(model).layers = nn.ModuleList(taken)
    try:
        decoder(model)(**{**arguments, "use_cache": False})
    finally:
        decoder(model).layers = layers
    assert taken[0].hidden_states is not None
    return [each.arguments for each in taken], taken[0].hidden_states


@contextmanager
def headless(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the model's logits are its hidden states after the final norm.

    It is still called as a whole: engines that shard it hang their hooks on it.
    """
    head = model.lm_head
    model.lm_head = nn.Identity()
    try:
        yield model
    finally:
        model.lm_head = head


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[Head]:
    """The weights of the LM head, for use inside.

    Where an engine spreads them: under FSDP2 they lie in the root unit, which is gathered for the whole of a step;
    ZeRO-3 gathers a weight when a module's attribute is read, and lets go of it with the root.
    """
    head: Any = model.lm_head
    yield Head(head.weight, head.bias)


@contextmanager
def checkpointing(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside, decoder layers in training keep what enters them alone, and backward computes the rest again."""
    if wanted:
        model.activation_checkpointing_enable()
    try:
        yield
    finally:
        if wanted:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()  # transformers does so for peft's models alone


@contextmanager
def compiling(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside, decoder layers are compiled, each for every block that stands in it."""
    if not wanted:
        yield
        return
    layers = [layer for layer in decoder_layers(model) if not isinstance(layer, SkippedLayer)]
    for layer in layers:
        layer.compile()
    try:
        # All layers are one piece of code to the compiler: with the teacher's blocks, the student's, and gradients or
        # none it needs more versions than it would keep.
        with torch._dynamo.config.patch(recompile_limit=8 + 8 * len(layers)):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def random_in_training(config: PretrainedConfig) -> bool:
    """Whether a model computes otherwise in training than in evaluation: dropout, or noise on its routers."""
    values = config.to_dict()
    return any(bool(values[name]) for name in values if "dropout" in name or "jitter" in name)


def masks_of_types(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor) -> dict[str, Any] | None:
    """Attention masks by kind of layer that keep packed examples apart, where the family needs them ready made."""
    if not family_of(model.config).masks_of_types:
        return None
    shape = torch.empty(*input_ids_BS.shape, 0, dtype=model.dtype, device=input_ids_BS.device)
    settings: dict[str, Any] = {
        "config": model.config, "inputs_embeds": shape, "attention_mask": None, "past_key_values": None,
        "position_ids": position_ids_BS,
    }  # fmt: skip
    return {
        "full_attention": create_causal_mask(**settings),
        "sliding_attention": create_sliding_window_causal_mask(**settings),
    }


def attention_linears(model: PreTrainedModel) -> list[str]:
    """Names of the Linear layers of every decoder layer's attention."""
    return [
        f"model.layers.{index}.self_attn.{name}"
        for index, layer in enumerate(decoder_layers(model))
        if not isinstance(layer, SkippedLayer)
        for name, module in layer.self_attn.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.Linear)
    ]


def layers_prefix() -> str:
    """What the state-dict names of all decoder layers begin with."""
    return "model.layers."


def layer_prefix(layer: int) -> str:
    """The state-dict prefix of a decoder layer, with the last dot."""
    return f"model.layers.{layer}."


def without_router_loss(model: PreTrainedModel) -> None:
    """Switch off the router's auxiliary loss: transformers' forward fails on it once no routed layer is left."""
    model.config.output_router_logits = False


class Head(NamedTuple):
    """The weights of an LM head."""

    weight_VD: Tensor
    bias_V: Tensor | None = None

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V), in the head's dtype."""
        return F.linear(hidden_TD, self.weight_VD, self.bias_V)
