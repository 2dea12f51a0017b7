"""What may be done to one MoE layer, as operations and as a block to try: for the combination of both papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.cdmoe import CDMoE, TooFewSelected, condensed, condensing_saves
from recondense.methods.cdmoe import Search as CondenseSearch
from recondense.methods.search import ranks
from recondense.methods.search.genetic import Genetic, best_sets, layer_seed
from recondense.methods.search.importance import expert_importances
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.methods.search.leave_out import Replay
from recondense.models import parameters
from recondense.models import views as views_module
from recondense.models.factors import Factors, factors
from recondense.models.low_rank import LowRankExperts
from recondense.models.views import SparseBlock
from recondense.operations import Condense, Factorize, Operation, Prune

Numbers = Mapping[int, Sequence[int]]  # by layer
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class OptionSettings:
    """Which options a layer has, and how their experts and ranks are chosen; the fields are those of `Combined`."""

    num_experts: Sequence[int]
    prune_ratios: Sequence[float]
    kept_ratios: Sequence[float]
    alpha: float
    rank_multiple: int | str
    shared_gate: str
    expert_search: str
    normalize: bool
    genetic: Genetic
    seed: int


@dataclass(frozen=True)
class Option:
    """One thing that may be done to one layer.

    Args:
        name: in words.
        operations: none leaves the layer alone.
        saved: parameters that go, of the whole model.
        saved_routed: parameters that go, of the routed experts.
    """

    name: str
    operations: tuple[Operation, ...] = ()
    saved: int = 0
    saved_routed: int = 0


class Choices(Protocol):
    """What stands in an option beside its size."""

    def prepare(self, views: Mapping[int, SparseBlock], condensing: Sequence[CDMoE], numbers: Numbers) -> None: ...

    def importance(self, view: SparseBlock) -> list[float]: ...

    def condense(self, view: SparseBlock, condensing: CDMoE) -> Condense: ...

    def dropped(self, view: SparseBlock, number: int) -> Sequence[int]: ...


class MadeUp:
    """Choices for sizes alone: all experts are as important, the first ones are kept or go."""

    def prepare(self, views: Mapping[int, SparseBlock], condensing: Sequence[CDMoE], numbers: Numbers) -> None:
        pass

    def importance(self, view: SparseBlock) -> list[float]:
        return [1.0] * view.num_experts

    def condense(self, view: SparseBlock, condensing: CDMoE) -> Condense:
        return condensing.shape(view)

    def dropped(self, view: SparseBlock, number: int) -> Sequence[int]:
        return range(number)


@dataclass(frozen=True)
class Searched:
    """Choices by the methods' own searches.

    Args:
        settings: which options there are.
        model: left bit-identical.
        tape: its hidden states on the calibration set.
        cache: orders, importances and sets found so far.
        max_scratch_bytes: bound on temporary tensors.
    """

    settings: OptionSettings
    model: PreTrainedModel
    tape: Callable[[], Tape]
    cache: Cache
    max_scratch_bytes: int
    _importance: dict[int, list[float]] = field(default_factory=dict)
    _condensed: dict[tuple[int, int], Condense | str] = field(default_factory=dict)  # a text: why there is none
    _dropped: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def prepare(self, views: Mapping[int, SparseBlock], condensing: Sequence[CDMoE], numbers: Numbers) -> None:
        """Search all that will be asked for, layer by layer; what the cache has is not searched again."""
        how = "layer_output", self.settings.normalize, self.max_scratch_bytes
        found, _ = expert_importances(self.model, self.tape, self.cache, views, *how, "expert importance")
        self._importance.update(found)
        for step in condensing:
            search = CondenseSearch(step, self.model, self.tape, self.cache, self.max_scratch_bytes)
            failed: dict[int, str] = {}
            search.experts(list(views), failed)
            for layer in views:
                ready = layer in search.orders
                self._condensed[layer, step.num_experts] = search.operation(layer) if ready else failed[layer]
        for number in sorted({number for each in numbers.values() for number in each}):
            layers = [layer for layer, each in numbers.items() if number in each]
            self._search_sets(views, layers, number)

    def _search_sets(self, views: Mapping[int, SparseBlock], layers: Sequence[int], number: int) -> None:
        def work(tape: Tape, layer: int, *_: Any) -> dict[str, Any]:
            replay = Replay(self.model, tape, views[layer], number, self.max_scratch_bytes)
            seed = layer_seed(self.settings.seed, layer)
            best = best_sets(replay.errors, views[layer].num_experts, number, self.settings.genetic, seed)[0]
            return {"dropped": list(best[0]), "error": best[1] / max(replay.output_norm, 1e-300)}

        names = {layer: f"set-{layer:03d}-{number:03d}" for layer in layers}
        found, _ = layerwise(self.model, self.tape, self.cache, names, work, f"sets of {number} experts")
        self._dropped.update({(layer, number): list(record["dropped"]) for layer, record in found.items()})

    def importance(self, view: SparseBlock) -> list[float]:
        return self._importance[view.layer]

    def condense(self, view: SparseBlock, condensing: CDMoE) -> Condense:
        found = self._condensed[view.layer, condensing.num_experts]
        if isinstance(found, str):
            raise TooFewSelected(found)
        return found

    def dropped(self, view: SparseBlock, number: int) -> Sequence[int]:
        return self._dropped[view.layer, number]


class Options:
    """Every option of every MoE layer.

    Args:
        settings: which options there are.
        model: left bit-identical.
        choices: searched, or made up where only sizes are wanted.
    """

    def __init__(self, settings: OptionSettings, model: PreTrainedModel, choices: Choices) -> None:
        self.settings = settings
        self.choices = choices
        self.blocks = views_module.sparse_blocks(model)
        self.importance: dict[int, list[float]] = {}
        self.of: dict[int, list[Option]] = {}
        self.left_out: dict[int, list[str]] = {}  # why a layer lacks an option
        self._factors: dict[tuple[int, int, str], Factors] = {}
        numbers = {layer: [number for number in self._numbers(layer) if number] for layer in self.blocks}
        choices.prepare(self.blocks, [self._condensing(count) for count in settings.num_experts], numbers)
        for layer, view in self.blocks.items():
            self.importance[layer] = choices.importance(view)
            self.of[layer] = [Option("as it is"), *self._condensed(layer), *self._pruned_and_factorized(layer)]

    def block(self, layer: int, option: Option) -> nn.Module | None:
        """The layer's block under an option, to try it; None leaves it as it is. Unchanged experts are not copied."""
        view = self.blocks[layer]
        retained = tuple(range(view.num_experts))
        made: nn.Module | None = None
        for operation in option.operations:
            if isinstance(operation, Condense):
                return condensed(view, operation)
            if isinstance(operation, Prune):
                retained = operation.retained
                made = views_module.masked_block(view, retained)
            if isinstance(operation, Factorize):
                return views_module.with_parts(
                    view.module,
                    router=views_module.pruned_router(view, retained),
                    experts=self._low_rank(view, retained, operation),
                )
        return made

    def forget(self) -> None:
        """Let go of the factors of the layer that was tried."""
        self._factors.clear()

    def widened(self, choice: dict[int, Option], spare: int) -> dict[int, Option]:
        """The choice with what the budget has left given to ranks, as evenly as steps of ranks allow."""
        low = {
            layer: option
            for layer, option in choice.items()
            if option.operations and isinstance(option.operations[-1], Factorize)
        }
        if not low or spare <= 0:
            return choice
        found = dict(choice)
        kept = {layer: self._kept(layer, option) for layer, option in low.items()}
        importance = {layer: self._own_importance(layer, option) for layer, option in low.items()}
        _, hidden_size, expert_width = next(iter(self.blocks.values())).weights.down_EDF.shape
        total = sum(kept.values())
        for layer, option in low.items():
            budget = kept[layer] + int(spare * kept[layer] / total)
            left = budget / ranks.parameters([1] * len(importance[layer]), hidden_size, expert_width)
            multiple = ranks.multiple_of(self.settings.rank_multiple, hidden_size, expert_width, left)
            how = hidden_size, expert_width, self.settings.alpha, multiple
            _, given = ranks.within({layer: importance[layer]}, budget, *how)
            found[layer] = self._factorized(layer, option.operations[:-1], given[layer])
        return found

    def records(self) -> dict[str, Any]:
        """For the plan: every option with what it saves."""
        return {
            "options": {
                str(layer): [[each.name, each.saved, each.saved_routed] for each in options]
                for layer, options in self.of.items()
            },
            **({"left_out": {str(layer): why for layer, why in self.left_out.items()}} if self.left_out else {}),
        }

    def _condensing(self, count: int) -> CDMoE:
        return CDMoE(count, "all", self.settings.shared_gate, self.settings.expert_search)

    def _numbers(self, layer: int) -> list[int]:
        """How many experts the options of a layer drop."""
        view = self.blocks[layer]
        most = view.num_experts - view.routing.top_k
        return [min(round(ratio * view.num_experts), most) for ratio in (0.0, *self.settings.prune_ratios)]

    def _condensed(self, layer: int) -> list[Option]:
        found = []
        for count in self.settings.num_experts:
            condensing, view = self._condensing(count), self.blocks[layer]
            saved = condensing_saves(view, condensing, routed=False)
            routed = condensing_saves(view, condensing, routed=True)
            try:
                found.append(Option(f"condensed to {count}", (self.choices.condense(view, condensing),), saved, routed))
            except TooFewSelected as error:
                self.left_out.setdefault(layer, []).append(str(error))
        return found

    def _pruned_and_factorized(self, layer: int) -> list[Option]:
        view = self.blocks[layer]
        _, hidden_size, expert_width = view.weights.down_EDF.shape
        found = []
        for number in self._numbers(layer):
            gone = self.choices.dropped(view, number) if number else ()
            prune = (Prune.without(layer, view.num_experts, gone),) if number else ()
            if prune:
                found.append(self._saving(layer, f"pruned by {number}", prune, 0))
            for kept in self.settings.kept_ratios:
                average = max(1.0, kept * ranks.break_even(hidden_size, expert_width))
                multiple = ranks.multiple_of(self.settings.rank_multiple, hidden_size, expert_width, average)
                own = self._own_importance(layer, Option("", prune))
                given = ranks.allocate(own, average, hidden_size, expert_width, self.settings.alpha, multiple)
                found.append(self._factorized(layer, prune, given))
        return list({each.name: each for each in found}.values())

    def _factorized(self, layer: int, prune: tuple[Operation, ...], given: ranks.Ranks) -> Option:
        low = [rank for rank in given if rank is not None]
        _, hidden_size, expert_width = self.blocks[layer].weights.down_EDF.shape
        lost = ranks.parameters([None] * len(given), hidden_size, expert_width)
        lost -= ranks.parameters(given, hidden_size, expert_width)
        name = f"{len(given)} experts, mean rank {sum(low) / max(1, len(low)):.4g}"
        ranks_of = dict.fromkeys(PROJECTIONS, tuple(given))
        return self._saving(layer, name, (*prune, Factorize(layer, ranks_of)), lost)

    def _saving(self, layer: int, name: str, operations: tuple[Operation, ...], factors_save: int) -> Option:
        view = self.blocks[layer]
        gone = sum(view.num_experts - len(each.retained) for each in operations if isinstance(each, Prune))
        routed = gone * parameters.expert_size(view) + factors_save
        return Option(name, operations, routed + gone * parameters.router_row_size(view), routed)

    def _own_importance(self, layer: int, option: Option) -> list[float]:
        """Of the experts that an option retains."""
        retained = next((each.retained for each in option.operations if isinstance(each, Prune)), None)
        values = self.importance[layer]
        return values if retained is None else [values[expert] for expert in retained]

    def _kept(self, layer: int, option: Option) -> int:
        """Parameters of the experts under an option that factorizes."""
        _, hidden_size, expert_width = self.blocks[layer].weights.down_EDF.shape
        operation = option.operations[-1]
        assert isinstance(operation, Factorize)
        return ranks.parameters(operation.ranks["gate_proj"], hidden_size, expert_width)

    def _most_rank(self, layer: int) -> int:
        """No expert's rank is above it; what is kept of factors while a layer's options are tried."""
        _, hidden_size, expert_width = self.blocks[layer].weights.down_EDF.shape
        return math.ceil(ranks.break_even(hidden_size, expert_width))

    def _low_rank(self, view: SparseBlock, retained: tuple[int, ...], operation: Factorize) -> LowRankExperts:
        weights = view.weights
        _, hidden_size, expert_width = weights.down_EDF.shape

        def of(place: int, name: str) -> tuple[Tensor, Tensor]:
            key = view.layer, retained[place], name
            if key not in self._factors:
                left, right = factors(weights.projections(retained[place])[name])
                most = self._most_rank(view.layer)
                self._factors[key] = Factors(left[:, :most].clone(), right[:most].clone())
            return self._factors[key]

        with torch.device(weights.down_EDF.device):
            low = LowRankExperts(hidden_size, expert_width, operation.ranks, weights.glu, bool(weights.biases()))
        biases = {name: bias[list(retained)] for name, bias in weights.biases().items()}
        return low.to(weights.down_EDF.dtype).fill(lambda place: weights.projections(retained[place]), of, biases)
