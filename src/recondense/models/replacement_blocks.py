"""The blocks of compressed models. This file imports only torch, because it is bundled into exports.

Legend: B batch, S sequence, T tokens, D hidden size, F expert width, W width of a condensed layer, E routed experts of
the original layer, n retained ones, K top-k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GLU:
    """The gated activation of most families, act(gate) ⊙ up."""

    act_fn: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up


@dataclass(frozen=True)
class ClampedGLU:
    """The gated activation of gpt-oss (arXiv 2508.10925), (clamp(up) + 1) ⊙ g·σ(αg) with g = min(gate, limit)."""

    alpha: float
    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        return (up.clamp(-self.limit, self.limit) + 1) * (gate * torch.sigmoid(gate * self.alpha))


Glu = Callable[[Tensor, Tensor], Tensor]


class MoEWeights(NamedTuple):
    """The weights of a sparse MoE block, in the same orientation for every family. They are views, never copies.

    Args:
        gate_up_EHD: fused gate and up weights of the routed experts (E, 2F, D); see `halves`.
        down_EDF: down weights of the routed experts (E, D, F).
        glu: the gated activation.
        interleaved: whether rows of gate and up alternate; otherwise the first F rows are gate_proj.
        gate_up_bias_EH: biases (E, 2F), or None.
        down_bias_ED: biases (E, D), or None.
        shared: gate_proj (Ws, D), up_proj (Ws, D) and down_proj (D, Ws) of the shared experts, or None.
        shared_gate: the weight (1, D) of the shared experts' gate, or None.
    """

    gate_up_EHD: Tensor
    down_EDF: Tensor
    glu: Glu
    interleaved: bool = False
    gate_up_bias_EH: Tensor | None = None
    down_bias_ED: Tensor | None = None
    shared: tuple[Tensor, Tensor, Tensor] | None = None
    shared_gate: Tensor | None = None

    def halves(self, both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Split a tensor with 2F entries along a dimension into views of its gate part and its up part."""
        if self.interleaved:
            gate, up = both.unflatten(dim, (-1, 2)).unbind(dim + 1 if dim >= 0 else dim)
        else:
            gate, up = both.chunk(2, dim=dim)
        return gate, up

    def projections(self, expert: int) -> dict[str, Tensor]:
        """Return gate_proj (F, D), up_proj (F, D) and down_proj (D, F) of an expert, by name."""
        gate_FD, up_FD = self.halves(self.gate_up_EHD[expert], 0)
        return {"gate_proj": gate_FD, "up_proj": up_FD, "down_proj": self.down_EDF[expert]}

    def biases(self) -> dict[str, Tensor]:
        """Return the biases of gate_proj (E, F), up_proj (E, F) and down_proj (E, D); empty if the family has none."""
        if self.gate_up_bias_EH is None or self.down_bias_ED is None:
            return {}
        gate_EF, up_EF = self.halves(self.gate_up_bias_EH, 1)
        return {"gate_proj": gate_EF, "up_proj": up_EF, "down_proj": self.down_bias_ED}


