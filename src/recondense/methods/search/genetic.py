"""Which experts of a layer to drop: a seeded genetic search over sets of one size, or all where they are few."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recondense.errors import UserError

Errors = Callable[[Tensor], Tensor]
Set = tuple[int, ...]
DIGITS = 6  # errors are compared to so many significant digits: the last ones differ between ways to compute them
CHUNK = 1024  # sets scored at once when all are
MOST_SETS = 10**7  # that an exact search tries: about an hour


@dataclass(frozen=True)
class Genetic:
    """Settings of the search.

    Args:
        population: sets in a generation.
        iterations: generations.
        parents: the best sets, which go on to the next generation and have children.
        mutation: how likely a child exchanges one of its experts for one outside.
        search: "genetic", "exact" (all sets), or "auto": all of them where they are at most `enumerate_below`.
        enumerate_below: so many sets take as long as the default population and iterations.
        memoise: score no set twice.
    """

    population: int = 100
    iterations: int = 50
    parents: int = 20
    mutation: float = 0.5
    search: str = "auto"
    enumerate_below: int = 5_000
    memoise: bool = True

    def problems(self) -> list[str]:
        """What is wrong, as sentences."""
        found = [
            f"method.{name}={getattr(self, name)} must be at least {least}"
            for name, least in (("population", 2), ("iterations", 1), ("parents", 2))
            if getattr(self, name) < least
        ]
        if self.parents >= self.population:
            found.append(
                f"method.parents={self.parents} must be below method.population={self.population}: the rest of a "
                "generation are their children"
            )
        if not 0 <= self.mutation <= 1:
            found.append(f"method.mutation={self.mutation} must lie between 0 and 1")
        if self.search not in ("auto", "genetic", "exact"):
            found.append(f"method.search={self.search} must be auto, genetic or exact")
        return found

    def endless(self, num_experts: int, num_dropped: int) -> list[str]:
        """Why an exact search of a layer would not end, as a sentence; empty if it would."""
        number = math.comb(num_experts, num_dropped)
        if self.search != "exact" or number <= MOST_SETS:
            return []
        return [
            f"method.search=exact: there are {number:.3g} sets of {num_dropped} of {num_experts} experts, and at most "
            f"{MOST_SETS:,} are tried; use genetic or auto"
        ]


def layer_seed(seed: int, layer: int) -> int:
    """One for each layer, so that what is found for a layer does not depend on the others."""
    return seed * 1_000_003 + layer


def best_sets(
    errors: Errors,
    num_experts: int,
    num_dropped: int,
    settings: Genetic,
    seed: int,
    num_best: int = 1,
    advance: Callable[[int, float], None] = lambda generation, best: None,
) -> list[tuple[Set, float]]:
    """The best sets of experts to drop.

    A child is drawn from the union of two parents, then one of its experts may be exchanged for any other (MoE-I²,
    arXiv 2411.01016, section 3.1).

    Args:
        errors: gives the error of each row of a bool tensor (P, E) of dropped experts.
        num_experts, num_dropped: E, and the size of a set.
        seed: the same seed gives the same sets.
        num_best: how many to return; fewer if there are no more.
        advance: called after each generation with its number and the least error so far.

    Returns:
        (set, error) with ascending sets, best first; the lexicographically first among equals.

    Raises:
        UserError: all sets are to be tried, and there are too many.
    """
    if num_dropped == 0:
        return [((), 0.0)]
    if problems := settings.endless(num_experts, num_dropped):
        raise UserError(problems[0])
    number = math.comb(num_experts, num_dropped)
    if settings.search == "exact" or (settings.search == "auto" and number <= settings.enumerate_below):
        return _enumerate(errors, num_experts, num_dropped, num_best, advance)
    draw = random.Random(seed)
    size = min(settings.population, number)
    population = _first_population(size, num_experts, num_dropped, draw)
    known: dict[Set, float] = {}
    for generation in range(settings.iterations):
        fresh = [each for each in population if each not in known] if settings.memoise else population
        known.update(_scored(errors, fresh, num_experts))
        population.sort(key=lambda each: (known[each], each))
        advance(generation, known[population[0]])
        if generation + 1 < settings.iterations:
            parents = population[: settings.parents]
            population = parents + _children(parents, size - len(parents), num_experts, settings.mutation, draw)
    return sorted(known.items(), key=lambda item: (item[1], item[0]))[:num_best]


def _first_population(size: int, num_experts: int, num_dropped: int, draw: random.Random) -> list[Set]:
    """Distinct sets, all equally likely."""
    population: dict[Set, None] = {}
    while len(population) < size:
        population[tuple(sorted(draw.sample(range(num_experts), num_dropped)))] = None
    return list(population)


def _children(parents: Sequence[Set], number: int, num_experts: int, mutation: float, draw: random.Random) -> list[Set]:
    children = []
    for _ in range(number):
        one, other = draw.sample(parents, 2)
        child = set(draw.sample(sorted({*one, *other}), len(one)))
        if draw.random() < mutation and len(child) < num_experts:
            leaving = draw.choice(sorted(child))
            entering = draw.choice([expert for expert in range(num_experts) if expert not in child])
            child = child - {leaving} | {entering}
        children.append(tuple(sorted(child)))
    return children


def _enumerate(
    errors: Errors, num_experts: int, num_dropped: int, num_best: int, advance: Callable[[int, float], None]
) -> list[tuple[Set, float]]:
    best: list[tuple[Set, float]] = []
    sets = itertools.combinations(range(num_experts), num_dropped)
    for generation in itertools.count():
        chunk = list(itertools.islice(sets, CHUNK))
        if not chunk:
            return best
        best = sorted([*best, *_scored(errors, chunk, num_experts)], key=lambda item: (item[1], item[0]))[:num_best]
        advance(generation, best[0][1])
    raise AssertionError


def _scored(errors: Errors, sets: Sequence[Set], num_experts: int) -> Iterable[tuple[Set, float]]:
    if not sets:
        return []
    dropped_PE = torch.zeros(len(sets), num_experts, dtype=torch.bool)
    dropped_PE.scatter_(1, torch.tensor(sets), True)
    return zip(sets, (float(f"{value:.{DIGITS}g}") for value in errors(dropped_PE).tolist()), strict=True)
