"""CD-MoE with a budget: how many layers are condensed, and how many experts each of them retains.

As few layers are condensed to `num_experts` experts as meet the budget. They save more than the budget requires, by up
to a layer. What remains of the budget is given back as further experts: a condensed layer retains the next expert of
its order. The result is below the budget by less than one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from recondense.files import fingerprint
from recondense.methods.search.cdmoe_search import CondenseSearch, condensed_block
from recondense.methods.search.damage import Damage
from recondense.methods.search.rerun import Change
from recondense.methods.step import Record
from recondense.progress import progress

ROUNDS = 16  # all experts of a layer are given out in as many rounds; each measures every condensed layer once


def fewest(saved: Sequence[int], need: int) -> int:
    """Return how many of the first layers together save at least `need` parameters; one more than all if none do."""
    total = 0
    for count, saving in enumerate(saved):
        if total >= need:
            return count
        total += saving
    return len(saved) if total >= need else len(saved) + 1


def spread_evenly(room: Mapping[int, int], total: int) -> dict[int, int]:
    """Give out experts to layers one by one, in turns.

    Args:
        room: how many experts each layer can take.
        total: the number of experts to give out; what no layer can take remains.

    Returns:
        The number that each layer gets.
    """
    numbers = dict.fromkeys(room, 0)
    while total > 0 and (able := [layer for layer in room if numbers[layer] < room[layer]]):
        for layer in able[:total]:
            numbers[layer] += 1
        total -= len(able[:total])
    return numbers


class Remainder:
    """Gives further experts to condensed layers, each time to the layer where they lower the damage most per expert.

    Experts of all layers have the same size, so this is also the most per byte. A layer gets its next experts in the
    order of the expert search. The damage is measured as in the layer search, with the experts so far in all layers.
    Layers with many experts get several at a time, so that there are about `ROUNDS` rounds.

    Args:
        search: the search that has chosen the layers; it lengthens its orders.
        layers: the condensed layers, in the order in which they were chosen.
        damage: the damage with `search.num_experts` experts in each of them.
    """

    def __init__(self, search: CondenseSearch, layers: Sequence[int], damage: float) -> None:
        self.search = search
        self.numbers = dict.fromkeys(layers, search.num_experts)
        self._js = damage
        self._damage: Damage | None = None  # made when something must be measured

    def give(self, total: int) -> Record:
        """Give out experts until there are no more, or until the layers retain all experts that are ever selected.

        Args:
            total: the number of experts to give out.

        Returns:
            For each round the layer that got experts, their number, the damage afterwards, and the damages of all
            layers; and the number of experts that no layer could take.
        """
        most = max((self.search.blocks[layer].num_experts for layer in self.numbers), default=0)
        step = max(1, -(-(most - self.search.num_experts) // ROUNDS))
        record: Record = {"order": [], "experts": [], "js": [], "candidates": []}
        remaining = total
        with progress("experts for the rest of the budget", total) as bar:
            while remaining and (given := self._possible(min(step, remaining))):
                layers, scores = list(given), self._measure(given, remaining)
                best = min(layers, key=lambda layer: (scores[layer] - self._js) / given[layer])
                remaining -= given[best]
                self._retain(best, given[best], scores[best])
                record["order"].append(best)
                record["experts"].append(given[best])
                record["js"].append(scores[best])
                record["candidates"].append([[layer, scores[layer]] for layer in layers])
                bar.advance(given[best])
        self.search.shorten(self.numbers)
        return {**record, "not_given": remaining}

    def _possible(self, step: int) -> dict[int, int]:
        """Return how many experts each layer can get, the lowest layer first; a layer that can get none is absent."""
        room = {layer: self.search.selected(layer) - number for layer, number in sorted(self.numbers.items())}
        return {layer: min(step, experts) for layer, experts in room.items() if experts > 0}

    def _measure(self, given: Mapping[int, int], remaining: int) -> dict[int, float]:
        """Measure the damage with further experts in each layer, or read it from the cache."""
        self._lengthen(given, remaining)
        name = f"more-{fingerprint(sorted(self.numbers.items()), sorted(given.items()))}{self.search.suffix}"
        record = self.search.context.cache.get(name)
        if record is None:
            record = {"js": self._damages().measure([self._change(layer, given[layer]) for layer in given])}
            self.search.context.cache[name] = record
        return dict(zip(given, record["js"], strict=True))

    def _lengthen(self, given: Mapping[int, int], remaining: int) -> None:
        """Make the orders long enough for the next experts. What is searched at once doubles every time."""
        lengths = {}
        for layer, step in given.items():
            number = self.numbers[layer] + step
            if number > len(self.search.records[layer]["order"]):
                ahead = min(2 * number - self.search.num_experts, self.numbers[layer] + remaining)
                lengths[layer] = min(ahead, self.search.selected(layer))
        self.search.lengthen(lengths)

    def _change(self, layer: int, step: int) -> Change:
        operation = self.search.operation(layer, self.numbers[layer] + step)
        return Change(layer, partial(condensed_block, self.search.blocks[layer], operation))

    def _damages(self) -> Damage:
        if self._damage is None:
            self._damage = Damage(self.search.context.model, self.search.context.tape())
            self._damage.put({layer: self._block(layer) for layer in self.numbers})
        return self._damage

    def _retain(self, layer: int, step: int, damage: float) -> None:
        self.numbers[layer] += step
        self._js = damage
        if self._damage is not None:
            self._damage.put({layer: self._block(layer)})

    def _block(self, layer: int) -> nn.Module:
        return self.search.make_block(self.search.operation(layer, self.numbers[layer]))
