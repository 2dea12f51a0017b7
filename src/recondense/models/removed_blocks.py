"""What replaces a removed MoE block or decoder layer. This file imports only torch: it is part of exports."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


class Zeros(nn.Module):
    """Replaces a removed MoE block or MLP. It adds nothing to the residual stream.

    The zeros depend on the input for autograd, so that the norm before them gets a gradient of zero. DDP waits for the
    gradient of every trained parameter.

    Args:
        pair: as in `CondensedMoE`.
    """

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        everywhere = torch.ones((), dtype=torch.bool, device=hidden_states.device)
        output = hidden_states.masked_fill(everywhere, 0.0)  # a product with 0 would keep infinities and NaN
        return (output, None) if self.pair else output


class SkippedLayer(nn.Module):
    """Replaces a removed decoder layer. It returns the residual stream unchanged and does not use the cache."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not that of the family's class

    @staticmethod
    def instead_of(layer: nn.Module) -> SkippedLayer:
        """Return a layer for the place of another one.

        It is an instance of the other layer's class too, because transformers takes a model's `hidden_states` from the
        layers of this class.
        """
        return _skipped_class(type(layer))()  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


@cache
def _skipped_class(layer_class: type[nn.Module]) -> type[SkippedLayer]:
    if issubclass(layer_class, SkippedLayer):
        return layer_class
    return type(SkippedLayer.__name__, (SkippedLayer, layer_class), {"__module__": __name__})
