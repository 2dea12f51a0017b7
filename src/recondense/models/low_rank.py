"""Routed experts whose projections are products of two factors. This file imports only torch: it is part of exports.

Legend: T tokens, K top-k, S = T·K routed tokens sorted by expert, t tokens of one expert, P tokens of the busiest
expert, D hidden size, F expert width, E experts, n experts of one bucket, R rank, O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn

from recondense.models.expert_products import (
    Biases,
    Combine,
    Dispatch,
    Gather,
    Glu,
    Scatter,
    batched_linear,
    empty_parameter,
    grouped_linear,
    is_groupable,
    reduces_gradients,
    run_expert,
    run_inner,
    stack_padded,
)

Ranks = Mapping[str, Sequence[int | None]]

# Below these bounds, the overhead of calls exceeds the time of the arithmetic on a CPU (benchmarks/low_rank.py).
SMALL = 2**15  # weights of an expert that multiply its input: D times the ranks of gate and up
FEW = 2**22  # multiplications of the busiest expert by these weights
PADDING = 2**20  # multiplications of an average expert by padding


class LowRankExperts(nn.Module):
    """Routed experts with a rank for each expert and projection, called like transformers' fused experts.

    E_e(x) = down( glu(gate x, up x) ),  each projection W = left · right (+ bias), or dense

    Experts of equal ranks and widths form a bucket, whose factors are 3-D tensors without padding. If the ranks are
    multiples of 16 bytes, a bucket is computed as one grouped product; otherwise each expert is a separate product. On
    a CPU, a bucket of small experts with few tokens is one batched product, and with very few tokens all buckets
    together are one. With dense projections only, these are experts of different widths.

    Args:
        hidden_size: D.
        expert_width: F, or one width per expert.
        ranks: for each of gate_proj, up_proj and down_proj, one rank per expert; None for a dense projection.
        glu: the family's gated activation.
        bias: whether the projections have biases.

    Reference: MoE-I², arXiv 2411.01016, section 3.2.
    """

    def __init__(
        self, hidden_size: int, expert_width: int | Sequence[int], ranks: Ranks, glu: Glu, bias: bool = False
    ) -> None:
        super().__init__()
        self.hidden_dim, self.glu, self.bias = hidden_size, glu, bias
        self.ranks = {name: tuple(ranks[name]) for name in ("gate_proj", "up_proj", "down_proj")}
        self.num_experts = len(self.ranks["gate_proj"])
        widths = (expert_width,) * self.num_experts if isinstance(expert_width, int) else tuple(expert_width)
        self.widths: tuple[int, ...] = widths
        shapes = list(zip(*self.ranks.values(), self.widths, strict=True))
        kinds = sorted(set(shapes), key=lambda shape: tuple(-1 if number is None else number for number in shape))
        self.experts_of = [tuple(e for e, shape in enumerate(shapes) if shape == kind) for kind in kinds]
        self.buckets = nn.ModuleList(
            _Bucket(len(experts), hidden_size, cast(int, width), ranks_of_kind, bias)
            for experts, (*ranks_of_kind, width) in zip(self.experts_of, kinds, strict=True)
        )
        order = [expert for experts in self.experts_of for expert in experts]
        self._place = tuple(order.index(expert) for expert in range(self.num_experts))
        self._in_bucket = [(b, e) for b, experts in enumerate(self.experts_of) for e in range(len(experts))]
        self._small = all(cast(_Bucket, bucket).small for bucket in self.buckets)
        self._places: dict[torch.device, Tensor] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ_k top_k_weights · E_{top_k_index}(x).

        Args:
            hidden_states: x (T, D).
            top_k_index: the selected experts (T, K).
            top_k_weights: their routing weights (T, K).

        Returns:
            The weighted sum (T, D).
        """
        if not top_k_index.numel():
            return torch.zeros_like(hidden_states)
        buckets, kind = cast("list[_Bucket]", list(self.buckets)), hidden_states.device.type
        dtype = next(buckets[0].parameters()).dtype  # not by name: an adapter would compute that weight
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        x_TD, top_k = hidden_states.to(dtype), top_k_index.shape[1]
        place_S = self._table(top_k_index.device)[top_k_index.flatten()]
        if kind == "cpu" and self._small and 2 * len(place_S) <= self.num_experts and not reduces_gradients():
            y_SD = self._row_by_row(x_TD, place_S, top_k) * top_k_weights.flatten()[:, None]
            return y_SD.unflatten(0, (-1, top_k)).sum(dim=1).to(hidden_states.dtype)
        order_S = place_S.argsort(stable=True)
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
        sizes = [len(experts) for experts in self.experts_of]
        counts_E = torch.bincount(place_S, minlength=self.num_experts)
        counts_on_device, counts_on_host = counts_E.split(sizes), iter(counts_E.tolist())  # type: ignore[no-untyped-call]
        counts = [list(islice(counts_on_host, size)) for size in sizes]
        x_SD = Dispatch.apply(x_TD, order_S, back_S, top_k)
        # A single split: its backward is one concatenation, while that of every slice would be as large as x_SD.
        parts = x_SD.split([sum(bucket_counts) for bucket_counts in counts])  # type: ignore[no-untyped-call]
        y_SD = torch.cat(
            [
                bucket(x_sD, bucket_counts, counts_n, self.glu) if len(x_sD) else bucket.idle(x_TD, self.glu)
                for bucket, x_sD, bucket_counts, counts_n in zip(buckets, parts, counts, counts_on_device, strict=True)
                if len(x_sD) or torch.is_grad_enabled()
            ]
        )
        weighted_SD = y_SD * top_k_weights.flatten()[order_S, None]
        y_TD: Tensor = Combine.apply(weighted_SD, order_S, back_S, top_k)
        return y_TD.to(hidden_states.dtype)

    def _row_by_row(self, x_TD: Tensor, place_S: Tensor, top_k: int) -> Tensor:
        """Compute the unweighted outputs (S, D) in token order, each row with a zero-padded copy of its expert."""
        buckets = cast("list[_Bucket]", list(self.buckets))
        if len(buckets) == 1:
            weights = [w.index_select(0, place_S) for w in buckets[0].weights() if w is not None]
            gate_rows = buckets[0].gate_rows
        else:
            experts = [self._in_bucket[place] for place in place_S.tolist()]
            # Converted here, because autocast does not convert the inputs of stack.
            factors = [tuple(w.to(x_TD.dtype) for w in buckets[b].factors(e)) for b, e in experts]
            gate, gate_left, up, up_left, down_right, down_left = map(stack_padded, zip(*factors, strict=True))
            weights = [torch.cat((gate, up), dim=1), gate_left, up_left, down_right, down_left]
            gate_rows = gate.shape[1]
        x_S1D = x_TD[:, None].expand(-1, top_k, -1).reshape(-1, 1, x_TD.shape[1])
        biases = None
        if self.bias:
            kinds = zip(*(bucket.biases() or () for bucket in buckets), strict=True)
            biases = [torch.cat(of_buckets)[place_S, None].to(x_TD.dtype) for of_buckets in kinds]
        return run_expert(x_S1D, weights, gate_rows, self.glu, batched_linear, biases).squeeze(1)

    @property
    def factorized(self) -> bool:
        """Whether any projection of any expert is a product of two factors."""
        return any(rank is not None for ranks in self.ranks.values() for rank in ranks)

    def place_of(self, expert: int) -> tuple[_Bucket, int]:
        """Return the bucket of an expert, and the expert's position in it."""
        bucket, position = self._in_bucket[self._place[expert]]
        return cast(_Bucket, self.buckets[bucket]), position

    def _table(self, device: torch.device) -> Tensor:
        """Return each expert's place in the order of the buckets; not a buffer, because the ranks determine it."""
        if device not in self._places:
            self._places[device] = torch.tensor(self._place, device=device)
        return self._places[device]

    def extra_repr(self) -> str:
        low = [rank for ranks in self.ranks.values() for rank in ranks if rank is not None]
        return f"num_experts={self.num_experts}, ranks={min(low, default=None)}..{max(low, default=None)}"

    @torch.no_grad()
    def fill(
        self,
        weights: Callable[[int], Mapping[str, Tensor]],
        factors: Callable[[int, str], tuple[Tensor, Tensor]],
        biases: Mapping[str, Tensor | Sequence[Tensor]] | None = None,
    ) -> LowRankExperts:
        """Copy in the factors, truncated to their ranks, or the weights of dense projections.

        Args:
            weights: returns gate_proj (F, D), up_proj (F, D) and down_proj (D, F) of an expert, by name.
            factors: returns (left (O, >= R), right (>= R, I)) of an expert's projection.
            biases: the biases of the three projections (E, F), (E, F) and (E, D), by name; None if there are none. If
                the widths differ, one tensor per expert.

        Returns:
            The module itself.
        """
        for experts, bucket in zip(self.experts_of, self.buckets, strict=True):
            assert isinstance(bucket, _Bucket)
            for name, bias in (biases or {}).items():
                getattr(bucket, f"{name}_bias").copy_(torch.stack([bias[expert] for expert in experts]))
            for position, expert in enumerate(experts):
                for name, weight in weights(expert).items():
                    if self.ranks[name][expert] is None:
                        bucket.fill_dense(position, name, weight)
                    else:
                        bucket.fill(position, name, *factors(expert, name))
        return self


