"""Choose the experts for the options of a layer: by a search, or placeholders if only the sizes matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from recondense.methods.cdmoe import CDMoE
from recondense.methods.search.cdmoe_search import CondenseSearch
from recondense.methods.search.channel_scores import channel_scores
from recondense.methods.search.expert_sets import search_expert_sets
from recondense.methods.search.genetic import Genetic
from recondense.methods.search.importance import expert_importances
from recondense.methods.search.layerwise import LayerwiseSearch
from recondense.methods.search.widths import retained_channels
from recondense.methods.step import SearchContext
from recondense.models.moe_blocks import SparseBlock
from recondense.operations import Condense

Blocks = Mapping[int, SparseBlock]
Numbers = Mapping[int, Sequence[int]]  # by layer: the numbers of experts that its options drop


class Choices(Protocol):
    """Chooses the experts that the options of a layer retain or drop."""

    def prepare(self, blocks: Blocks, condensing: Sequence[CDMoE], numbers: Numbers) -> None:
        """Search for everything that the other methods return."""

    def importance(self, block: SparseBlock) -> list[float]:
        """Return the importance of each expert."""

    def condense(self, block: SparseBlock, condensing: CDMoE, further: int = 0) -> Condense | None:
        """Return the operation that condenses the layer; None if it cannot be condensed, see `problem`.

        Args:
            block: the layer.
            condensing: the step that condenses it.
            further: the number of experts that it retains in addition to those of the step; at most `room`.
        """

    def room(self, block: SparseBlock, condensing: CDMoE) -> int:
        """Return the number of experts that the condensed layer can retain in addition to those of the step."""

    def problem(self, block: SparseBlock, condensing: CDMoE) -> str:
        """Return why the layer cannot be condensed; empty if it can."""

    def dropped(self, block: SparseBlock, number: int) -> Sequence[int]:
        """Return the experts to drop if the layer loses `number` experts."""

    def channels(self, block: SparseBlock, widths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return the channels that each expert keeps, given the number of them."""


class MadeUpChoices:
    """Placeholder choices of the right sizes: all experts are equally important; the first are retained or dropped."""

    def prepare(self, blocks: Blocks, condensing: Sequence[CDMoE], numbers: Numbers) -> None:
        pass

    def importance(self, block: SparseBlock) -> list[float]:
        return [1.0] * block.num_experts

    def condense(self, block: SparseBlock, condensing: CDMoE, further: int = 0) -> Condense | None:
        if condensing.num_experts > block.num_experts:  # an earlier round has pruned the layer
            return None
        return condensing.outline_layer(block, further)

    def room(self, block: SparseBlock, condensing: CDMoE) -> int:
        return block.num_experts - condensing.num_experts

    def problem(self, block: SparseBlock, condensing: CDMoE) -> str:
        return ""

    def dropped(self, block: SparseBlock, number: int) -> Sequence[int]:
        return range(number)

    def channels(self, block: SparseBlock, widths: Sequence[int]) -> Sequence[Sequence[int]]:
        return [range(width) for width in widths]


class SearchedChoices:
    """Choices made by the searches of CD-MoE and MoE-I².

    Args:
        context: the model, its tape and the cache.
        genetic, seed: the settings and the seed of the search for the experts to drop.
        normalize: whether to normalize the importance; see `expert_importance`.
        score: the score of channels; see `channel_scores`. None if no option narrows.
    """

    def __init__(
        self, context: SearchContext, genetic: Genetic, seed: int, normalize: bool, score: str | None = None
    ) -> None:
        self.context = context
        self.genetic = genetic
        self.seed = seed
        self.normalize = normalize
        self.score = score
        self._channels: dict[int, Tensor] = {}
        self._importance: dict[int, list[float]] = {}
        self._condensing: dict[int, CondenseSearch] = {}  # by the number of retained experts
        self._dropped: dict[tuple[int, int], Sequence[int]] = {}  # by layer and number

    def prepare(self, blocks: Blocks, condensing: Sequence[CDMoE], numbers: Numbers) -> None:
        search = LayerwiseSearch(self.context)
        self._importance = expert_importances(search, blocks, "layer_output", self.normalize, "expert importance")
        for step in condensing:
            settings = step.num_experts, step.shared_gate, step.expert_search, step.coefficient_max_length
            experts = CondenseSearch(self.context, *settings)
            experts.search_experts(list(blocks), allow_too_few=True)
            self._condensing[step.num_experts] = experts
        for number in sorted({number for layer_numbers in numbers.values() for number in layer_numbers}):
            layers = {layer: number for layer, layer_numbers in numbers.items() if number in layer_numbers}
            title = f"sets of {number} experts"
            sets = search_expert_sets(search, blocks, layers, self.genetic, self.seed, title)
            self._dropped |= {(layer, number): best[0] for layer, (best, *_) in sets.items()}

        if self.score is not None:
            self._channels = channel_scores(self.context, blocks, self.score)

    def importance(self, block: SparseBlock) -> list[float]:
        return self._importance[block.layer]

    def condense(self, block: SparseBlock, condensing: CDMoE, further: int = 0) -> Condense | None:
        search = self._condensing[condensing.num_experts]
        if self.problem(block, condensing):
            return None
        search.lengthen({block.layer: condensing.num_experts + further})
        return search.operation(block.layer, condensing.num_experts + further)

    def room(self, block: SparseBlock, condensing: CDMoE) -> int:
        return self._condensing[condensing.num_experts].selected(block.layer) - condensing.num_experts

    def problem(self, block: SparseBlock, condensing: CDMoE) -> str:
        search = self._condensing[condensing.num_experts]
        if problem := search.problem(block.layer):
            return problem
        experts = condensing.num_experts
        return f"layer {block.layer}: {experts} experts would lose super experts" * search.loses_protected(block.layer)

    def dropped(self, block: SparseBlock, number: int) -> Sequence[int]:
        return self._dropped[block.layer, number]

    def channels(self, block: SparseBlock, widths: Sequence[int]) -> Sequence[Sequence[int]]:
        return retained_channels(self._channels[block.layer], list(widths))
