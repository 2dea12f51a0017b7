"""Find the best sets of experts to drop: a seeded genetic search over sets of a given size, or all sets if few.

Legend: P sets, E routed experts.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recondense.errors import UserError

Errors = Callable[[Tensor], Tensor]
ExpertSet = tuple[int, ...]
DIGITS = 6  # errors are rounded to this many digits: the others depend on how they are computed
CHUNK = 1024  # sets that an exact search scores at once
MOST_SETS = 10**7  # the most sets that an exact search tries, which takes about an hour


@dataclass(frozen=True)
class Genetic:
    """The settings of the search.

    Args:
        population: number of sets in a generation.
        iterations: number of generations.
        parents: number of the best sets that stay in the next generation and have children.
        mutation: probability that one expert of a child is exchanged for another.
        search: "genetic", "exact" (all sets), or "auto": exact if there are at most `enumerate_below` sets.
        enumerate_below: the default is as many sets as the default population and iterations score.
        memoise: never score a set twice.
    """

    population: int = 100
    iterations: int = 50
    parents: int = 20
    mutation: float = 0.5
    search: str = "auto"
    enumerate_below: int = field(default=5_000, metadata={"setting": False})
    memoise: bool = field(default=True, metadata={"setting": False})

    def problems(self) -> list[str]:
        """List the problems of these settings, as sentences."""
        problems = [
            f"method.{name}={getattr(self, name)} must be at least {least}"
            for name, least in (("population", 2), ("iterations", 1), ("parents", 2))
            if getattr(self, name) < least
        ]
        if self.parents >= self.population:
            problems.append(
                f"method.parents={self.parents} must be below method.population={self.population}: the other sets of a "
                "generation are children of the parents"
            )
        if not 0 <= self.mutation <= 1:
            problems.append(f"method.mutation={self.mutation} must lie between 0 and 1")
        if self.search not in ("auto", "genetic", "exact"):
            problems.append(f"method.search={self.search} must be auto, genetic or exact")
        return problems

    def key(self) -> dict[str, Any]:
        """Return the settings that affect the result, as JSON values."""
        names = ("population", "iterations", "parents", "mutation")
        return {**{name: getattr(self, name) for name in names}, "search_kind": self.search}

    def refuse_too_many(self, num_experts: int, num_dropped: int) -> list[str]:
        """Return a problem if an exact search would try more than MOST_SETS sets."""
        number = math.comb(num_experts, num_dropped)
        if self.search != "exact" or number <= MOST_SETS:
            return []
        return [
            f"method.search=exact: there are {number:.3g} sets of {num_dropped} of {num_experts} experts, but at most "
            f"{MOST_SETS:,} can be tried; use genetic or auto"
        ]


GENETIC = Genetic()


def layer_seed(seed: int, layer: int) -> int:
    """Return the seed of one layer, so that its result does not depend on the other layers."""
    return seed * 1_000_003 + layer


def best_sets(
    errors: Errors,
    num_experts: int,
    num_dropped: int,
    settings: Genetic,
    seed: int,
    num_best: int = 1,
    advance: Callable[[int, float], None] = lambda generation, best: None,
) -> list[tuple[ExpertSet, float]]:
    """Find the best sets of experts to drop.

    A child is drawn from the union of two parents. Then one of its experts may be exchanged for any other.

    Args:
        errors: returns the error of each row of a bool tensor (P, E) of dropped experts.
        num_experts: E.
        num_dropped: the size of a set.
        settings: the settings of the search.
        seed: the seed of the search.
        num_best: the maximum number of sets to return.
        advance: called after each generation with its number and the least error so far.

    Returns:
        Pairs (set, error), best first; equal errors in lexicographic order. A set is ascending.

    Raises:
        UserError: an exact search would try more than MOST_SETS sets.

    Reference: MoE-I², arXiv 2411.01016, section 3.1.
    """
    if num_dropped == 0:
        return [((), 0.0)]
    if problems := settings.refuse_too_many(num_experts, num_dropped):
        raise UserError(problems[0])
    number = math.comb(num_experts, num_dropped)
    if settings.search == "exact" or (settings.search == "auto" and number <= settings.enumerate_below):
        return _enumerate(errors, num_experts, num_dropped, num_best, advance)
    return _evolve(errors, num_experts, num_dropped, settings, random.Random(seed), advance)[:num_best]


def _evolve(
    errors: Errors,
    num_experts: int,
    num_dropped: int,
    settings: Genetic,
    draw: random.Random,
    advance: Callable[[int, float], None],
) -> list[tuple[ExpertSet, float]]:
    """Return all sets that the genetic search scored, best first."""
    size = min(settings.population, math.comb(num_experts, num_dropped))
    population = _first_population(size, num_experts, num_dropped, draw)
    known: dict[ExpertSet, float] = {}
    for generation in range(settings.iterations):
        fresh = [dropped for dropped in population if dropped not in known] if settings.memoise else population
        known.update(_score(errors, fresh, num_experts))
        population.sort(key=lambda dropped: (known[dropped], dropped))
        advance(generation, known[population[0]])
        if generation + 1 < settings.iterations:
            parents = population[: settings.parents]
            population = parents + _children(parents, size - len(parents), num_experts, settings.mutation, draw)
    return sorted(known.items(), key=lambda item: (item[1], item[0]))


def _first_population(size: int, num_experts: int, num_dropped: int, draw: random.Random) -> list[ExpertSet]:
    """Draw distinct sets with equal probabilities."""
    population: dict[ExpertSet, None] = {}
    while len(population) < size:
        population[tuple(sorted(draw.sample(range(num_experts), num_dropped)))] = None
    return list(population)


def _children(
    parents: Sequence[ExpertSet], number: int, num_experts: int, mutation: float, draw: random.Random
) -> list[ExpertSet]:
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
) -> list[tuple[ExpertSet, float]]:
    best: list[tuple[ExpertSet, float]] = []
    sets = itertools.combinations(range(num_experts), num_dropped)
    for generation in itertools.count():
        chunk = list(itertools.islice(sets, CHUNK))
        if not chunk:
            return best
        best = sorted([*best, *_score(errors, chunk, num_experts)], key=lambda item: (item[1], item[0]))[:num_best]
        advance(generation, best[0][1])
    raise AssertionError


def _score(errors: Errors, sets: Sequence[ExpertSet], num_experts: int) -> Iterable[tuple[ExpertSet, float]]:
    if not sets:
        return []
    dropped_PE = torch.zeros(len(sets), num_experts, dtype=torch.bool)
    dropped_PE.scatter_(1, torch.tensor(sets), True)
    return zip(sets, (float(f"{value:.{DIGITS}g}") for value in errors(dropped_PE).tolist()), strict=True)
