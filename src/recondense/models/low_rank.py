"""Routed experts whose projections are products of two factors. Imports torch alone: it is bundled into exports.

Legend: T tokens, K top-k, S = T·K routed tokens sorted by expert, t those of one expert, P those of the busiest, D
hidden size, F expert width, E experts, n those of one bucket, R rank, O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

Glu = Callable[[Tensor, Tensor], Tensor]
Ranks = Mapping[str, Sequence[int | None]]
Linear = Callable[[Tensor, Tensor], Tensor]
Biases = Sequence[Tensor] | None  # of gate, up and down, each to be added to all rows of a product

# Where calls cost more than arithmetic on a CPU, in weights and in multiplications (benchmarks/low_rank.py).
SMALL = 2**15  # weights that meet an expert's input: D times the ranks of gate and up
FEW = 2**22  # multiplications of the busiest expert with those weights
PADDING = 2**20  # multiplications of an average expert with zeros


class LowRankExperts(nn.Module):
    """Routed experts with a rank an expert and projection, called as transformers' fused experts are.

    E_e(x) = down( glu(gate x, up x) ),  each projection W = left · right (+ bias), or dense

    Experts of equal ranks form a bucket: its factors are 3-D tensors of exactly their size, nothing is padded. Ranks at
    multiples of 16 bytes make the product over a bucket one grouped product; others go expert by expert. On a CPU small
    experts with few tokens are one batched product a bucket, and those of very few tokens one product in all.

    Args:
        hidden_size: D.
        expert_width: F.
        ranks: for gate_proj, up_proj and down_proj one rank an expert; None is dense.
        glu: the family's gated activation.
        bias: the projections have biases.

    Reference: MoE-I², arXiv 2411.01016, section 3.2.
    """

    def __init__(self, hidden_size: int, expert_width: int, ranks: Ranks, glu: Glu, bias: bool = False) -> None:
        super().__init__()
        self.hidden_dim, self.intermediate_dim, self.glu, self.bias = hidden_size, expert_width, glu, bias
        self.ranks = {name: tuple(ranks[name]) for name in ("gate_proj", "up_proj", "down_proj")}
        self.num_experts = len(self.ranks["gate_proj"])
        triples = list(zip(*self.ranks.values(), strict=True))
        kinds = sorted(set(triples), key=lambda triple: tuple(-1 if rank is None else rank for rank in triple))
        self.experts_of = [tuple(e for e, triple in enumerate(triples) if triple == kind) for kind in kinds]
        self.buckets = nn.ModuleList(
            _Bucket(len(experts), hidden_size, expert_width, kind, bias)
            for experts, kind in zip(self.experts_of, kinds, strict=True)
        )
        order = [expert for experts in self.experts_of for expert in experts]
        self._place = tuple(order.index(expert) for expert in range(self.num_experts))
        self._in_bucket = [(b, e) for b, experts in enumerate(self.experts_of) for e in range(len(experts))]
        self._small = all(cast(_Bucket, bucket).small for bucket in self.buckets)
        self._places: dict[torch.device, Tensor] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ_k top_k_weights · E_{top_k_index}(x): (T, D), (T, K), (T, K) to (T, D); only routed tokens are computed."""
        if not top_k_index.numel():
            return torch.zeros_like(hidden_states)
        buckets, kind = cast("list[_Bucket]", list(self.buckets)), hidden_states.device.type
        dtype = next(buckets[0].parameters()).dtype  # not a weight by its name, which an adapter would compute
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        x_TD, top_k = hidden_states.to(dtype), top_k_index.shape[1]
        place_S = self._table(top_k_index.device)[top_k_index.flatten()]
        if kind == "cpu" and self._small and 2 * len(place_S) <= self.num_experts and not _trains_with_others():
            y_SD = self._row_by_row(x_TD, place_S, top_k) * top_k_weights.flatten()[:, None]
            return y_SD.unflatten(0, (-1, top_k)).sum(dim=1).to(hidden_states.dtype)
        order_S = place_S.argsort(stable=True)
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
        sizes = [len(experts) for experts in self.experts_of]
        counts_E = torch.bincount(place_S, minlength=self.num_experts)
        on_device, waited = counts_E.split(sizes), iter(counts_E.tolist())  # type: ignore[no-untyped-call]
        counts = [list(islice(waited, size)) for size in sizes]
        x_SD = _Spread.apply(x_TD, order_S, back_S, top_k)
        # Split once: the backward of a slice is as large as the whole, that of a split is one concatenation.
        parts = x_SD.split([sum(own) for own in counts])  # type: ignore[no-untyped-call]
        y_SD = torch.cat(
            [
                bucket(x_sD, own, counts_n, self.glu) if len(x_sD) else bucket.idle(x_TD, self.glu)
                for bucket, x_sD, own, counts_n in zip(buckets, parts, counts, on_device, strict=True)
                if len(x_sD) or torch.is_grad_enabled()
            ]
        )
        weighted_SD = y_SD * top_k_weights.flatten()[order_S, None]
        y_TD: Tensor = _Collect.apply(weighted_SD, order_S, back_S, top_k)
        return y_TD.to(hidden_states.dtype)

    def _row_by_row(self, x_TD: Tensor, place_S: Tensor, top_k: int) -> Tensor:
        """Outputs (S, D), each row with a copy of its expert, ranks padded with zeros; neither sorted nor weighted."""
        buckets = cast("list[_Bucket]", list(self.buckets))
        if len(buckets) == 1:
            weights = [w.index_select(0, place_S) for w in buckets[0].weights() if w is not None]
            gate_rows = buckets[0].gate_rows
        else:
            each = [buckets[b].factors(e) for b, e in (self._in_bucket[place] for place in place_S.tolist())]
            each = [tuple(w.to(x_TD.dtype) for w in own) for own in each]  # stack keeps out of autocast
            gate, gate_left, up, up_left, down_right, down_left = map(_stacked, zip(*each, strict=True))
            weights = [torch.cat((gate, up), dim=1), gate_left, up_left, down_right, down_left]
            gate_rows = gate.shape[1]
        x_S1D = x_TD[:, None].expand(-1, top_k, -1).reshape(-1, 1, x_TD.shape[1])
        biases = None
        if self.bias:
            added = zip(*(bucket.biases() or () for bucket in buckets), strict=True)
            biases = [torch.cat(own)[place_S, None].to(x_TD.dtype) for own in added]
        return _chain(x_S1D, weights, gate_rows, self.glu, _batched_linear, biases).squeeze(1)

    def place_of(self, expert: int) -> tuple[_Bucket, int]:
        """The bucket that an expert is in, and its position there."""
        bucket, position = self._in_bucket[self._place[expert]]
        return cast(_Bucket, self.buckets[bucket]), position

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
        weights: Callable[[int], Mapping[str, Tensor]],
        factors: Callable[[int, str], tuple[Tensor, Tensor]],
        biases: Mapping[str, Tensor] | None = None,
    ) -> LowRankExperts:
        """Copy in the first columns and rows of factors, or the weight where a projection is dense.

        Args:
            weights: gives gate_proj (F, D), up_proj (F, D) and down_proj (D, F) of an expert, by name.
            factors: gives (left (O, >= R), right (>= R, I)) of an expert's projection.
            biases: of the three projections, (E, F), (E, F) and (E, D), if there are any.

        Returns:
            itself.
        """
        for experts, bucket in zip(self.experts_of, self.buckets, strict=True):
            assert isinstance(bucket, _Bucket)
            for name, bias in (biases or {}).items():
                getattr(bucket, f"{name}_bias").copy_(bias[list(experts)])
            for position, expert in enumerate(experts):
                for name, weight in weights(expert).items():
                    if self.ranks[name][expert] is None:
                        bucket.fill_dense(position, name, weight)
                    else:
                        bucket.fill(position, name, *factors(expert, name))
        return self


