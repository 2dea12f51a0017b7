"""Layer drop and block drop: remove what changes the residual stream least (arXiv 2406.02500, section 3).

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.search.budget import Budget
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.models import decoder, views
from recondense.models.families import Facts
from recondense.models.parameters import total_parameters
from recondense.operations import Drop


@dataclass(frozen=True)
class Dropping:
    """Drop the MoE blocks ("moe": layer drop) or whole decoder layers ("block": block drop) of highest similarity.

    Similarity is the mean cosine, over calibration tokens, between the residual stream before and after the part. One
    pass decides, as in the paper; the fewest that keep the budget go.

    Args:
        part: "moe" or "block". Whole layers are those with a sparse MoE block, and never the first of an attention
            type: a cache counts the tokens by it.
        removed_expert_ratio, memory_ratio: the budget.

    Raises:
        UserError: a setting outside its range.

    Reference: Demystifying the Compression of Mixture-of-Experts Through a Unified Framework, arXiv 2406.02500, 3.2.
    """

    part: Literal["moe", "block"]
    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None

    def __post_init__(self) -> None:
        problems = self.budget.problems()
        if self.part not in ("moe", "block"):
            problems.append(f"method.part={self.part} must be moe or block")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, self.memory_ratio)

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        if self.part == "block" and facts.moe_layers == (0,):
            return ["method=block_drop: the only MoE layer is the first decoder layer, which cannot go; use layer_drop"]
        return []

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; the budget is not part of it."""
        return {"method": "dropping", "version": 1, "part": self.part}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return ""

    def outline(self, model: PreTrainedModel) -> list[Drop]:
        """Operations of the sizes that the search reaches, from shapes alone; which layers they change is made up."""
        return self._drops(model, dict.fromkeys(self._layers(model), 0.0))

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Drop], dict[str, Any]]:
        """Decide which layers lose the part; the model is left bit-identical.

        Returns:
            operations, the most similar first, and all similarities.

        Raises:
            UserError: not even dropping all of them keeps the budget.
        """
        started = time.perf_counter()
        layers = self._layers(model)
        names = {layer: f"similarity-{layer:03d}" for layer in layers}

        def work(tape: Tape, layer: int, *_: Any) -> dict[str, Any]:
            return {"cosine": self._similarity(model, tape, layer)}

        found, _ = layerwise(model, tape, cache, names, work, "cosine similarity", by_text=True)
        similarity = {layer: float(record["cosine"]) for layer, record in found.items()}
        return self._drops(model, similarity), {
            **self.key(),
            **self.budget.settings(),
            "similarity": {str(layer): value for layer, value in similarity.items()},
            "seconds": {"similarity": time.perf_counter() - started},
        }

    def _layers(self, model: PreTrainedModel) -> list[int]:
        """Those that can lose the part.

        Raises:
            UserError: not even dropping all of them keeps the budget.
        """
        never = decoder.cache_layers(model.config) if self.part == "block" else set()
        layers = [layer for layer in views.sparse_blocks(model) if layer not in never]
        most = sum(self._size(model, layer) for layer in layers)
        if self.budget.expert_parameters_to_remove(model) > most:
            raise UserError(
                f"method: the budget asks for more than dropping layers can save; all {len(layers)} that can go give "
                f"{self.budget.at_best(model, most)}"
            )
        return layers

    def _drops(self, model: PreTrainedModel, similarity: Mapping[int, float]) -> list[Drop]:
        """The fewest that keep the budget, the most similar first."""
        operations: list[Drop] = []
        left = self.budget.expert_parameters_to_remove(model)
        for layer in sorted(similarity, key=lambda layer: (-similarity[layer], layer)):
            if left <= 0:
                break
            operations.append(Drop(layer, self.part))
            left -= self._size(model, layer)
        assert left <= 0
        return operations

    @torch.no_grad()
    def _similarity(self, model: PreTrainedModel, tape: Tape, layer: int) -> float:
        totals = []
        for index, trace in enumerate(tape.trace(model, layer)):
            after_TD = tape.real_tokens(index, tape.states[layer + 1][index]).float()
            if self.part == "moe":  # the residual stream between attention and the MoE block
                before_TD = after_TD - trace.output_TD.float()
            else:
                before_TD = tape.real_tokens(index, tape.states[layer][index]).float()
            totals.append(_cosine(before_TD, after_TD).double().sum())
        return float(tape.texts.total(totals)) / tape.num_tokens

    def _size(self, model: PreTrainedModel, layer: int) -> int:
        """What the budget counts of what goes with a layer."""
        if self.budget.removed_expert_ratio is not None:
            return total_parameters(views.sparse_blocks(model)[layer].experts)
        whole = self.part == "block"
        return total_parameters(decoder.decoder_layers(model)[layer] if whole else views.get_block(model, layer))


def _cosine(one_TD: Tensor, other_TD: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one_TD, other_TD, dim=1)
