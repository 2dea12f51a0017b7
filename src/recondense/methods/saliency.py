"""Prune the routed experts of least saliency, each scored on its own: the baselines of a search.

Legend: T tokens, E routed experts, K top-k, D hidden size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.methods.search.allocation import uniform
from recondense.methods.search.budget import Budget
from recondense.methods.search.genetic import layer_seed
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.methods.search.routing import routing_totals
from recondense.models import views
from recondense.models.blocks import expert_outputs
from recondense.models.families import Facts
from recondense.models.views import SparseBlock
from recondense.operations import Prune

SALIENCIES = {
    "random": "drawn from the seed",
    "frequency": "how many calibration tokens select the expert",
    "routing_weight": "the sum of its routing weights",
    "reap": "the mean of routing weight x norm of the expert's output, over the tokens that select it",
    "expert_drop": "the sum of routing weight x norm of the expert's output",
}


@dataclass(frozen=True)
class SaliencyPruning:
    """Drop the experts of least saliency.

    Args:
        saliency: one of `SALIENCIES`. "frequency" and "routing_weight" are the usual baselines (arXiv 2402.14800,
            section 4; arXiv 2412.00069, ablations); "reap" divides by the tokens that select an expert, so that rare
            but strong experts stay; "expert_drop" does not.
        allocation: "uniform": every layer loses as many; "global": the least salient of all layers, none below top_k.
            Of a router that selects groups first, every group loses as many: its least salient.
        removed_expert_ratio, memory_ratio: the budget.
        seed: of "random".

    Raises:
        UserError: a setting outside its range.

    Reference: REAP, arXiv 2510.13999, section 4; expert drop, arXiv 2406.02500, section 3.
    """

    saliency: str
    allocation: str = "uniform"
    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.saliency not in SALIENCIES:
            problems.append(f"method.saliency={self.saliency} must be one of {', '.join(SALIENCIES)}")
        if self.allocation not in ("uniform", "global"):
            problems.append(f"method.allocation={self.allocation} must be uniform or global")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, self.memory_ratio)

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        return too_much(self.budget.removed_expert_ratio, facts)

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration."""
        seed = {"seed": self.seed} if self.saliency == "random" else {}
        return {"method": "saliency", "version": 1, "saliency": self.saliency, **seed}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return "how many experts each layer loses; not their total" if self.allocation == "global" else ""

    def outline(self, model: PreTrainedModel) -> list[Prune]:
        """Operations of the sizes that the search reaches, from shapes alone: the first experts of every layer go."""
        counts = {layer: block.num_experts for layer, block in views.sparse_blocks(model).items()}
        return self._prunes(model, {layer: [0.0] * count for layer, count in counts.items()}, everywhere=True)

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Prune], dict[str, Any]]:
        """Decide which experts go; the model is left bit-identical.

        Returns:
            operations in layer order, and every expert's saliency.

        Raises:
            UserError: more experts are to go than can.
        """
        started = time.perf_counter()
        blocks = views.sparse_blocks(model)
        if not blocks:
            return [], {**self.key(), "seconds": {}}
        if self.saliency == "random":
            scores = {layer: self._drawn(block) for layer, block in blocks.items()}
        else:
            names = {layer: f"saliency-{layer:03d}" for layer in blocks}

            def work(tape: Tape, layer: int, *_: Any) -> dict[str, Any]:
                return {"saliency": self._scores(model, tape, blocks[layer])}

            found, _ = layerwise(model, tape, cache, names, work, f"saliency: {self.saliency}", by_text=True)
            scores = {layer: list(record["saliency"]) for layer, record in found.items()}
        return self._prunes(model, scores, everywhere=self.allocation == "uniform"), {
            **self.key(),
            **self.budget.settings(),
            "allocation": self.allocation,
            "saliencies": {str(layer): values for layer, values in scores.items()},
            "seconds": {"saliency": time.perf_counter() - started},
        }

    def _prunes(self, model: PreTrainedModel, scores: Mapping[int, list[float]], everywhere: bool) -> list[Prune]:
        """The budget's number of experts, by their scores.

        Args:
            everywhere: the same number of every layer.
        """
        blocks = views.sparse_blocks(model)
        if not blocks:
            return []
        routing = next(iter(blocks.values())).routing
        rows = {layer: _rows(values, routing.num_groups) for layer, values in scores.items()}
        sums = {layer: [sum(scores[layer][expert] for expert in row) for row in own] for layer, own in rows.items()}
        number = -(-self.budget.experts_to_drop(model) // routing.num_groups)
        gone = _least(sums, number, routing.least_experts // routing.num_groups, everywhere)
        dropped = {layer: {expert for row in gone[layer] for expert in rows[layer][row]} for layer in rows}
        return [Prune.without(layer, len(values), dropped[layer]) for layer, values in scores.items() if dropped[layer]]

    def _drawn(self, block: SparseBlock) -> list[float]:
        draw = random.Random(layer_seed(self.seed, block.layer))
        return [draw.random() for _ in range(block.num_experts)]

    def _scores(self, model: PreTrainedModel, tape: Tape, block: SparseBlock) -> list[float]:
        traces = tape.trace(model, block.layer)
        counts_E, weights_E = routing_totals(tape, traces, block.num_experts)
        if self.saliency in ("frequency", "routing_weight"):
            return [float(value) for value in (counts_E if self.saliency == "frequency" else weights_E)]
        norms_E = tape.texts.total(_weighted_norms(block, trace) for trace in traces)
        return (norms_E / counts_E.clamp_min(1) if self.saliency == "reap" else norms_E).tolist()


def too_much(removed_expert_ratio: float | None, facts: Facts) -> list[str]:
    """A budget that would leave fewer experts than a token selects."""
    most = 1 - facts.least_experts / facts.num_experts
    if removed_expert_ratio is None or removed_expert_ratio <= most + 1e-9:
        return []
    return [
        f"method.removed_expert_ratio={removed_expert_ratio}: {facts.num_experts} experts a layer, of which each token "
        f"selects {facts.top_k}{_of_groups(facts)}: at most {most:.4g} can go"
    ]


def _of_groups(facts: Facts) -> str:
    return "" if facts.num_groups == 1 else f" out of {facts.top_groups} of {facts.num_groups} groups"


def _rows(values: list[float], num_groups: int) -> list[list[int]]:
    """Experts that go together, least salient first: one of each group, so that groups stay equal."""
    size = len(values) // num_groups
    groups = [sorted(range(first, first + size), key=lambda e: (values[e], e)) for first in range(0, len(values), size)]
    return [list(row) for row in zip(*groups, strict=True)]


@torch.no_grad()
def _weighted_norms(block: SparseBlock, trace: LayerTrace) -> Tensor:
    """Σ weight·‖E(x)‖₂ over the tokens of a block of texts that select each expert; (E,) in fp64."""
    norms = []
    for expert in range(block.num_experts):
        chosen_TK = trace.top_k_index_TK == expert
        rows = chosen_TK.any(dim=1)
        weight_t = (trace.top_k_weights_TK * chosen_TK).sum(dim=1)[rows].double()
        norm_t = expert_outputs(trace.x_TD[rows], block.weights, [expert])[0].double().norm(dim=1)
        norms.append((weight_t * norm_t).sum())
    return torch.stack(norms)


def _least(scores: Mapping[int, list[float]], number: int, floor: int, everywhere: bool) -> dict[int, set[int]]:
    """The experts of least saliency, lowest index first among equals."""
    room = uniform(number, {layer: len(values) for layer, values in scores.items()}, floor)  # or its error
    if not everywhere:
        room = {layer: len(values) - floor for layer, values in scores.items()}
    order = sorted((value, layer, expert) for layer, values in scores.items() for expert, value in enumerate(values))
    dropped: dict[int, set[int]] = {layer: set() for layer in scores}
    left = number
    for _, layer, expert in order:
        if left and len(dropped[layer]) < room[layer]:
            dropped[layer].add(expert)
            left -= 1
    return dropped
