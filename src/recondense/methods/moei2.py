"""MoE-I², first stage: decide which experts to prune (arXiv 2411.01016, section 3.1).

The importance of its experts decides how many experts each layer loses. A genetic search finds candidate sets of
experts in each layer, and the block-wise KT-reception field chooses among them. The second stage is `Decompose`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.methods.search.allocation import drop_by_importance
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.expert_sets import search_expert_sets
from recondense.methods.search.genetic import GENETIC, ExpertSet, Genetic
from recondense.methods.search.importance import KINDS, expert_importances
from recondense.methods.search.kt_field import Group, reception_field
from recondense.methods.search.layerwise import LayerwiseSearch
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.operations import Prune
from recondense.progress import progress

MOST_COMBINATIONS = 10_000  # of the candidates of a group of layers; each combination runs these layers
Candidates = dict[int, list[tuple[ExpertSet, float]]]  # by layer: sets of experts to drop with their errors, best first


@dataclass(frozen=True)
class InterExpertPruning:
    """Prune experts non-uniformly over the layers, by a genetic search and KT-reception fields.

    Args:
        prune_ratio: fraction of all routed experts to drop.
        budget: the budget of the entire method. If it requires less than `prune_ratio`, fewer experts are dropped.
        importance: the loss that defines an expert's importance: "layer_output" or "lm_loss".
        normalize: see `expert_importance`.
        genetic, seed: the settings and the seed of the search for candidates.
        num_candidates: K, the number of candidate sets per layer.
        block_size: T, the number of MoE layers in a group of the reception field.

    Raises:
        UserError: a setting is outside its range.

    Reference: MoE-I², arXiv 2411.01016, section 3.1.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True
    left_open: ClassVar[str] = "how many experts each layer loses, but not their total"

    prune_ratio: float = 0.25
    budget: Budget = NO_BUDGET
    importance: str = "layer_output"
    normalize: bool = True
    genetic: Genetic = GENETIC
    num_candidates: int = 3
    block_size: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*self.genetic.problems(), *self.budget.problems(required=False)]
        if not 0 < self.prune_ratio < 1:
            problems.append(f"method.prune_ratio={self.prune_ratio} must lie between 0 and 1")
        if self.importance not in KINDS:
            problems.append(f"method.importance={self.importance} must be {' or '.join(KINDS)}")
        for name in ("num_candidates", "block_size"):
            if getattr(self, name) < 1:
                problems.append(f"method.{name}={getattr(self, name)} must be at least 1")
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        problems = refuse_groups(facts)
        total = len(facts.moe_layers) * facts.num_experts
        most = len(facts.moe_layers) * (facts.num_experts - facts.top_k)
        if round(self.prune_ratio * total) > most:
            problems.append(
                f"method.prune_ratio={self.prune_ratio}: must be at most {most / total:.4g}, because each token "
                f"selects {facts.top_k} of the {facts.num_experts} experts of a layer"
            )
        if round(self.prune_ratio * total) < 1:
            problems.append(f"method.prune_ratio={self.prune_ratio}: none of the {total} experts would be pruned")
        if not self.budget.is_given:  # for an average layer; a budget may require fewer
            problems += self.genetic.refuse_too_many(facts.num_experts, round(self.prune_ratio * facts.num_experts))
        runs = self.num_candidates**self.block_size
        if runs > MOST_COMBINATIONS:
            problems.append(
                f"method.num_candidates={self.num_candidates} and method.block_size={self.block_size}: "
                f"there would be {runs:,} combinations for each group of layers, but at most {MOST_COMBINATIONS:,} are "
                "supported; lower one of them"
            )
        return problems

    def key(self) -> Record:
        importance = {"importance": self.importance, "normalize": self.normalize}
        kt_field = {"num_candidates": self.num_candidates, "block_size": self.block_size}
        settings = {**importance, **self.genetic.key(), **kt_field, "seed": self.seed}
        return {"method": "moei2", "version": 2, **settings}

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> InterExpertPruning | None:
        """Return the step for one round, see `Step.for_round`: `prune_ratio` is a fraction of the experts before it."""
        total = sum(block.num_experts for block in moe_blocks.sparse_blocks(model).values())
        before, after = (round(round(self.prune_ratio * total) * done / count) for done in (number - 1, number))
        if before == after:
            return None
        ratio = (after - before) / (total - before)
        return replace(self, prune_ratio=ratio, budget=self.budget.part(number, count))

    def outline(self, model: PreTrainedModel) -> list[Prune]:
        """Return operations of the final sizes, see `Step.outline`. All layers count as equally important."""
        blocks = moe_blocks.sparse_blocks(model)
        numbers = self.numbers(model, dict.fromkeys(blocks, 1.0))
        return [
            Prune.from_dropped(layer, blocks[layer].num_experts, range(number))
            for layer, number in numbers.items()
            if number
        ]

    def numbers(self, model: PreTrainedModel, importance: Mapping[int, float]) -> dict[int, int]:
        """Return the number of experts that each layer loses.

        Args:
            model: the model after the earlier steps.
            importance: the importance of each sparse layer.
        """
        blocks = moe_blocks.sparse_blocks(model)
        if not blocks:
            return {}
        experts = {layer: block.num_experts for layer, block in blocks.items()}
        total = round(self.prune_ratio * sum(experts.values()))
        if self.budget.is_given:
            total = min(total, self.budget.experts_at_most(model))
        return drop_by_importance(total, importance, experts, next(iter(blocks.values())).routing.top_k)

    def search(self, context: SearchContext) -> tuple[list[Prune], Record]:
        """Decide which experts to prune; see `Step.search`.

        Raises:
            UserError: more experts should be pruned than possible.
        """
        started = time.perf_counter()
        blocks = moe_blocks.sparse_blocks(context.model)
        if not blocks:
            return [], {**self.key(), "seconds": {}}
        search = LayerwiseSearch(context)
        importance = expert_importances(search, blocks, self.importance, self.normalize, "expert importance")
        seconds = {"importance": time.perf_counter() - started}
        layer_importance = {layer: sum(values) for layer, values in importance.items()}
        numbers = self.numbers(context.model, layer_importance)
        candidates: Candidates = search_expert_sets(
            search, blocks, numbers, self.genetic, self.seed, "genetic search", self.num_candidates
        )
        seconds["genetic"] = time.perf_counter() - started - sum(seconds.values())
        groups = self._search_groups(context, candidates)
        seconds["reception_field"] = time.perf_counter() - started - sum(seconds.values())
        return _prunes(groups, candidates, {layer: block.num_experts for layer, block in blocks.items()}), {
            **self.key(),
            "prune_ratio": self.prune_ratio,
            **self.budget.settings(),
            "expert_importance": {str(layer): values for layer, values in importance.items()},
            "layer_importance": {str(layer): value for layer, value in layer_importance.items()},
            "dropped": {str(layer): number for layer, number in numbers.items()},
            "candidates": {
                str(layer): [[list(dropped), error] for dropped, error in sets] for layer, sets in candidates.items()
            },
            "blocks": [_to_json(group) for group in groups],
            "reused": f"{search.reused} of {2 * len(blocks)} importances and candidate sets" if search.reused else "",
            "seconds": seconds,
        }

    def _search_groups(self, context: SearchContext, candidates: Candidates) -> list[Group]:
        """Choose among the candidates by the reception field, or read the choice from the cache."""
        name = _field_name(candidates)
        sets = {layer: [dropped for dropped, _ in layer_sets] for layer, layer_sets in candidates.items()}
        count = -(-len(sets) // self.block_size)
        record = context.cache.get(name) or {"blocks": []}
        groups = [_from_json(entry) for entry in record["blocks"]]
        if len(groups) == count:
            return groups
        with progress("KT-reception field", count) as bar:
            bar.advance(len(groups))

            def keep(decided: list[Group]) -> None:
                context.cache[name] = {"blocks": [_to_json(group) for group in decided]}
                bar.advance()

            return reception_field(context.model, context.tape(), sets, self.block_size, groups, keep)


def _prunes(groups: list[Group], candidates: Candidates, num_experts: Mapping[int, int]) -> list[Prune]:
    """Return the operations of the chosen candidates, in layer order."""
    sets = {
        layer: candidates[layer][place][0]
        for group in groups
        for layer, place in zip(group.layers, group.choice, strict=True)
    }
    return [Prune.from_dropped(layer, num_experts[layer], dropped) for layer, dropped in sets.items() if dropped]


def _field_name(candidates: Candidates) -> str:
    """Return the name of the reception field in the cache, made of the numbers of experts that the layers lose."""
    return "blocks-" + "-".join(str(len(sets[0][0])) for sets in candidates.values())


def _to_json(group: Group) -> Record:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(group).items()}


def _from_json(entry: Record) -> Group:
    return Group(tuple(entry["layers"]), tuple(entry["choice"]), entry["error"], entry["combinations"])


def refuse_groups(facts: Facts) -> list[str]:
    """Return a problem if the model's router selects groups, whose experts cannot be pruned one by one."""
    if facts.num_groups == 1:
        return []
    return [
        f"the router selects among {facts.num_groups} groups of experts. Pruning must keep the groups equally large, "
        "which this search does not. Use method=cdmoe or method=svd_llm."
    ]
