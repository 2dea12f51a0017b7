"""Make routed experts with fewer channels, and solve for their down projections by least squares.

Legend: E routed experts, D hidden size, F expert width, n retained channels of an expert, r removed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recondense.errors import UserError
from recondense.models.expert_widths import select_channels
from recondense.models.low_rank import LowRankExperts
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import MoEWeights
from recondense.operations import PROJECTIONS

RIDGE = 1e-2  # of the least squares, relative to the mean diagonal of the retained channels' second moment
ROW_BYTES = 16  # the grouped products of fused experts need rows of multiples of this

Moment = Callable[[int], Tensor]


@torch.no_grad()
def narrow_experts(block: SparseBlock, channels: Sequence[Sequence[int]], moment: Moment | None = None) -> nn.Module:
    """Return a copy of a layer's experts with only some channels of each.

    Args:
        block: the layer.
        channels: the channels that each expert retains, ascending.
        moment: returns an expert's second moment Σ w² h hᵀ (F, F) of the inputs h of its down projection on the
            calibration set. The down projections are then solved for by least squares, see `compensated_down`.

    Returns:
        A module of the family's own class if all experts retain equally many channels; otherwise `LowRankExperts` with
        dense projections.

    Raises:
        UserError: the layer has another number of experts or narrower ones; or its experts are factorized or have
            different widths.
    """
    weights = block.weights
    _check(block, channels)
    device = weights.down_EDF.device
    index = [torch.tensor(retained, device=device) for retained in channels]

    def down_of(expert: int) -> Tensor:
        if moment is None:
            return weights.down_EDF[expert][:, index[expert]]
        return compensated_down(weights.down_EDF[expert], index[expert], moment(expert))

    if len({len(retained) for retained in channels}) == 1:
        experts = select_channels(block.experts, torch.stack(index))
        if moment is not None:
            down_EDn = experts.down_proj.mT if getattr(experts, "is_transposed", False) else experts.down_proj
            for expert in range(block.num_experts):
                down_EDn[expert].copy_(down_of(expert))  # type: ignore[operator,index]
        return experts
    return _uneven_experts(weights, index, down_of)


def _uneven_experts(weights: MoEWeights, index: Sequence[Tensor], down_of: Callable[[int], Tensor]) -> LowRankExperts:
    """Make experts of different widths from the retained channels of each expert and its down projection (D, n)."""
    biases = {
        name: list(bias) if name == "down_proj" else [bias[expert, rows] for expert, rows in enumerate(index)]
        for name, bias in weights.biases().items()
    }

    def projections(expert: int) -> dict[str, Tensor]:
        gate_FD, up_FD, _ = weights.projections(expert).values()
        return {"gate_proj": gate_FD[index[expert]], "up_proj": up_FD[index[expert]], "down_proj": down_of(expert)}

    def none(expert: int, name: str) -> tuple[Tensor, Tensor]:
        raise AssertionError("no projection is factorized")

    dense = dict.fromkeys(PROJECTIONS, (None,) * len(index))
    with torch.device(weights.down_EDF.device):
        uneven = LowRankExperts(weights.down_EDF.shape[1], [*map(len, index)], dense, weights.glu, bool(biases))
    return uneven.to(weights.down_EDF.dtype).fill(projections, none, biases)


def _check(block: SparseBlock, channels: Sequence[Sequence[int]]) -> None:
    if len(channels) != block.num_experts:
        raise UserError(
            f"plan: narrow, layer {block.layer}: there are channels for {len(channels)} experts, but the layer has "
            f"{block.num_experts}"
        )
    for expert, (retained, width) in enumerate(zip(channels, block.widths, strict=True)):
        if retained[-1] >= width:
            raise UserError(
                f"plan: narrow, layer {block.layer}: the plan retains channel {retained[-1]} of expert {expert}, which "
                f"has {width} channels"
            )
    narrow = {len(retained) for retained in channels}
    row_bytes = max(narrow) * block.weights.down_EDF.element_size()
    if len(narrow) == 1 and narrow != set(block.widths) and row_bytes % ROW_BYTES:
        raise UserError(
            f"plan: narrow, layer {block.layer}: rows of {max(narrow)} numbers are {row_bytes} bytes, but grouped "
            f"products need a multiple of {ROW_BYTES} bytes"
        )


def compensated_down(down_DF: Tensor, retained_n: Tensor, moment_FF: Tensor, ridge: float = RIDGE) -> Tensor:
    """Solve for the down projection of an expert with fewer channels by least squares.

    W' = argmin Σ w² ‖W h − W' h_n‖² + λ‖W' − W_n‖²  =  W_n + W_r M_rn (M_nn + λ)⁻¹,  λ = ridge · mean diag M_nn

    Args:
        down_DF: W, the expert's down projection.
        retained_n: the retained channels.
        moment_FF: M = Σ w² h hᵀ over the tokens of the expert, in fp64; w is the routing weight.
        ridge: the penalty on the distance from the retained columns of W.

    Returns:
        W' (D, n) in fp32.
    """
    removed = torch.ones(down_DF.shape[1], dtype=torch.bool, device=down_DF.device)
    removed[retained_n] = False
    moment_nF = moment_FF[retained_n]
    normal_nn = moment_nF[:, retained_n].clone()
    normal_nn.diagonal().add_(ridge * float(normal_nn.diagonal().mean()) + 1e-30)
    right_nD = moment_nF[:, removed] @ down_DF[:, removed].double().T
    return (down_DF[:, retained_n].double() + torch.linalg.solve(normal_nn, right_nD).T).float()
