"""MoE-I², first stage: which experts a model loses (arXiv 2411.01016, section 3.1).

Importance of experts and layers, a non-uniform number to drop in each layer, candidates by a layer-wise genetic search,
and the block-wise KT-reception field that chooses among them. The second stage, the decomposition, is `factorize`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.search.allocation import inverse_importance
from recondense.methods.search.budget import Budget
from recondense.methods.search.genetic import Genetic, best_sets, layer_seed
from recondense.methods.search.importance import KINDS, expert_importances
from recondense.methods.search.kt_field import Block, reception_field
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.methods.search.leave_out import Replay
from recondense.models import views
from recondense.models.families import Facts
from recondense.operations import Prune
from recondense.progress import Stage, progress

MOST_COMBINATIONS = 10_000  # of a block's candidates, each a run of decoder layers


@dataclass(frozen=True)
class InterExpertPruning:
    """Prune experts non-uniformly over layers, by a genetic search and KT-reception fields.

    Args:
        prune_ratio: fraction of all routed experts that goes.
        removed_expert_ratio, memory_ratio: a budget of the whole method; where it asks for less, fewer experts go.
        importance: the loss behind an expert's importance: "layer_output" or "lm_loss".
        normalize: layer_output relative to the layer's own output; the raw norm grows with depth.
        population, iterations, parents, mutation, search: see `Genetic`.
        num_candidates: K, the best sets kept of each layer.
        block_size: T, MoE layers in a block.
        seed: of the genetic search.

    Raises:
        UserError: a setting outside its range.

    Reference: MoE-I², arXiv 2411.01016, section 3.1.
    """

    prune_ratio: float = 0.25
    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None
    importance: str = "layer_output"
    normalize: bool = True
    population: int = 100
    iterations: int = 50
    parents: int = 20
    mutation: float = 0.5
    search_kind: str = field(default="auto", metadata={"setting": "search"})
    num_candidates: int = 3
    block_size: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*self.genetic.problems(), *self.budget.problems(required=False)]
        if self.removed_expert_ratio is not None and self.memory_ratio is not None:
            problems.append("method.removed_expert_ratio and method.memory_ratio are both given: set one to null")
        if not 0 < self.prune_ratio < 1:
            problems.append(f"method.prune_ratio={self.prune_ratio} must lie between 0 and 1")
        if self.importance not in KINDS:
            problems.append(f"method.importance={self.importance} must be {' or '.join(KINDS)}")
        for name in ("num_candidates", "block_size"):
            if getattr(self, name) < 1:
                problems.append(f"method.{name}={getattr(self, name)} must be at least 1")
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
        problems = refuse_groups(facts)
        total = len(facts.moe_layers) * facts.num_experts
        most = len(facts.moe_layers) * (facts.num_experts - facts.top_k)
        if round(self.prune_ratio * total) > most:
            problems.append(
                f"method.prune_ratio={self.prune_ratio}: {facts.num_experts} experts a layer, of which each token "
                f"selects {facts.top_k}: at most {most / total:.4g} can go"
            )
        if round(self.prune_ratio * total) < 1:
            problems.append(f"method.prune_ratio={self.prune_ratio}: not one of {total} experts would go")
        if not self.budget.given:  # of an average layer; a budget may ask for fewer
            problems += self.genetic.endless(facts.num_experts, round(self.prune_ratio * facts.num_experts))
        runs = self.num_candidates**self.block_size
        if runs > MOST_COMBINATIONS:
            problems.append(
                f"method.num_candidates={self.num_candidates} and method.block_size={self.block_size}: "
                f"{runs:,} combinations a block; at most {MOST_COMBINATIONS:,} are tried"
            )
        return problems

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; the ratio is not part of it."""
        names = ("importance", "normalize", "population", "iterations", "parents", "mutation", "search_kind")
        own = {name: getattr(self, name) for name in (*names, "num_candidates", "block_size", "seed")}
        return {"method": "moei2", "version": 2, **own}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return "how many experts each layer loses; not their total"

    def outline(self, model: PreTrainedModel) -> list[Prune]:
        """Operations of the sizes that the search reaches, from shapes alone: as if all layers were as important.

        Which experts go is made up.
        """
        blocks = views.sparse_blocks(model)
        numbers = self.numbers(model, dict.fromkeys(blocks, 1.0))
        chosen = {layer: range(number) for layer, number in numbers.items() if number}
        return [Prune.without(layer, blocks[layer].num_experts, dropped) for layer, dropped in chosen.items()]

    def numbers(self, model: PreTrainedModel, importance: Mapping[int, float]) -> dict[int, int]:
        """How many experts each layer loses.

        Args:
            importance: of each sparse layer.
        """
        blocks = views.sparse_blocks(model)
        if not blocks:
            return {}
        experts = {layer: block.num_experts for layer, block in blocks.items()}
        total = round(self.prune_ratio * sum(experts.values()))
        if self.budget.given:
            total = min(total, self.budget.experts_at_most(model))
        return inverse_importance(total, importance, experts, next(iter(blocks.values())).routing.top_k)

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Prune], dict[str, Any]]:
        """Decide which experts go; the model is left bit-identical.

        Args:
            model: the causal LM, as the step before left it.
            tape: gives its hidden states on the calibration set; called only if the cache lacks something.
            cache: importances and candidates found so far, by layer and number; written as they are found.
            max_scratch_bytes: bound on temporary tensors.

        Returns:
            operations in layer order, and what decided them: importances, numbers, candidates, blocks, seconds.

        Raises:
            UserError: more experts are to go than can.
        """
        search = _Search(self, model, tape, cache, max_scratch_bytes)
        return search.run()


