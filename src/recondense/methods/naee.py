"""NAEE: in every layer, prune the set of experts that changes the layer's output least (arXiv 2402.14800)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.methods.moei2 import refuse_groups
from recondense.methods.saliency import refuse_too_much
from recondense.methods.search.allocation import drop_uniformly
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.expert_sets import search_expert_sets
from recondense.methods.search.genetic import GENETIC, Genetic
from recondense.methods.search.layerwise import LayerwiseSearch
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.operations import Prune


@dataclass(frozen=True)
class NAEE:
    """Prune the same number of experts in every layer, with the least change of the layer's output (Frobenius norm).

    The paper tries all sets, which is possible for Mixtral's eight experts. If there are many sets, the genetic search
    of MoE-I² minimizes the same error. `search: exact` always tries all sets.

    Args:
        budget: the parameters to remove.
        genetic, seed: the settings and the seed of the search.

    Raises:
        UserError: a setting is outside its range.

    Reference: Not All Experts are Equal, arXiv 2402.14800, section 3.1.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True
    left_open: ClassVar[str] = ""

    budget: Budget = NO_BUDGET
    genetic: Genetic = GENETIC
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*self.budget.problems(), *self.genetic.problems()]
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        num_dropped = round((self.budget.removed_expert_ratio or 0.0) * facts.num_experts)
        return [
            *refuse_groups(facts),
            *refuse_too_much(self.budget, facts),
            *self.genetic.refuse_too_many(facts.num_experts, num_dropped),
        ]

    def key(self) -> Record:
        return {"method": "naee", "version": 1, **self.genetic.key(), "seed": self.seed}

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> NAEE:
        return replace(self, budget=self.budget.part(number, count))

    def outline(self, model: PreTrainedModel) -> list[Prune]:
        experts = {layer: block.num_experts for layer, block in moe_blocks.sparse_blocks(model).items()}
        numbers = self._numbers(model, experts)
        return [Prune.from_dropped(layer, experts[layer], range(number)) for layer, number in numbers.items() if number]

    def _numbers(self, model: PreTrainedModel, experts: Mapping[int, int]) -> dict[int, int]:
        """Return the number of experts that each layer loses."""
        blocks = moe_blocks.sparse_blocks(model)
        floor = next(iter(blocks.values())).routing.top_k if blocks else 0
        return drop_uniformly(self.budget.experts_to_drop(model, floor=floor), experts, floor)

    def search(self, context: SearchContext) -> tuple[list[Prune], Record]:
        """Decide which experts to prune; see `Step.search`.

        Raises:
            UserError: the budget requires pruning more experts than possible.
        """
        started = time.perf_counter()
        blocks = moe_blocks.sparse_blocks(context.model)
        if not blocks:
            return [], {**self.key(), "seconds": {}}
        experts = {layer: block.num_experts for layer, block in blocks.items()}
        numbers = self._numbers(context.model, experts)
        search = LayerwiseSearch(context)
        sets = search_expert_sets(search, blocks, numbers, self.genetic, self.seed, "expert sets", relative=True)
        best = {layer: candidates[0] for layer, candidates in sets.items()}
        operations = [
            Prune.from_dropped(layer, experts[layer], dropped) for layer, (dropped, _) in best.items() if dropped
        ]
        return operations, {
            **self.key(),
            **self.budget.settings(),
            "errors": {str(layer): error for layer, (_, error) in best.items()},
            "seconds": {"sets": time.perf_counter() - started},
        }
