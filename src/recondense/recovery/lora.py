"""LoRA adapters: on attention, on experts or on both; they can be switched off, and merged into the weights.

Linear layers get theirs from peft. The experts' weights are three-dimensional parameters that low-rank experts read
without a forward of their own, which is where peft hangs its adapters; those get the same update as a parametrization.

Legend: n experts, O and I output and input features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from recondense.config.schema import LoraSettings
from recondense.models import decoder
from recondense.recovery import trainable

Replaced = Callable[[nn.Module, str, nn.Parameter], None]


class LoraUpdate(nn.Module):
    """W + (alpha / r)·B A for each expert of a weight (n, O, I); B starts at 0.

    The rank r is that of the settings, or the full one where it is less.

    Reference: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, weight_nOI: Tensor, settings: LoraSettings) -> None:
        super().__init__()
        num_experts, num_outputs, num_inputs = weight_nOI.shape
        rank = min(settings.rank, num_outputs, num_inputs)
        kind: dict[str, Any] = {"dtype": weight_nOI.dtype, "device": weight_nOI.device}
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, num_inputs, **kind))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, num_outputs, rank, **kind))
        for each in self.lora_A:
            nn.init.kaiming_uniform_(each, a=5**0.5)  # as peft does
        self.scale = settings.alpha / rank
        self.active = True

    def forward(self, weight_nOI: Tensor) -> Tensor:
        """The weight that is used in place of the stored one."""
        if not self.active:
            return weight_nOI
        return weight_nOI + (self.scale * torch.bmm(self.lora_B, self.lora_A)).to(weight_nOI.dtype)


@dataclass
class Adapters:
    """The adapters of one model.

    Args:
        model: the model that they are in.
        linears: peft's layers, by the name of the Linear that each wraps.
        updates: (module, name of its parameter, the update).
    """

    model: PreTrainedModel
    linears: dict[str, LoraLinear] = field(default_factory=dict)
    updates: list[tuple[nn.Module, str, LoraUpdate]] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        own = [value for layer in self.linears.values() for name, value in layer.named_parameters() if "lora_" in name]
        return [*own, *(value for *_, update in self.updates for value in update.parameters())]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it would without adapters."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for layer in self.linears.values():
            layer._disable_adapters = not on  # enable_adapters would change requires_grad as well
        for *_, update in self.updates:
            update.active = on

    @torch.no_grad()
    def merge(self, replaced: Replaced) -> None:
        """Put plain modules with merged weights in place of adapters. No weight is changed: each merged one is new.

        Args:
            replaced: called with the module, the name and the weight as it was, so that others can go on using it.
        """
        for name, layer in self.linears.items():
            base: Any = layer.get_base_layer()
            before = base.weight
            delta = layer.get_delta_weight("default").to(before.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, base)
            base.weight = nn.Parameter(before + delta, requires_grad=False)
            replaced(base, "weight", before)
        for module, name, _ in self.updates:
            merged = getattr(module, name).detach().clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            before = module._parameters[name]
            assert before is not None
            module._parameters[name] = nn.Parameter(merged, requires_grad=False)
            replaced(module, name, before)
        self.linears.clear()
        self.updates.clear()


def once(adapters: Adapters | None) -> AbstractContextManager[None]:
    """A context in which each updated weight is computed once, however often it is read.

    It must hold one pass with adapters or one without, not both: what was computed stays until it ends.
    """
    return parametrize.cached() if adapters is not None else nullcontext()


def inject(model: PreTrainedModel, layers: Sequence[int], settings: LoraSettings) -> Adapters:
    """Put adapters into a model.

    Args:
        layers: whose experts get adapters; attention gets them in every decoder layer.
        settings: rank, alpha, dropout (of linear layers alone), and what gets adapters.

    Returns:
        the adapters; everything else of the model is frozen.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # the same start for every run of a plan
        return _inject(model, layers, settings)


def _inject(model: PreTrainedModel, layers: Sequence[int], settings: LoraSettings) -> Adapters:
    model.requires_grad_(False)
    found = Adapters(model)
    names = decoder.attention_linears(model) if settings.target != "experts" else []
    experts = trainable.trained_modules(model, layers) if settings.target != "attention" else {}
    for name, module in experts.items():
        for inner, each in list(module.named_modules()):
            where = f"{name}.{inner}" if inner else name
            if isinstance(each, nn.Linear):
                names.append(where)
                continue
            for parameter, value in list(each.named_parameters(recurse=False)):
                if value.ndim == 3:
                    update = LoraUpdate(value, settings)
                    parametrize.register_parametrization(each, parameter, update)
                    found.updates.append((each, parameter, update))
    # peft's own injection rewrites targets by model type, for models whose experts it knows; here the names are exact.
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        layer = LoraLinear(base, "default", config, r=settings.rank, lora_alpha=settings.alpha)
        setattr(model.get_submodule(parent), leaf, layer)
        found.linears[name] = layer
    return found
