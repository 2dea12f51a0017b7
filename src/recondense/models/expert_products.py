"""The products that low-rank experts compute. This file imports only torch, because it is bundled into exports.

Legend: T tokens, K top-k, S = T·K routed tokens sorted by expert, P tokens of the busiest expert, D hidden size, n
experts of a bucket, O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Glu = Callable[[Tensor, Tensor], Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]
Biases = Sequence[Tensor] | None  # of gate, up and down, each added to all rows of a product


def run_expert(
    x: Tensor,
    weights: Sequence[Tensor | None],
    gate_rows: int,
    glu: Glu,
    linear: Linear,
    biases: Biases = None,
) -> Tensor:
    """Compute an expert's output.

    Args:
        x: the expert's tokens.
        weights: the right factors of gate and up in one tensor, the left factor of gate, that of up, and the right and
            left factors of down. A dense projection has its weight in the place of the right factor for gate and up and
            of the left factor for down, and None in the place of the other factor.
        gate_rows: number of rows of the first weight that belong to gate.
        glu: the gated activation.
        linear: multiplies rows by a weight.
        biases: the biases of gate, up and down; None if there are none.
    """
    *_, down_right, down_left = weights
    assert down_left is not None
    inner = run_inner(x, weights, gate_rows, glu, linear, biases)
    output = linear(inner if down_right is None else linear(inner, down_right), down_left)
    return output if biases is None else output + biases[2]


def run_inner(
    x: Tensor,
    weights: Sequence[Tensor | None],
    gate_rows: int,
    glu: Glu,
    linear: Linear,
    biases: Biases,
) -> Tensor:
    """Compute the input of an expert's down projection; the arguments are those of `run_expert`."""
    gate_up, gate_left, up_left, *_ = weights
    assert gate_up is not None
    inner = linear(x, gate_up)
    gate, up = inner.split((gate_rows, inner.shape[-1] - gate_rows), dim=-1)  # type: ignore[no-untyped-call]
    gate = gate if gate_left is None else linear(gate, gate_left)
    up = up if up_left is None else linear(up, up_left)
    return glu(gate, up) if biases is None else glu(gate + biases[0], up + biases[1])


def stack_padded(factors: Sequence[Tensor]) -> Tensor:
    """Stack matrices of different ranks, padded with zeros."""
    rows, columns = (max(w.shape[dim] for w in factors) for dim in (0, 1))
    return torch.stack([nn.functional.pad(w, (0, columns - w.shape[1], 0, rows - w.shape[0])) for w in factors])


def is_groupable(x_SD: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Return whether torch's grouped product supports these tensors.

    It needs rows and addresses at multiples of 16 bytes, and a CPU or a GPU of the Ampere generation or later.
    """
    if torch.compiler.is_compiling() and x_SD.dtype != torch.bfloat16:
        return False  # dynamo traces the grouped product only for bfloat16
    if not hasattr(nn.functional, "grouped_mm") or x_SD.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x_SD.is_cuda and (x_SD.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x_SD.device) < (8, 0)):
        return False
    if x_SD.device.type not in ("cpu", "cuda"):
        return False
    rows = [size * x_SD.element_size() for w in weights if w is not None for size in w.shape[1:]]
    addresses = [w.data_ptr() for w in weights if w is not None] + [x_SD.data_ptr()]
    return not any(number % 16 for number in (*rows, *addresses))


def grouped_linear(x_SI: Tensor, weight_nOI: Tensor, ends: Tensor) -> Tensor:
    return nn.functional.grouped_mm(x_SI, weight_nOI.transpose(-2, -1), offs=ends)


def batched_linear(x_nPI: Tensor, weight_nOI: Tensor) -> Tensor:
    return torch.bmm(x_nPI, weight_nOI.transpose(1, 2))


class Dispatch(torch.autograd.Function):
    """Copy each token for each of its experts, sorted by expert; the backward pass sums in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_S: Tensor, back_S: Tensor, top_k: int) -> Tensor:
        ctx.order_S, ctx.back_S, ctx.top_k = order_S, back_S, top_k
        return x_TD.index_select(0, order_S // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, Combine.apply(grads[0], ctx.order_S, ctx.back_S, ctx.top_k)), None, None, None


def reduces_gradients() -> bool:
    """Return whether gradients are reduced over processes, so that every weight must get one, in a common order."""
    return torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()


class Combine(torch.autograd.Function):
    """Sum over each token's experts; the adjoint of `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, order_S: Tensor, back_S: Tensor, top_k: int) -> Tensor:
        ctx.order_S, ctx.back_S, ctx.top_k = order_S, back_S, top_k
        return y_SD.index_select(0, back_S).unflatten(0, (-1, top_k)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, Dispatch.apply(grads[0], ctx.order_S, ctx.back_S, ctx.top_k)), None, None, None


class Scatter(torch.autograd.Function):
    """Write rows to their places in a tensor of zeros; the adjoint of `Gather`."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, places_S: Tensor, num: int) -> Tensor:
        ctx.places_S = places_S
        return x_SD.new_zeros(num, x_SD.shape[1]).index_copy_(0, places_S, x_SD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, Gather.apply(grads[0], ctx.places_S)), None, None


class Gather(torch.autograd.Function):
    """Take rows from different places."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, places_S: Tensor) -> Tensor:
        ctx.places_S, ctx.num = places_S, len(x_PD)
        return x_PD.index_select(0, places_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, Scatter.apply(grads[0], ctx.places_S, ctx.num)), None


def empty_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
