"""Remove the channels of experts that the model needs least.

Legend: D hidden size, F expert width, E routed experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.channel_scores import SCORES, channel_scores
from recondense.methods.search.widths import (
    ALLOCATIONS,
    allocate,
    multiple_problems,
    narrowest,
    require_whole_rows,
    resolve_multiple,
    retained_channels,
    width_problems,
)
from recondense.methods.step import Record, SearchContext
from recondense.models import families, moe_blocks, parameters
from recondense.models.families import Facts
from recondense.operations import Narrow


@dataclass(frozen=True)
class Narrowing:
    """Remove channels of all routed experts: rows of gate_proj and up_proj, and the same columns of down_proj.

    Args:
        score: the score of a channel; see `channel_scores`. "heapr" needs a backward pass through the model, "norms"
            only activations.
        allocation: "uniform" gives all experts of all layers one width, which the family's own config can express.
            "layer" gives the experts of a layer one width, "global" gives each expert its own: of all layers or
            experts, those get narrower that lose the least score per channel.
        width: the width of all experts, instead of a budget.
        width_multiple: widths are rounded to multiples of this; see `widths.resolve_multiple` for "auto".
        compensate: solve for down_proj by least squares, so that each expert's outputs change little.
        budget: the parameters to remove.

    Raises:
        UserError: a setting is outside its range.

    Reference: HEAPr, arXiv 2509.22299 (ICLR 2026), whose pruning is score=heapr with allocation=global and
    compensate=false.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True

    score: str = "heapr"
    allocation: str = "uniform"
    width: int | None = None
    width_multiple: int | str = "auto"
    compensate: bool = True
    budget: Budget = NO_BUDGET

    def __post_init__(self) -> None:
        problems = self.budget.problems(required=self.width is None)
        if self.score not in SCORES:
            problems.append(f"method.score={self.score} must be {' or '.join(SCORES)}")
        if self.allocation not in ALLOCATIONS:
            problems.append(f"method.allocation={self.allocation} must be one of {', '.join(ALLOCATIONS)}")
        problems += width_problems(self.width)
        if self.width is not None and self.budget.is_given:
            budget = ", ".join(f"method.{name}={value}" for name, value in self.budget.settings().items() if value)
            problems.append(f"method.width={self.width} and {budget} are both set; set one of them to null")
        if self.width is not None and self.allocation != "uniform":
            problems.append(f"method.width={self.width}: needs method.allocation=uniform; otherwise set a budget")
        problems += multiple_problems(self.width_multiple)
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        problems = []
        if self.width is not None and self.width > facts.expert_width:
            problems.append(f"method.width={self.width}: must be at most {facts.expert_width}, the width of an expert")
        if self.width_multiple != "auto" and int(self.width_multiple) > facts.expert_width:
            problems.append(
                f"method.width_multiple={self.width_multiple}: must be at most {facts.expert_width}, the width of an "
                "expert"
            )
        return problems

    def key(self) -> Record:
        return {"method": "narrowing", "version": 1, "score": self.score}

    @property
    def left_open(self) -> str:
        what = {"layer": "each layer's experts keep", "global": "each expert keeps"}.get(self.allocation)
        return f"how many channels {what}, but not their total" if what else ""

    @property
    def repeatable(self) -> bool:
        return self.allocation == "uniform"  # experts of different widths cannot be narrowed again

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> Narrowing | None:
        """Return the step for one round, see `Step.for_round`. The widths of earlier rounds are rounded up.

        The multiple is that of the original's width in every round, also if it is "auto".
        """
        full = families.facts(model.config).expert_width
        multiple = resolve_multiple(self.width_multiple, full)
        if self.width is None:
            return replace(self, width_multiple=multiple, budget=self.budget.part(number, count))
        exact = full - (full - self.width) * number / count
        width = self.width if number == count else math.ceil(exact / multiple) * multiple
        return replace(self, width_multiple=multiple, width=width) if width < full else None

    def outline(self, model: PreTrainedModel) -> list[Narrow]:
        """Return operations of the final sizes, see `Step.outline`. All experts count as equally important."""
        blocks = moe_blocks.sparse_blocks(model)
        scores = {
            layer: torch.arange(block.widths[0], dtype=torch.float32).expand(block.num_experts, -1)
            for layer, block in blocks.items()
        }
        return self._operations(scores, self._widths(model, scores))

    def search(self, context: SearchContext) -> tuple[list[Narrow], Record]:
        """Decide the channels; see `Step.search`.

        Raises:
            UserError: even the smallest width of all experts exceeds the budget.
        """
        started = time.perf_counter()
        model = context.model
        blocks = moe_blocks.sparse_blocks(model)
        if not blocks:
            return [], {**self.key(), "seconds": {}}
        self.outline(model)  # before anything is computed, check that the budget can be met
        scores = channel_scores(context, blocks, self.score)
        widths = self._widths(model, scores)
        return self._operations(scores, widths), {
            **self.key(),
            **self.budget.settings(),
            "allocation": self.allocation,
            "width_multiple": self._multiple(scores),
            "compensate": self.compensate,
            "widths": {str(layer): values for layer, values in widths.items()},
            "removed_score": {str(layer): _removed_share(scores[layer], widths[layer]) for layer in scores},
            "seconds": {"scores": time.perf_counter() - started},
        }

    def _operations(self, scores: Mapping[int, Tensor], widths: Mapping[int, list[int]]) -> list[Narrow]:
        """Return one operation for each layer in which an expert loses channels."""
        return [
            Narrow.from_channels(layer, retained_channels(scores_EF, widths[layer]), self.compensate)
            for layer, scores_EF in scores.items()
            if min(widths[layer]) < scores_EF.shape[1]
        ]

    def _multiple(self, scores: Mapping[int, Tensor]) -> int:
        return resolve_multiple(self.width_multiple, max(scores_EF.shape[1] for scores_EF in scores.values()))

    def _widths(self, model: PreTrainedModel, scores: Mapping[int, Tensor]) -> dict[int, list[int]]:
        """Return the width of each expert, by layer.

        Raises:
            UserError: even the smallest width of all experts exceeds the budget.
        """
        if not scores:
            return {}
        block = next(iter(moe_blocks.sparse_blocks(model).values()))
        size, multiple = parameters.channel_size(block), self._multiple(scores)
        unit, name = (multiple, "width_multiple") if self.width is None else (self.width, "width")
        require_whole_rows(name, unit, block.weights.down_EDF.dtype)
        if self.width is not None:
            return {layer: [min(self.width, values.shape[1])] * len(values) for layer, values in scores.items()}
        need = self.budget.expert_parameters_to_remove(model)
        most = sum(len(values) * (values.shape[1] - narrowest(values.shape[1], multiple)) for values in scores.values())
        if need > most * size:
            raise UserError(
                f"method: the budget requires more than narrowing can save; width {multiple} for every expert reaches "
                f"{self.budget.strictest_ratio(model, most * size)}"
            )
        return allocate(scores, math.ceil(need / size), multiple, self.allocation)


def _removed_share(scores_EF: Tensor, widths: list[int]) -> float:
    """Return the sum of the removed channels' scores as a fraction of the layer's."""
    sums_EF = scores_EF.double().sort(dim=1).values.cumsum(dim=1)
    removed = sum(
        float(sums_F[len(sums_F) - width - 1])
        for sums_F, width in zip(sums_EF, widths, strict=True)
        if width < len(sums_F)
    )
    return removed / max(float(sums_EF[:, -1].sum()), 1e-300)
