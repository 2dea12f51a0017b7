"""CD-MoE and MoE-I² in one run: condense some layers, prune and factorize others, within one budget.

For each layer a few options are tried on the model as it is: condensed, pruned, factorized, pruned then factorized,
each at a few strengths. Their damage is the divergence of the final hidden state; what is chosen together does the
least damage for the parameters that must go. The damage of several layers is not the sum of the single ones, so it is
measured again around the choice, and the choice that measures least is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.methods.cdmoe import CDMoE
from recondense.methods.options import MadeUp, Option, Options, OptionSettings, Searched
from recondense.methods.search.budget import Budget
from recondense.methods.search.damage import Damage
from recondense.methods.search.genetic import Genetic
from recondense.methods.search.knapsack import least_damage
from recondense.methods.search.layerwise import Cache
from recondense.methods.search.ranks import break_even, multiple_problems
from recondense.methods.search.rerun import Start
from recondense.models.families import Facts
from recondense.models.layer_store import layer_store
from recondense.operations import Operation
from recondense.plan import Plan
from recondense.progress import progress


@dataclass(frozen=True)
class Combined:
    """Choose for every MoE layer between condensing, pruning, factorizing and nothing, by damage per parameter saved.

    Args:
        memory_ratio: parameters of the compressed model / of the original.
        removed_expert_ratio: where it is given, in its place: fraction of the routed experts' parameters that goes.
        num_experts: routed experts that a condensed layer keeps; an option for each number. The shared stay.
        prune_ratios: fractions of a layer's experts that an option drops; 0 is always among them.
        kept_ratios: fractions of a retained expert's parameters that an option's factors keep; 1 is always among them.
        rounds: how often the damages are measured: first each layer alone, then around the choice so far.
        alpha: how much more rank important experts get (MoE-I²).
        rank_multiple: as in `Decompose`.
        shared_gate, expert_search: as in `CDMoE`.
        normalize: as in MoE-I²'s importance.
        population, iterations, parents, mutation, seed: of the genetic search for the experts to drop.

    Raises:
        UserError: a setting outside its range.

    Reference: arXiv 2412.00069, section 3 (condensing); arXiv 2411.01016, section 3 (pruning and decomposition). The
    combination is this project's own.
    """

    memory_ratio: float | None = None
    removed_expert_ratio: float | None = None
    num_experts: Sequence[int] = (4,)
    prune_ratios: Sequence[float] = (0.25, 0.5)
    kept_ratios: Sequence[float] = (0.75, 0.5, 0.25)
    rounds: int = 2
    alpha: float = 0.15
    rank_multiple: int | str = "auto"
    shared_gate: str = "mean"
    expert_search: str = "greedy"
    normalize: bool = True
    population: int = 100
    iterations: int = 50
    parents: int = 20
    mutation: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*self.budget.problems(), *self.genetic.problems()]
        if self.alpha < 0:
            problems.append(f"method.alpha={self.alpha} must be at least 0")
        if not (self.num_experts or self.prune_ratios or self.kept_ratios):
            problems.append(
                "method.num_experts, prune_ratios and kept_ratios are all empty: there is nothing to choose"
            )
        try:  # its own words for what condensing takes
            CDMoE(1, "all", self.shared_gate, self.expert_search)
        except UserError as error:
            problems += str(error).splitlines()
        for name in ("prune_ratios", "kept_ratios"):
            wrong = [value for value in getattr(self, name) if not 0 < value < 1]
            if wrong:
                problems.append(f"method.{name}={list(getattr(self, name))}: {wrong} must lie between 0 and 1")
        wrong = [count for count in self.num_experts if not isinstance(count, int) or count < 0]
        if wrong:
            problems.append(f"method.num_experts={list(self.num_experts)}: {wrong} must be whole numbers of at least 0")
        problems += multiple_problems(self.rank_multiple)
        if self.rounds < 1:
            problems.append(f"method.rounds={self.rounds} must be at least 1")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, None if self.removed_expert_ratio is not None else self.memory_ratio)

    @property
    def genetic(self) -> Genetic:
        return Genetic(self.population, self.iterations, self.parents, self.mutation)

    @property
    def option_settings(self) -> OptionSettings:
        names = [field.name for field in fields(OptionSettings)]
        return OptionSettings(**{name: getattr(self, name) for name in names})

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        problems = [
            f"method.num_experts: a layer cannot keep {count}: the model has {facts.num_experts} routed experts"
            for count in self.num_experts
            if count > facts.num_experts
        ]
        if 0 in self.num_experts and facts.shared_width == 0:
            problems.append("method.num_experts: 0 leaves nothing of a layer: this model has no shared experts")
        cap = break_even(facts.hidden_size, facts.expert_width)
        least = min(self.kept_ratios, default=1.0) * cap
        if self.rank_multiple != "auto" and int(self.rank_multiple) > least:
            problems.append(
                f"method.rank_multiple={self.rank_multiple}: must be at most {least:.4g}, the average rank "
                f"of the least of method.kept_ratios={list(self.kept_ratios)}"
            )
        if facts.num_groups > 1:
            problems.append(
                f"method=cdmoe_moei2: the router selects among {facts.num_groups} groups of experts, which pruning "
                "must leave equal; this search does not. Use method=cdmoe or svd_llm."
            )
        for ratio in self.prune_ratios:
            retained = facts.num_experts - round(ratio * facts.num_experts)
            if retained < facts.top_k:
                problems.append(
                    f"method.prune_ratios: {ratio} leaves {retained} of {facts.num_experts} experts, but each token "
                    f"selects {facts.top_k}; use at most {1 - facts.top_k / facts.num_experts:.4g}"
                )
        return problems

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; the budget is not part of it."""
        lists = {name: list(getattr(self, name)) for name in ("num_experts", "prune_ratios", "kept_ratios")}
        searched = ("population", "iterations", "parents", "mutation", "seed")
        names = ("alpha", "rank_multiple", "shared_gate", "expert_search", "normalize", *searched)
        return {"method": "cdmoe_moei2", "version": 3, **lists, **{name: getattr(self, name) for name in names}}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return "what is done to each layer; all of it together keeps the budget"

    def outline(self, model: PreTrainedModel) -> list[Operation]:
        """Operations that just keep the budget, from shapes alone.

        The damage that decides is made up, as much for every parameter that goes: a mix, one of many of its size.
        """
        options = Options(self.option_settings, model, MadeUp())
        self._check_reach(options, model)
        damage = {layer: [float(option.saved) for option in each] for layer, each in options.of.items()}
        choice = self._choose(options, damage, model)
        return [operation for option in choice.values() for operation in option.operations]

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Operation], dict[str, Any]]:
        """Decide what to do with every layer; the model is left bit-identical.

        Returns:
            operations in layer order; for every round the damages, the choice, and the damage of all of it together.

        Raises:
            UserError: the budget asks for more than the options can save.
        """
        started = time.perf_counter()
        settings = self.option_settings
        options = Options(settings, model, Searched(settings, model, tape, cache, max_scratch_bytes))
        self._check_reach(options, model)  # before anything is measured
        damage = Damage(model, tape())
        seconds = {"options": time.perf_counter() - started}
        rounds: list[dict[str, Any]] = []
        choice: dict[int, Option] = {}
        around = ""  # the first round measures each layer alone: the same for every budget
        for number in range(self.rounds):
            measured = _measure(damage, options, f"damage, round {number + 1} of {self.rounds}", cache, around)
            found = self._choose(options, measured, model)
            around = f"{_fingerprint(found)}-"
            together = damage.choose(_blocks(model, options, found))
            rounds.append(_record(measured, found, together))
            if together <= min(each["damage"] for each in rounds):
                choice = found
        seconds["damage"] = time.perf_counter() - started - seconds["options"]
        operations = [operation for option in choice.values() for operation in option.operations]
        return operations, {
            **self.key(),
            **self.budget.settings(),
            "rounds": rounds,
            "chosen": {str(layer): option.name for layer, option in choice.items()},
            "expert_importance": {str(layer): values for layer, values in options.importance.items()},
            **options.records(),
            "seconds": seconds,
        }

    def _check_reach(self, options: Options, model: PreTrainedModel) -> None:
        """Refuse a budget that no choice keeps.

        Raises:
            UserError: with what the options can save.
        """
        most = sum(map(max, self._saved(options)))
        if self.budget.expert_parameters_to_remove(model) > most:
            raise UserError(
                "method: the budget asks for more than condensing, pruning and factorizing can save; the strongest "
                f"options of all layers give {self.budget.at_best(model, most)}"
            )

    def _saved(self, options: Options) -> list[list[int]]:
        """What the budget counts as saved by each option of each layer."""
        routed = self.budget.removed_expert_ratio is not None
        return [[option.saved_routed if routed else option.saved for option in each] for each in options.of.values()]

    def _choose(self, options: Options, measured: dict[int, list[float]], model: PreTrainedModel) -> dict[int, Option]:
        """Least damage for the budget, then what is left of the budget is given to ranks."""
        need = self.budget.expert_parameters_to_remove(model)
        layers, saved = list(options.of), self._saved(options)
        chosen = least_damage(saved, [measured[layer] for layer in layers], need)
        spare = sum(each[index] for each, index in zip(saved, chosen, strict=True)) - need
        found = {layer: options.of[layer][index] for layer, index in zip(layers, chosen, strict=True)}
        return options.widened(found, spare)


