"""Merge similar experts, weighted by how often they are used: MC-SMoE's grouping and HC-SMoE's clustering.

Legend: T tokens, E routed experts, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.methods.search.allocation import uniform
from recondense.methods.search.budget import Budget
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.methods.search.routing import routing_totals
from recondense.models import views
from recondense.models.blocks import expert_outputs
from recondense.models.families import Facts
from recondense.models.views import SparseBlock
from recondense.operations import Merge


@dataclass(frozen=True)
class Merging:
    """Merge experts into groups; the router keeps its rows, and each group computes the weighted mean of its experts.

    Args:
        grouping: "router_logits" (MC-SMoE): the experts used most, counted over all layers, dominate; every other joins
            the dominant one of its layer whose router logits are most like its own, its rows permuted to match.
            "expert_outputs" (HC-SMoE): average-linkage clustering of the mean outputs over all calibration tokens, as
            many groups in every layer.
        removed_expert_ratio, memory_ratio: the budget.

    Raises:
        UserError: a setting outside its range.

    Reference: MC-SMoE, arXiv 2310.01334, section 3.2 (its merging, not its compression after it); HC-SMoE, arXiv
    2410.08589, section 3.
    """

    grouping: str
    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.grouping not in ("router_logits", "expert_outputs"):
            problems.append(f"method.grouping={self.grouping} must be router_logits or expert_outputs")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, self.memory_ratio)

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        most = 1 - 1 / facts.num_experts
        if (self.budget.removed_expert_ratio or 0) > most:
            return [
                f"method.removed_expert_ratio={self.removed_expert_ratio}: one of {facts.num_experts} experts a layer "
                f"stays at least: at most {most:.4g} can go"
            ]
        return []

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; the budget is not part of it."""
        return {"method": "merging", "version": 2, "grouping": self.grouping}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return "how many groups each layer keeps; not their total" if self.grouping == "router_logits" else ""

    def outline(self, model: PreTrainedModel) -> list[Merge]:
        """Operations of the sizes that the search reaches, from shapes alone: as many groups in every layer.

        Which experts join is made up.
        """
        experts = {layer: block.num_experts for layer, block in views.sparse_blocks(model).items()}
        even = _even(experts, self.budget.experts_to_drop(model, router_rows=False))
        operations = []
        for layer, count in experts.items():
            if even[layer] < count:
                groups = (tuple(range(count - even[layer] + 1)), *((e,) for e in range(count - even[layer] + 1, count)))
                operations.append(Merge(layer, groups, tuple(_shares([1.0] * len(group)) for group in groups)))
        return operations

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Merge], dict[str, Any]]:
        """Decide the groups; the model is left bit-identical.

        Returns:
            operations in layer order, and how often each expert was selected.

        Raises:
            UserError: more experts are to go than can.
        """
        started = time.perf_counter()
        blocks = views.sparse_blocks(model)
        names = {layer: f"features-{layer:03d}" for layer in blocks}

        def work(tape: Tape, layer: int, *_: Any) -> dict[str, Any]:
            return self._features(blocks[layer], tape, tape.trace(model, layer))

        found, _ = layerwise(model, tape, cache, names, work, "similarity of experts", by_text=True)
        counts = {layer: list(entry["counts"]) for layer, entry in found.items()}
        gone = self.budget.experts_to_drop(model, router_rows=False)
        numbers = self._numbers(counts, gone)
        operations = []
        for layer, number in numbers.items():
            if number < blocks[layer].num_experts:
                features = torch.tensor(found[layer]["features"])
                operations.append(self._merge(layer, features, counts[layer], number))
        return operations, {
            **self.key(),
            **self.budget.settings(),
            "selected": {str(layer): values for layer, values in counts.items()},
            "seconds": {"grouping": time.perf_counter() - started},
        }

    @torch.no_grad()
    def _features(self, block: SparseBlock, tape: Tape, traces: Sequence[LayerTrace]) -> dict[str, Any]:
        """What experts are compared by, one row each: similarity of router logits, or mean outputs (E, D)."""
        counts_E, _ = routing_totals(tape, traces, block.num_experts)
        if self.grouping == "router_logits":
            gram_EE = tape.texts.total(_gram(block.router(trace.x_TD)[0].double()) for trace in traces)
            norms_E = gram_EE.diagonal().sqrt().clamp_min(1e-150)
            features = gram_EE / (norms_E[:, None] * norms_E)
        else:
            experts = range(block.num_experts)
            sums = (
                torch.stack([expert_outputs(trace.x_TD, block.weights, [e])[0].double().sum(dim=0) for e in experts])
                for trace in traces
            )
            features = tape.texts.total(sums) / tape.num_tokens
        return {"counts": counts_E.double().tolist(), "features": features.tolist()}

    def _numbers(self, counts: dict[int, list[float]], gone: int) -> dict[int, int]:
        """Groups of each layer."""
        experts = {layer: len(values) for layer, values in counts.items()}
        even = _even(experts, gone)  # or its error
        if self.grouping == "expert_outputs":
            return even
        # The best used of each layer, then the best used of all: frequencies compare across layers.
        dominant = {layer: 1 for layer in counts}
        ranked = sorted(
            ((value, layer) for layer, values in counts.items() for value in sorted(values, reverse=True)[1:]),
            key=lambda pair: (-pair[0], pair[1]),
        )
        for _, layer in ranked[: sum(experts.values()) - gone - len(experts)]:
            dominant[layer] += 1
        return dominant

    def _merge(self, layer: int, features: Tensor, counts: Sequence[float], number: int) -> Merge:
        order = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
        if self.grouping == "router_logits":
            leaders = order[:number]
            groups = {leader: [leader] for leader in leaders}
            for expert in order[number:]:
                nearest = max(leaders, key=lambda leader: (float(features[expert, leader]), -leader))
                groups[nearest].append(expert)
            parted = list(groups.values())
        else:
            # Exactly so many groups: a cut by height would join equal ones further.
            labels = cut_tree(linkage(features.numpy(), "average"), n_clusters=number)[:, 0]
            parted = [[expert for expert in order if labels[expert] == label] for label in sorted(set(labels))]
        parted.sort()
        weights = [_shares([counts[expert] for expert in group]) for group in parted]
        align = self.grouping == "router_logits"
        return Merge(layer, tuple(map(tuple, parted)), tuple(weights), align)


def _gram(logits_TE: Tensor) -> Tensor:
    return logits_TE.T @ logits_TE


def _even(experts: dict[int, int], gone: int) -> dict[int, int]:
    """Groups of each layer, where every layer loses as many experts.

    Raises:
        UserError: more are to go than can.
    """
    return {layer: experts[layer] - lost for layer, lost in uniform(gone, experts, 1).items()}


def _shares(counts: Sequence[float]) -> tuple[float, ...]:
    """Frequencies as weights; equal ones where nobody was ever selected."""
    total = sum(counts)
    return tuple(value / total for value in counts) if total else tuple(1 / len(counts) for _ in counts)