class _Bucket(nn.Module):
    """Experts of equal ranks. The right factors of gate and up are one tensor, because both have the same input."""

    def __init__(
        self, num_experts: int, hidden_size: int, expert_width: int, ranks: Sequence[int | None], bias: bool
    ) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, expert_width
        self.gate_rank, self.up_rank, self.down_rank = ranks
        gate_rows = expert_width if self.gate_rank is None else self.gate_rank
        up_rows = expert_width if self.up_rank is None else self.up_rank
        self.gate_rows, self._size = gate_rows, hidden_size * (gate_rows + up_rows)
        self.small = None not in ranks and self._size <= SMALL
        self.gate_up_right = empty_parameter(num_experts, gate_rows + up_rows, hidden_size)  # or dense weights
        self.gate_left = None if self.gate_rank is None else empty_parameter(num_experts, expert_width, gate_rows)
        self.up_left = None if self.up_rank is None else empty_parameter(num_experts, expert_width, up_rows)
        if self.down_rank is None:
            self.down_right = None
            self.down_left = empty_parameter(num_experts, hidden_size, expert_width)
        else:
            self.down_right = empty_parameter(num_experts, self.down_rank, expert_width)
            self.down_left = empty_parameter(num_experts, hidden_size, self.down_rank)
        self.gate_proj_bias = empty_parameter(num_experts, expert_width) if bias else None
        self.up_proj_bias = empty_parameter(num_experts, expert_width) if bias else None
        self.down_proj_bias = empty_parameter(num_experts, hidden_size) if bias else None

    def forward(self, x_SD: Tensor, counts: list[int], counts_n: Tensor, glu: Glu) -> Tensor:
        """Compute the unweighted outputs (S, D) of tokens that are sorted by expert.

        Args:
            x_SD: the tokens.
            counts: the number of tokens of each expert.
            counts_n: the same numbers on the device.
            glu: the gated activation.
        """
        if x_SD.device.type == "cpu" and self._pads(counts):
            return self._padded(x_SD, counts, counts_n, glu)
        weights, biases = self.weights(), self.biases()
        if len(counts) - counts.count(0) == 1:
            busy = next(e for e, count in enumerate(counts) if count)
            # The backward of squeeze is a view, while that of indexing allocates zeros.
            one = [w if w is None else w.squeeze(0) if len(w) == 1 else w[busy] for w in weights]
            bias = None if biases is None else [b[busy] for b in biases]
            return run_expert(x_SD, one, self.gate_rows, glu, nn.functional.linear, bias)
        if is_groupable(x_SD, weights):
            # Autocast does not convert the inputs of grouped_mm.
            linear = partial(grouped_linear, ends=counts_n.cumsum(0).to(torch.int32))
            converted = [None if w is None else w.to(x_SD.dtype) for w in weights]
            rows = None
            if biases is not None:
                rows = [b.to(x_SD.dtype).repeat_interleave(counts_n, 0, output_size=len(x_SD)) for b in biases]
            return run_expert(x_SD, converted, self.gate_rows, glu, linear, rows)
        return self._one_by_one(x_SD, counts, glu)

    def _one_by_one(self, x_SD: Tensor, counts: list[int], glu: Glu) -> Tensor:
        """Compute `forward` one expert after another."""
        biases, none = self.biases(), (None,) * self.num_experts
        # Unbind all at once, so that the backward pass stacks gradients instead of adding zeros.
        weights_n = zip(*(none if w is None else w.unbind(0) for w in self.weights()), strict=True)
        biases_n = none if biases is None else list(zip(*(b.unbind(0) for b in biases), strict=True))
        outputs = []
        for x_tD, weights, bias in zip(x_SD.split(counts), weights_n, biases_n, strict=True):  # type: ignore[no-untyped-call]
            if len(x_tD):
                outputs.append(run_expert(x_tD, weights, self.gate_rows, glu, nn.functional.linear, bias))
        return torch.cat(outputs)

    def idle(self, x_TD: Tensor, glu: Glu) -> Tensor:
        """Return an empty output (0, D) through which every weight gets a gradient of zeros.

        Processes reduce gradients together, in the order in which the backward pass produces them. So a process without
        tokens for these experts must produce gradients too, in the same order.
        """
        counts = [1] + [0] * (self.num_experts - 1)
        row_1D = x_TD.new_zeros(1, x_TD.shape[1])
        return self(row_1D, counts, torch.tensor(counts, device=x_TD.device), glu)[:0]  # type: ignore[no-any-return]

    def _padded(self, x_SD: Tensor, counts: list[int], counts_n: Tensor, glu: Glu) -> Tensor:
        """Compute `forward` as one batched product, with the tokens of each expert padded to those of the busiest."""
        most = max(counts)
        shift_n = torch.arange(0, most * len(counts), most) - (counts_n.cumsum(0) - counts_n)
        places_S = torch.arange(len(x_SD)) + shift_n.repeat_interleave(counts_n, output_size=len(x_SD))
        x_nPD = Scatter.apply(x_SD, places_S, most * len(counts)).unflatten(0, (-1, most))
        biases = self.biases()
        rows = None if biases is None else [bias[:, None].to(x_SD.dtype) for bias in biases]
        y_nPD = run_expert(x_nPD, self.weights(), self.gate_rows, glu, batched_linear, rows)
        return cast(Tensor, Gather.apply(y_nPD.flatten(0, 1), places_S))

    def _pads(self, counts: list[int]) -> bool:
        """Return whether one padded product is faster than a product for each expert."""
        most, mean = max(counts), sum(counts) / len(counts)
        return len(counts) >= 4 and self.small and most * self._size <= FEW and (most - mean) * self._size <= PADDING

    def weights(self) -> tuple[Tensor | None, ...]:
        """Return the weights in the order of `run_expert`; None in the place of a dense projection's other factor."""
        return self.gate_up_right, self.gate_left, self.up_left, self.down_right, self.down_left

    def biases(self) -> Biases:
        """Return the biases of gate (n, F), up (n, F) and down (n, D); None if the family has none."""
        if self.gate_proj_bias is None or self.up_proj_bias is None or self.down_proj_bias is None:
            return None
        return self.gate_proj_bias, self.up_proj_bias, self.down_proj_bias

    def inner(self, x_tD: Tensor, position: int, glu: Glu) -> Tensor:
        """Compute the input of an expert's down projection (t, F)."""
        weights = [None if w is None else w[position] for w in self.weights()]
        biases = self.biases()
        bias = None if biases is None else [b[position] for b in biases]
        return run_inner(x_tD, weights, self.gate_rows, glu, nn.functional.linear, bias)

    def projection(self, position: int, name: str) -> Tensor:
        """Multiply out an expert's projection (O, I)."""
        if name == "down_proj":
            outer, inner = self.down_left[position], None if self.down_right is None else self.down_right[position]
        else:
            rows, factor = self._part(name)
            right = self.gate_up_right[position, rows]
            outer, inner = (right, None) if factor is None else (factor[position], right)
        return outer if inner is None else outer.float() @ inner.float()

    def factors(self, position: int) -> tuple[Tensor, ...]:
        """Return an expert's right (R, I) and left (O, R) factors of gate, up and down. None of them may be dense."""
        gate_up, gate_left, up_left, down_right, down_left = (w[position] for w in self.weights() if w is not None)
        return gate_up[: self.gate_rows], gate_left, gate_up[self.gate_rows :], up_left, down_right, down_left

    def fill(self, position: int, name: str, left_OR: Tensor, right_RI: Tensor) -> None:
        """Copy in the factors of an expert's projection, truncated to its rank."""
        if name == "down_proj":
            assert self.down_right is not None
            rank = self.down_right.shape[1]
            self.down_right[position].copy_(right_RI[:rank])
            self.down_left[position].copy_(left_OR[:, :rank])
            return
        rows, target = self._part(name)
        assert target is not None
        self.gate_up_right[position, rows].copy_(right_RI[: target.shape[2]])
        target[position].copy_(left_OR[:, : target.shape[2]])

    def fill_dense(self, position: int, name: str, weight: Tensor) -> None:
        """Copy in an expert's dense projection."""
        if name == "down_proj":
            self.down_left[position].copy_(weight)
        else:
            self.gate_up_right[position, self._part(name)[0]].copy_(weight)

    def _part(self, name: str) -> tuple[slice, Tensor | None]:
        """Return the rows of gate_up_right that belong to gate_proj or up_proj, and its left factor."""
        if name == "gate_proj":
            return slice(0, self.gate_rows), self.gate_left
        return slice(self.gate_rows, None), self.up_left