def _fingerprint(choice: dict[int, Option]) -> str:
    """Of what stands in the layers; one without an operation is as it was."""
    operations = [operation for option in choice.values() for operation in option.operations]
    return fingerprint(Plan("", tuple(operations)).to_dict()["operations"])


def _measure(damage: Damage, options: Options, title: str, cache: Cache, around: str) -> dict[int, list[float]]:
    """The damage of each option of each layer, with what is chosen now in all other layers.

    Args:
        cache: damages found so far; written after every layer.
        around: what names the choice there.
    """
    found: dict[int, list[float]] = {}
    with progress(title, sum(len(each) for each in options.of.values())) as bar:
        for layer, each in options.of.items():
            key = f"damage-{around}{layer:03d}"
            known = cache.get(key)
            if known is None:
                known = {"damage": damage.of([Start(layer, partial(options.block, layer, option)) for option in each])}
                options.forget()
                cache[key] = known
            bar.advance(len(each))
            found[layer] = list(known["damage"])
    return found


def _blocks(model: PreTrainedModel, options: Options, choice: dict[int, Option]) -> dict[int, nn.Module]:
    blocks = {}
    for layer, option in choice.items():
        with layer_store(model).resident(layer):
            block = options.block(layer, option)
            options.forget()
            if block is not None:
                blocks[layer] = layer_store(model).offload(block)
    return blocks


def _record(measured: dict[int, list[float]], choice: dict[int, Option], together: float) -> dict[str, Any]:
    return {
        "damages": {str(layer): values for layer, values in measured.items()},
        "choice": {str(layer): option.name for layer, option in choice.items()},
        "damage": together,
    }