class _Bucket(nn.Module):
    """Experts of equal ranks. gate and up share their input, so what meets it first is one product."""

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
        self.gate_up_right = _empty(num_experts, gate_rows + up_rows, hidden_size)  # whole rows where dense
        self.gate_left = None if self.gate_rank is None else _empty(num_experts, expert_width, gate_rows)
        self.up_left = None if self.up_rank is None else _empty(num_experts, expert_width, up_rows)
        if self.down_rank is None:
            self.down_right = None
            self.down_left = _empty(num_experts, hidden_size, expert_width)
        else:
            self.down_right = _empty(num_experts, self.down_rank, expert_width)
            self.down_left = _empty(num_experts, hidden_size, self.down_rank)
        self.gate_proj_bias = _empty(num_experts, expert_width) if bias else None
        self.up_proj_bias = _empty(num_experts, expert_width) if bias else None
        self.down_proj_bias = _empty(num_experts, hidden_size) if bias else None

    def forward(self, x_SD: Tensor, counts: list[int], counts_n: Tensor, glu: Glu) -> Tensor:
        """Outputs (S, D) of tokens sorted by expert, `counts` of each (`counts_n` on the device); unweighted."""
        if x_SD.device.type == "cpu" and self._pads(counts):
            return self._padded(x_SD, counts, counts_n, glu)
        weights, biases = self.weights(), self.biases()
        if len(counts) - counts.count(0) == 1:
            busy = next(e for e, count in enumerate(counts) if count)
            # The backward of squeeze is a view, that of an index a tensor of zeros.
            own = [w if w is None else w.squeeze(0) if len(w) == 1 else w[busy] for w in weights]
            added = None if biases is None else [bias[busy] for bias in biases]
            return _chain(x_SD, own, self.gate_rows, glu, nn.functional.linear, added)
        if _groupable(x_SD, weights):
            # grouped_mm keeps out of autocast, so the weights are converted here.
            linear = partial(_grouped_linear, ends=counts_n.cumsum(0).to(torch.int32))
            own = [None if w is None else w.to(x_SD.dtype) for w in weights]
            added = None
            if biases is not None:
                added = [b.to(x_SD.dtype).repeat_interleave(counts_n, 0, output_size=len(x_SD)) for b in biases]
            return _chain(x_SD, own, self.gate_rows, glu, linear, added)
        outputs = []
        # Unbound at once, so that backward stacks gradients instead of adding zeros.
        each = zip(*((None,) * self.num_experts if w is None else w.unbind(0) for w in weights), strict=True)
        added_n = (
            [None] * self.num_experts if biases is None else list(zip(*(b.unbind(0) for b in biases), strict=True))
        )
        for x_tD, own_weights, own_biases in zip(x_SD.split(counts), each, added_n, strict=True):  # type: ignore[no-untyped-call]
            if len(x_tD):
                outputs.append(_chain(x_tD, own_weights, self.gate_rows, glu, nn.functional.linear, own_biases))
        return torch.cat(outputs)

    def idle(self, x_TD: Tensor, glu: Glu) -> Tensor:
        """Outputs (0, D) of no token, which give every weight a gradient of zeros, in the order of others' gradients.

        Processes whose tokens differ reduce gradients together, in the order in which these come.
        """
        counts = [1] + [0] * (self.num_experts - 1)
        row_1D = x_TD.new_zeros(1, x_TD.shape[1])
        return self(row_1D, counts, torch.tensor(counts, device=x_TD.device), glu)[:0]  # type: ignore[no-any-return]

    def _padded(self, x_SD: Tensor, counts: list[int], counts_n: Tensor, glu: Glu) -> Tensor:
        most = max(counts)
        shift_n = torch.arange(0, most * len(counts), most) - (counts_n.cumsum(0) - counts_n)
        places_S = torch.arange(len(x_SD)) + shift_n.repeat_interleave(counts_n, output_size=len(x_SD))
        x_nPD = _Put.apply(x_SD, places_S, most * len(counts)).unflatten(0, (-1, most))
        biases = self.biases()
        added = None if biases is None else [bias[:, None].to(x_SD.dtype) for bias in biases]
        y_nPD = _chain(x_nPD, self.weights(), self.gate_rows, glu, _batched_linear, added)
        return cast(Tensor, _Take.apply(y_nPD.flatten(0, 1), places_S))

    def _pads(self, counts: list[int]) -> bool:
        """Whether one product over experts padded to the busiest one's tokens costs less than a product for each."""
        most, mean = max(counts), sum(counts) / len(counts)
        return len(counts) >= 4 and self.small and most * self._size <= FEW and (most - mean) * self._size <= PADDING

    def weights(self) -> tuple[Tensor | None, ...]:
        """As `_chain` takes them; None where a projection is dense."""
        return self.gate_up_right, self.gate_left, self.up_left, self.down_right, self.down_left

    def biases(self) -> Biases:
        """Of gate, up and down: (n, F), (n, F) and (n, D); None where the family has none."""
        if self.gate_proj_bias is None or self.up_proj_bias is None or self.down_proj_bias is None:
            return None
        return self.gate_proj_bias, self.up_proj_bias, self.down_proj_bias

    def inner(self, x_tD: Tensor, position: int, glu: Glu) -> Tensor:
        """What enters an expert's down projection, (t, F)."""
        own = [None if w is None else w[position] for w in self.weights()]
        biases = self.biases()
        added = None if biases is None else [bias[position] for bias in biases]
        return _inner(x_tD, own, self.gate_rows, glu, nn.functional.linear, added)

    def projection(self, position: int, name: str) -> Tensor:
        """An expert's projection multiplied out, (O, I)."""
        if name == "down_proj":
            left, right = self.down_left[position], None if self.down_right is None else self.down_right[position]
        else:
            rows, factor = self._part(name)
            inner = self.gate_up_right[position, rows]
            left, right = (inner, None) if factor is None else (factor[position], inner)
        return left if right is None else left.float() @ right.float()

    def factors(self, position: int) -> tuple[Tensor, ...]:
        """An expert's right (R, I) and left (O, R) factors of gate, up and down; none is dense."""
        gate_up, gate_left, up_left, down_right, down_left = (w[position] for w in self.weights() if w is not None)
        return gate_up[: self.gate_rows], gate_left, gate_up[self.gate_rows :], up_left, down_right, down_left

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


