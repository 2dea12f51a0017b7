"""Intra-expert decomposition: decide the rank of every routed expert (MoE-I², arXiv 2411.01016, section 3.2).

With uniform importances, whitening and no earlier pruning, this is SVD-LLM (arXiv 2403.07378) applied to experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.methods.search import ranks
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.importance import KINDS, expert_importances
from recondense.methods.search.layerwise import LayerwiseSearch
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks, parameters
from recondense.models.families import Facts
from recondense.models.parameters import routed_parameters
from recondense.operations import PROJECTIONS, Factorize


@dataclass(frozen=True)
class Decompose:
    """Factorize every routed expert of the sparse layers, each with its own rank.

    The average rank is determined by the first of these that is set: `budget`, `ratio`, `average_rank`.

    Args:
        average_rank: R_a. "auto" keeps 0.614 of an expert's parameters, as in the paper. None factorizes nothing if
            `budget` and `ratio` are not set either.
        ratio: fraction of the experts' current parameters to keep.
        budget: the budget of the entire method; parameters that earlier steps removed count towards it.
        alpha: how strongly the rank of an expert depends on its importance; 0 gives all experts the same rank.
        rank_multiple: ranks are rounded to multiples of this; 1 does not round. "auto": see `ranks.resolve_multiple`.
        whitening: minimize the error on the calibration activations.
        importance: "layer_output", "lm_loss", or "uniform".
        normalize: see `expert_importance`.
        required: whether `budget`, `ratio` or `average_rank` must be set.

    Raises:
        UserError: a setting is outside its range.

    Reference: MoE-I², arXiv 2411.01016, section 3.2; SVD-LLM, arXiv 2403.07378, section 3.1.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False

    average_rank: int | str | None = "auto"
    ratio: float | None = None
    budget: Budget = NO_BUDGET
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
        if self.ratio is not None and self.budget.is_given:
            budget = ", ".join(f"method.{name}={value}" for name, value in self.budget.settings().items() if value)
            problems.append(f"method.ratio={self.ratio} and {budget} are both set; set one of them to null")
        if isinstance(rank, int) and self._by_share:
            problems.append(
                f"method.average_rank={rank}: a budget or method.ratio determines the ranks; leave average_rank at its "
                "default"
            )
        problems += ranks.multiple_problems(self.rank_multiple)
        if self.alpha > 0 and self.importance == "uniform":
            problems.append(
                f"method.alpha={self.alpha}: has no effect with method.importance=uniform; use {' or '.join(KINDS)}"
            )
        if self.alpha < 0:
            problems.append(f"method.alpha={self.alpha} must be at least 0")
        if self.importance not in (*KINDS, "uniform"):
            problems.append(f"method.importance={self.importance} must be {', '.join(KINDS)} or uniform")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def _by_share(self) -> bool:
        """Whether a budget or a ratio determines the average rank."""
        return self.budget.is_given or self.ratio is not None

    @property
    def _does_nothing(self) -> bool:
        return self.average_rank is None and not self._by_share

    def check(self, facts: Facts) -> list[str]:
        cap = ranks.break_even(facts.hidden_size, facts.expert_width)
        least = 1 if self.rank_multiple == "auto" else int(self.rank_multiple)
        problems = []
        if facts.num_groups > 1 and self.alpha and self.importance != "uniform":
            problems.append(
                f"method.importance={self.importance}: the router selects among {facts.num_groups} groups of experts, "
                "for which the loss without one expert cannot be computed; use method.alpha=0"
            )
        automatic = ranks.automatic_rank(facts.hidden_size, facts.expert_width)
        average = automatic if self.average_rank == "auto" else self.average_rank
        if isinstance(average, int) and not least <= average < cap and not self._by_share:
            shown = f"auto ({average})" if self.average_rank == "auto" else average
            problems.append(
                f"method.average_rank={shown}: must be at least method.rank_multiple={least} and below {cap:.4g}, the "
                f"rank at which the factors of an expert of {facts.hidden_size} x {facts.expert_width} have as many "
                "parameters as the expert; use null to factorize nothing"
            )
        if least >= cap:
            problems.append(
                f"method.rank_multiple={least}: must be below {cap:.4g}; from that rank on, factors save no parameters"
            )
        return problems

    def key(self) -> Record:
        return {"method": "decompose", "version": 2, "importance": self.importance, "normalize": self.normalize}

    @property
    def left_open(self) -> str:
        even = not self.alpha or self.importance == "uniform"
        return "" if even else "the ranks of single experts, but not their mean"

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> Decompose:
        return self

    def outline(self, model: PreTrainedModel) -> list[Factorize]:
        """Return operations of the final sizes, see `Step.outline`. All experts count as equally important."""
        blocks = moe_blocks.sparse_blocks(model)
        if not blocks or self._does_nothing:
            return []
        importance = {layer: [1.0] * block.num_experts for layer, block in blocks.items()}
        return self._operations(self._ranks(model, importance, *_shape(blocks))[2])

    def search(self, context: SearchContext) -> tuple[list[Factorize], Record]:
        """Decide the ranks; see `Step.search`.

        Raises:
            UserError: even the lowest rank for all experts exceeds the budget.
        """
        started = time.perf_counter()
        model = context.model
        blocks = moe_blocks.sparse_blocks(model)
        if not blocks or self._does_nothing:
            return [], {**self.key(), "seconds": {}}
        shape = _shape(blocks)
        importance = self._importance(context, blocks)
        multiple, average, layer_ranks = self._ranks(model, importance, *shape)
        before = sum(ranks.parameters([None] * len(values), *shape) for values in layer_ranks.values())
        after = sum(ranks.parameters(values, *shape) for values in layer_ranks.values())
        original = parameters.parameter_counts(model.config).routed_experts
        return self._operations(layer_ranks), {
            **self.key(),
            **self.budget.settings(),
            "alpha": self.alpha,
            "rank_multiple": multiple,
            "whitening": self.whitening,
            "average_rank": average,
            "break_even": ranks.break_even(*shape),
            "importance_of_experts": {str(layer): list(values) for layer, values in importance.items()},
            "kept_of_retained": after / before,
            "kept_of_routed_experts": (routed_parameters(model) - before + after) / original,
            "seconds": {"ranks": time.perf_counter() - started},
        }

    def _operations(self, layer_ranks: dict[int, ranks.Ranks]) -> list[Factorize]:
        """Return one operation for each layer, except layers in which all experts stay dense."""
        return [
            Factorize(layer, dict.fromkeys(PROJECTIONS, tuple(values)), self.whitening)
            for layer, values in layer_ranks.items()
            if any(rank is not None for rank in values)
        ]

    def _ranks(
        self, model: PreTrainedModel, importance: Mapping[int, Sequence[float]], hidden_size: int, expert_width: int
    ) -> tuple[int, float, dict[int, ranks.Ranks]]:
        """Return the multiple to which ranks are rounded, their average, and the ranks of each layer."""
        shape = hidden_size, expert_width
        num_experts = sum(map(len, importance.values()))
        dense = ranks.parameters([None] * num_experts, *shape)
        if not self._by_share:
            average = ranks.automatic_rank(*shape) if self.average_rank == "auto" else self.average_rank
            assert isinstance(average, int)
            multiple = ranks.resolve_multiple(self.rank_multiple, *shape, average)
            allocated = {
                layer: ranks.allocate(values, average, *shape, self.alpha, multiple)
                for layer, values in importance.items()
            }
            return multiple, average, allocated
        if self.budget.is_given:
            kept = dense - self.budget.expert_parameters_to_remove(model)
        else:
            kept = int((self.ratio or 1.0) * dense)
        multiple = ranks.resolve_multiple(
            self.rank_multiple, *shape, kept / ranks.parameters([1] * num_experts, *shape)
        )
        least = ranks.parameters([multiple] * num_experts, *shape)
        if kept < least and self.budget.is_given:
            raise UserError(
                f"method: the budget requires more than factors can save; rank {multiple} for every expert reaches "
                f"{self.budget.strictest_ratio(model, dense - least)}"
            )
        return multiple, *ranks.allocate_budget(importance, kept, *shape, self.alpha, multiple)

    def _importance(
        self, context: SearchContext, blocks: Mapping[int, moe_blocks.SparseBlock]
    ) -> Mapping[int, Sequence[float]]:
        if self.importance == "uniform" or not self.alpha:
            return {layer: [1.0] * block.num_experts for layer, block in blocks.items()}
        title = "importance of the retained experts"
        return expert_importances(LayerwiseSearch(context), blocks, self.importance, self.normalize, title)


def _shape(blocks: Mapping[int, moe_blocks.SparseBlock]) -> tuple[int, int]:
    """Return the hidden size and the width of a routed expert."""
    _, hidden_size, expert_width = next(iter(blocks.values())).weights.down_EDF.shape
    return hidden_size, expert_width
