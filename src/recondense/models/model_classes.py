"""Model classes: the classes of a family and of its compressed models, and models without weights."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from recondense.models.compressed_classes import PREFIX, compressed_classes
from recondense.models.families import FAMILIES, family_name, family_of


def on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the model that a config describes on the meta device, without weights.

    Raises:
        UserError: the family is not supported.
    """
    family_of(config)
    return empty_model(config, dtype)


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the model that a config describes without weights; the family need not be supported."""
    register_model_type(config.model_type)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **({"dtype": dtype} if dtype else {}))
    return model


def is_known(model_type: object) -> bool:
    """Return whether transformers or recondense has the classes of a model_type, so that no remote code is needed."""
    if not isinstance(model_type, str):
        return False
    if model_type.removeprefix(PREFIX) in FAMILIES:
        register_model_type(model_type)
    return model_type in CONFIG_MAPPING


@cache
def register_model_type(model_type: str) -> None:
    """Register `deepseek` or a compressed family with transformers' Auto classes; ignore any other model type.

    Folders of these types then load without remote code.
    """
    if model_type.removeprefix(PREFIX) == "deepseek":
        from recondense.models import deepseek  # late: it imports the model classes of three families

        deepseek.register()
    if not model_type.startswith(PREFIX):
        return
    family = FAMILIES[family_name(model_type)]
    config_class = type(AutoConfig.for_model(family_name(model_type)))
    model_class, base = model_class_of(config_class), base_class_of(config_class)
    compressed_config, compressed_model, compressed_base = compressed_classes(
        config_class, model_class, base, family.router_entries, family.expert_entries
    )
    AutoConfig.register(model_type, compressed_config, exist_ok=True)
    AutoModelForCausalLM.register(compressed_config, compressed_model, exist_ok=True)
    AutoModel.register(compressed_config, compressed_base, exist_ok=True)


def model_class_of(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Return the causal LM class for a config class."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[config_class])


def base_class_of(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Return the class of the model without head for a config class."""
    return cast(type[PreTrainedModel], MODEL_MAPPING[config_class])


def has_attention(config: PretrainedConfig, name: str) -> bool:
    """Return whether the model of a config supports an attention implementation."""
    flag = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(name)
    known = str(config.model_type).removeprefix(PREFIX) in FAMILIES  # a teacher may be of another family
    model_class = family_classes(config)[1] if known else model_class_of(type(config))
    return flag is None or bool(getattr(model_class, flag))


def family_classes(config: PretrainedConfig) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Return the family's own config class and causal LM class, even for the config of a compressed model."""
    register_model_type(config.model_type)
    config_class = type(AutoConfig.for_model(family_name(config.model_type)))
    return config_class, model_class_of(config_class)
