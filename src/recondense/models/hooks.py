"""Modes of a model and hooks on it, put back after use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after, every submodule has its own mode again (they may differ)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of modules in the forward that runs inside, in their order."""
    found: dict[int, Tensor] = {}
    outputs: list[Tensor] = []

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    outputs += [found[number] for number in range(len(modules))]


@contextmanager
def input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that enter a module in the forward that runs inside."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