def _chain(
    x: Tensor, weights: Sequence[Tensor | None], gate_rows: int, glu: Glu, linear: Linear, biases: Biases = None
) -> Tensor:
    """An expert's output; of `weights` the left of gate and up and the right of down are None where it is dense."""
    *_, down_right, down_left = weights
    assert down_left is not None
    inner = _inner(x, weights, gate_rows, glu, linear, biases)
    output = linear(inner if down_right is None else linear(inner, down_right), down_left)
    return output if biases is None else output + biases[2]


def _inner(
    x: Tensor, weights: Sequence[Tensor | None], gate_rows: int, glu: Glu, linear: Linear, biases: Biases
) -> Tensor:
    """What enters an expert's down projection."""
    gate_up, gate_left, up_left, *_ = weights
    assert gate_up is not None
    inner = linear(x, gate_up)
    gate, up = inner.split((gate_rows, inner.shape[-1] - gate_rows), dim=-1)  # type: ignore[no-untyped-call]
    gate = gate if gate_left is None else linear(gate, gate_left)
    up = up if up_left is None else linear(up, up_left)
    return glu(gate, up) if biases is None else glu(gate + biases[0], up + biases[1])


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """Matrices of different ranks as one tensor, padded with zeros."""
    rows, columns = (max(w.shape[dim] for w in factors) for dim in (0, 1))
    return torch.stack([nn.functional.pad(w, (0, columns - w.shape[1], 0, rows - w.shape[0])) for w in factors])


