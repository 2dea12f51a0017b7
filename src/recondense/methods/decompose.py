"""Intra-expert decomposition: a rank for every routed expert (MoE-I², arXiv 2411.01016, section 3.2).

With uniform importances, whitening and no pruning before it, this is SVD-LLM (arXiv 2403.07378) on experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.search import ranks
from recondense.methods.search.budget import Budget
from recondense.methods.search.importance import KINDS, expert_importances
from recondense.methods.search.layerwise import Cache
from recondense.models import parameters, views
from recondense.models.families import Facts
from recondense.models.parameters import routed_parameters
from recondense.operations import Factorize


@dataclass(frozen=True)
class Decompose:
    """Factorize every routed expert of the sparse layers that are left, at its own rank.

    The average rank comes from the first of these that is given: a budget, `ratio`, `average_rank`.

    Args:
        average_rank: R_a; "auto" keeps 0.614 of an expert's parameters, the paper's share; None, and no other of the
            three: nothing is factorized.
        ratio: fraction of the experts' present parameters that stays.
        removed_expert_ratio, memory_ratio: budgets of the whole model; what earlier steps removed counts.
        alpha: how much more rank important experts get; 0 gives all the same.
        rank_multiple: ranks are multiples of this; "auto": see `ranks.multiple_of`; 1 rounds nothing.
        whitening: factors of least error on the calibration activations.
        importance: "layer_output", "lm_loss", or "uniform".
        normalize: see `expert_importance`.
        required: one of the three must be given.

    Raises:
        UserError: a setting outside its range.

    Reference: MoE-I², arXiv 2411.01016, section 3.2; SVD-LLM, arXiv 2403.07378, section 3.1.
    """

    average_rank: int | str | None = "auto"
    ratio: float | None = None
    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None
    alpha: float = 0.15
    rank_multiple: int | str = "auto"
    whitening: bool = False
    importance: str = "layer_output"
    normalize: bool = True
    required: bool = False

    def __post_init__(self) -> None:
        rank = self.average_rank
        problems = self.budget.problems(required=self.required and rank is None and self.ratio is None)
        if rank not in (None, "auto") and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            problems.append(f"method.average_rank={rank} must be a whole number of at least 1, auto or null")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            problems.append(f"method.ratio={self.ratio} must be above 0 and at most 1")
        if self.ratio is not None and self.budget.given:
            given = ", ".join(f"method.{name}={value}" for name, value in self.budget.settings().items() if value)
            problems.append(f"method.ratio={self.ratio} and {given} are both given: set one to null")
        if isinstance(rank, int) and self._by_share:
            problems.append(
                f"method.average_rank={rank}: a budget or method.ratio gives the ranks; leave it at its default"
            )
        problems += ranks.multiple_problems(self.rank_multiple)
        if self.alpha > 0 and self.importance == "uniform":
            problems.append(
                f"method.alpha={self.alpha}: has no effect where method.importance=uniform; use {' or '.join(KINDS)}"
            )
        if self.alpha < 0:
            problems.append(f"method.alpha={self.alpha} must be at least 0")
        if self.importance not in (*KINDS, "uniform"):
            problems.append(f"method.importance={self.importance} must be {', '.join(KINDS)} or uniform")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, self.memory_ratio)

    @property
    def _by_share(self) -> bool:
        """Whether a budget or a ratio gives the average rank."""
        return self.budget.given or self.ratio is not None

    @property
    def _nothing_asked(self) -> bool:
        return self.average_rank is None and not self._by_share

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        cap = ranks.break_even(facts.hidden_size, facts.expert_width)
        least = 1 if self.rank_multiple == "auto" else int(self.rank_multiple)
        problems = []
        if facts.num_groups > 1 and self.alpha and self.importance != "uniform":
            problems.append(
                f"method.importance={self.importance}: the router selects among {facts.num_groups} groups of experts, "
                "where the loss without one expert is not known; use method.alpha=0"
            )
        automatic = ranks.automatic(facts.hidden_size, facts.expert_width)
        average = automatic if self.average_rank == "auto" else self.average_rank
        if isinstance(average, int) and not least <= average < cap and not self._by_share:
            shown = f"auto ({average})" if self.average_rank == "auto" else average
            problems.append(
                f"method.average_rank={shown}: must be at least method.rank_multiple={least} and below {cap:.4g}, the "
                f"rank at which the factors of an expert of {facts.hidden_size} x {facts.expert_width} have as many "
                "parameters as the expert; null factorizes nothing"
            )
        if least >= cap:
            problems.append(
                f"method.rank_multiple={least}: must be below {cap:.4g}, from where on factors save nothing"
            )
        return problems

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; ranks and budgets are not part of it."""
        return {"method": "decompose", "version": 2, "importance": self.importance, "normalize": self.normalize}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        even = not self.alpha or self.importance == "uniform"
        return "" if even else "the ranks of single experts; not their mean"

    def outline(self, model: PreTrainedModel) -> list[Factorize]:
        """Operations of the sizes that the search reaches, from shapes alone: as if all experts were as important."""
        blocks = views.sparse_blocks(model)
        if not blocks or self._nothing_asked:
            return []
        importance = {layer: [1.0] * block.num_experts for layer, block in blocks.items()}
        return self._operations(self._ranks(model, importance, *_shape(blocks))[2])

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Factorize], dict[str, Any]]:
        """Decide the ranks; the model is left bit-identical.

        Args:
            model: the causal LM, as the step before left it.
            tape: gives its hidden states on the calibration set; called only if importances are needed.
            cache: importances found so far.
            max_scratch_bytes: bound on temporary tensors.

        Returns:
            operations in layer order; importances, the average rank, and what share of the routed experts' parameters
            of the original stays.

        Raises:
            UserError: the budget is smaller than the least rank everywhere.
        """
        started = time.perf_counter()
        blocks = views.sparse_blocks(model)
        if not blocks or self._nothing_asked:
            return [], {**self.key(), "seconds": {}}
        hidden_size, expert_width = _shape(blocks)
        importance = self._importance(model, blocks, tape, cache, max_scratch_bytes)
        multiple, average, found = self._ranks(model, importance, hidden_size, expert_width)
        before = sum(ranks.parameters([None] * len(each), hidden_size, expert_width) for each in found.values())
        after = sum(ranks.parameters(each, hidden_size, expert_width) for each in found.values())
        original = parameters.parameter_counts(model.config).routed_experts
        return self._operations(found), {
            **self.key(),
            **self.budget.settings(),
            "alpha": self.alpha,
            "rank_multiple": multiple,
            "whitening": self.whitening,
            "average_rank": average,
            "break_even": ranks.break_even(hidden_size, expert_width),
            "importance_of_experts": {str(layer): list(values) for layer, values in importance.items()},
            "kept_of_retained": after / before,
            "kept_of_routed_experts": (routed_parameters(model) - before + after) / original,
            "seconds": {"ranks": time.perf_counter() - started},
        }

    def _operations(self, found: dict[int, ranks.Ranks]) -> list[Factorize]:
        """Of the layers in which some expert does not stay dense."""
        changed = {layer: each for layer, each in found.items() if any(rank is not None for rank in each)}
        return [
            Factorize(layer, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), tuple(each)), self.whitening)
            for layer, each in changed.items()
        ]

    def _ranks(
        self, model: PreTrainedModel, importance: Mapping[int, Sequence[float]], hidden_size: int, expert_width: int
    ) -> tuple[int, float, dict[int, ranks.Ranks]]:
        """What ranks are multiples of, their average, and each layer's."""
        shape = hidden_size, expert_width
        num_experts = sum(len(each) for each in importance.values())
        dense = ranks.parameters([None] * num_experts, *shape)
        if not self._by_share:
            average = ranks.automatic(*shape) if self.average_rank == "auto" else self.average_rank
            assert isinstance(average, int)
            multiple = ranks.multiple_of(self.rank_multiple, *shape, average)
            how = *shape, self.alpha, multiple
            return multiple, average, {layer: ranks.allocate(each, average, *how) for layer, each in importance.items()}
        if self.budget.given:
            kept = dense - self.budget.expert_parameters_to_remove(model)
        else:
            kept = int((self.ratio or 1.0) * dense)
        multiple = ranks.multiple_of(self.rank_multiple, *shape, kept / ranks.parameters([1] * num_experts, *shape))
        least = ranks.parameters([multiple] * num_experts, *shape)
        if kept < least and self.budget.given:
            raise UserError(
                f"method: the budget asks for more than factors can save; rank {multiple} for every expert gives "
                f"{self.budget.at_best(model, dense - least)}"
            )
        return multiple, *ranks.within(importance, kept, *shape, self.alpha, multiple)

    def _importance(
        self,
        model: PreTrainedModel,
        blocks: dict[int, views.SparseBlock],
        tape: Callable[[], Tape],
        cache: Cache,
        max_scratch_bytes: int,
    ) -> Mapping[int, Sequence[float]]:
        if self.importance == "uniform" or not self.alpha:
            return {layer: [1.0] * block.num_experts for layer, block in blocks.items()}
        title = "importance of the retained experts"
        found, _ = expert_importances(
            model, tape, cache, blocks, self.importance, self.normalize, max_scratch_bytes, title
        )
        return found


def _shape(blocks: Mapping[int, views.SparseBlock]) -> tuple[int, int]:
    """Hidden size and width of a routed expert."""
    _, hidden_size, expert_width = next(iter(blocks.values())).weights.down_EDF.shape
    return hidden_size, expert_width
