"""Contexts that set a model's evaluation mode or hooks on its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode inside the context, and restore the mode of every submodule afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forward_hooks(
    modules: Sequence[nn.Module], hook: Callable[[int, tuple[Any, ...], Tensor], Tensor | None]
) -> Iterator[None]:
    """Call a function after each of some modules in the forward pass inside the context.

    Args:
        modules: the modules.
        hook: gets the number of the module, its positional arguments and the first tensor of its output. The tensor
            that it returns, if any, replaces that one.
    """

    def register(number: int, module: nn.Module) -> RemovableHandle:
        def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            several = isinstance(output, tuple)
            new = hook(number, args, output[0] if several else output)
            return (new, *output[1:]) if several and new is not None else new

        return module.register_forward_hook(call)

    handles = [register(number, module) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Capture the outputs of some modules in the forward pass inside the context.

    Yields:
        A list that is filled at the end of the context, in the order of the modules.
    """
    by_number: dict[int, Tensor] = {}
    outputs: list[Tensor] = []

    def keep(number: int, args: tuple[Any, ...], output: Tensor) -> None:
        by_number[number] = output

    with forward_hooks(modules, keep):
        yield outputs
    outputs += [by_number[number] for number in range(len(modules))]


@contextmanager
def capture_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Capture the hidden states that enter a module in the forward pass inside the context.

    Yields:
        A list to which the states are appended.
    """
    inputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()
