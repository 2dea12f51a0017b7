"""Keep the most important experts untouched and merge all others: SlimQwen's partial preservation (arXiv 2605.08738).

Legend: E routed experts, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.methods.merging import (
    cosines,
    even_groups,
    mean_outputs,
    outline_merges,
    refuse_too_few_groups,
    router_similarity,
    shares_of,
)
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.expert_scores import SALIENCIES, WITHOUT_TEXTS, score_experts, warn_of_few_tokens
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.protection import raise_protected
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.models.moe_blocks import SparseBlock
from recondense.operations import Merge

CHOICES = tuple(name for name in SALIENCIES if name not in WITHOUT_TEXTS)


@dataclass(frozen=True)
class HalfMerging:
    """Of the experts that a layer shall have, keep half untouched, and merge all remaining experts into the other half.

    In a layer that shall have n experts, the n // 2 most salient ones stay as they are. The next n - n // 2 are the
    centers of groups. Every other expert joins the most similar center, its neurons are permuted to match those of the
    center, and the group becomes the mean of its experts, weighted by how many calibration tokens select each. The
    router keeps its rows, and each row selects a group. All layers have the same number of groups.

    The paper's text could not be read beyond its summary: that half of the target experts are kept and the others are
    merged. The saliency, the similarity, the weights and the permutation were chosen here, as in MC-SMoE.

    Args:
        saliency: one of `CHOICES`, see `SaliencyPruning`.
        similarity: "router_logits", the cosine similarity of router logits over the calibration tokens, or
            "expert_outputs", that of the experts' mean outputs.
        budget: the parameters to remove.

    Raises:
        UserError: a setting is outside its range.

    Reference: SlimQwen, arXiv 2605.08738, partial-preservation expert merging.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False
    left_open: ClassVar[str] = ""

    saliency: str = "reap"
    similarity: str = "router_logits"
    budget: Budget = NO_BUDGET

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.saliency not in CHOICES:
            problems.append(f"method.saliency={self.saliency} must be one of {', '.join(CHOICES)}")
        if self.similarity not in ("router_logits", "expert_outputs"):
            problems.append(f"method.similarity={self.similarity} must be router_logits or expert_outputs")
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        return refuse_too_few_groups(self.budget, facts)

    def key(self) -> Record:
        return {"method": "half_merging", "version": 1, "saliency": self.saliency, "similarity": self.similarity}

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> HalfMerging:
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
        names = {layer: f"half-merging-{layer:03d}" for layer in blocks}

        def work(task: LayerTask) -> Record:
            return self._score(blocks[task.layer], task.tape, task.tape.trace(context.model, task.layer))

        records = LayerwiseSearch(context).per_text(names, work, "saliency and similarity of experts")
        experts = {layer: block.num_experts for layer, block in blocks.items()}
        numbers = even_groups(experts, self.budget.experts_to_drop(context.model, router_rows=False, floor=1))
        operations = [
            _merge(layer, records[layer], number, context.protected.get(layer, frozenset()))
            for layer, number in numbers.items()
            if number < experts[layer]
        ]
        return operations, {
            **self.key(),
            **self.budget.settings(),
            "saliencies": {str(layer): list(record["saliency"]) for layer, record in records.items()},
            **warn_of_few_tokens({layer: record["selected"] for layer, record in records.items()}),
            "seconds": {"grouping": time.perf_counter() - started},
        }

    @torch.no_grad()
    def _score(self, block: SparseBlock, tape: Tape, traces: Sequence[LayerTrace]) -> Record:
        """Return the saliency of each expert, how often it is selected, and its similarities to the others (E, E)."""
        if self.similarity == "router_logits":
            similarity_EE = router_similarity(block, tape, traces)
        else:
            outputs_ED = mean_outputs(block, tape, traces)
            similarity_EE = cosines(outputs_ED @ outputs_ED.T)
        return {**score_experts(self.saliency, tape, traces, block), "similarity": similarity_EE.tolist()}


def _merge(layer: int, record: Record, number: int, protected: Collection[int]) -> Merge:
    """Make the groups of a layer.

    Args:
        layer: decoder-layer index.
        record: the scores of `HalfMerging._score`.
        number: the number of groups.
        protected: experts that stay untouched, unless there are too few groups.
    """
    similarity_EE, counts = record["similarity"], record["selected"]
    saliency = raise_protected(record["saliency"], protected)
    order = sorted(range(len(saliency)), key=lambda expert: (-saliency[expert], expert))
    untouched = number // 2
    if len(protected) < number:
        untouched = max(untouched, len(protected))
    centers = order[untouched:number]
    groups = {expert: [expert] for expert in order[:number]}
    for expert in order[number:]:
        nearest = max(centers, key=lambda center: (similarity_EE[expert][center], -center))
        groups[nearest].append(expert)
    partition = sorted(groups.values())
    weights = tuple(shares_of([counts[expert] for expert in group]) for group in partition)
    return Merge(layer, tuple(map(tuple, partition)), weights, align=True)