class CondensedMoE(nn.Module):
    """A condensed MoE layer: the shared experts and a few routed experts as one wide SwiGLU, active for every token.

    y = W_down [ scale ⊙ glu(W_gate x, W_up x) ],  scale = shared gate on the shared rows, w̄_i on expert i's rows

    The scale stays outside the weights while training, because if it were folded into W_down, AdamW's steps would
    effectively be 1/w̄ times larger. If the experts have biases, the bias of W_down is Σ w̄_i·b_i.

    Args:
        hidden_size: D.
        shared_width: rows of the shared experts; 0 without shared experts.
        routed_width: n·F, the rows of the retained routed experts together.
        glu: the family's gated activation.
        token_gate: keep the shared experts' gate per token, sigmoid(W_g x), instead of a constant.
        scaled: have the scale as a buffer; False if it is folded into W_down.
        bias: whether the three projections have biases.
        pair: return (y, None), for families whose blocks also return their router's scores.

    Reference: Condense, Don't Just Prune, arXiv 2412.00069, section 3.
    """

    scale: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        shared_width: int,
        routed_width: int,
        glu: Glu,
        token_gate: bool = False,
        scaled: bool = True,
        bias: bool = False,
        pair: bool = False,
    ) -> None:
        super().__init__()
        width = shared_width + routed_width
        self.shared_width = shared_width
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=bias)
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if token_gate else None
        self.glu, self.pair = glu, pair
        self.register_buffer("scale", torch.ones(width, dtype=torch.float32) if scaled else None)

    @property
    def routed_width(self) -> int:
        """The number of rows that came from routed experts."""
        return self.down_proj.in_features - self.shared_width

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CondensedMoE:
        """Move and convert the module, but keep the scale in fp32: Lightning's bf16-true converts everything."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        """Map x (…, D) to y (…, D)."""
        parts = [self.gate_proj(hidden_states), self.up_proj(hidden_states)]
        if self.shared_expert_gate is not None:
            parts.append(torch.sigmoid(self.shared_expert_gate(hidden_states)))
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            # Recomputed in the backward pass: of the tensors of width W, only the outputs of two projections are kept.
            inner = checkpoint(self._inner, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            inner = self._inner(*parts)
        output: Tensor = self.down_proj(inner)
        return (output, None) if self.pair else output

    def _inner(self, gate: Tensor, up: Tensor, token_gate: Tensor | None = None) -> Tensor:
        """Compute the input of the down projection (…, W)."""
        inner = self.glu(gate, up)
        if self.scale is not None:
            inner = (inner * self.scale).to(inner.dtype)  # rounding the scale would give a systematic error
        if token_gate is not None:
            shared, routed = inner.split((self.shared_width, inner.shape[-1] - self.shared_width), dim=-1)
            inner = torch.cat((token_gate * shared, routed), dim=-1)
        return inner

    @classmethod
    def make_empty(cls, weights: MoEWeights, num_experts: int, token_gate: bool, pair: bool = False) -> CondensedMoE:
        """Make a block of the right shape without filling it, on the device and in the dtype of the weights."""
        _, hidden_size, expert_width = weights.down_EDF.shape
        with torch.device(weights.down_EDF.device):
            layer = cls(
                hidden_size=hidden_size,
                shared_width=weights.shared[0].shape[0] if weights.shared else 0,
                routed_width=num_experts * expert_width,
                glu=weights.glu,
                token_gate=token_gate and weights.shared_gate is not None,
                bias=bool(weights.biases()),
                pair=pair,
            )
        return layer.to(weights.down_EDF.dtype).requires_grad_(False)

    @torch.no_grad()
    def fill(
        self, weights: MoEWeights, experts: Sequence[int], coefficients: Sequence[float], shared_gate: float | None
    ) -> CondensedMoE:
        """Copy in the rows of the shared experts, then those of the retained experts in order, and set the scales.

        Args:
            weights: the weights of the sparse block.
            experts: the retained experts.
            coefficients: the constants that replace their routing weights, in the order of `experts`.
            shared_gate: the constant on the shared rows; None for 1.

        Returns:
            The module itself.
        """
        gates, ups, downs = ([weight] for weight in weights.shared) if weights.shared else ([], [], [])
        for expert in experts:
            for parts, weight in zip((gates, ups, downs), weights.projections(expert).values(), strict=True):
                parts.append(weight)
        self.gate_proj.weight.copy_(torch.cat(gates, dim=0))
        self.up_proj.weight.copy_(torch.cat(ups, dim=0))
        self.down_proj.weight.copy_(torch.cat(downs, dim=1))
        for name, bias in weights.biases().items():
            retained = bias[list(experts)].float()
            if name == "down_proj":
                share_n1 = torch.tensor(list(coefficients), dtype=torch.float32, device=retained.device)[:, None]
                self.down_proj.bias.copy_((retained * share_n1).sum(dim=0))
            else:
                getattr(self, name).bias.copy_(retained.flatten())
        if self.shared_expert_gate is not None:
            assert weights.shared_gate is not None
            self.shared_expert_gate.weight.copy_(weights.shared_gate)
        assert self.scale is not None
        values = [1.0 if shared_gate is None else shared_gate] * self.shared_width
        values += [value for value in coefficients for _ in range(weights.down_EDF.shape[-1])]
        self.scale.copy_(torch.tensor(values, dtype=torch.float64))
        return self

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the scale into down_proj (in fp32) and remove it. The block still computes the same function."""
        if self.scale is not None:
            weight = self.down_proj.weight
            weight.copy_((weight.float() * self.scale.float()).to(weight.dtype))
            self.scale = None


