"""Prune the routed experts with the least saliency. Each expert is scored independently of the others."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.methods.search.allocation import drop_uniformly
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.expert_scores import (
    SALIENCIES,
    WITHOUT_TEXTS,
    inverse_aimer,
    score_experts,
    warn_of_few_tokens,
)
from recondense.methods.search.genetic import layer_seed
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.propagation import score_behind_pruned_layers
from recondense.methods.search.protection import raise_protected
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.models.layer_store import layer_store
from recondense.models.moe_blocks import SparseBlock
from recondense.operations import Prune


@dataclass(frozen=True)
class SaliencyPruning:
    """Prune the experts with the least saliency.

    Args:
        saliency: one of `SALIENCIES`. "frequency" and "routing_weight" are common baselines (arXiv 2402.14800, section
            4; arXiv 2412.00069, ablations). "reap" divides by the number of tokens that select an expert, so that rare
            but strong experts are retained; "expert_drop" does not. "man" and "msan" are "reap" without the routing
            weight, of the norm and of its square: the paper advises them if the model should stay good at everything,
            and criteria with routing weight and frequency if it should stay good at one task. "aimer" reads only the
            weights of the experts.
        allocation: "uniform" prunes the same number of experts in every layer. "global" prunes the least salient
            experts of all layers, but retains at least top_k in each. If the router selects groups first, every group
            loses the same number.
        budget: the parameters to remove.
        seed: the seed for "random".
        propagate: score a layer on the states of the model in which the layers below it are already pruned, as
            llm-compressor does by default; False scores all layers on the original.

    Raises:
        UserError: a setting is outside its range.

    Reference: REAP, arXiv 2510.13999, section 4; expert drop, arXiv 2406.02500, section 3; MAN and MSAN, arXiv
    2606.15716, whose full text could not be read (the names stand for the mean activation norm and the mean squared
    activation norm, "routed-token-averaged" and "gate-free"); AIMER, arXiv 2603.18492.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True

    saliency: str
    allocation: str = "uniform"
    budget: Budget = NO_BUDGET
    seed: int = 0
    propagate: bool = False

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.saliency not in SALIENCIES:
            problems.append(f"method.saliency={self.saliency} must be one of {', '.join(SALIENCIES)}")
        if self.allocation not in ("uniform", "global"):
            problems.append(f"method.allocation={self.allocation} must be uniform or global")
        if self.propagate and self.allocation == "global":
            problems.append(
                "method.propagate=true: allocation=global compares the scores of all layers before any is pruned; use "
                "method.allocation=uniform"
            )
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        return refuse_too_much(self.budget, facts)

    def key(self) -> Record:
        seed = {"seed": self.seed} if self.saliency == "random" else {}
        propagate = {"propagate": True} if self.propagate else {}
        return {"method": "saliency", "version": 2, "saliency": self.saliency, **seed, **propagate}

    @property
    def left_open(self) -> str:
        return "how many experts each layer loses, but not their total" if self.allocation == "global" else ""

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> SaliencyPruning:
        return replace(self, budget=self.budget.part(number, count))

    def outline(self, model: PreTrainedModel) -> list[Prune]:
        counts = {layer: block.num_experts for layer, block in moe_blocks.sparse_blocks(model).items()}
        return self._prunes(model, {layer: [0.0] * count for layer, count in counts.items()}, everywhere=True)

    def search(self, context: SearchContext) -> tuple[list[Prune], Record]:
        """Decide which experts to prune; see `Step.search`.

        Raises:
            UserError: the budget requires pruning more experts than possible.
        """
        started = time.perf_counter()
        model = context.model
        blocks = moe_blocks.sparse_blocks(model)
        if not blocks:
            return [], {**self.key(), "seconds": {}}
        if self.saliency in WITHOUT_TEXTS:
            records = {layer: {"saliency": self._score_alone(model, block)} for layer, block in blocks.items()}
        elif self.propagate:
            records = self._score_behind_pruned(context)
        else:

            def work(task: LayerTask) -> Record:
                traces = task.tape.trace(model, task.layer)
                return score_experts(self.saliency, task.tape, traces, blocks[task.layer])

            names = {layer: f"saliency-{layer:03d}" for layer in blocks}
            records = LayerwiseSearch(context).per_text(names, work, f"saliency: {self.saliency}")
        scores = {layer: list(record["saliency"]) for layer, record in records.items()}
        selected = {layer: record["selected"] for layer, record in records.items() if "selected" in record}
        kept = {layer: raise_protected(values, context.protected.get(layer, ())) for layer, values in scores.items()}
        return self._prunes(model, kept, everywhere=self.allocation == "uniform"), {
            **self.key(),
            **self.budget.settings(),
            "allocation": self.allocation,
            "saliencies": {str(layer): values for layer, values in scores.items()},
            **(warn_of_few_tokens(selected) if selected else {}),
            "seconds": {"saliency": time.perf_counter() - started},
        }

    def _score_alone(self, model: PreTrainedModel, block: SparseBlock) -> list[float]:
        """Score the experts of a layer without the calibration set."""
        if self.saliency == "random":
            draw = random.Random(layer_seed(self.seed, block.layer))
            return [draw.random() for _ in range(block.num_experts)]
        with layer_store(model).resident(block.layer):
            return inverse_aimer(block.weights)

    def _score_behind_pruned(self, context: SearchContext) -> dict[int, Record]:
        """Score the experts of every layer behind the layers pruned so far."""
        blocks = moe_blocks.sparse_blocks(context.model)
        numbers = self._rows_to_drop(context.model)

        def score(tape: Tape, traces: Sequence[LayerTrace], block: SparseBlock) -> Record:
            return score_experts(self.saliency, tape, traces, block)

        def decide(layer: int, record: Record) -> Prune | None:
            values = raise_protected(record["saliency"], context.protected.get(layer, ()))
            rows = _rows(values, blocks[layer].routing.num_groups)
            dropped = {expert for row in rows[: numbers[layer]] for expert in row}
            return Prune.from_dropped(layer, blocks[layer].num_experts, dropped) if dropped else None

        title = f"saliency: {self.saliency}, behind the layers pruned so far"
        return score_behind_pruned_layers(context, score, decide, title)[0]

    def _rows_to_drop(self, model: PreTrainedModel) -> dict[int, int]:
        """Return how many rows of experts every layer loses if all lose equally many; a row has one of each group.

        Raises:
            UserError: the layers cannot lose as many experts.
        """
        blocks = moe_blocks.sparse_blocks(model)
        routing = next(iter(blocks.values())).routing
        number = -(-self.budget.experts_to_drop(model, floor=routing.min_experts) // routing.num_groups)
        rows = {layer: block.num_experts // routing.num_groups for layer, block in blocks.items()}
        return drop_uniformly(number, rows, routing.min_experts // routing.num_groups)

    def _prunes(self, model: PreTrainedModel, scores: Mapping[int, list[float]], everywhere: bool) -> list[Prune]:
        """Prune as many experts as the budget requires, by their scores.

        Args:
            model: the model after the earlier steps.
            scores: the score of each expert, by layer.
            everywhere: prune the same number in every layer.
        """
        if not scores:
            return []
        routing = next(iter(moe_blocks.sparse_blocks(model).values())).routing
        rows = {layer: _rows(values, routing.num_groups) for layer, values in scores.items()}
        numbers = self._rows_to_drop(model)
        if not everywhere:
            floor = routing.min_experts // routing.num_groups
            numbers = _least_of_all(scores, rows, sum(numbers.values()), floor)
        dropped = {layer: {e for row in rows[layer][: numbers[layer]] for e in row} for layer in scores}
        return [
            Prune.from_dropped(layer, len(values), dropped[layer]) for layer, values in scores.items() if dropped[layer]
        ]


def refuse_too_much(budget: Budget, facts: Facts) -> list[str]:
    """Return a problem if the budget would leave fewer experts than a token selects."""
    ratio = budget.removed_expert_ratio
    most = 1 - facts.min_experts / facts.num_experts
    if ratio is None or ratio <= most + 1e-9:
        return []
    groups = "" if facts.num_groups == 1 else f", from {facts.top_groups} of {facts.num_groups} groups"
    return [
        f"method.removed_expert_ratio={ratio}: must be at most {most:.4g}, because each token selects {facts.top_k} of "
        f"the {facts.num_experts} experts of a layer{groups}"
    ]


def _rows(values: Sequence[float], num_groups: int) -> list[list[int]]:
    """Return rows of experts to prune together, one from each group so that groups stay equal; least salient first.

    Among equals, the lowest index comes first.
    """
    size = len(values) // num_groups
    groups = [sorted(range(first, first + size), key=lambda e: (values[e], e)) for first in range(0, len(values), size)]
    return [list(row) for row in zip(*groups, strict=True)]


def _least_of_all(
    scores: Mapping[int, Sequence[float]], rows: Mapping[int, Sequence[Sequence[int]]], number: int, floor: int
) -> dict[int, int]:
    """Return how many rows each layer loses if the least salient rows of all layers are pruned.

    Args:
        scores: the score of each expert, by layer.
        rows: the rows of each layer, least salient first.
        number: the number of rows to prune.
        floor: the rows that each layer retains.
    """
    order = sorted(
        (sum(scores[layer][expert] for expert in row), layer, place)
        for layer, layer_rows in rows.items()
        for place, row in enumerate(layer_rows[: max(0, len(layer_rows) - floor)])
    )
    numbers = dict.fromkeys(rows, 0)
    for _, layer, _ in order[:number]:
        numbers[layer] += 1
    return numbers
