"""The budget of a method: how many parameters, or entire experts, it must remove."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.models import parameters
from recondense.models.moe_blocks import sparse_blocks
from recondense.models.parameters import count_parameters, routed_parameters


@dataclass(frozen=True)
class Budget:
    """How much of the uncompressed model a method must remove. At most one of the two ratios is set.

    Sizes are counted in parameters, which are proportional to bytes if all weights have the same dtype. The scale of a
    condensed layer does not count, because it is folded into other weights at export.

    Args:
        removed_expert_ratio: fraction of the routed experts' parameters to remove.
        memory_ratio: upper bound on the parameters of the compressed model / those of the original.
    """

    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None

    @property
    def is_given(self) -> bool:
        return self.removed_expert_ratio is not None or self.memory_ratio is not None

    def problems(self, *, required: bool = True) -> list[str]:
        """List the problems of the two ratios, as sentences.

        Args:
            required: whether one of them must be set.
        """
        if required and not self.is_given:
            return ["method.removed_expert_ratio and method.memory_ratio are both null: set one of them"]
        problems = [
            f"method.{name}={value} must lie between 0 and 1"
            for name, value in self.settings().items()
            if value is not None
            and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1)
        ]
        if self.removed_expert_ratio is not None and self.memory_ratio is not None:
            problems.append("method.removed_expert_ratio and method.memory_ratio are both set; set one of them to null")
        return problems

    def settings(self) -> dict[str, float | None]:
        """Return the two ratios by name."""
        return {"removed_expert_ratio": self.removed_expert_ratio, "memory_ratio": self.memory_ratio}

    def part(self, number: int, count: int) -> Budget:
        """Return the budget after some of several rounds that remove equally much; after the last it is this one.

        Args:
            number: the number of the round, from 1.
            count: the number of rounds.
        """
        if number == count:
            return self
        removed, memory, share = self.removed_expert_ratio, self.memory_ratio, number / count
        return Budget(
            None if removed is None else removed * share,
            None if memory is None else 1 - (1 - memory) * share,
        )

    def experts_to_drop(self, model: PreTrainedModel, router_rows: bool = True, floor: int = 0) -> int:
        """Return the number of experts that must still be dropped from the model.

        removed_expert_ratio r drops round(r·L·E) experts of L layers. memory_ratio drops as few as meet it. Both count
        experts of the present width, if an earlier step has narrowed them.

        Args:
            model: the model after the earlier steps.
            router_rows: whether dropping an expert also removes its row in the router; merging experts does not.
            floor: the fewest experts that a layer retains.

        Raises:
            UserError: the layers cannot lose as many experts.
        """
        counts = parameters.parameter_counts(model.config)
        size = expert = parameters.present_expert(model)
        if self.removed_expert_ratio is not None:
            target = round(self.removed_expert_ratio * counts.routed_experts / counts.expert) * counts.expert
            number = math.ceil((target - (counts.routed_experts - routed_parameters(model))) / expert)
        else:
            size += counts.router_row if router_rows else 0
            number = math.ceil(self.expert_parameters_to_remove(model) / size)
        layers = [block.num_experts for block in sparse_blocks(model).values()]
        room = sum(max(0, experts - floor) for experts in layers)
        if number > room and layers:
            raise UserError(
                f"method: the budget requires dropping {number} experts, but the {len(layers)} MoE layers can lose at "
                f"most {room}: each must retain {floor}. The strictest possible budget is "
                f"{self.strictest_ratio(model, room * size)}"
            )
        return max(0, number)

    def experts_at_most(self, model: PreTrainedModel) -> int:
        """Return the largest number of experts that can be dropped without removing more than the budget requires."""
        counts = parameters.parameter_counts(model.config)
        size = parameters.present_expert(model) + (counts.router_row if self.memory_ratio is not None else 0)
        return self.expert_parameters_to_remove(model) // size

    def expert_parameters_to_remove(self, model: PreTrainedModel) -> int:
        """Return the number of parameters that must still be removed from the model.

        removed_expert_ratio counts the parameters of routed experts, memory_ratio counts all parameters.
        """
        counts = parameters.parameter_counts(model.config)
        if self.removed_expert_ratio is not None:
            target = counts.routed_experts - round(self.removed_expert_ratio * counts.routed_experts)
            return max(0, routed_parameters(model) - target)
        assert self.memory_ratio is not None
        return max(0, count_parameters(model) - math.floor(self.memory_ratio * counts.total))

    def strictest_ratio(self, model: PreTrainedModel, removable: int) -> str:
        """Return the strictest ratio that the model can meet, as `name=value`, rounded to a value that it meets.

        Args:
            model: the model after the earlier steps.
            removable: the number of parameters that can still be removed, counted as in `expert_parameters_to_remove`.
        """
        counts = parameters.parameter_counts(model.config)
        if self.removed_expert_ratio is not None:
            removed = counts.routed_experts - routed_parameters(model) + removable
            return f"removed_expert_ratio={math.floor(1e4 * removed / counts.routed_experts) / 1e4:g}"
        remaining = count_parameters(model) - removable
        return f"memory_ratio={math.ceil(1e4 * remaining / counts.total) / 1e4:g}"


NO_BUDGET = Budget()
