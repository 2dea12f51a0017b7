"""MoNE: replace the experts that few tokens select and whose outputs vary little by constants (arXiv 2507.00390).

Legend: t tokens that select one expert, E routed experts, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
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
from recondense.methods.search.expert_scores import warn_of_few_tokens
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.protection import raise_protected
from recondense.methods.search.routing import routing_totals
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks, parameters
from recondense.models.families import Facts
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import expert_outputs
from recondense.operations import Constant


@dataclass(frozen=True)
class MoNE:
    """Replace the same number of experts of every layer by constants ("novices"): the means of their outputs.

    The experts with the least product of access frequency and output fluctuation are replaced. The frequency is the
    fraction of calibration tokens that select the expert; the fluctuation is the norm of the standard deviations of the
    D entries of its output over these tokens. The paper names the two metrics and gives the fluctuation; that they are
    multiplied is from the authors' code, which takes the mean routing weight for the frequency. A constant counts D
    parameters in the budget, so a little more experts are replaced than pruning would remove.

    Args:
        budget: the parameters to remove.

    Raises:
        UserError: a setting is outside its range.

    Reference: MoNE, arXiv 2507.00390.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False
    left_open: ClassVar[str] = ""

    budget: Budget = NO_BUDGET

    def __post_init__(self) -> None:
        if problems := self.budget.problems():
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        ratio = self.budget.removed_expert_ratio
        most = (1 - 1 / facts.num_experts) * (1 - 1 / (3 * facts.expert_width))
        if ratio is None or ratio <= most:
            return []
        return [
            f"method.removed_expert_ratio={ratio}: must be at most {most:.4g}, because at least one of the "
            f"{facts.num_experts} experts of a layer remains, and the constants of the others count"
        ]

    def key(self) -> Record:
        return {"method": "mone", "version": 1}

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> MoNE:
        return self

    def outline(self, model: PreTrainedModel) -> list[Constant]:
        blocks = moe_blocks.sparse_blocks(model)
        return self._constants(model, {layer: [0.0] * block.num_experts for layer, block in blocks.items()})

    def search(self, context: SearchContext) -> tuple[list[Constant], Record]:
        """Decide which experts become constants; see `Step.search`.

        Raises:
            UserError: the budget requires removing more than possible.
        """
        started = time.perf_counter()
        blocks = moe_blocks.sparse_blocks(context.model)
        names = {layer: f"fluctuation-{layer:03d}" for layer in blocks}

        def work(task: LayerTask) -> Record:
            return _score(blocks[task.layer], task.tape, task.tape.trace(context.model, task.layer))

        records = LayerwiseSearch(context).per_text(names, work, "fluctuation of experts")
        scores = {layer: list(record["saliency"]) for layer, record in records.items()}
        kept = {layer: raise_protected(values, context.protected.get(layer, ())) for layer, values in scores.items()}
        return self._constants(context.model, kept), {
            **self.key(),
            **self.budget.settings(),
            "saliencies": {str(layer): values for layer, values in scores.items()},
            **warn_of_few_tokens({layer: record["selected"] for layer, record in records.items()}),
            "seconds": {"fluctuation": time.perf_counter() - started},
        }

    def _constants(self, model: PreTrainedModel, scores: dict[int, list[float]]) -> list[Constant]:
        """Replace as many experts as the budget requires, those with the least score first.

        Raises:
            UserError: the budget requires removing more than possible.
        """
        saved = parameters.present_expert(model) - model.config.hidden_size
        total = math.ceil(self.budget.expert_parameters_to_remove(model) / saved)
        numbers = drop_uniformly(total, {layer: len(values) for layer, values in scores.items()}, 1)
        order = {layer: sorted(range(len(values)), key=lambda e: (values[e], e)) for layer, values in scores.items()}
        return [Constant(layer, tuple(sorted(order[layer][number:]))) for layer, number in numbers.items() if number]


@torch.no_grad()
def _score(block: SparseBlock, tape: Tape, traces: Sequence[LayerTrace]) -> Record:
    """Return the score of each expert of a layer, and how many calibration tokens select it."""
    counts_E, _ = routing_totals(tape, traces, block.num_experts)
    sums_E2D = tape.texts.total(_moments(block, trace) for trace in traces)
    sum_ED, square_ED = sums_E2D.unbind(dim=1)
    number_E1 = counts_E.double()[:, None]
    variance_ED = (square_ED - sum_ED.square() / number_E1.clamp_min(1)) / (number_E1 - 1).clamp_min(1)
    fluctuation_E = variance_ED.clamp_min(0).sum(dim=1).sqrt()
    scores_E = counts_E / tape.num_tokens * fluctuation_E
    return {"saliency": scores_E.tolist(), "selected": counts_E.tolist()}


def _moments(block: SparseBlock, trace: LayerTrace) -> Tensor:
    """Sum the outputs of each expert and their squares over the tokens of a text batch that select it; (E, 2, D)."""
    moments = []
    for expert in range(block.num_experts):
        x_tD = trace.x_TD[(trace.top_k_index_TK == expert).any(dim=1)]
        y_tD = expert_outputs(x_tD, block.weights, [expert])[0].double()
        moments.append(torch.stack((y_tD.sum(dim=0), y_tD.square().sum(dim=0))))
    return torch.stack(moments)
