"""CD-MoE's greedy searches: the order of the experts of each layer, and the order of the layers (arXiv 2412.00069).

The expert search treats each MoE layer independently. A layer's output is linear in its experts' outputs, so one pass
over the calibration set gives every candidate's difference from the original. The layer search reruns only the layers
above a candidate. A prefix of an order is the result for a smaller number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.methods.search.cdmoe_scoring import LayerScorer
from recondense.methods.search.coefficients import LayerRouting, coefficient_texts, measure_routing
from recondense.methods.search.damage import Damage
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.rerun import Change
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.layer_store import layer_store
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import CondensedMoE
from recondense.operations import Condense
from recondense.progress import progress

BY_EXPERT = ("order", "js", "candidates")  # entries of a layer's record that have one value per retained expert


def condensed_block(block: SparseBlock, operation: Condense) -> CondensedMoE:
    """Make the condensed block of an operation, without changing the original."""
    weights = block.weights
    token_gate = operation.shared_gate is None
    condensed = CondensedMoE.make_empty(weights, len(operation.experts), token_gate, pair=block.pair)
    return condensed.fill(weights, operation.experts, operation.coefficients, operation.shared_gate)


class CondenseSearch:
    """Searches for the experts to retain and the layers to condense.

    Args:
        context: the model, its tape and the cache.
        num_experts, shared_gate, expert_search, coefficient_max_length: as in `CDMoE`.

    Attributes:
        records: for each layer, the order of the first `num_experts` experts, with scores and routing statistics.
    """

    def __init__(
        self,
        context: SearchContext,
        num_experts: int,
        shared_gate: str,
        expert_search: str,
        coefficient_max_length: int | None = None,
    ) -> None:
        self.context = context
        self.num_experts = num_experts
        self.mean_gate = shared_gate == "mean"
        self.expert_search = expert_search
        self.blocks = moe_blocks.sparse_blocks(context.model)
        self.texts = coefficient_texts(context, coefficient_max_length)
        self.suffix = "" if self.texts is None else self.texts.suffix
        self._routing: Mapping[int, LayerRouting] = {}  # empty: the routing on the tape
        self.records: dict[int, Record] = {}
        self._counts: dict[str, tuple[int, int]] = {}  # by what was searched: results from the cache, all results

    def describe_reuse(self) -> str:
        """Describe in words how many results came from the cache; empty if none did."""
        return " and ".join(f"{cached} of {total} {name}" for name, (cached, total) in self._counts.items() if cached)

    def describe_texts(self) -> Record:
        """Return an entry for the plan about the texts of the coefficients; empty if they are those of the tape."""
        return {} if self.texts is None else {"coefficient_texts": self.texts.describe()}

    def search_experts(self, layers: Sequence[int], allow_too_few: bool = False) -> None:
        """Search for the order of each layer's experts, or read it from the cache, and store it in `records`.

        Args:
            layers: decoder-layer indices.
            allow_too_few: accept layers in which too few experts are ever selected; they get no order, see `problem`.

        Raises:
            UserError: too few experts of a layer are ever selected on the calibration set.
        """
        if self.texts is not None and layers:
            self._routing = measure_routing(self.context, self.texts)
        reused = self._search_orders(dict.fromkeys(layers, self.num_experts), allow_too_few)
        self._counts["expert orders"] = reused, len(layers)

    def lengthen(self, numbers: Mapping[int, int]) -> None:
        """Search further in the orders of layers that `search_experts` has searched.

        Args:
            numbers: the length of the order by layer; at most `selected` of it.
        """
        longer = {layer: number for layer, number in numbers.items() if number > len(self.records[layer]["order"])}
        if longer:
            self._search_orders(longer)

    def shorten(self, numbers: Mapping[int, int]) -> None:
        """Keep only the first experts of the orders in `records`; the number of them by layer."""
        for layer, number in numbers.items():
            self.records[layer] = _first(self.records[layer], number)

    def selected(self, layer: int) -> int:
        """Return how many experts of a searched layer are ever selected; an order has no other experts."""
        return _selected(self.records[layer])

    def _search_orders(self, numbers: Mapping[int, int], allow_too_few: bool = False) -> int:
        """Search for orders of these lengths, by layer; return how many of them the cache had."""

        def work(task: LayerTask) -> Record:
            return self._search_layer(task, numbers[task.layer], allow_too_few)

        def complete(layer: int, record: Record) -> bool:
            number = numbers[layer]
            return len(record["order"]) >= number or (allow_too_few and bool(_too_few(record, number)))

        search = LayerwiseSearch(self.context)
        names = {layer: f"experts-{layer:03d}{self.suffix}" for layer in numbers}
        records = search.per_layer(names, work, "expert search", complete)
        self.records |= {layer: _first(record, numbers[layer]) for layer, record in records.items()}
        return search.reused

    def problem(self, layer: int) -> str:
        """Return why there is no operation for a searched layer; empty if there is one."""
        problem = _too_few(self.records[layer], self.num_experts)
        return f"layer {layer}: {problem}" if problem else ""

    def loses_protected(self, layer: int) -> bool:
        """Return whether the operation of a searched layer would lose super experts."""
        return not self.context.protected.get(layer, frozenset()) <= set(self.records[layer]["order"])

    def operation(self, layer: int, number: int | None = None) -> Condense:
        """Return the operation that condenses a searched layer to the first experts of its order; by default to all."""
        record = self.records[layer]
        gate = record["shared_gate_mean"] if self.mean_gate else None
        experts = tuple(record["order"][:number])
        coefficients = tuple(record["coefficients"][expert] for expert in experts)
        return Condense(layer=layer, experts=experts, coefficients=coefficients, shared_gate=gate)

    def make_block(self, operation: Condense) -> nn.Module:
        """Make the condensed block of an operation, with its weights where the model keeps those of its layers."""
        model = self.context.model
        with layer_store(model).resident(operation.layer):
            return layer_store(model).offload(condensed_block(self.blocks[operation.layer], operation))

    @torch.no_grad()
    def search_layers(self, operations: dict[int, Condense], count: int) -> Record:
        """Search for the first `count` layers of the greedy order, or read them from the cache.

        Layers that would lose super experts come last.

        Args:
            operations: the operation of each layer to choose from.
            count: number of layers to choose.

        Returns:
            The order of the layers, the scores of all candidates, and the number of layer runs.
        """
        last = [layer for layer in operations if self.loses_protected(layer)]
        candidates = f"-{fingerprint(sorted(operations), last)}" if last or len(operations) < len(self.blocks) else ""
        name = f"layers-{self.num_experts:03d}{candidates}{self.suffix}"  # one order for each number of experts
        record = self.context.cache.get(name) or {"order": [], "js": [], "candidates": [], "layer_runs": 0}
        cached = min(count, len(record["order"]))
        self._counts["layers of the layer order"] = cached, count
        if cached < count:
            self._extend_layer_order(record, name, operations, count, last)
        return {name: value[:count] if isinstance(value, list) else value for name, value in record.items()}

    @torch.no_grad()
    def _search_layer(self, task: LayerTask, number: int, allow_too_few: bool) -> Record:
        scorer = LayerScorer.prepare(
            self.context.model,
            task.tape,
            self.blocks[task.layer],
            self.mean_gate,
            self.context.max_scratch_bytes,
            self._routing.get(task.layer),
        )
        record = task.cached or {
            "order": [],
            "js": [],
            "candidates": [],
            "js_shared_only": scorer.js_shared_only,
            **scorer.statistics(),
        }
        if problem := _too_few(record, number):
            if allow_too_few:
                return record
            raise UserError(f"layer {task.layer}: {problem}")
        coefficients = scorer.coefficients
        for expert in record["order"]:
            scorer.add(expert)
        while len(record["order"]) < number:
            candidates = [
                expert
                for expert, coefficient in enumerate(coefficients)
                if coefficient is not None and expert not in record["order"]
            ]
            protected = [expert for expert in candidates if expert in self.context.protected.get(task.layer, ())]
            if protected:  # super experts come first
                candidates = protected[:1]
            elif self.expert_search != "greedy":
                values = coefficients if self.expert_search == "routing_weight" else scorer.routing.selected
                candidates = [max(candidates, key=lambda expert: (values[expert], -expert))]
            scores = scorer.score(candidates).tolist()
            best = min(range(len(candidates)), key=lambda i: scores[i])  # min keeps the first: the lowest index
            scorer.add(candidates[best])
            _append(record, candidates, scores, best)
        return record

    def _extend_layer_order(
        self, record: Record, name: str, operations: dict[int, Condense], count: int, last: Sequence[int]
    ) -> None:
        """Add layers to the order until it has `count`, those of `last` after all others; cache it each time."""
        tape = self.context.tape()
        blocks = {layer: self.make_block(operation) for layer, operation in operations.items()}
        damage = Damage(self.context.model, tape)
        damage.put({layer: blocks[layer] for layer in record["order"]})
        runs = record["layer_runs"] - round(tape.layer_runs)
        with progress("layer search", count) as bar:
            bar.advance(len(record["order"]))
            while len(record["order"]) < count:
                remaining = [layer for layer in blocks if layer not in record["order"]]
                layers = [layer for layer in remaining if layer not in last] or remaining
                scores = damage.measure([Change(layer, partial(blocks.get, layer)) for layer in layers])
                best = min(range(len(layers)), key=lambda i: scores[i])  # the lowest layer wins a tie
                damage.put({layers[best]: blocks[layers[best]]})
                _append(record, layers, scores, best)
                record["layer_runs"] = runs + round(tape.layer_runs)
                self.context.cache[name] = record
                bar.advance()


def _append(record: Record, candidates: Sequence[int], scores: Sequence[float], best: int) -> None:
    """Append the best candidate to the order, with the scores of all candidates."""
    record["order"].append(candidates[best])
    record["js"].append(scores[best])
    record["candidates"].append([list(pair) for pair in zip(candidates, scores, strict=True)])


def _first(record: Record, number: int) -> Record:
    """Return the record of a layer with only the first experts of its order."""
    return {name: value[:number] if name in BY_EXPERT else value for name, value in record.items()}


def _selected(record: Record) -> int:
    return sum(value is not None for value in record["coefficients"])


def _too_few(record: Record, number: int) -> str:
    """Return why an order cannot have this number of experts; empty if it can."""
    if (available := _selected(record)) >= number:
        return ""
    return (
        f"the calibration set selects only {available} of {len(record['coefficients'])} routed experts, but "
        f"method.num_experts={number}; use more or longer calibration texts "
        "(data.calibration.num_samples, data.calibration.max_length) or retain fewer experts"
    )
