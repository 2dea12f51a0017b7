"""The options of each MoE layer: condense, prune, narrow, factorize, or prune and one of the last two, a few each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from recondense.methods.cdmoe import CDMoE
from recondense.methods.search import ranks
from recondense.methods.search.option_choices import Choices
from recondense.methods.search.widths import require_whole_rows, resolve_multiple
from recondense.models import moe_blocks, parameters
from recondense.models.moe_blocks import SparseBlock
from recondense.operations import PROJECTIONS, Condense, Factorize, Narrow, Operation, Prune


@dataclass(frozen=True)
class OptionSettings:
    """The settings that determine the options of a layer; the fields are those of `Combined`."""

    num_experts: Sequence[int]
    prune_ratios: Sequence[float]
    kept_ratios: Sequence[float]
    width_ratios: Sequence[float]
    width_multiple: int | str
    alpha: float
    rank_multiple: int | str
    shared_gate: str
    expert_search: str
    coefficient_max_length: int | None

    def condensing(self) -> list[CDMoE]:
        """Return a step for each number of experts that a condensed layer may retain."""
        settings = "all", self.shared_gate, self.expert_search, self.coefficient_max_length
        return [CDMoE(count, *settings) for count in self.num_experts]


@dataclass(frozen=True)
class Option:
    """One option of one layer.

    Args:
        name: a description in words.
        operations: the operations; empty if the option does not change the layer.
        saved: the number of parameters that the option saves.
        saved_routed: the number of routed experts' parameters that the option saves.
    """

    name: str
    operations: tuple[Operation, ...] = ()
    saved: int = 0
    saved_routed: int = 0

    def saving(self, routed: bool) -> int:
        """Return the number of parameters that the option saves; with `routed`, of routed experts only."""
        return self.saved_routed if routed else self.saved

    @property
    def factorize(self) -> Factorize | None:
        """The last operation, if it factorizes."""
        last = self.operations[-1] if self.operations else None
        return last if isinstance(last, Factorize) else None


class Options:
    """The options of all MoE layers. Use `build` to make them.

    Attributes:
        blocks: the layers.
        importance: the importance of each expert, by layer.
        by_layer: the options of each layer; the first one does not change it.
        problems: the reasons why a layer lacks an option, by layer.
    """

    def __init__(self, settings: OptionSettings, blocks: Mapping[int, SparseBlock]) -> None:
        self.settings = settings
        self.blocks = blocks
        self.importance: dict[int, list[float]] = {}
        self.by_layer: dict[int, list[Option]] = {}
        self.problems: dict[int, list[str]] = {}

    @classmethod
    def build(cls, settings: OptionSettings, model: PreTrainedModel, choices: Choices) -> Options:
        """Collect the options of all layers.

        Args:
            settings: the settings of the options.
            model: the model; it stays bit-identical.
            choices: chooses the experts that the options retain or drop.
        """
        options = cls(settings, moe_blocks.sparse_blocks(model))
        if options.blocks and settings.width_ratios:
            require_whole_rows("width_multiple", options._width_multiple, model.dtype)
        condensing = settings.condensing()
        numbers = {layer: [number for number in options._numbers(layer) if number] for layer in options.blocks}
        choices.prepare(options.blocks, condensing, numbers)
        for layer, block in options.blocks.items():
            options.importance[layer] = choices.importance(block)
            options.by_layer[layer] = [
                Option("as it is"),
                *(option for step in condensing for option in options._condense(block, step, choices)),
                *options._prune_and_shrink(layer, choices),
            ]
        return options

    def widen(self, choice: dict[int, Option], spare: int) -> dict[int, Option]:
        """Raise ranks until the rest of a budget is used, as evenly over the layers as the steps of ranks allow.

        Args:
            choice: one option per layer.
            spare: the number of parameters that may be added.

        Returns:
            The choice with higher ranks.
        """
        factorized = {layer: option.factorize for layer, option in choice.items() if option.factorize is not None}
        if not factorized or spare <= 0:
            return choice
        sizes = {
            layer: ranks.parameters(operation.ranks[PROJECTIONS[0]], *self._shape)
            for layer, operation in factorized.items()
        }
        made: dict[int, tuple[ranks.Ranks, int]] = {}  # the ranks of each layer, and what they are multiples of
        total, rest = sum(sizes.values()), spare
        for layer in factorized:
            earlier = choice[layer].operations[:-1]
            importance = self._retained_importance(layer, earlier)
            budget = sizes[layer] + int(spare * sizes[layer] / total)
            average = budget / ranks.parameters([1] * len(importance), *self._shape)
            multiple = ranks.resolve_multiple(self.settings.rank_multiple, *self._shape, average)
            _, allocated = ranks.allocate_budget(
                {layer: importance}, budget, *self._shape, self.settings.alpha, multiple
            )
            made[layer] = allocated[layer], multiple
            rest -= ranks.parameters(allocated[layer], *self._shape) - sizes[layer]
        widened = dict(choice)
        for layer, (layer_ranks, multiple) in made.items():  # what remains is less than a step for each layer
            raised, rest = ranks.raise_ranks(layer_ranks, rest, *self._shape, multiple)
            widened[layer] = self._factorize(layer, choice[layer].operations[:-1], raised)
        return widened

    def regain(
        self, choice: Mapping[int, Option], spare: int, damages: Mapping[int, float], choices: Choices, routed: bool
    ) -> dict[int, Option]:
        """Use up the rest of a budget: retain further channels of narrowed layers, then further experts of others.

        The layers with the most damage per dropped expert (or channel) come first. A condensed layer retains the next
        experts of its order, a pruned one the most important of those that it would lose. What remains is less than
        an expert; if all changed layers are narrowed, less than a step of one layer's width.

        Args:
            choice: one option per layer.
            spare: the number of parameters that may be added.
            damages: the damage of each layer's option.
            choices: chooses the experts of condensed layers.
            routed: whether only the parameters of routed experts count.

        Returns:
            The choice with more experts and channels.
        """
        regained, spare = dict(choice), max(0, spare)
        lost = {layer: lost for layer, option in choice.items() if (lost := _lost_channels(option, self._shape[1]))}
        for layer in sorted(lost, key=lambda layer: (-damages[layer] / lost[layer], layer)):
            regained[layer] = self._with_wider(layer, choice[layer], spare, choices, routed)
            spare -= choice[layer].saving(routed) - regained[layer].saving(routed)
        dropped = {layer: len(_dropped(option, self.blocks[layer].num_experts)) for layer, option in choice.items()}
        layers = [layer for layer, number in dropped.items() if number]
        for layer in sorted(layers, key=lambda layer: (-damages[layer] / dropped[layer], layer)):
            regained[layer] = self._with_more(layer, choice[layer], spare, choices, routed)
            spare -= choice[layer].saving(routed) - regained[layer].saving(routed)
        return regained

    def records(self) -> dict[str, Any]:
        """Return all options with their savings, as JSON values for the plan."""
        options = {
            str(layer): [[option.name, option.saved, option.saved_routed] for option in layer_options]
            for layer, layer_options in self.by_layer.items()
        }
        problems = {str(layer): problems for layer, problems in self.problems.items()}
        return {"options": options, **({"left_out": problems} if problems else {})}

    @property
    def _shape(self) -> tuple[int, int]:
        """The hidden size and the width of a routed expert."""
        _, hidden_size, expert_width = next(iter(self.blocks.values())).weights.down_EDF.shape
        return hidden_size, expert_width

    def _numbers(self, layer: int) -> list[int]:
        """Return the numbers of experts that the options of a layer drop."""
        block = self.blocks[layer]
        most = block.num_experts - block.routing.top_k
        return [min(round(ratio * block.num_experts), most) for ratio in (0.0, *self.settings.prune_ratios)]

    def _with_wider(self, layer: int, option: Option, spare: int, choices: Choices, routed: bool) -> Option:
        """Return an option with experts that are as much wider as fits into `spare` parameters.

        If the rest has room for an expert, pruned experts are retained too; if none are pruned any more, the most
        important experts get one more step of width than the others.
        """
        block, full, multiple = self.blocks[layer], self._shape[1], self._width_multiple
        retained = [*next((o.retained for o in option.operations if isinstance(o, Prune)), range(block.num_experts))]
        channel, row = parameters.channel_size(block), 0 if routed else parameters.router_row_size(block)
        narrow = full - _lost_channels(option, full)
        steps = [*range(narrow, full, multiple), full]  # the last step is smaller if widths are no multiples
        width = max(step for step in steps if len(retained) * (step - narrow) * channel <= spare)
        rest = spare - len(retained) * (width - narrow) * channel
        expert = parameters.expert_size(block) + row - (full - width) * channel  # with the bias of down_proj
        by_importance = sorted(range(block.num_experts), key=lambda e: (-self.importance[layer][e], e))
        regained = [expert for expert in by_importance if expert not in retained][: rest // expert]
        retained, rest = [*retained, *regained], rest - len(regained) * expert
        widths = [width] * block.num_experts
        if width < full and len(retained) == block.num_experts and rest >= expert:
            wider = steps[steps.index(width) + 1]
            for place in by_importance[: rest // ((wider - width) * channel)]:
                widths[place] = wider
        return self._prune_and_narrow(layer, sorted(retained), widths, choices)

    def _prune_and_narrow(self, layer: int, retained: Sequence[int], widths: Sequence[int], choices: Choices) -> Option:
        """Return the option that prunes a layer and narrows it, if there is something to prune or to narrow."""
        number = self.blocks[layer].num_experts
        prune = (Prune(layer, tuple(retained)),) if len(retained) < number else ()
        if min(widths) < self._shape[1]:
            return self._narrow(layer, prune, widths, choices)
        return self._option(layer, f"pruned by {number - len(retained)}", prune, 0) if prune else Option("as it is")

    def _with_more(self, layer: int, option: Option, spare: int, choices: Choices, routed: bool) -> Option:
        """Return an option of the same kind that retains as many further experts as fit into `spare` parameters."""
        block, [operation] = self.blocks[layer], option.operations
        if isinstance(operation, Condense):
            number = len(operation.experts)
            step = next(step for step in self.settings.condensing() if step.num_experts == number)
            expert = step.saved_parameters(block, routed) - step.saved_parameters(block, routed, further=1)
            further = min(spare // expert, choices.room(block, step))
            return self._condense(block, step, choices, further)[0] if further else option
        expert = parameters.expert_size(block) + (0 if routed else parameters.router_row_size(block))
        dropped = sorted(
            _dropped(option, block.num_experts), key=lambda expert: (self.importance[layer][expert], expert)
        )
        if not (remaining := dropped[: max(0, len(dropped) - spare // expert)]):
            return Option("as it is")
        prune = Prune.from_dropped(layer, block.num_experts, remaining)
        return self._option(layer, f"pruned by {len(remaining)}", (prune,), 0)

    def _condense(self, block: SparseBlock, step: CDMoE, choices: Choices, further: int = 0) -> list[Option]:
        operation = choices.condense(block, step, further)
        if operation is None:
            self.problems.setdefault(block.layer, []).append(choices.problem(block, step))
            return []
        saved, routed = (step.saved_parameters(block, routed, further) for routed in (False, True))
        return [Option(f"condensed to {step.num_experts + further}", (operation,), saved, routed)]

    @property
    def _width_multiple(self) -> int:
        return resolve_multiple(self.settings.width_multiple, self._shape[1])

    def _prune_and_shrink(self, layer: int, choices: Choices) -> list[Option]:
        block, settings = self.blocks[layer], self.settings
        options = []
        for number in self._numbers(layer):
            dropped = choices.dropped(block, number) if number else ()
            prune = (Prune.from_dropped(layer, block.num_experts, dropped),) if number else ()
            if prune:
                options.append(self._option(layer, f"pruned by {number}", prune, 0))
            importance = self._retained_importance(layer, prune)
            for ratio in settings.kept_ratios:
                average = max(1.0, ratio * ranks.break_even(*self._shape))
                multiple = ranks.resolve_multiple(settings.rank_multiple, *self._shape, average)
                allocated = ranks.allocate(importance, average, *self._shape, settings.alpha, multiple)
                options.append(self._factorize(layer, prune, allocated))
            options += [self._narrow(layer, prune, [width] * block.num_experts, choices) for width in self._widths()]
        return list({option.name: option for option in options}.values())

    def _widths(self) -> list[int]:
        """Return the widths of the options that narrow a layer."""
        width, multiple = self._shape[1], self._width_multiple
        rounded = [max(multiple, int(ratio * width) // multiple * multiple) for ratio in self.settings.width_ratios]
        return [one for one in rounded if one < width]

    def _narrow(self, layer: int, prune: tuple[Prune, ...], widths: Sequence[int], choices: Choices) -> Option:
        """Return the option that narrows a layer and prunes it; the widths are those of all its experts.

        The narrowing comes first: its least squares then see the routing of the original, as in the measurement.
        """
        block = self.blocks[layer]
        operation = Narrow.from_channels(layer, choices.channels(block, widths), compensate=True)
        retained = prune[0].retained if prune else range(block.num_experts)
        saved = sum(self._shape[1] - widths[expert] for expert in retained) * parameters.channel_size(block)
        pruned = f"pruned by {block.num_experts - len(retained)} and " if prune else ""
        shown = " to ".join(map(str, sorted(set(widths))))
        return self._option(layer, f"{pruned}narrowed to {shown}", (operation, *prune), saved)

    def _factorize(self, layer: int, earlier: tuple[Operation, ...], allocated: ranks.Ranks) -> Option:
        """Return the option that factorizes a layer after its earlier operations."""
        low = [rank for rank in allocated if rank is not None]
        saved = ranks.parameters([None] * len(allocated), *self._shape) - ranks.parameters(allocated, *self._shape)
        name = f"{len(allocated)} experts, mean rank {sum(low) / max(1, len(low)):.4g}"
        operation = Factorize(layer, dict.fromkeys(PROJECTIONS, tuple(allocated)))
        return self._option(layer, name, (*earlier, operation), saved)

    def _option(self, layer: int, name: str, operations: tuple[Operation, ...], saved_by_others: int) -> Option:
        block = self.blocks[layer]
        dropped = sum(
            block.num_experts - len(operation.retained) for operation in operations if isinstance(operation, Prune)
        )
        routed = dropped * parameters.expert_size(block) + saved_by_others
        return Option(name, operations, routed + dropped * parameters.router_row_size(block), routed)

    def _retained_importance(self, layer: int, operations: Sequence[Operation]) -> list[float]:
        """Return the importance of the experts that remain after some operations."""
        values = self.importance[layer]
        for operation in operations:
            if isinstance(operation, Prune):
                return [values[expert] for expert in operation.retained]
        return values


def _dropped(option: Option, num_experts: int) -> set[int]:
    """Return the experts that an option drops; none if it also factorizes or narrows what it retains."""
    if len(option.operations) != 1 or not isinstance(operation := option.operations[0], Condense | Prune):
        return set()
    retained = operation.experts if isinstance(operation, Condense) else operation.retained
    return set(range(num_experts)) - set(retained)


def _lost_channels(option: Option, width: int) -> int:
    """Return how many of its `width` channels each expert loses."""
    widths = [operation.widths[0] for operation in option.operations if isinstance(operation, Narrow)]
    return width - widths[0] if widths else 0
