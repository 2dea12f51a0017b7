"""Routed experts whose projections are products of two factors. Imports torch alone: it is bundled into exports.

Legend: T tokens, K top-k, S = T·K routed tokens sorted by expert, D hidden size, F expert width, E experts, R rank, O
and I output and input features of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Ranks = Mapping[str, Sequence[int | None]]


class LowRankExperts(nn.Module):
    """Routed experts with a rank an expert and projection, called as transformers' fused experts are.

    E_e(x) = down( act(gate x) ⊙ up x ),  each projection W = left · right, or dense

    Experts of equal ranks form a bucket: its factors are 3-D tensors of exactly their size, so nothing is padded, and a
    product over its experts is one grouped product.

    Args:
        hidden_size: D.
        expert_width: F.
        ranks: for gate_proj, up_proj and down_proj one rank an expert; None is dense.
        act_fn: the activation.

    Reference: MoE-I², arXiv 2411.01016, section 3.2.
    """

    def __init__(self, hidden_size: int, expert_width: int, ranks: Ranks, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden_dim, self.intermediate_dim, self.act_fn = hidden_size, expert_width, act_fn
        self.ranks = {name: tuple(ranks[name]) for name in ("gate_proj", "up_proj", "down_proj")}
        self.num_experts = len(self.ranks["gate_proj"])
        triples = list(zip(*self.ranks.values(), strict=True))
        kinds = sorted(set(triples), key=lambda triple: tuple(-1 if rank is None else rank for rank in triple))
        self.experts_of = [tuple(e for e, triple in enumerate(triples) if triple == kind) for kind in kinds]
        self.buckets = nn.ModuleList(
            _Bucket(len(experts), hidden_size, expert_width, kind)
            for experts, kind in zip(self.experts_of, kinds, strict=True)
        )
        order = [expert for experts in self.experts_of for expert in experts]
        self._place = tuple(order.index(expert) for expert in range(self.num_experts))
        self._places: dict[torch.device, Tensor] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ_k top_k_weights · E_{top_k_index}(x): (T, D), (T, K), (T, K) to (T, D); only routed tokens are computed."""
        num_tokens, top_k = top_k_index.shape
        place_S = self._table(top_k_index.device)[top_k_index.flatten()]
        order_S = place_S.argsort(stable=True)
        counts = torch.bincount(place_S, minlength=self.num_experts).tolist()
        x_SD = hidden_states[order_S // top_k]
        of_bucket, first = [], 0
        for experts in self.experts_of:
            of_bucket.append(counts[first : first + len(experts)])
            first += len(experts)
        # Split once: the backward of a slice is as large as the whole, that of a split is one concatenation.
        parts = x_SD.split([sum(own) for own in of_bucket])
        used = [each for each in zip(self.buckets, parts, of_bucket, strict=True) if len(each[1])]
        outputs = [bucket(x_sD, own, self.act_fn) for bucket, x_sD, own in used]
        if not outputs:
            return torch.zeros_like(hidden_states)
        y_SD = torch.cat(outputs) * top_k_weights.flatten()[order_S, None]
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
        return y_SD[back_S].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _table(self, device: torch.device) -> Tensor:
        """Each expert's place in the order of the buckets; not a buffer: its values follow from the ranks."""
        if device not in self._places:
            self._places[device] = torch.tensor(self._place, device=device)
        return self._places[device]

    def extra_repr(self) -> str:
        low = [rank for ranks in self.ranks.values() for rank in ranks if rank is not None]
        return f"num_experts={self.num_experts}, ranks={min(low, default=None)}..{max(low, default=None)}"

    @torch.no_grad()
    def fill(
        self,
        gate_up_EHD: Tensor,
        down_EDF: Tensor,
        factors: Callable[[int, str], tuple[Tensor, Tensor]],
    ) -> LowRankExperts:
        """Copy in the first columns and rows of factors, or the weight where a projection is dense.

        Args:
            gate_up_EHD, down_EDF: fused weights (E, 2F, D) and (E, D, F).
            factors: gives (left (O, >= R), right (>= R, I)) of an expert's projection.

        Returns:
            itself.
        """
        for experts, bucket in zip(self.experts_of, self.buckets, strict=True):
            assert isinstance(bucket, _Bucket)
            for position, expert in enumerate(experts):
                gate_FD, up_FD = gate_up_EHD[expert].chunk(2, dim=0)
                own = {"gate_proj": gate_FD, "up_proj": up_FD, "down_proj": down_EDF[expert]}
                for name, weight in own.items():
                    if self.ranks[name][expert] is None:
                        bucket.fill_dense(position, name, weight)
                    else:
                        bucket.fill(position, name, *factors(expert, name))
        return self


class _Bucket(nn.Module):
    """Experts of equal ranks. gate and up share their input, so what meets it first is one product."""

    def __init__(self, num_experts: int, hidden_size: int, expert_width: int, ranks: Sequence[int | None]) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, expert_width
        self.gate_rank, self.up_rank, self.down_rank = ranks
        gate_rows = expert_width if self.gate_rank is None else self.gate_rank
        up_rows = expert_width if self.up_rank is None else self.up_rank
        self.gate_rows = gate_rows
        self.gate_up_right = _empty(num_experts, gate_rows + up_rows, hidden_size)  # whole rows where dense
        self.gate_left = None if self.gate_rank is None else _empty(num_experts, expert_width, gate_rows)
        self.up_left = None if self.up_rank is None else _empty(num_experts, expert_width, up_rows)
        if self.down_rank is None:
            self.down_right = None
            self.down_left = _empty(num_experts, hidden_size, expert_width)
        else:
            self.down_right = _empty(num_experts, self.down_rank, expert_width)
            self.down_left = _empty(num_experts, hidden_size, self.down_rank)

    def forward(self, x_SD: Tensor, counts: list[int], act_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs (S, D) of tokens sorted by expert, `counts` of each; unweighted."""
        outputs = []
        weights = zip(*(self._each(weight) for weight in self._weights()), strict=True)
        for count, x_tD, (gate_up, gate_left, up_left, down_right, down_left) in zip(
            counts, x_SD.split(counts), weights, strict=True
        ):
            if not count:
                continue
            inner = nn.functional.linear(x_tD, gate_up)
            gate, up = inner[:, : self.gate_rows], inner[:, self.gate_rows :]
            if gate_left is not None:
                gate = nn.functional.linear(gate, gate_left)
            if up_left is not None:
                up = nn.functional.linear(up, up_left)
            inner = act_fn(gate) * up
            if down_right is not None:
                inner = nn.functional.linear(inner, down_right)
            outputs.append(nn.functional.linear(inner, down_left))
        return torch.cat(outputs)

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self.gate_up_right, self.gate_left, self.up_left, self.down_right, self.down_left

    def _each(self, weight: Tensor | None) -> Sequence[Tensor | None]:
        """One weight an expert; unbound at once, so that backward stacks gradients instead of adding zeros."""
        return (None,) * self.num_experts if weight is None else weight.unbind(0)

    def fill(self, position: int, name: str, left: Tensor, right: Tensor) -> None:
        """Copy an expert's factors."""
        if name == "down_proj":
            assert self.down_right is not None
            rank = self.down_right.shape[1]
            self.down_right[position].copy_(right[:rank])
            self.down_left[position].copy_(left[:, :rank])
            return
        rows, target = self._part(name)
        assert target is not None
        self.gate_up_right[position, rows].copy_(right[: target.shape[2]])
        target[position].copy_(left[:, : target.shape[2]])

    def fill_dense(self, position: int, name: str, weight: Tensor) -> None:
        """Copy an expert's whole projection."""
        if name == "down_proj":
            self.down_left[position].copy_(weight)
        else:
            self.gate_up_right[position, self._part(name)[0]].copy_(weight)

    def _part(self, name: str) -> tuple[slice, Tensor | None]:
        """The rows of gate_up_right that belong to gate_proj or up_proj, and its left factor."""
        if name == "gate_proj":
            return slice(0, self.gate_rows), self.gate_left
        return slice(self.gate_rows, None), self.up_left


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
