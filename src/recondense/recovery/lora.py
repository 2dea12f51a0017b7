"""LoRA adapters on attention, experts or both. They can be disabled, and merged into the weights.

Linear layers get adapters from peft. The experts' weights are three-dimensional parameters without a module whose
forward peft could wrap. They get the same update as a parametrization.

Legend: n experts, O and I output and input features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recondense.config.schema import LoraSettings
from recondense.models import decoder
from recondense.recovery import trainable
from recondense.surgery.student import Student


class LoraUpdate(nn.Module):
    """W + (alpha / r)·B A for each expert of a weight (n, O, I). B is initialized to 0.

    The rank r is that of the settings, or the full rank if that is lower.

    Args:
        weight_nOI: the weight.
        settings: rank and alpha.

    Reference: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, weight_nOI: Tensor, settings: LoraSettings) -> None:
        super().__init__()
        num_experts, num_outputs, num_inputs = weight_nOI.shape
        rank = min(settings.rank, num_outputs, num_inputs)
        options: dict[str, Any] = {"dtype": weight_nOI.dtype, "device": weight_nOI.device}
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, num_inputs, **options))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, num_outputs, rank, **options))
        for matrix_rI in self.lora_A:
            nn.init.kaiming_uniform_(matrix_rI, a=5**0.5)  # as in peft
        self.scale = settings.alpha / rank
        self.active = True

    def forward(self, weight_nOI: Tensor) -> Tensor:
        """Return the updated weight, or the stored one if the update is disabled."""
        if not self.active:
            return weight_nOI
        return weight_nOI + (self.scale * torch.bmm(self.lora_B, self.lora_A)).to(weight_nOI.dtype)


@dataclass
class Adapters:
    """The adapters in a student's model.

    Args:
        student: the student.
        linears: peft's layers, by the name of the Linear layer that each wraps.
        updates: triples of a module, the name of its parameter, and the update.
    """

    student: Student
    linears: dict[str, LoraLinear] = field(default_factory=dict)
    updates: list[tuple[nn.Module, str, LoraUpdate]] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights of the adapters, which are trained."""
        layers = self.linears.values()
        matrices = [value for layer in layers for name, value in layer.named_parameters() if "lora_" in name]
        return [*matrices, *(value for *_, update in self.updates for value in update.parameters())]

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Disable the adapters inside the context."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for layer in self.linears.values():
            layer._disable_adapters = not on  # `enable_adapters` would also change requires_grad
        for *_, update in self.updates:
            update.active = on

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the adapters by plain modules with merged weights. The original keeps its weights."""
        self.student.replace_weights(self._take_out())
        self.student.additions = None

    def remove(self) -> None:
        """Remove the adapters without merging them. The model has its modules and weights from before `inject`."""
        for name in self.linears:
            self._unwrap(name)
        for module, name, _ in self.updates:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        self.student.additions = None

    def _take_out(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Remove the adapters one by one; yield the plain module, the name of its weight, and the merged weight."""
        for name, layer in self.linears.items():
            delta = layer.get_delta_weight("default")
            base = self._unwrap(name)
            yield base, "weight", nn.Parameter(base.weight + delta.to(base.weight.dtype), requires_grad=False)
        for module, name, _ in self.updates:
            merged = getattr(module, name).detach().clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            yield module, name, nn.Parameter(merged, requires_grad=False)

    def _unwrap(self, name: str) -> Any:
        """Put a Linear layer back in the place of peft's layer around it, and return it."""
        base = self.linears[name].get_base_layer()
        parent, _, leaf = name.rpartition(".")
        setattr(self.student.model.get_submodule(parent), leaf, base)
        return base


def cache_updates(adapters: Adapters | None) -> AbstractContextManager[None]:
    """Return a context in which each updated weight is computed only once.

    Weights are cached until the context ends. So it must not contain both a pass with adapters and one without.
    """
    return parametrize.cached() if adapters is not None else nullcontext()


def inject(student: Student, layers: Sequence[int], settings: LoraSettings) -> Adapters:
    """Add adapters to a student's model. They are disabled inside `student.original()`.

    Args:
        student: the student. All other weights of its model are frozen.
        layers: the decoder layers whose experts get adapters. Attention gets them in every decoder layer.
        settings: rank, alpha, dropout (only of Linear layers), and which parts get adapters.

    Returns:
        The adapters.
    """
    model = student.model
    model.requires_grad_(False)
    adapters = Adapters(student)
    linears = decoder.attention_linears(model) if settings.target != "experts" else []
    experts = trainable.trainable_modules(model, layers) if settings.target != "attention" else {}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)  # the same initialization in every run
            for name, module in experts.items():
                linears += _update_experts(name, module, settings, adapters)
            for name in linears:
                _wrap_linear(name, settings, adapters)
    except BaseException:  # such as too little memory
        adapters.remove()
        raise
    student.additions = adapters
    return adapters


def _update_experts(name: str, module: nn.Module, settings: LoraSettings, adapters: Adapters) -> list[str]:
    """Register updates of the experts' weights in a module, and return the names of its Linear layers."""
    linears = []
    for inner, part in list(module.named_modules()):
        if isinstance(part, nn.Linear):
            linears.append(f"{name}.{inner}" if inner else name)
            continue
        for parameter, value in list(part.named_parameters(recurse=False)):
            if value.ndim == 3:
                update = LoraUpdate(value, settings)
                parametrize.register_parametrization(part, parameter, update)
                adapters.updates.append((part, parameter, update))
    return linears


def _wrap_linear(name: str, settings: LoraSettings, adapters: Adapters) -> None:
    """Wrap one Linear layer in peft's layer."""
    # Not with peft's own injection, which changes the targets of model types whose experts it knows.
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout)
    model = adapters.student.model
    parent, _, leaf = name.rpartition(".")
    layer = LoraLinear(model.get_submodule(name), "default", config, r=settings.rank, lora_alpha=settings.alpha)
    setattr(model.get_submodule(parent), leaf, layer)
    adapters.linears[name] = layer
