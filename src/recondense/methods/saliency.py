"""Prune the routed experts with the least saliency. Each expert is scored independently of the others.

Legend: T tokens, t tokens that select one expert, E routed experts, K top-k, D hidden size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.methods.search.allocation import drop_uniformly
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.genetic import layer_seed
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.routing import routing_totals
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import expert_outputs
from recondense.operations import Prune

SALIENCIES = {
    "random": "a random number",
    "frequency": "the number of calibration tokens that select the expert",
    "routing_weight": "the sum of its routing weights",
    "reap": "the mean of routing weight x norm of the expert's output, over the tokens that select it",
    "expert_drop": "the sum of routing weight x norm of the expert's output",
}


@dataclass(frozen=True)
class SaliencyPruning:
    """Prune the experts with the least saliency.

    Args:
        saliency: one of `SALIENCIES`. "frequency" and "routing_weight" are common baselines (arXiv 2402.14800, section
            4; arXiv 2412.00069, ablations). "reap" divides by the number of tokens that select an expert, so that rare
            but strong experts are retained; "expert_drop" does not.
        allocation: "uniform" prunes the same number of experts in every layer. "global" prunes the least salient
            experts of all layers, but retains at least top_k in each. If the router selects groups first, every group
            loses the same number.
        budget: the parameters to remove.
        seed: the seed for "random".

    Raises:
        UserError: a setting is outside its range.

    Reference: REAP, arXiv 2510.13999, section 4; expert drop, arXiv 2406.02500, section 3.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True

    saliency: str
    allocation: str = "uniform"
    budget: Budget = NO_BUDGET
    seed: int = 0

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.saliency not in SALIENCIES:
            problems.append(f"method.saliency={self.saliency} must be one of {', '.join(SALIENCIES)}")
        if self.allocation not in ("uniform", "global"):
            problems.append(f"method.allocation={self.allocation} must be uniform or global")
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        return refuse_too_much(self.budget, facts)

    def key(self) -> Record:
        seed = {"seed": self.seed} if self.saliency == "random" else {}
        return {"method": "saliency", "version": 1, "saliency": self.saliency, **seed}

    @property
    def left_open(self) -> str:
        return "how many experts each layer loses, but not their total" if self.allocation == "global" else ""

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
        if self.saliency == "random":
            scores = {layer: self._draw(block) for layer, block in blocks.items()}
        else:

            def work(task: LayerTask) -> Record:
                return {"saliency": self._score(model, task.tape, blocks[task.layer])}

            names = {layer: f"saliency-{layer:03d}" for layer in blocks}
            records = LayerwiseSearch(context).per_text(names, work, f"saliency: {self.saliency}")
            scores = {layer: list(record["saliency"]) for layer, record in records.items()}
        return self._prunes(model, scores, everywhere=self.allocation == "uniform"), {
            **self.key(),
            **self.budget.settings(),
            "allocation": self.allocation,
            "saliencies": {str(layer): values for layer, values in scores.items()},
            "seconds": {"saliency": time.perf_counter() - started},
        }

    def _prunes(self, model: PreTrainedModel, scores: Mapping[int, list[float]], everywhere: bool) -> list[Prune]:
        """Prune as many experts as the budget requires, by their scores.

        Args:
            model: the model after the earlier steps.
            scores: the score of each expert, by layer.
            everywhere: prune the same number in every layer.
        """
        blocks = moe_blocks.sparse_blocks(model)
        if not blocks:
            return []
        routing = next(iter(blocks.values())).routing
        rows = {layer: _rows(values, routing.num_groups) for layer, values in scores.items()}
        sums = {
            layer: [sum(scores[layer][expert] for expert in row) for row in layer_rows]
            for layer, layer_rows in rows.items()
        }
        number = -(-self.budget.experts_to_drop(model) // routing.num_groups)
        dropped_rows = _least(sums, number, routing.min_experts // routing.num_groups, everywhere)
        dropped = {layer: {expert for row in dropped_rows[layer] for expert in rows[layer][row]} for layer in rows}
        return [
            Prune.from_dropped(layer, len(values), dropped[layer]) for layer, values in scores.items() if dropped[layer]
        ]

    def _draw(self, block: SparseBlock) -> list[float]:
        draw = random.Random(layer_seed(self.seed, block.layer))
        return [draw.random() for _ in range(block.num_experts)]

    def _score(self, model: PreTrainedModel, tape: Tape, block: SparseBlock) -> list[float]:
        traces = tape.trace(model, block.layer)
        counts_E, weights_E = routing_totals(tape, traces, block.num_experts)
        if self.saliency in ("frequency", "routing_weight"):
            return [float(value) for value in (counts_E if self.saliency == "frequency" else weights_E)]
        norms_E = tape.texts.total(_weighted_norms(block, trace) for trace in traces)
        return (norms_E / counts_E.clamp_min(1) if self.saliency == "reap" else norms_E).tolist()


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


def _rows(values: list[float], num_groups: int) -> list[list[int]]:
    """Return rows of experts to prune together, one from each group so that groups stay equal; least salient first."""
    size = len(values) // num_groups
    groups = [sorted(range(first, first + size), key=lambda e: (values[e], e)) for first in range(0, len(values), size)]
    return [list(row) for row in zip(*groups, strict=True)]


@torch.no_grad()
def _weighted_norms(block: SparseBlock, trace: LayerTrace) -> Tensor:
    """Compute Σ weight·‖E(x)‖₂ over the tokens of a text batch that select each expert; (E,) in fp64."""
    norms = []
    for expert in range(block.num_experts):
        selected_TK = trace.top_k_index_TK == expert
        rows = selected_TK.any(dim=1)
        weight_t = (trace.top_k_weights_TK * selected_TK).sum(dim=1)[rows].double()
        norm_t = expert_outputs(trace.x_TD[rows], block.weights, [expert])[0].double().norm(dim=1)
        norms.append((weight_t * norm_t).sum())
    return torch.stack(norms)


def _least(scores: Mapping[int, list[float]], number: int, floor: int, everywhere: bool) -> dict[int, set[int]]:
    """Choose the experts with the least saliency; among equals, the lowest index first.

    Raises:
        UserError: the layers cannot lose as many experts.
    """
    room = drop_uniformly(number, {layer: len(values) for layer, values in scores.items()}, floor)
    if not everywhere:
        room = {layer: len(values) - floor for layer, values in scores.items()}
    order = sorted((value, layer, expert) for layer, values in scores.items() for expert, value in enumerate(values))
    dropped: dict[int, set[int]] = {layer: set() for layer in scores}
    remaining = number
    for _, layer, expert in order:
        if remaining and len(dropped[layer]) < room[layer]:
            dropped[layer].add(expert)
            remaining -= 1
    return dropped
