"""Sparse blocks of every family in plain torch, in fp64: token by token, expert by expert, from their state dicts.

Legend: T tokens, D hidden size, E routed experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from recondense.models.routing import Routing
from support.tiny_models import EVERY, tiny

# The routing of the families in tests/support/tiny_models.py, from the papers and transformers' routers.
V3 = Routing(2, normalize=True, scale=1.5, score="sigmoid", least_sum=1e-20)
ROUTING = {
    "qwen2_moe": Routing(2, normalize=False),
    "qwen3_moe": Routing(2, normalize=True),
    "deepseek": Routing(2, normalize=False),
    "deepseek_v2": Routing(2, normalize=False, scale=1.5),
    "deepseek_v3": V3,
    "mixtral": Routing(2, normalize=True),
    "olmoe": Routing(2, normalize=False),
    "gpt_oss": Routing(2, normalize=True),  # a softmax over the selected logits
    "glm4_moe": V3,
    "ernie4_5_moe": Routing(2, normalize=True, least_sum=1e-12),
    "dots1": V3,
    "solar_open": V3,
    "glm4_moe_lite": V3,
    "mellum": Routing(2, normalize=True),
}
ALPHA, LIMIT = 1.702, 7.0  # of gpt_oss's activation
GROUPED: dict[str, Any] = {"num_groups": 2, "top_groups": 1}


def corrected(family: str, scale: float = 1.0) -> Any:
    """A model whose correction biases are as large as the scores, with logits far apart."""
    model = EVERY[family]()
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.mul_(3.0)
        elif name.endswith("mlp.gate.weight"):
            tensor.mul_(scale)
    return model


# The families, and routers that their tiny models do not have.
VARIANTS: dict[str, tuple[Callable[..., Any], Routing]] = {
    **{name: (make, ROUTING[name]) for name, make in EVERY.items()},
    **{
        f"{name}, {'' if normalize else 'not '}normalized": (
            partial(tiny, name, norm_topk_prob=normalize),
            replace(ROUTING[name], normalize=normalize),
        )
        for name, normalize in [
            *(("qwen2_moe", True), ("qwen3_moe", False), ("deepseek", True), ("olmoe", True), ("deepseek_v3", False)),
            ("mellum", False),
        ]
    },
    "deepseek, one expert": (
        partial(tiny, "deepseek", norm_topk_prob=True, num_experts_per_tok=1),
        Routing(1, normalize=False),
    ),
    "deepseek_v2, groups": (
        partial(tiny, "deepseek_v2", topk_method="group_limited_greedy", n_group=2, topk_group=1),
        replace(ROUTING["deepseek_v2"], **GROUPED),
    ),
    "deepseek_v3, groups": (
        partial(tiny, "deepseek_v3", n_group=2, topk_group=1),
        replace(ROUTING["deepseek_v3"], **GROUPED),
    ),
    **{f"{name}, large biases": (partial(corrected, name), ROUTING[name]) for name in ("deepseek_v3", "ernie4_5_moe")},
}
# Scores that round to 0 in fp32, so that all selected scores of a token may be nearly 0.
STEEP: dict[str, tuple[Callable[..., Any], Routing]] = {
    f"{name}, large biases, steep": (partial(corrected, name, scale=40.0), ROUTING[name])
    for name in ("deepseek_v3", "ernie4_5_moe")
}
# For operations: retained experts, groups and their weights.
FOUR = (0, 2, 3, 5)
EVEN = ((0, 3, 5, 7),) * 2 + ((1, 2, 3, 15),) + ((0, 4, 8, 12),) * 3  # retained channels of each of six experts
UNEVEN = ((0, 3, 5, 7), (2,), tuple(range(16)), (1, 2, 3, 15), tuple(range(12)), (4, 5, 6))
PAIRS = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))
Ranks = dict[str, tuple[int | None, ...]]
# Buckets of one expert and of several, ranks that are multiples of 16 bytes and others, and dense projections.
RANKS: Ranks = {
    "gate_proj": (4, 4, 3, 5, None, 8),
    "up_proj": (4, 4, 5, None, 5, 8),
    "down_proj": (4, 4, 7, 6, 6, None),
}


@cache
def variant(name: str) -> tuple[Any, Routing]:
    """A model that no test may change, and its routing."""
    make, routing = {**VARIANTS, **STEEP}[name]
    return make(), routing


class PlainMoE:
    """A sparse block computed from its state dict; no module runs.

    Args:
        block: a block of a family's own class.
        routing: how its router selects and weighs experts.
    """

    def __init__(self, block: nn.Module, routing: Routing) -> None:
        self.state = {name: value.detach().double() for name, value in block.state_dict().items()}
        self.routing = routing
        self.is_transposed = "router.bias" in self.state  # gpt_oss
        self.num_experts = len(self.state["experts.down_proj"])

    @property
    def correction_E(self) -> Tensor:
        """What is added to the scores to select the top_k; zeros in families without a correction."""
        corrections = [value for name, value in self.state.items() if name.endswith("e_score_correction_bias")]
        return corrections[0].flatten() if corrections else torch.zeros(self.num_experts, dtype=torch.float64)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E)"""
        name = "router" if self.is_transposed else "gate"
        return x_TD @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def routing_weights(self, x_TD: Tensor, dropped: Collection[int] = ()) -> Tensor:
        """(T, E), zero for the experts that a token does not select; the router ignores dropped experts."""
        dropped_E = torch.tensor([expert in dropped for expert in range(self.num_experts)])
        logits_TE = self.logits(x_TD).masked_fill(dropped_E, -torch.inf)
        scores_TE = logits_TE.softmax(dim=1) if self.routing.score == "softmax" else logits_TE.sigmoid()
        choice_TE = (scores_TE + self.correction_E).masked_fill(dropped_E, -torch.inf)
        weights_TE = torch.zeros_like(scores_TE)
        for token, choice in enumerate(choice_TE.tolist()):
            best = sorted(self._allowed(choice), key=lambda expert, choice=choice: -choice[expert])[
                : self.routing.top_k
            ]
            weights_K = scores_TE[token, best]
            if self.routing.normalize and self.routing.score == "sigmoid":
                weights_K = weights_K / (weights_K.sum() + self.routing.least_sum)
            elif self.routing.normalize:
                weights_K = weights_K / max(float(weights_K.sum()), self.routing.least_sum)
            weights_TE[token, best] = self.routing.scale * weights_K
        return weights_TE

    def _allowed(self, choice: Sequence[float]) -> list[int]:
        """Experts of the best groups. A group scores as its best expert, or its best two if scores are sigmoids."""
        count = 1 if self.routing.score == "softmax" else 2
        size = self.num_experts // self.routing.num_groups
        groups = [list(range(first, first + size)) for first in range(0, self.num_experts, size)]
        groups.sort(key=lambda group: -sum(sorted((choice[expert] for expert in group), reverse=True)[:count]))
        return sorted(expert for group in groups[: self.routing.top_groups] for expert in group)

    def expert(self, index: int, x_TD: Tensor) -> Tensor:
        """(T, D), unweighted"""
        both, down = self.state["experts.gate_up_proj"][index], self.state["experts.down_proj"][index]
        if self.is_transposed:
            mixed = x_TD @ both + self.state["experts.gate_up_proj_bias"][index]
            gate, up = mixed[:, ::2].clamp(max=LIMIT), mixed[:, 1::2].clamp(-LIMIT, LIMIT)
            return ((up + 1) * gate / (1 + torch.exp(-ALPHA * gate))) @ down + self.state["experts.down_proj_bias"][
                index
            ]
        width = down.shape[1]
        gate, up = x_TD @ both[:width].T, x_TD @ both[width:].T
        return (gate / (1 + torch.exp(-gate)) * up) @ down.T

    def shared(self, x_TD: Tensor, gate: float | None = None) -> Tensor:
        """(T, D), the output of the shared experts, 0 without any; `gate` replaces their gate per token."""
        prefix = next(
            (name for name in ("shared_expert", "shared_experts") if f"{name}.up_proj.weight" in self.state), None
        )
        if prefix is None:
            return torch.zeros_like(x_TD)
        gate_proj, up_proj, down_proj = (self.state[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gate_TF = x_TD @ gate_proj.T
        y_TD = (gate_TF / (1 + torch.exp(-gate_TF)) * (x_TD @ up_proj.T)) @ down_proj.T
        if gate is None and "shared_expert_gate.weight" in self.state:
            return torch.sigmoid(x_TD @ self.state["shared_expert_gate.weight"].T) * y_TD
        return y_TD if gate is None else gate * y_TD

    def __call__(self, x_TD: Tensor, dropped: Collection[int] = ()) -> Tensor:
        """(T, D)"""
        weights_TE = self.routing_weights(x_TD, dropped)
        rows = []
        for token in range(len(x_TD)):
            x_1D = x_TD[token : token + 1]
            selected = weights_TE[token].nonzero().flatten().tolist()
            routed = [weights_TE[token, expert] * self.expert(expert, x_1D) for expert in selected]
            rows.append(torch.stack(routed).sum(dim=0) + self.shared(x_1D))
        return torch.cat(rows)

    def narrowed(self, channels: Sequence[Sequence[int]]) -> PlainMoE:
        """A block whose experts have zeros in the columns of down_proj of all channels but these."""
        block = self._copy()
        down = block.state["experts.down_proj"] = self.state["experts.down_proj"].clone()
        for expert, retained in enumerate(channels):
            columns = down[expert] if self.is_transposed else down[expert].T
            columns[[channel for channel in range(len(columns)) if channel not in retained]] = 0
        return block

    def merged(self, groups: Sequence[Sequence[int]], shares: Sequence[Sequence[float]]) -> PlainMoE:
        """A block whose experts are the weighted means of their groups, biases included; the routing is the same."""
        block = self._copy()
        for name, value in self.state.items():
            if name.startswith("experts."):
                block.state[name] = value.clone()
                for group, group_shares in zip(groups, shares, strict=True):
                    mean = sum(share * value[expert] for share, expert in zip(group_shares, group, strict=True))
                    block.state[name][list(group)] = mean
        return block

    def truncated(self, ranks: Ranks) -> PlainMoE:
        """A block whose projections are truncated SVDs; biases and routing are the same."""
        block = self._copy()
        both, down = (self.state[f"experts.{name}"].clone() for name in ("gate_up_proj", "down_proj"))
        width = down.shape[1] if self.is_transposed else down.shape[2]
        for index in range(self.num_experts):
            interleaved, halves = (slice(None, None, 2), slice(1, None, 2)), (slice(width), slice(width, None))
            slices = interleaved if self.is_transposed else halves
            for rows, name in zip(slices, ("gate_proj", "up_proj"), strict=True):
                where = (slice(None), rows) if self.is_transposed else (rows,)
                both[index][where] = low_rank(both[index][where], ranks[name][index])
            down[index] = low_rank(down[index], ranks["down_proj"][index])
        block.state |= {"experts.gate_up_proj": both, "experts.down_proj": down}
        return block

    def _copy(self) -> PlainMoE:
        block = object.__new__(PlainMoE)
        block.__dict__ = {**self.__dict__, "state": dict(self.state)}
        return block


def low_rank(weight: Tensor, rank: int | None) -> Tensor:
    """The nearest matrix of this rank; None returns the matrix itself."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


class Standing(nn.Module):
    """A function of tokens that stands in for a block of a model, so that plain torch gives the model's logits."""

    def __init__(self, function: Callable[[Tensor], Tensor], pair: bool) -> None:
        super().__init__()
        self.function, self.pair = function, pair

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        output = self.function(hidden_states.flatten(0, -2).double()).to(hidden_states.dtype).view_as(hidden_states)
        return (output, None) if self.pair else output


def tokens(scale: float = 1.0, number: int = 23) -> Tensor:
    """(T, 32)"""
    return scale * torch.randn(number, 32, generator=torch.Generator().manual_seed(7))


def block_of(model: Any, layer: int) -> Any:
    """The feed-forward block of a decoder layer."""
    return model.model.layers[layer].mlp


@torch.no_grad()
def run(block: Any, x_TD: Tensor) -> Tensor:
    """(T, D), the output of a block of transformers, which may return more."""
    output = block(x_TD[None])
    return (output[0] if isinstance(output, tuple) else output)[0]
