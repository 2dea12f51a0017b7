"""NAEE: of every layer, the experts whose loss changes the layer's output least, all sets tried (arXiv 2402.14800)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.moei2 import refuse_groups
from recondense.methods.saliency import too_much
from recondense.methods.search.allocation import uniform
from recondense.methods.search.budget import Budget
from recondense.methods.search.genetic import Genetic, best_sets, layer_seed
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.methods.search.leave_out import Replay
from recondense.models import views
from recondense.models.families import Facts
from recondense.operations import Prune


@dataclass(frozen=True)
class NAEE:
    """Prune the same number of experts in every layer, by the least Frobenius distance of the layer's output.

    The paper tries all sets, which Mixtral's eight experts allow. For more, the same loss is minimised by the genetic
    search of MoE-I²; `exact` insists on all sets.

    Args:
        removed_expert_ratio, memory_ratio: the budget.
        population, iterations, parents, mutation, search_kind: see `Genetic`.
        seed: of the genetic search.

    Raises:
        UserError: a setting outside its range.

    Reference: Not All Experts are Equal, arXiv 2402.14800, section 3.1.
    """

    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None
    population: int = 100
    iterations: int = 50
    parents: int = 20
    mutation: float = 0.5
    search_kind: str = field(default="auto", metadata={"setting": "search"})
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*self.budget.problems(), *self.genetic.problems()]
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, self.memory_ratio)

    @property
    def genetic(self) -> Genetic:
        return Genetic(self.population, self.iterations, self.parents, self.mutation, self.search_kind)

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        num_dropped = round((self.budget.removed_expert_ratio or 0.0) * facts.num_experts)
        return [
            *refuse_groups(facts),
            *too_much(self.budget.removed_expert_ratio, facts),
            *self.genetic.endless(facts.num_experts, num_dropped),
        ]

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; the budget is not part of it."""
        names = ("population", "iterations", "parents", "mutation", "search_kind", "seed")
        return {"method": "naee", "version": 1, **{name: getattr(self, name) for name in names}}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return ""

    def outline(self, model: PreTrainedModel) -> list[Prune]:
        """Operations of the sizes that the search reaches, from shapes alone; which experts go is made up."""
        experts = {layer: block.num_experts for layer, block in views.sparse_blocks(model).items()}
        numbers = self._numbers(model, experts)
        return [Prune.without(layer, experts[layer], range(number)) for layer, number in numbers.items() if number]

    def _numbers(self, model: PreTrainedModel, experts: Mapping[int, int]) -> dict[int, int]:
        """How many experts each layer loses."""
        blocks = views.sparse_blocks(model)
        floor = next(iter(blocks.values())).routing.top_k if blocks else 0
        return uniform(self.budget.experts_to_drop(model), experts, floor)

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Prune], dict[str, Any]]:
        """Decide which experts go; the model is left bit-identical.

        Returns:
            operations in layer order, and each layer's error.

        Raises:
            UserError: more experts are to go than can.
        """
        started = time.perf_counter()
        blocks = views.sparse_blocks(model)
        if not blocks:
            return [], {**self.key(), "seconds": {}}
        experts = {layer: block.num_experts for layer, block in blocks.items()}
        numbers = self._numbers(model, experts)
        names = {layer: f"set-{layer:03d}-{number:03d}" for layer, number in numbers.items() if number}

        def work(tape: Tape, layer: int, *_: Any) -> dict[str, Any]:
            replay = Replay(model, tape, blocks[layer], numbers[layer], max_scratch_bytes)
            seed = layer_seed(self.seed, layer)
            best = best_sets(replay.errors, experts[layer], numbers[layer], self.genetic, seed)[0]
            return {"dropped": list(best[0]), "error": best[1] / max(replay.output_norm, 1e-300)}

        records, _ = layerwise(model, tape, cache, names, work, "expert sets")
        found: dict[int, tuple[tuple[int, ...], float]] = {
            layer: (tuple(record["dropped"]), float(record["error"]))
            for layer in numbers
            for record in [records.get(layer, {"dropped": [], "error": 0.0})]
        }
        operations = [Prune.without(layer, experts[layer], dropped) for layer, (dropped, _) in found.items() if dropped]
        return operations, {
            **self.key(),
            **self.budget.settings(),
            "errors": {str(layer): error for layer, (_, error) in found.items()},
            "seconds": {"sets": time.perf_counter() - started},
        }
