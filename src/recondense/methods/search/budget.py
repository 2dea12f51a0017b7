"""Budgets that every method takes: how many parameters, or whole experts, have to go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from recondense.models import parameters
from recondense.models.parameters import routed_parameters, total_parameters


@dataclass(frozen=True)
class Budget:
    """What may stay of a model, against its uncompressed self.

    Counted in parameters, which are bytes where all weights have one type. The scale of a condensed layer is folded at
    export and does not count.

    Args:
        removed_expert_ratio: fraction of the routed experts' parameters that goes.
        memory_ratio: parameters of the compressed whole model / of the original, an upper bound; where it is given,
            removed_expert_ratio (which has a default in most YAMLs) does not count.
    """

    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.memory_ratio is not None:
            object.__setattr__(self, "removed_expert_ratio", None)

    @property
    def given(self) -> bool:
        return self.removed_expert_ratio is not None or self.memory_ratio is not None

    def problems(self, *, required: bool = True) -> list[str]:
        """What is wrong with the two, as sentences.

        Args:
            required: one of them must be given.
        """
        if required and not self.given:
            return ["method.removed_expert_ratio and method.memory_ratio are both null: set one of them"]
        return [
            f"method.{name}={value} must lie between 0 and 1"
            for name in ("removed_expert_ratio", "memory_ratio")
            if (value := getattr(self, name)) is not None
            and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1)
        ]

    def settings(self) -> dict[str, float | None]:
        """For records: what was asked for."""
        return {"removed_expert_ratio": self.removed_expert_ratio, "memory_ratio": self.memory_ratio}

    def experts_to_drop(self, model: PreTrainedModel, router_rows: bool = True) -> int:
        """Whole experts that still have to go of the model as it is now.

        removed_expert_ratio r drops round(r·L·E) experts of L layers; memory_ratio the fewest that keep it.

        Args:
            router_rows: an expert's row in the router goes with it; not so when experts are merged.
        """
        counts = parameters.parameter_counts(model.config)
        expert = counts.expert
        if self.removed_expert_ratio is not None:
            wanted = round(self.removed_expert_ratio * counts.routed_experts / expert)
            gone = (counts.routed_experts - routed_parameters(model)) // expert
            return max(0, wanted - gone)
        size = expert + (counts.router_row if router_rows else 0)
        return max(0, math.ceil(self.expert_parameters_to_remove(model) / size))

    def experts_at_most(self, model: PreTrainedModel) -> int:
        """Whole experts that may still go before more is gone than was asked for."""
        counts = parameters.parameter_counts(model.config)
        size = counts.expert + (counts.router_row if self.memory_ratio is not None else 0)
        return self.expert_parameters_to_remove(model) // size

    def expert_parameters_to_remove(self, model: PreTrainedModel) -> int:
        """Parameters that still have to go: of the routed experts for removed_expert_ratio, of any for memory_ratio."""
        counts = parameters.parameter_counts(model.config)
        if self.removed_expert_ratio is not None:
            target = counts.routed_experts - round(self.removed_expert_ratio * counts.routed_experts)
            return max(0, routed_parameters(model) - target)
        assert self.memory_ratio is not None
        return max(0, total_parameters(model) - math.floor(self.memory_ratio * counts.total))

    def at_best(self, model: PreTrainedModel, removable: int) -> str:
        """The strictest budget of this kind that a model can keep, in words, rounded to the side that it can.

        Args:
            removable: parameters that can still go of the model as it is now, counted as this budget counts.
        """
        counts = parameters.parameter_counts(model.config)
        if self.removed_expert_ratio is not None:
            gone = counts.routed_experts - routed_parameters(model) + removable
            return f"removed_expert_ratio={math.floor(1e4 * gone / counts.routed_experts) / 1e4:g}"
        left = total_parameters(model) - removable
        return f"memory_ratio={math.ceil(1e4 * left / counts.total) / 1e4:g}"
