"""Layer drop and block drop: decide which layers change the residual stream least (arXiv 2406.02500, section 3).

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.step import Record, SearchContext
from recondense.models import decoder, moe_blocks
from recondense.models.families import Facts
from recondense.models.parameters import count_parameters
from recondense.operations import Drop


@dataclass(frozen=True)
class Dropping:
    """Drop the MoE blocks (layer drop) or the decoder layers (block drop) that change the residual stream least.

    The similarity of a part is the mean cosine similarity between the residual stream before and after it, over the
    calibration tokens. As in the paper, it is measured once. The parts with the largest similarity are dropped, as many
    as the budget requires.

    Args:
        part: "moe" drops MoE blocks, "layer" drops decoder layers that have a MoE block. The first layer of each
            attention type is kept, because the key-value cache counts tokens with it.
        budget: the parameters to remove.

    Raises:
        UserError: a setting is outside its range.

    Reference: Demystifying the Compression of Mixture-of-Experts Through a Unified Framework, arXiv 2406.02500, 3.2.
    """

    condenses: ClassVar[bool] = False
    removes_layers: ClassVar[bool] = True
    needs_whole_experts: ClassVar[bool] = False
    repeatable: ClassVar[bool] = True
    left_open: ClassVar[str] = ""

    part: Literal["moe", "layer"]
    budget: Budget = NO_BUDGET

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.part not in ("moe", "layer"):
            problems.append(f"method.part={self.part} must be moe or layer")
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        if self.part == "layer" and facts.moe_layers == (0,):
            return [
                "method=block_drop: the only MoE layer is the first decoder layer, which cannot be dropped; use "
                "method=layer_drop"
            ]
        return []

    def key(self) -> Record:
        return {"method": "dropping", "version": 1, "part": self.part}

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> Dropping:
        return replace(self, budget=self.budget.part(number, count))

    def outline(self, model: PreTrainedModel) -> list[Drop]:
        return self._drops(model, dict.fromkeys(self._layers(model), 0.0))

    def search(self, context: SearchContext) -> tuple[list[Drop], Record]:
        """Decide in which layers to drop the part; see `Step.search`.

        Raises:
            UserError: dropping the part in all layers does not meet the budget.
        """
        started = time.perf_counter()
        names = {layer: f"similarity-{layer:03d}" for layer in self._layers(context.model)}

        def work(task: LayerTask) -> Record:
            return {"cosine": self._similarity(context.model, task.tape, task.layer)}

        records = LayerwiseSearch(context).per_text(names, work, "cosine similarity")
        similarity = {layer: float(record["cosine"]) for layer, record in records.items()}
        return self._drops(context.model, similarity, context.protected), {
            **self.key(),
            **self.budget.settings(),
            "similarity": {str(layer): value for layer, value in similarity.items()},
            "seconds": {"similarity": time.perf_counter() - started},
        }

    def _layers(self, model: PreTrainedModel) -> list[int]:
        """Return the layers in which the part can be dropped.

        Raises:
            UserError: dropping the part in all of them does not meet the budget.
        """
        kept = decoder.cache_layers(model.config) if self.part == "layer" else set()
        layers = [layer for layer in moe_blocks.sparse_blocks(model) if layer not in kept]
        most = sum(self._size(model, layer) for layer in layers)
        if self.budget.expert_parameters_to_remove(model) > most:
            raise UserError(
                f"method: the budget requires more than dropping layers can save; all {len(layers)} layers that can be "
                f"dropped reach {self.budget.strictest_ratio(model, most)}"
            )
        return layers

    def _drops(
        self, model: PreTrainedModel, similarity: Mapping[int, float], protected: Collection[int] = ()
    ) -> list[Drop]:
        """Drop as few layers as the budget allows, those with the largest similarity first.

        Args:
            model: the model after the earlier steps.
            similarity: the similarity by layer.
            protected: the layers with super experts, which come last.
        """
        operations: list[Drop] = []
        need = self.budget.expert_parameters_to_remove(model)
        for layer in sorted(similarity, key=lambda layer: (layer in protected, -similarity[layer], layer)):
            if need <= 0:
                break
            operations.append(Drop(layer, self.part))
            need -= self._size(model, layer)
        assert need <= 0
        return operations

    @torch.no_grad()
    def _similarity(self, model: PreTrainedModel, tape: Tape, layer: int) -> float:
        """Compute the mean cosine similarity between the residual stream before and after the part."""
        totals = []
        for index, trace in enumerate(tape.trace(model, layer)):
            after_TD = tape.real_tokens(index, tape.states[layer + 1][index]).float()
            if self.part == "moe":  # the residual stream between attention and the MoE block
                before_TD = after_TD - trace.output_TD.float()
            else:
                before_TD = tape.real_tokens(index, tape.states[layer][index]).float()
            totals.append(cosine_similarity(before_TD, after_TD, dim=1).double().sum())
        return float(tape.texts.total(totals)) / tape.num_tokens

    def _size(self, model: PreTrainedModel, layer: int) -> int:
        """Return the number of parameters that dropping the part of a layer removes, as the budget counts them."""
        if self.budget.removed_expert_ratio is not None:
            return count_parameters(moe_blocks.sparse_blocks(model)[layer].experts)
        if self.part == "layer":
            return count_parameters(decoder.decoder_layers(model)[layer])
        return count_parameters(moe_blocks.get_block(model, layer))
