"""Decide which similar experts to merge: MC-SMoE's grouping and HC-SMoE's clustering.

Legend: T tokens, E routed experts, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.methods.search.allocation import drop_uniformly
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.routing import routing_totals
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import expert_outputs
from recondense.operations import Merge


@dataclass(frozen=True)
class Merging:
    """Merge experts in groups, weighted by how often they are selected. The router keeps its rows.

    Args:
        grouping: "router_logits" (MC-SMoE): the most frequently selected experts of all layers are dominant. Every
            other expert joins the dominant expert of its layer with the most similar router logits, and its neurons are
            permuted to match. "expert_outputs" (HC-SMoE): average-linkage clustering of the experts' mean outputs over
            all calibration tokens, with the same number of groups in every layer.
        budget: the parameters to remove.

    Raises:
        UserError: a setting is outside its range.

    Reference: MC-SMoE, arXiv 2310.01334, section 3.2 (only the merging, without the compression that follows); HC-SMoE,
    arXiv 2410.08589, section 3.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False

    grouping: str
    budget: Budget = NO_BUDGET

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.grouping not in ("router_logits", "expert_outputs"):
            problems.append(f"method.grouping={self.grouping} must be router_logits or expert_outputs")
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        return refuse_too_few_groups(self.budget, facts)

    def key(self) -> Record:
        return {"method": "merging", "version": 2, "grouping": self.grouping}

    @property
    def left_open(self) -> str:
        return "how many groups each layer has, but not their total" if self.grouping == "router_logits" else ""

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> Merging:
        return self

    def outline(self, model: PreTrainedModel) -> list[Merge]:
        return outline_merges(model, self.budget)

    def search(self, context: SearchContext) -> tuple[list[Merge], Record]:
        """Decide the groups; see `Step.search`.

        Raises:
            UserError: the budget requires removing more experts than possible.
        """
        started = time.perf_counter()
        blocks = moe_blocks.sparse_blocks(context.model)
        names = {layer: f"features-{layer:03d}" for layer in blocks}

        def work(task: LayerTask) -> Record:
            return self._features(blocks[task.layer], task.tape, task.tape.trace(context.model, task.layer))

        records = LayerwiseSearch(context).per_text(names, work, "similarity of experts")
        counts = {layer: list(record["counts"]) for layer, record in records.items()}
        num_dropped = self.budget.experts_to_drop(context.model, router_rows=False, floor=1)
        numbers = self._numbers(counts, num_dropped, context.protected)
        operations = []
        for layer, number in numbers.items():
            if number < blocks[layer].num_experts:
                features = torch.tensor(records[layer]["features"])
                protected = context.protected.get(layer, frozenset())
                operations.append(self._merge(layer, features, counts[layer], number, protected))
        return operations, {
            **self.key(),
            **self.budget.settings(),
            "selected": {str(layer): values for layer, values in counts.items()},
            "seconds": {"grouping": time.perf_counter() - started},
        }

    @torch.no_grad()
    def _features(self, block: SparseBlock, tape: Tape, traces: Sequence[LayerTrace]) -> Record:
        """Return how often each expert is selected, and for each expert a row of features to compare it by.

        The rows are the similarities of its router logits to those of all experts (E, E), or its mean output (E, D).
        """
        counts_E, _ = routing_totals(tape, traces, block.num_experts)
        if self.grouping == "router_logits":
            features = router_similarity(block, tape, traces)
        else:
            features = mean_outputs(block, tape, traces)
        return {"counts": counts_E.double().tolist(), "features": features.tolist()}

    def _numbers(
        self, counts: dict[int, list[float]], num_dropped: int, protected: Mapping[int, frozenset[int]]
    ) -> dict[int, int]:
        """Return the number of groups of each layer, one of them for each protected expert.

        Raises:
            UserError: more experts should be removed than possible.
        """
        experts = {layer: len(values) for layer, values in counts.items()}
        even = even_groups(experts, num_dropped)
        if self.grouping == "expert_outputs":
            return even
        # The protected experts and the most selected other expert of each layer, then the most selected of all layers.
        free = {
            layer: sorted((v for e, v in enumerate(values) if e not in protected.get(layer, ())), reverse=True)
            for layer, values in counts.items()
        }
        dominant = {layer: min(experts[layer], experts[layer] - len(free[layer]) + 1) for layer in counts}
        ranked = sorted(
            ((value, layer) for layer, values in free.items() for value in values[1:]),
            key=lambda pair: (-pair[0], pair[1]),
        )
        remaining = sum(experts.values()) - num_dropped - sum(dominant.values())
        if remaining < 0:  # too few groups for the protected experts
            return self._numbers(counts, num_dropped, {})
        for _, layer in ranked[:remaining]:
            dominant[layer] += 1
        return dominant

    def _merge(
        self, layer: int, features: Tensor, counts: Sequence[float], number: int, protected: Collection[int]
    ) -> Merge:
        """Group the experts of a layer; a protected expert is a group of its own, unless there are too few groups."""
        alone = sorted(protected) if len(protected) < number else []
        number -= len(alone)
        order = sorted((expert for expert in range(len(counts)) if expert not in alone), key=lambda e: (-counts[e], e))
        if self.grouping == "router_logits":
            leaders = order[:number]
            groups = {leader: [leader] for leader in leaders}
            for expert in order[number:]:
                nearest = max(leaders, key=lambda leader: (float(features[expert, leader]), -leader))
                groups[nearest].append(expert)
            partition = list(groups.values())
        else:
            # Cut to exactly this number of groups: a cut by height would also join groups at equal distances.
            free = sorted(order)
            cut = cut_tree(linkage(features[free].numpy(), "average"), n_clusters=number)[:, 0]
            labels = dict(zip(free, cut, strict=True))
            partition = [[expert for expert in order if labels[expert] == label] for label in sorted(set(cut))]
        partition = sorted([*partition, *([expert] for expert in alone)])
        weights = [shares_of([counts[expert] for expert in group]) for group in partition]
        align = self.grouping == "router_logits"
        return Merge(layer, tuple(map(tuple, partition)), tuple(weights), align)