class _Search:
    """One search over one model, one tape and one cache."""

    def __init__(
        self,
        step: InterExpertPruning,
        model: PreTrainedModel,
        tape: Callable[[], Tape],
        cache: Cache,
        max_scratch_bytes: int,
    ) -> None:
        self.step = step
        self.model = model
        self.tape = tape
        self.cache = cache
        self.max_scratch_bytes = max_scratch_bytes
        self.blocks = views.sparse_blocks(model)
        self.reused = 0

    def run(self) -> tuple[list[Prune], dict[str, Any]]:
        started = time.perf_counter()
        if not self.blocks:
            return [], {**self.step.key(), "seconds": {}}
        importance = self._importance()
        seconds = {"importance": time.perf_counter() - started}
        experts = {layer: block.num_experts for layer, block in self.blocks.items()}
        layer_importance = {layer: sum(values) for layer, values in importance.items()}
        numbers = self.step.numbers(self.model, layer_importance)
        candidates = self._candidates(numbers)
        seconds["genetic"] = time.perf_counter() - started - sum(seconds.values())
        fields = self._fields(candidates)
        seconds["reception_field"] = time.perf_counter() - started - sum(seconds.values())
        chosen = {
            layer: candidates[layer][place][0]
            for field in fields
            for layer, place in zip(field["layers"], field["choice"], strict=True)
        }
        operations = [Prune.without(layer, experts[layer], dropped) for layer, dropped in chosen.items() if dropped]
        return operations, {
            **self.step.key(),
            "prune_ratio": self.step.prune_ratio,
            **self.step.budget.settings(),
            "expert_importance": {str(layer): values for layer, values in importance.items()},
            "layer_importance": {str(layer): value for layer, value in layer_importance.items()},
            "dropped": {str(layer): number for layer, number in numbers.items()},
            "candidates": {str(layer): _plain(sets) for layer, sets in candidates.items()},
            "blocks": fields,
            "reused": f"{self.reused} of {2 * len(self.blocks)} importances and candidate sets" if self.reused else "",
            "seconds": seconds,
        }

    def _importance(self) -> dict[int, list[float]]:
        how = self.step.importance, self.step.normalize, self.max_scratch_bytes
        found, reused = expert_importances(self.model, self.tape, self.cache, self.blocks, *how, "expert importance")
        self.reused += reused
        return found

    def _candidates(self, numbers: dict[int, int]) -> dict[int, list[tuple[tuple[int, ...], float]]]:
        def work(tape: Tape, layer: int, known: Any, bar: Stage) -> dict[str, Any]:
            step, block, number = self.step, self.blocks[layer], numbers[layer]

            def show(generation: int, best: float) -> None:
                bar.note(f"layer {layer}, generation {generation}, best error {best:.4g}")

            replay = Replay(self.model, tape, block, number, self.max_scratch_bytes)
            seed = layer_seed(step.seed, layer)
            how = step.genetic, seed, step.num_candidates
            return {"sets": _plain(best_sets(replay.errors, block.num_experts, number, *how, show))}

        names = {layer: f"candidates-{layer:03d}-{number:03d}" for layer, number in numbers.items() if number}
        found, reused = layerwise(self.model, self.tape, self.cache, names, work, "genetic search")
        self.reused += reused + len(numbers) - len(names)
        nothing: dict[str, Any] = {"sets": [[[], 0.0]]}
        return {
            layer: [(tuple(each), float(error)) for each, error in found.get(layer, nothing)["sets"]]
            for layer in numbers
        }

    def _fields(self, candidates: dict[int, list[tuple[tuple[int, ...], float]]]) -> list[dict[str, Any]]:
        numbers = "-".join(str(len(sets[0][0])) for sets in candidates.values())
        key = f"blocks-{numbers}"
        sets = {layer: [each for each, _ in found] for layer, found in candidates.items()}
        count = -(-len(sets) // self.step.block_size)
        entry = self.cache.get(key) or {"blocks": []}
        known = [Block(**{name: _tuple(value) for name, value in each.items()}) for each in entry["blocks"]]
        if len(known) == count:
            return list(entry["blocks"])
        with progress("KT-reception field", count) as bar:
            bar.advance(len(known))

            def decided(blocks: list[Block]) -> None:
                self.cache[key] = {"blocks": [_record(block) for block in blocks]}
                bar.advance()

            found = reception_field(self.model, self.tape(), sets, self.step.block_size, known, decided)
        return [_record(block) for block in found]


def _record(block: Block) -> dict[str, Any]:
    """As JSON reads it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(block).items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(sets: list[tuple[tuple[int, ...], float]]) -> list[list[Any]]:
    """As JSON reads it back."""
    return [[list(each), error] for each, error in sets]


def refuse_groups(facts: Facts) -> list[str]:
    """Why this model's experts cannot be pruned one by one, if so."""
    if facts.num_groups == 1:
        return []
    return [
        f"the router selects among {facts.num_groups} groups of experts, which pruning would have to leave equal; this "
        "search does not. Use method=cdmoe or method=svd_llm."
    ]
