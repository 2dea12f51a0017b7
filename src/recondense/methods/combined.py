"""CD-MoE and MoE-I² in one run: condense some layers, prune, narrow or factorize others, within one budget.

Each layer has several options: condense, prune, narrow, factorize, or prune and narrow or factorize, each at a few
strengths. Every option is first tried on the unchanged model. The damage of an option is the divergence of the final
hidden state from the original's. The search chooses one option per layer, with the least sum of damages among the
choices that meet the budget. The damage of several changed layers is not the sum of their single damages. Therefore the
damages are measured again with the chosen options in the other layers, and of all choices the one with the least
measured damage is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.methods.cdmoe import CDMoE
from recondense.methods.search import ranks, widths
from recondense.methods.search.budget import NO_BUDGET, Budget
from recondense.methods.search.channel_scores import SCORES
from recondense.methods.search.coefficients import coefficient_texts
from recondense.methods.search.damage import Damage
from recondense.methods.search.genetic import GENETIC, Genetic
from recondense.methods.search.knapsack import least_damage
from recondense.methods.search.layer_options import Option, Options, OptionSettings
from recondense.methods.search.option_blocks import OptionBlocks
from recondense.methods.search.option_choices import Choices, MadeUpChoices, SearchedChoices
from recondense.methods.search.rerun import Change
from recondense.methods.step import Cache, Record, SearchContext
from recondense.models.families import Facts
from recondense.models.layer_store import layer_store
from recondense.operations import Narrow, Operation
from recondense.plan import Plan
from recondense.progress import progress


@dataclass(frozen=True)
class Combined:
    """For every MoE layer, choose whether to condense, prune, narrow or factorize it, by damage per parameter saved.

    Args:
        budget: the parameters to remove.
        num_experts: numbers of routed experts that a condensed layer retains; each is one option.
        prune_ratios: fractions of a layer's experts to drop, in addition to 0.
        kept_ratios: parameters of the factors as fractions of a retained expert's parameters, in addition to 1.
        width_ratios: widths of narrowed experts as fractions of their width, in addition to 1. The measured damage is
            that after the least squares for down_proj.
        width_multiple: as in `Narrowing`.
        score: the score of channels, as in `Narrowing`.
        measurements: how often the damages are measured: first for each layer alone, then around the choice so far.
        alpha: how strongly the rank of an expert depends on its importance (MoE-I²).
        rank_multiple: as in `Decompose`.
        shared_gate, expert_search, coefficient_max_length: as in `CDMoE`.
        normalize: whether to normalize the importance, as in `InterExpertPruning`.
        genetic, seed: the settings and the seed of the search for the experts to drop.

    Raises:
        UserError: a setting is outside its range.

    Reference: arXiv 2412.00069, section 3 (condensing); arXiv 2411.01016, section 3 (pruning and decomposition). The
    combination is not from a paper.
    """

    condenses: ClassVar[bool] = True
    removes_layers: ClassVar[bool] = False
    needs_whole_experts: ClassVar[bool] = True
    left_open: ClassVar[str] = "what is done to each layer; the total meets the budget"

    budget: Budget = NO_BUDGET
    num_experts: Sequence[int] = (4,)
    prune_ratios: Sequence[float] = (0.25, 0.5)
    kept_ratios: Sequence[float] = (0.75, 0.5, 0.25)
    width_ratios: Sequence[float] = (0.75, 0.5)
    width_multiple: int | str = "auto"
    score: str = "heapr"
    measurements: int = 2
    alpha: float = 0.15
    rank_multiple: int | str = "auto"
    shared_gate: str = "mean"
    expert_search: str = "greedy"
    coefficient_max_length: int | None = None
    normalize: bool = True
    genetic: Genetic = GENETIC
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [*self.budget.problems(), *self.genetic.problems()]
        if self.alpha < 0:
            problems.append(f"method.alpha={self.alpha} must be at least 0")
        if not (self.num_experts or self.prune_ratios or self.kept_ratios or self.width_ratios):
            problems.append(
                "method.num_experts, prune_ratios, kept_ratios and width_ratios are all empty: there is no option to "
                "choose"
            )
        try:
            CDMoE(1, "all", self.shared_gate, self.expert_search, self.coefficient_max_length)  # checks these three
        except UserError as error:
            problems += str(error).splitlines()
        for name in ("prune_ratios", "kept_ratios", "width_ratios"):
            wrong = [value for value in getattr(self, name) if not 0 < value < 1]
            if wrong:
                problems.append(f"method.{name}={list(getattr(self, name))}: {wrong} must lie between 0 and 1")
        wrong = [count for count in self.num_experts if not isinstance(count, int) or count < 0]
        if wrong:
            problems.append(f"method.num_experts={list(self.num_experts)}: {wrong} must be whole numbers of at least 0")
        problems += [*ranks.multiple_problems(self.rank_multiple), *widths.multiple_problems(self.width_multiple)]
        if self.score not in SCORES:
            problems.append(f"method.score={self.score} must be {' or '.join(SCORES)}")
        if self.measurements < 1:
            problems.append(f"method.measurements={self.measurements} must be at least 1")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def repeatable(self) -> bool:
        return bool(self.num_experts or self.prune_ratios)

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> Combined:
        """Return the step for one round, see `Step.for_round`. Only the last one narrows and factorizes."""
        if number == count:
            return self
        return replace(self, budget=self.budget.part(number, count), kept_ratios=(), width_ratios=())

    @property
    def _option_settings(self) -> OptionSettings:
        names = [field.name for field in fields(OptionSettings)]
        return OptionSettings(**{name: getattr(self, name) for name in names})

    def check(self, facts: Facts) -> list[str]:
        problems = [
            f"method.num_experts: a layer cannot keep {count}: the model has {facts.num_experts} routed experts"
            for count in self.num_experts
            if count > facts.num_experts
        ]
        if 0 in self.num_experts and facts.shared_width == 0:
            problems.append("method.num_experts: 0 would leave the layers empty: this model has no shared experts")
        if self.width_multiple != "auto" and int(self.width_multiple) > facts.expert_width:
            problems.append(
                f"method.width_multiple={self.width_multiple}: must be at most {facts.expert_width}, the width of an "
                "expert"
            )
        cap = ranks.break_even(facts.hidden_size, facts.expert_width)
        least = min(self.kept_ratios, default=1.0) * cap
        if self.rank_multiple != "auto" and int(self.rank_multiple) > least:
            problems.append(
                f"method.rank_multiple={self.rank_multiple}: must be at most {least:.4g}, the average rank for the "
                f"smallest of method.kept_ratios={list(self.kept_ratios)}"
            )
        if facts.num_groups > 1:
            problems.append(
                f"method=cdmoe_moei2: the router selects among {facts.num_groups} groups of experts. Pruning must keep "
                "the groups equally large, which this search does not. Use method=cdmoe or svd_llm."
            )
        for ratio in self.prune_ratios:
            retained = facts.num_experts - round(ratio * facts.num_experts)
            if retained < facts.top_k:
                problems.append(
                    f"method.prune_ratios: {ratio} leaves {retained} of {facts.num_experts} experts, but each token "
                    f"selects {facts.top_k}; use at most {1 - facts.top_k / facts.num_experts:.4g}"
                )
        return problems

    def key(self) -> Record:
        lists = {name: list(getattr(self, name)) for name in ("num_experts", "prune_ratios")}
        names = ("alpha", "rank_multiple", "width_multiple", "score", "shared_gate", "expert_search", "normalize")
        settings = {**lists, **{name: getattr(self, name) for name in names}, **self.genetic.key(), "seed": self.seed}
        return {"method": "cdmoe_moei2", "version": 4, **settings}

    def outline(self, model: PreTrainedModel) -> list[Operation]:
        """Return operations of the final sizes, see `Step.outline`.

        The damages are placeholders, equal for every parameter saved, so this is one of many possible choices.
        """
        choices = MadeUpChoices()
        options = Options.build(self._option_settings, model, choices)
        self._check_reach(options, model)
        damages = {layer: [float(option.saved) for option in listed] for layer, listed in options.by_layer.items()}
        return _operations(self._choose(options, damages, model, choices))

    def search(self, context: SearchContext) -> tuple[list[Operation], Record]:
        """Decide what to do with every layer; see `Step.search`.

        Raises:
            UserError: the options cannot save as many parameters as the budget requires.
        """
        started = time.perf_counter()
        model = context.model
        score = self.score if self.width_ratios else None
        choices = SearchedChoices(context, self.genetic, self.seed, self.normalize, score)
        options = Options.build(self._option_settings, model, choices)
        self._check_reach(options, model)  # before the damages are measured
        damage = Damage(model, context.tape())
        seconds = {"options": time.perf_counter() - started}
        measured: list[Record] = []
        choice: dict[int, Option] = {}
        texts = coefficient_texts(context, self.coefficient_max_length) if self.num_experts else None
        suffix = "" if texts is None else texts.suffix
        # The other searches do not depend on these two, so all rounds of a run share them. Damages are those of a list.
        shrinking = {name: list(getattr(self, name)) for name in ("kept_ratios", "width_ratios")}
        listed = f"{fingerprint(shrinking)}-"
        around = listed  # the first measurement takes each layer alone: the same for every budget
        for number in range(self.measurements):
            title = f"damage, measurement {number + 1} of {self.measurements}"
            damages = _measure(damage, options, title, context.cache, around, suffix)
            candidate = self._choose(options, damages, model, choices)
            around = f"{listed}{_fingerprint(candidate)}-"
            together = damage.replace(_blocks(damage, options, candidate))
            measured.append(_record(damages, candidate, together))
            if together <= min(earlier["damage"] for earlier in measured):
                choice = candidate
        seconds["damage"] = time.perf_counter() - started - seconds["options"]
        return _operations(choice), {
            **self.key(),
            **shrinking,
            **self.budget.settings(),
            **({} if texts is None else {"coefficient_texts": texts.describe()}),
            "measurements": measured,
            "chosen": {str(layer): option.name for layer, option in choice.items()},
            "expert_importance": {str(layer): values for layer, values in options.importance.items()},
            **options.records(),
            "seconds": seconds,
        }

    def _check_reach(self, options: Options, model: PreTrainedModel) -> None:
        """Check that some choice meets the budget.

        Raises:
            UserError: none does; the message says how much the options can save.
        """
        most = sum(map(max, self._saved(options)))
        if self.budget.expert_parameters_to_remove(model) > most:
            raise UserError(
                "method: the budget requires more than condensing, pruning, narrowing and factorizing can save; the "
                f"strongest options of all layers reach {self.budget.strictest_ratio(model, most)}"
            )

    def _saved(self, options: Options) -> list[list[int]]:
        """Return the number of parameters that each option of each layer saves, as the budget counts them."""
        return [[option.saving(self._routed) for option in listed] for listed in options.by_layer.values()]

    @property
    def _routed(self) -> bool:
        """Whether the budget counts the parameters of routed experts only."""
        return self.budget.removed_expert_ratio is not None

    def _choose(
        self, options: Options, damages: dict[int, list[float]], model: PreTrainedModel, choices: Choices
    ) -> dict[int, Option]:
        """Choose the options with the least damage that meet the budget, and use up what remains of it.

        First ranks are raised. If no layer is factorized, narrowed layers retain more channels, others more experts.
        """
        need = self.budget.expert_parameters_to_remove(model)
        layers, saved = list(options.by_layer), self._saved(options)
        indices = least_damage(saved, [damages[layer] for layer in layers], need)
        spare = sum(savings[index] for savings, index in zip(saved, indices, strict=True)) - need
        choice = {layer: options.by_layer[layer][index] for layer, index in zip(layers, indices, strict=True)}
        choice = options.widen(choice, spare)
        spare = sum(option.saving(self._routed) for option in choice.values()) - need
        chosen = {layer: damages[layer][index] for layer, index in zip(layers, indices, strict=True)}
        return options.regain(choice, spare, chosen, choices, self._routed)


def _operations(choice: dict[int, Option]) -> list[Operation]:
    """Return the operations of a choice: first those that need the states of the unchanged model, then the others."""
    operations = [operation for option in choice.values() for operation in option.operations]
    return sorted(operations, key=lambda operation: not isinstance(operation, Narrow))


def _fingerprint(choice: dict[int, Option]) -> str:
    """Return the hash of a choice; layers without an operation do not change it."""
    return fingerprint(Plan("", tuple(_operations(choice))).to_dict()["operations"])


def _measure(
    damage: Damage, options: Options, title: str, cache: Cache, around: str, suffix: str
) -> dict[int, list[float]]:
    """Measure the damage of each option of each layer, with the current choice in all other layers.

    Args:
        damage: measures the changes.
        options: the options of all layers.
        title: the description of the progress bar.
        cache: earlier measurements; written after every layer.
        around: the name of the options and the current choice in the cache.
        suffix: the end of the names in the cache, if the coefficients come from other texts than the tape's.
    """
    damages: dict[int, list[float]] = {}
    blocks = OptionBlocks(damage.model, damage.tape)
    with progress(title, sum(map(len, options.by_layer.values()))) as bar:
        for layer, listed in options.by_layer.items():
            key = f"damage-{around}{layer:03d}{suffix}"
            record = cache.get(key)
            if record is None:
                block = options.blocks[layer]
                changes = [Change(layer, partial(blocks.make, block, option.operations)) for option in listed]
                record = {"damage": damage.measure(changes)}
                blocks.release()
                cache[key] = record
            bar.advance(len(listed))
            damages[layer] = list(record["damage"])
    return damages


def _blocks(damage: Damage, options: Options, choice: dict[int, Option]) -> dict[int, nn.Module]:
    """Make the changed blocks of a choice, by layer."""
    changed: dict[int, nn.Module] = {}
    model = damage.model
    blocks = OptionBlocks(model, damage.tape)
    for layer, option in choice.items():
        with layer_store(model).resident(layer):
            block = blocks.make(options.blocks[layer], option.operations)
            blocks.release()
            if block is not None:
                changed[layer] = layer_store(model).offload(block)
    return changed


def _record(damages: dict[int, list[float]], choice: dict[int, Option], together: float) -> dict[str, Any]:
    return {
        "damages": {str(layer): values for layer, values in damages.items()},
        "choice": {str(layer): option.name for layer, option in choice.items()},
        "damage": together,
    }