def _groupable(x_SD: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Whether torch's grouped product takes these: rows and addresses at multiples of 16 bytes, on Ampere or a CPU."""
    if torch.compiler.is_compiling() and x_SD.dtype != torch.bfloat16:
        return False  # dynamo knows the grouped product of bfloat16 alone
    if not hasattr(nn.functional, "grouped_mm") or x_SD.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x_SD.is_cuda and (x_SD.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x_SD.device) < (8, 0)):
        return False
    if x_SD.device.type not in ("cpu", "cuda"):
        return False
    rows = [size * x_SD.element_size() for w in weights if w is not None for size in w.shape[1:]]
    addresses = [w.data_ptr() for w in weights if w is not None] + [x_SD.data_ptr()]
    return not any(number % 16 for number in (*rows, *addresses))


def _grouped_linear(x_SI: Tensor, weight_nOI: Tensor, ends: Tensor) -> Tensor:
    return nn.functional.grouped_mm(x_SI, weight_nOI.transpose(-2, -1), offs=ends)


def _batched_linear(x_nPI: Tensor, weight_nOI: Tensor) -> Tensor:
    return torch.bmm(x_nPI, weight_nOI.transpose(1, 2))


class _Spread(torch.autograd.Function):
    """Each token once for each of its experts, in the experts' order; its adjoint is a sum in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_S: Tensor, back_S: Tensor, top_k: int) -> Tensor:
        ctx.order_S, ctx.back_S, ctx.top_k = order_S, back_S, top_k
        return x_TD.index_select(0, order_S // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Collect.apply(grads[0], ctx.order_S, ctx.back_S, ctx.top_k)), None, None, None


def _trains_with_others() -> bool:
    """Whether gradients are reduced over processes: each weight must have one, and all in the same order."""
    return torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()


class _Collect(torch.autograd.Function):
    """The adjoint of `_Spread`: sums over each token's experts."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, order_S: Tensor, back_S: Tensor, top_k: int) -> Tensor:
        ctx.order_S, ctx.back_S, ctx.top_k = order_S, back_S, top_k
        return y_SD.index_select(0, back_S).unflatten(0, (-1, top_k)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Spread.apply(grads[0], ctx.order_S, ctx.back_S, ctx.top_k)), None, None, None


class _Put(torch.autograd.Function):
    """Rows at their places among zeros; the adjoint of `_Take`."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, places_S: Tensor, num: int) -> Tensor:
        ctx.places_S = places_S
        return x_SD.new_zeros(num, x_SD.shape[1]).index_copy_(0, places_S, x_SD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Take.apply(grads[0], ctx.places_S)), None, None


class _Take(torch.autograd.Function):
    """Rows of different places."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, places_S: Tensor) -> Tensor:
        ctx.places_S, ctx.num = places_S, len(x_PD)
        return x_PD.index_select(0, places_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Put.apply(grads[0], ctx.places_S, ctx.num)), None


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
