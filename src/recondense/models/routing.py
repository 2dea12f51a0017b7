"""How the routers of the families make weights of their logits, as their configs say it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PretrainedConfig

DEEPSEEK_V3_LEAST_SUM = 1e-20  # a constant of its modeling file


@dataclass(frozen=True)
class Routing:
    """How a router makes weights of its logits: it scores all experts and selects the top_k of them.

    Args:
        top_k: selected experts a token.
        normalize: divide the selected weights by their sum.
        scale: multiply the weights by this, after that.
        score: a softmax over all experts, or a sigmoid for each. A softmax over the selected logits alone is `softmax`
            with `normalize`.
        num_groups: experts are in this many groups of equal size.
        top_groups: experts are selected from the best groups only, this many.
        least_sum: for softmax, the least sum that weights are divided by; for sigmoid, added to the sum. A correction
            bias may select experts whose weights are all close to 0.
    """

    top_k: int
    normalize: bool
    scale: float = 1.0
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    least_sum: float = 0.0

    @property
    def min_experts(self) -> int:
        """The fewest experts that a layer can route among."""
        return min_experts(self.top_k, self.num_groups, self.top_groups)


def min_experts(top_k: int, num_groups: int, top_groups: int) -> int:
    """The fewest experts to route among: top_k; of groups, two each at least, and top_k in the selected groups."""
    return top_k if num_groups == 1 else num_groups * max(2, -(-top_k // top_groups))


def read_plain(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=bool(config.norm_topk_prob))


def read_deepseek(config: PretrainedConfig) -> Routing:
    """With one expert a token, weights are not normalized."""
    routing = read_plain(config)
    return replace(routing, normalize=routing.normalize and routing.top_k > 1)


def read_normalized(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=True)


def read_deepseek_v2(config: PretrainedConfig) -> Routing:
    """transformers ignores `norm_topk_prob`; it ignores groups unless the method is group_limited_greedy."""
    routing = Routing(config.num_experts_per_tok, normalize=False, scale=float(config.routed_scaling_factor))
    if config.topk_method != "group_limited_greedy":
        return routing
    return replace(routing, num_groups=config.n_group, top_groups=config.topk_group)


def read_deepseek_v3(config: PretrainedConfig) -> Routing:
    return Routing(
        config.num_experts_per_tok,
        normalize=bool(config.norm_topk_prob),
        scale=float(config.routed_scaling_factor),
        score="sigmoid",
        num_groups=config.n_group,
        top_groups=config.topk_group,
        least_sum=DEEPSEEK_V3_LEAST_SUM,
    )


def read_ernie(config: PretrainedConfig) -> Routing:
    return replace(read_normalized(config), least_sum=float(config.moe_norm_min))