def expert_outputs(x_TD: Tensor, weights: MoEWeights, experts: Sequence[int]) -> Tensor:
    """Compute the unweighted outputs of some routed experts for all tokens.

    Each expert is a product of the same shape, so its output has the same bits no matter which other experts are
    computed.

    Args:
        x_TD: tokens.
        weights: the weights of the sparse block.
        experts: indices of n experts.

    Returns:
        The outputs (n, T, D) in the dtype of x.
    """
    output_nTD = x_TD.new_empty(len(experts), *x_TD.shape)
    for position, expert in enumerate(experts):
        torch.mm(expert_inner(x_TD, weights, expert), weights.down_EDF[expert].T, out=output_nTD[position])
        if weights.down_bias_ED is not None:
            output_nTD[position] += weights.down_bias_ED[expert]
    return output_nTD


def expert_inner(x_TD: Tensor, weights: MoEWeights, expert: int) -> Tensor:
    """Compute the input of an expert's down projection, glu(gate x, up x) (T, F)."""
    bias_H = None if weights.gate_up_bias_EH is None else weights.gate_up_bias_EH[expert]
    both_TH = nn.functional.linear(x_TD, weights.gate_up_EHD[expert], bias_H)
    return weights.glu(*weights.halves(both_TH, -1))


class RemappedRouter(nn.Module):
    """A router with a table that maps its rows to experts.

    Rows can share an expert (merged experts), or the rows can belong to some of the experts (trials of pruning).

    Args:
        router: returns (logits, top_k_weights, top_k_index).
        table: the expert of each row of the router.
    """

    table: Tensor

    def __init__(self, router: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("table", table)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the router's output with the experts from the table as top_k_index (T, K)."""
        logits, top_k_weights, top_k_index = self.router(hidden_states)
        return logits, top_k_weights, self.table[top_k_index]


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a new module that shares all parameters, buffers and children of a module, but not its hooks."""
    duplicate = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        duplicate.__dict__[name] = dict(module.__dict__[name])
    for name in [name for name in duplicate.__dict__ if name.endswith("_hooks") or "_hooks_" in name]:
        duplicate.__dict__[name] = type(duplicate.__dict__[name])()
    return duplicate


def select_experts(module: nn.Module, index: Sequence[int], num_experts: int, names: Sequence[str]) -> nn.Module:
    """Return a copy of a router or an experts module with only some of its experts.

    Args:
        module: a router or an experts module. Tensors and children without an entry per expert are shared.
        index: the n experts to retain.
        num_experts: E of the module.
        names: names of the parameters and buffers of the module and its children that have one entry per expert, along
            the first dimension of size E. They are copied.

    Returns:
        A module of the same class. Its attributes that count experts are n.
    """
    duplicate = shallow_copy(module)
    for name in names:
        *path, last = name.split(".")
        holder = duplicate
        for child in path:
            holder._modules[child] = shallow_copy(holder.get_submodule(child))
            holder = holder.get_submodule(child)
        tensors: dict[str, Any] = holder._parameters if last in holder._parameters else holder._buffers  # type: ignore[assignment]
        tensor: Tensor = tensors[last]
        dim = list(tensor.shape).index(num_experts)
        cut = tensor.detach().index_select(dim, torch.as_tensor(index, device=tensor.device))
        tensors[last] = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
    for name in EXPERT_COUNTS:
        if getattr(duplicate, name, None) == num_experts:
            setattr(duplicate, name, len(index))
    return duplicate


EXPERT_COUNTS = ("num_experts", "n_routed_experts")  # attributes of routers and experts modules