def refuse_too_few_groups(budget: Budget, facts: Facts) -> list[str]:
    """Return a problem if the budget would leave no expert in a layer."""
    most = 1 - 1 / facts.num_experts
    ratio = budget.removed_expert_ratio
    if ratio is None or ratio <= most:
        return []
    return [
        f"method.removed_expert_ratio={ratio}: must be at most {most:.4g}, because at least one of the "
        f"{facts.num_experts} experts of a layer remains"
    ]


def outline_merges(model: PreTrainedModel, budget: Budget) -> list[Merge]:
    """Return operations with the right numbers of groups, the same in every layer, and placeholders for the groups."""
    experts = {layer: block.num_experts for layer, block in moe_blocks.sparse_blocks(model).items()}
    even = even_groups(experts, budget.experts_to_drop(model, router_rows=False, floor=1))
    operations = []
    for layer, count in experts.items():
        if even[layer] < count:
            groups = (tuple(range(count - even[layer] + 1)), *((e,) for e in range(count - even[layer] + 1, count)))
            operations.append(Merge(layer, groups, tuple(shares_of([1.0] * len(group)) for group in groups)))
    return operations


def router_similarity(block: SparseBlock, tape: Tape, traces: Sequence[LayerTrace]) -> Tensor:
    """Return the cosine similarities (E, E) of the experts' router logits over all calibration tokens."""
    gram_EE = tape.texts.total(_gram(block.router(trace.x_TD)[0].double()) for trace in traces)
    return cosines(gram_EE)


def cosines(gram_EE: Tensor) -> Tensor:
    """Return cosine similarities from inner products."""
    norms_E = gram_EE.diagonal().sqrt().clamp_min(1e-150)
    return gram_EE / (norms_E[:, None] * norms_E)


def mean_outputs(block: SparseBlock, tape: Tape, traces: Sequence[LayerTrace]) -> Tensor:
    """Return each expert's mean output (E, D) over all calibration tokens, whether they select it or not."""
    experts = range(block.num_experts)
    sums = (
        torch.stack([expert_outputs(trace.x_TD, block.weights, [e])[0].double().sum(dim=0) for e in experts])
        for trace in traces
    )
    return tape.texts.total(sums) / tape.num_tokens


def _gram(logits_TE: Tensor) -> Tensor:
    return logits_TE.T @ logits_TE


def even_groups(experts: dict[int, int], num_dropped: int) -> dict[int, int]:
    """Return the number of groups of each layer if every layer loses the same number of experts.

    Raises:
        UserError: more experts should be removed than possible.
    """
    return {layer: experts[layer] - number for layer, number in drop_uniformly(num_dropped, experts, 1).items()}


def shares_of(counts: Sequence[float]) -> tuple[float, ...]:
    """Return weights in proportion to the counts; equal weights if no expert was ever selected."""
    total = sum(counts)
    return tuple(value / total for value in counts) if total else tuple(1 / len(counts) for _ in counts)
