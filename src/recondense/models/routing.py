"""Read from a config how a family's router turns logits into routing weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PretrainedConfig

DEEPSEEK_V3_LEAST_SUM = 1e-20  # a constant in the modeling file of DeepSeek-V3


@dataclass(frozen=True)
class Routing:
    """How a router turns logits into routing weights: it scores all experts and selects top_k of them.

    Args:
        top_k: number of experts that a token selects.
        normalize: divide the selected weights by their sum.
        scale: factor for the weights, after the normalization.
        score: a softmax over all experts, or a sigmoid for each expert. A softmax over only the selected logits is the
            same as `softmax` with `normalize`.
        num_groups: number of groups of experts, of equal size.
        top_groups: number of best groups from which experts are selected.
        least_sum: for softmax, the lower bound on the sum by which weights are divided; for sigmoid, it is added to the
            sum. It matters because a correction bias may select experts whose weights are all close to 0.
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
    """Return the fewest experts that a layer can route among.

    That is top_k. If the router selects groups, each group needs two experts, and the selected groups top_k together.
    """
    return top_k if num_groups == 1 else num_groups * max(2, -(-top_k // top_groups))


def read_plain(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=bool(config.norm_topk_prob))


def read_deepseek(config: PretrainedConfig) -> Routing:
    """Read the routing of `deepseek`, which does not normalize weights if a token selects only one expert."""
    routing = read_plain(config)
    return replace(routing, normalize=routing.normalize and routing.top_k > 1)


def read_normalized(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=True)


def read_deepseek_v2(config: PretrainedConfig) -> Routing:
    """Read the routing of `deepseek_v2` as transformers computes it.

    transformers ignores `norm_topk_prob`, and ignores groups unless topk_method is group_limited_greedy.
    """
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
