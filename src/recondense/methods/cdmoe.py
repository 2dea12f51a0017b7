"""CD-MoE: decide which layers to condense and which of their experts to retain (arXiv 2412.00069)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.cdmoe_budget import Remainder, fewest, spread_evenly
from recondense.methods.search.cdmoe_search import CondenseSearch
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.families import Facts
from recondense.models.moe_blocks import SparseBlock
from recondense.models.parameters import count_parameters
from recondense.operations import Condense

EXPERT_SEARCHES = ("greedy", "frequency", "routing_weight")


@dataclass(frozen=True)
class LayerChoice:
    """The parsed setting `num_layers`.

    Args:
        layers: the layers to choose from; None for all MoE layers.
        count: the number of layers that the layer search chooses; None condenses all of them, without a search.
    """

    layers: tuple[int, ...] | None
    count: int | None


def read_num_layers(num_layers: object) -> LayerChoice:
    """Parse the setting: a number, a list of decoder-layer indices, or "all".

    Raises:
        UserError: the setting is none of these, or the list is empty or names a layer twice.
    """
    if num_layers == "all":
        return LayerChoice(None, None)
    if _is_int(num_layers):
        count = cast(int, num_layers)
        if count < 1:
            raise UserError(f"method.num_layers={count} must be at least 1; use method=none to condense no layer")
        return LayerChoice(None, count)
    if isinstance(num_layers, str) or not isinstance(num_layers, Sequence) or not all(map(_is_int, num_layers)):
        shown = repr(num_layers) if isinstance(num_layers, str) else num_layers  # a string can look like a list
        raise UserError(f"method.num_layers={shown} must be a number, a list of layers, or all")
    if not num_layers:
        raise UserError("method.num_layers=[] names no layer; use method=none to condense no layer")
    if len(set(num_layers)) < len(num_layers):
        raise UserError(f"method.num_layers={list(num_layers)} names a layer twice")
    return LayerChoice(tuple(num_layers), None)


@dataclass(frozen=True)
class CDMoE:
    """Condense MoE layers. A greedy search by Jensen-Shannon divergence chooses first the experts, then the layers.

    Args:
        num_experts: routed experts that a condensed layer retains; 0 retains only the shared experts (CD-MoE-S). With a
            budget, see there.
        num_layers: the number of layers to condense (greedy layer search), a list of decoder-layer indices, or "all".
        shared_gate: "mean" replaces the shared experts' gate by its mean over the calibration tokens, as in the
            authors' code. "token" keeps the gate.
        expert_search: "greedy" as in the paper. "frequency" retains the experts that the most tokens select, with a
            layer order of its own; the paper's ablation "routing weight" (55.7 points instead of 55.5) is this one.
            "routing_weight" retains the experts with the largest coefficients, which is not in the paper. The
            coefficient of an expert is its mean routing weight over the tokens that select it.
        coefficient_max_length: the tokens of each calibration text that coefficients, selections and the mean gate come
            from. None takes the whole texts, as the authors do, cut at the model's positions (the authors do not cut);
            the maximum length of the calibration set takes what the searches see. The whole texts need one more pass,
            unless no text is longer than the calibration set's maximum length.
        budget: a budget instead of `num_layers`, met to within one expert. The fewest layers that meet it with
            `num_experts` experts each are condensed; if all layers together do not meet it, each starts with fewer
            experts. What remains is given back as further experts of these layers (`Remainder`). This is not in the
            paper, which sets both numbers.

    Raises:
        UserError: a setting is outside its range.

    Reference: Condense, Don't Just Prune, arXiv 2412.00069, sections 3.2 and 3.3.
    """

    condenses: ClassVar[bool] = True
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True

    num_experts: int = 4
    num_layers: int | str | Sequence[int] = "all"
    shared_gate: str = "mean"
    expert_search: str = "greedy"
    coefficient_max_length: int | None = None
    budget: Budget = NO_BUDGET

    def __post_init__(self) -> None:
        problems = self.budget.problems(required=False)
        if self.budget.is_given and self.num_layers != "all":
            problems.append(
                f"method.num_layers={self.num_layers}: a budget decides the number of layers; set num_layers to all"
            )
        if not _is_int(self.num_experts) or self.num_experts < 0:
            problems.append(f"method.num_experts={self.num_experts} must be a whole number of at least 0")
        if self.shared_gate not in ("mean", "token"):
            problems.append(f"method.shared_gate={self.shared_gate} must be mean or token")
        if self.expert_search not in EXPERT_SEARCHES:
            allowed = ", ".join(EXPERT_SEARCHES)
            problems.append(f"method.expert_search={self.expert_search} must be one of {allowed}")
        length = self.coefficient_max_length
        if length is not None and (not _is_int(length) or length < 1):
            problems.append(
                f"method.coefficient_max_length={length} must be a whole number of at least 1, or null for whole texts"
            )
        try:
            read_num_layers(self.num_layers)
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))

    def check(self, facts: Facts) -> list[str]:
        problems = []
        if self.num_experts > facts.num_experts:
            problems.append(
                f"method.num_experts={self.num_experts}: the model has {facts.num_experts} routed experts per layer"
            )
        if self.num_experts == 0 and facts.shared_width == 0:
            problems.append("method.num_experts=0 would leave the layers empty: this model has no shared experts")
        choice = read_num_layers(self.num_layers)
        if choice.count is not None and choice.count > len(facts.moe_layers):
            problems.append(f"method.num_layers={choice.count}: the model has {len(facts.moe_layers)} MoE layers")
        for layer in choice.layers or ():
            if layer not in facts.moe_layers:
                nearest = min(facts.moe_layers, key=lambda moe_layer: abs(moe_layer - layer))
                problems.append(
                    f"method.num_layers: layer {layer} is not a MoE layer. The MoE layers of this model are "
                    f"{_ranges(facts.moe_layers)} (did you mean {nearest}?)"
                )
        return problems

    def key(self) -> Record:
        return {"method": "cdmoe", "version": 2, "shared_gate": self.shared_gate, "expert_search": self.expert_search}

    @property
    def left_open(self) -> str:
        return "how many experts each condensed layer retains, but not their total" if self.budget.is_given else ""

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> CDMoE | None:
        return _for_round(self, number, count, model)

    def outline(self, model: PreTrainedModel) -> list[Condense]:
        if self.budget.is_given:
            return self._within_budget(model)._outline_budget(model)
        blocks = moe_blocks.sparse_blocks(model)
        layers, count = self._layers(model)
        return [self.outline_layer(blocks[layer]) for layer in layers[:count]]

    def _outline_budget(self, model: PreTrainedModel) -> list[Condense]:
        blocks = moe_blocks.sparse_blocks(model)
        layers = list(blocks)[: self._fewest_layers(model, list(blocks))]
        room = {layer: blocks[layer].num_experts - self.num_experts for layer in layers}
        further = spread_evenly(room, self._experts_to_give_back(model, layers))
        if len(layers) > 1 and 0 < further[layers[0]] == further[layers[-1]] < room[layers[0]]:
            # The search decides by damage; numbers that happen to be equal would pass for a row of the paper.
            further |= {layers[0]: further[layers[0]] + 1, layers[-1]: further[layers[-1]] - 1}
        return [self.outline_layer(blocks[layer], further[layer]) for layer in layers]

    def outline_layer(self, block: SparseBlock, further: int = 0) -> Condense:
        """Return an operation of the right size for one layer, with the first experts and placeholder coefficients.

        Args:
            block: the layer.
            further: the number of experts that it retains in addition to `num_experts`.
        """
        constant = self.shared_gate == "mean" and block.shared_expert_gate is not None
        experts = tuple(range(self.num_experts + further))
        return Condense(block.layer, experts, (1.0,) * len(experts), 1.0 if constant else None)

    def saved_parameters(self, block: SparseBlock, routed: bool, further: int = 0) -> int:
        """Return the number of parameters that condensing removes from a layer.

        They are those of the dropped experts, of the router, and of the shared experts' gate if it becomes a constant.

        Args:
            block: the layer.
            routed: count only the parameters of routed experts.
            further: the number of experts that the layer retains in addition to `num_experts`.
        """
        weights, number = block.weights, self.num_experts + further
        _, hidden_size, expert_width = weights.down_EDF.shape
        retained = number * 3 * hidden_size * expert_width
        if weights.biases() and number:
            retained += number * 2 * expert_width + hidden_size  # the biases of down_proj are merged
        experts = count_parameters(block.experts) - retained
        gate = block.shared_expert_gate if self.shared_gate == "mean" else None
        others = [block.router] if gate is None else [block.router, gate]
        return experts if routed else experts + sum(map(count_parameters, others))

    def search(self, context: SearchContext) -> tuple[list[Condense], Record]:
        """Decide what to condense; see `Step.search`.

        Raises:
            UserError: the budget cannot be met, or fewer than `num_experts` experts of a layer are ever selected.
        """
        if self.budget.is_given:
            return self._within_budget(context.model)._search_budget(context)
        started = time.perf_counter()
        search = self._start(context)
        layers, count = self._layers(context.model)
        search.search_experts(layers)
        operations = {layer: search.operation(layer) for layer in layers}
        record: dict[str, Any] = {}
        seconds = {"expert_search": time.perf_counter() - started}
        if count is not None:
            record["layer_search"] = search.search_layers(operations, count)
            layers = record["layer_search"]["order"]
            seconds["layer_search"] = time.perf_counter() - started - seconds["expert_search"]
        return [operations[layer] for layer in layers], self._record(search, record, seconds)

    def _start(self, context: SearchContext) -> CondenseSearch:
        settings = self.num_experts, self.shared_gate, self.expert_search, self.coefficient_max_length
        return CondenseSearch(context, *settings)

    def _search_budget(self, context: SearchContext) -> tuple[list[Condense], Record]:
        """Decide which layers to condense and how many experts each retains, so that the budget is met closely."""
        times = [time.perf_counter()]
        search, model = self._start(context), context.model
        moe_layers = list(search.blocks)
        count = self._fewest_layers(model, moe_layers)
        search.search_experts(moe_layers)
        times.append(time.perf_counter())
        operations = {layer: search.operation(layer) for layer in moe_layers}
        record: dict[str, Any] = {"layer_search": search.search_layers(operations, count)}
        # After an earlier step, layers may have different numbers of experts, so that the chosen ones save another sum.
        while (needed := self._fewest_layers(model, record["layer_search"]["order"])) != count:
            count = needed
            record["layer_search"] = search.search_layers(operations, count)
        layers = record["layer_search"]["order"]
        times.append(time.perf_counter())
        number = self._experts_to_give_back(model, layers)
        remainder = Remainder(search, layers, record["layer_search"]["js"][-1] if layers else 0.0)
        record["remainder"] = remainder.give(number)
        times.append(time.perf_counter())
        names = ("expert_search", "layer_search", "remainder")
        seconds = {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}
        return [search.operation(layer) for layer in layers], self._record(search, record, seconds)

    def _record(self, search: CondenseSearch, record: Record, seconds: Record) -> Record:
        """Return the record of the step, from that of its layer search."""
        return {
            **self.key(),
            **search.describe_texts(),
            "expert_search": {str(layer): layer_record for layer, layer_record in search.records.items()},
            **record,
            "num_experts": self.num_experts,
            **(self.budget.settings() if self.budget.is_given else {}),
            "reused": search.describe_reuse(),
            "seconds": seconds,
        }

    def _layers(self, model: PreTrainedModel) -> tuple[list[int], int | None]:
        """Return the layers to choose from, and how many the layer search chooses; None condenses all of them."""
        choice = read_num_layers(self.num_layers)
        return (list(moe_blocks.sparse_blocks(model)) if choice.layers is None else list(choice.layers)), choice.count

    def _saved(self, model: PreTrainedModel, layers: Sequence[int], further: int = 0) -> list[int]:
        """Return what condensing saves in each layer, as the budget counts it."""
        blocks, routed = moe_blocks.sparse_blocks(model), self.budget.removed_expert_ratio is not None
        return [self.saved_parameters(blocks[layer], routed, further) for layer in layers]

    def _within_budget(self, model: PreTrainedModel) -> CDMoE:
        """Return the step with the most experts per layer, up to `num_experts`, with which all layers meet the budget.

        Raises:
            UserError: not even the fewest experts meet it: none, or one if the layers have no shared experts.
        """
        blocks, need = moe_blocks.sparse_blocks(model), self.budget.expert_parameters_to_remove(model)
        has_shared = all(block.shared_expert is not None for block in blocks.values())
        least, most = min(self.num_experts, 0 if has_shared else 1), 0
        for number in range(self.num_experts, least - 1, -1):
            step = replace(self, num_experts=number)
            most = sum(step._saved(model, list(blocks)))
            if need <= most:
                return step
        raise UserError(
            f"method: the budget requires removing {need:,} parameters, but condensing all {len(blocks)} MoE layers to "
            f"{least} experts removes only {most:,}. The strictest possible budget is "
            f"{self.budget.strictest_ratio(model, most)}"
        )

    def _fewest_layers(self, model: PreTrainedModel, layers: Sequence[int]) -> int:
        """Return how many of the first layers meet the budget with `num_experts` each, or one more than all of them."""
        return fewest(self._saved(model, layers), self.budget.expert_parameters_to_remove(model))

    def _experts_to_give_back(self, model: PreTrainedModel, layers: Sequence[int]) -> int:
        """Return how many further experts the condensed layers may retain within the budget."""
        if not layers:
            return 0
        saved = self._saved(model, layers)
        # With biases, the first expert of a layer has more parameters than the others.
        expert = saved[0] - self._saved(model, layers[:1], further=1)[0]
        return (sum(saved) - self.budget.expert_parameters_to_remove(model)) // expert


def _for_round(step: CDMoE, number: int, count: int, model: PreTrainedModel) -> CDMoE | None:
    """Return a step for one round, see `Step.for_round`. Listed layers are condensed in their order.

    A condensed layer cannot be condensed again. With a budget, earlier rounds therefore give back no experts: each
    condenses its share of the layers that the budget needs, to the number of experts with which it needs them.
    """
    if step.budget.is_given:
        whole = step._within_budget(model)
        needed = whole._fewest_layers(model, list(moe_blocks.sparse_blocks(model)))
        before, after = (needed * done // count for done in (number - 1, number))
        if number == count:
            return whole
        return replace(whole, budget=NO_BUDGET, num_layers=after - before) if after > before else None
    layers, chosen = step._layers(model)
    total = len(layers) if chosen is None else chosen
    before, after = (-(-total * done // count) for done in (number - 1, number))
    if before == after:
        return None
    if read_num_layers(step.num_layers).layers is not None:
        return replace(step, num_layers=tuple(layers[before:after]))
    return step if chosen is None and number == count else replace(step, num_layers=after - before)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ranges(layers: Sequence[int]) -> str:
    """Return ascending indices in words, such as "1 to 26" or "0, 2, 4"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
