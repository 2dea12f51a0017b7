"""CD-MoE: which experts of which layers a condensed model keeps (arXiv 2412.00069).

The expert search treats each MoE layer on its own. A layer's output before the final norm is linear in its experts'
outputs, so one pass over the calibration set gives every candidate's difference from the original. The layer search
reruns only the layers above a candidate. Both give orders whose prefixes serve every smaller budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.search.budget import Budget
from recondense.methods.search.cdmoe_scoring import LayerScorer
from recondense.methods.search.damage import Damage
from recondense.methods.search.layerwise import Cache, layerwise
from recondense.methods.search.rerun import Start
from recondense.models import views
from recondense.models.blocks import CondensedMoE
from recondense.models.families import Facts
from recondense.models.layer_store import layer_store
from recondense.models.parameters import total_parameters
from recondense.models.views import SparseBlock
from recondense.operations import Condense
from recondense.progress import Stage, progress


class TooFewSelected(UserError):
    """Fewer experts of a layer were ever selected on the calibration set than it is to retain."""


@dataclass(frozen=True)
class CDMoE:
    """Condense MoE layers: experts by greedy Jensen-Shannon divergence, then layers likewise.

    Args:
        num_experts: routed experts that a condensed layer keeps; 0 keeps the shared experts alone (CD-MoE-S).
        num_layers: how many layers to condense (greedy layer search), which ones (a list of decoder-layer indices),
            or "all".
        shared_gate: "mean" replaces the shared experts' gate by its mean over the calibration tokens (the authors'
            code), "token" keeps it.
        expert_search: "greedy" (the paper), or "routing_weight": the largest coefficients, the mean routing weight
            of an expert over the tokens that selected it (its ablation).
        removed_expert_ratio, memory_ratio: a budget in place of num_layers: the fewest layers that keep it.

    Raises:
        UserError: a setting outside its range.

    Reference: Condense, Don't Just Prune, arXiv 2412.00069, sections 3.2 and 3.3.
    """

    num_experts: int = 4
    num_layers: int | str | Sequence[int] = "all"
    shared_gate: str = "mean"
    expert_search: str = "greedy"
    removed_expert_ratio: float | None = None
    memory_ratio: float | None = None

    def __post_init__(self) -> None:
        problems = self.budget.problems(required=False)
        if self.removed_expert_ratio is not None and self.memory_ratio is not None:
            problems.append("method.removed_expert_ratio and method.memory_ratio are both given: set one to null")
        if self.budget.given and self.num_layers != "all":
            problems.append(
                f"method.num_layers={self.num_layers}: a budget decides how many layers are condensed; leave it at all"
            )
        if not _is_int(self.num_experts) or self.num_experts < 0:
            problems.append(f"method.num_experts={self.num_experts} must be a whole number of at least 0")
        if self.shared_gate not in ("mean", "token"):
            problems.append(f"method.shared_gate={self.shared_gate} must be mean or token")
        if self.expert_search not in ("greedy", "routing_weight"):
            problems.append(f"method.expert_search={self.expert_search} must be greedy or routing_weight")
        if isinstance(self.num_layers, str):
            if self.num_layers != "all":
                problems.append(f"method.num_layers={self.num_layers} must be a number, a list of layers, or all")
        elif _is_int(self.num_layers):
            if self.num_layers < 1:  # type: ignore[operator]
                problems.append(
                    f"method.num_layers={self.num_layers} must be at least 1; method=none leaves the model as it is"
                )
        elif not isinstance(self.num_layers, Sequence) or not all(_is_int(layer) for layer in self.num_layers):
            problems.append(f"method.num_layers={self.num_layers} must be a number, a list of layers, or all")
        elif not self.num_layers:
            problems.append("method.num_layers=[] names no layer; method=none leaves the model as it is")
        elif len(set(self.num_layers)) < len(self.num_layers):
            problems.append(f"method.num_layers={list(self.num_layers)} names a layer twice")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        return Budget(self.removed_expert_ratio, self.memory_ratio)

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with these settings on a model of these facts; one sentence each, empty if nothing."""
        problems = []
        if self.num_experts > facts.num_experts:
            problems.append(
                f"method.num_experts={self.num_experts}: the model has {facts.num_experts} routed experts a layer"
            )
        if self.num_experts == 0 and facts.shared_width == 0:
            problems.append("method.num_experts=0 leaves nothing of a layer: this model has no shared experts")
        if _is_int(self.num_layers) and self.num_layers > len(facts.moe_layers):  # type: ignore[operator]
            problems.append(f"method.num_layers={self.num_layers}: the model has {len(facts.moe_layers)} MoE layers")
        if not isinstance(self.num_layers, int | str):
            for layer in self.num_layers:
                if layer not in facts.moe_layers:
                    nearest = min(facts.moe_layers, key=lambda other: abs(other - layer))
                    problems.append(
                        f"method.num_layers: layer {layer} is not a MoE layer of this model, whose MoE layers are "
                        f"{_ranges(facts.moe_layers)} (did you mean {nearest}?)"
                    )
        return problems

    def key(self) -> dict[str, Any]:
        """What a cached search depends on besides weights and calibration; budgets are not part of it."""
        return {"method": "cdmoe", "version": 2, "shared_gate": self.shared_gate, "expert_search": self.expert_search}

    @property
    def left_open(self) -> str:
        """What of the sizes the calibration set decides, in words; empty if nothing."""
        return ""

    def outline(self, model: PreTrainedModel) -> list[Condense]:
        """Operations of the sizes that the search reaches, from shapes alone; which layers and experts is made up."""
        blocks = views.sparse_blocks(model)
        wanted = self._wanted(model)
        if isinstance(wanted, int | str):
            wanted = [*blocks][: wanted if isinstance(wanted, int) else len(blocks)]
        return [self.shape(blocks[layer]) for layer in wanted]

    def shape(self, block: SparseBlock) -> Condense:
        """What condensing makes of a layer, with the first experts and made-up coefficients."""
        constant = self.shared_gate == "mean" and block.shared_expert_gate is not None
        experts = tuple(range(self.num_experts))
        return Condense(block.layer, experts, (1.0,) * len(experts), 1.0 if constant else None)

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> tuple[list[Condense], dict[str, Any]]:
        """Decide what to condense; the model is left bit-identical.

        Args:
            model: the causal LM, as the step before left it.
            tape: gives its hidden states on the calibration set; called only if the cache lacks something.
            cache: orders found so far; written after every layer and after every step of the layer search.
            max_scratch_bytes: bound on temporary tensors; the answer does not depend on it.

        Returns:
            operations in the order in which their layers were chosen, and the scores that decided them.

        Raises:
            UserError: fewer experts were ever selected on the calibration set than are to be retained.
        """
        started = time.perf_counter()
        search = Search(self, model, tape, cache, max_scratch_bytes)
        wanted = self._wanted(model)
        layers = list(views.sparse_blocks(model)) if isinstance(wanted, int | str) else [*wanted]
        search.experts(layers)
        operations = {layer: search.operation(layer) for layer in layers}
        record: dict[str, Any] = {"expert_search": {str(layer): search.orders[layer] for layer in layers}}
        seconds = {"expert_search": time.perf_counter() - started}
        if isinstance(wanted, int):
            record["layer_search"] = search.layers(operations, wanted)
            layers = record["layer_search"]["order"]
            seconds["layer_search"] = time.perf_counter() - started - seconds["expert_search"]
        return [operations[layer] for layer in layers], {
            **self.key(),
            **record,
            "num_experts": self.num_experts,
            **(self.budget.settings() if self.budget.given else {}),
            "reused": search.reused(),
            "seconds": seconds,
        }

    def _wanted(self, model: PreTrainedModel) -> int | str | Sequence[int]:
        """How many layers, which ones, or "all"."""
        return self._layers_for(model) if self.budget.given else self.num_layers

    def _layers_for(self, model: PreTrainedModel) -> int:
        """The fewest layers whose condensing keeps the budget; all MoE layers of a model are alike."""
        block = next(iter(views.sparse_blocks(model).values()))
        need = self.budget.expert_parameters_to_remove(model)
        saved = condensing_saves(block, self, routed=self.budget.removed_expert_ratio is not None)
        most = len(views.sparse_blocks(model))
        if need > most * saved:
            raise UserError(
                f"method: the budget asks for {need:,} parameters less, but condensing all {most} MoE layers to "
                f"{self.num_experts} experts saves {most * saved:,}: {self.budget.at_best(model, most * saved)} at "
                "best; set it within that or lower method.num_experts"
            )
        return max(1, -(-need // saved)) if need else 1


def condensing_saves(block: SparseBlock, step: CDMoE, routed: bool) -> int:
    """Parameters that a layer loses when condensed: experts, router, and the shared experts' gate if it turns constant.

    Args:
        routed: count routed experts alone.
    """
    weights = block.weights
    _, hidden_size, expert_width = weights.down_EDF.shape
    kept = step.num_experts * 3 * hidden_size * expert_width
    if weights.biases() and step.num_experts:
        kept += step.num_experts * 2 * expert_width + hidden_size  # those of down_proj become one
    experts = total_parameters(block.experts) - kept
    gate = block.shared_expert_gate if step.shared_gate == "mean" else None
    others = [block.router] if gate is None else [block.router, gate]
    return experts if routed else experts + sum(map(total_parameters, others))


def condensed(block: SparseBlock, operation: Condense) -> CondensedMoE:
    """The layer that an operation would make, beside the original."""
    weights = block.weights
    token_gate = operation.shared_gate is None
    layer = CondensedMoE.shaped_for(weights, len(operation.experts), token_gate, pair=block.pair)
    return layer.fill(weights, operation.experts, operation.coefficients, operation.shared_gate)


class Search:
    """The greedy searches of one CDMoE step over one model, one tape and one cache."""

    def __init__(
        self, step: CDMoE, model: PreTrainedModel, tape: Callable[[], Tape], cache: Cache, max_scratch_bytes: int
    ) -> None:
        self.step = step
        self.model = model
        self.tape = tape
        self.cache = cache
        self.max_scratch_bytes = max_scratch_bytes
        self.blocks = views.sparse_blocks(model)
        self.orders: dict[int, dict[str, Any]] = {}  # by layer, as far as `experts` was asked for
        self.counts = {"expert orders": [0, 0], "layers of the layer order": [0, 0]}  # out of the cache, and searched

    def reused(self) -> str:
        """How much came out of the cache, in words; empty if nothing did."""
        found = [f"{cached} of {cached + new} {name}" for name, (cached, new) in self.counts.items() if cached]
        return " and ".join(found)

    def experts(self, layers: Sequence[int], failed: dict[int, str] | None = None) -> None:
        """The first num_experts of each layer's order with their scores, searched as far as the cache lacks them.

        Args:
            failed: takes what is wrong with a layer; None: it is raised.
        """
        count = self.step.num_experts
        names = {layer: f"experts-{layer:03d}" for layer in layers}
        entries, reused = layerwise(
            self.model,
            self.tape,
            self.cache,
            names,
            self._search_experts,
            "expert search",
            lambda entry: len(entry["order"]) >= count,
            failed,
        )
        self.counts["expert orders"] = [reused, len(layers) - reused]
        prefix = ("order", "js", "candidates")
        for layer, entry in entries.items():
            self.orders[layer] = {name: value[:count] if name in prefix else value for name, value in entry.items()}

    @torch.no_grad()
    def _search_experts(self, tape: Tape, layer: int, entry: dict[str, Any] | None, bar: Stage) -> dict[str, Any]:
        scorer = LayerScorer(
            self.model, tape, self.blocks[layer], self.step.shared_gate == "mean", self.max_scratch_bytes
        )
        coefficients = scorer.coefficients
        count = self.step.num_experts
        available = [expert for expert, value in enumerate(coefficients) if value is not None]
        if len(available) < count:
            raise TooFewSelected(
                f"layer {layer}: {len(available)} of {len(coefficients)} routed experts were ever selected on the "
                f"calibration set, but method.num_experts={count}; use more or longer calibration texts "
                "(data.calibration.num_samples, data.calibration.max_length) or retain fewer experts"
            )
        entry = entry or {
            "order": [],
            "js": [],
            "candidates": [],
            "js_shared_only": scorer.js_shared_only,
            **scorer.statistics(),
        }
        for expert in entry["order"]:
            scorer.add(expert)
        while len(entry["order"]) < count:
            candidates = [expert for expert in available if expert not in entry["order"]]
            if self.step.expert_search == "routing_weight":
                candidates = [max(candidates, key=lambda expert: (coefficients[expert], -expert))]
            scores = scorer.score(candidates).tolist()
            best = min(range(len(candidates)), key=lambda i: scores[i])  # min keeps the first: the lowest index
            scorer.add(candidates[best])
            entry["order"].append(candidates[best])
            entry["js"].append(scores[best])
            entry["candidates"].append([list(pair) for pair in zip(candidates, scores, strict=True)])
        return entry

    def operation(self, layer: int) -> Condense:
        entry = self.orders[layer]
        gate = entry["shared_gate_mean"] if self.step.shared_gate == "mean" else None
        coefficients = tuple(entry["coefficients"][expert] for expert in entry["order"])
        return Condense(layer=layer, experts=tuple(entry["order"]), coefficients=coefficients, shared_gate=gate)

    @torch.no_grad()
    def layers(self, operations: dict[int, Condense], count: int) -> dict[str, Any]:
        """The first `count` layers of the greedy order; one order for each number of routed experts."""
        key = f"layers-{self.step.num_experts:03d}"
        entry = self.cache.get(key) or {"order": [], "js": [], "candidates": [], "layer_runs": 0}
        cached = min(count, len(entry["order"]))
        self.counts["layers of the layer order"] = [cached, count - cached]
        if cached < count:
            tape = self.tape()
            blocks = {layer: self._condensed(operation) for layer, operation in operations.items()}
            damage = Damage(self.model, tape)
            damage.stand({layer: blocks[layer] for layer in entry["order"]})
            runs = entry["layer_runs"] - round(tape.layer_runs)
            with progress("layer search", count) as bar:
                bar.advance(cached)
                while len(entry["order"]) < count:
                    left = [layer for layer in blocks if layer not in entry["order"]]
                    scores = damage.of([Start(layer, partial(blocks.get, layer)) for layer in left])
                    best = min(range(len(left)), key=lambda place: scores[place])  # the lowest layer wins a tie
                    damage.stand({left[best]: blocks[left[best]]})
                    entry["order"].append(left[best])
                    entry["js"].append(scores[best])
                    entry["candidates"].append([list(pair) for pair in zip(left, scores, strict=True)])
                    entry["layer_runs"] = runs + round(tape.layer_runs)
                    self.cache[key] = entry
                    bar.advance()
        return {name: value[:count] if isinstance(value, list) else value for name, value in entry.items()}

    def _condensed(self, operation: Condense) -> nn.Module:
        store = layer_store(self.model)
        with store.resident(operation.layer):
            return store.offload(condensed(self.blocks[operation.layer], operation))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ranges(layers: Sequence[int]) -> str:
    """Ascending indices in words: 1-26, or 0, 2, 4."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
