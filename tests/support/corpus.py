"""A fixed corpus for tests: sentences of a small grammar, the same on every machine."""

from __future__ import annotations

import random

PEOPLE = [
    "the miller",
    "an old sailor",
    "her neighbour",
    "the youngest clerk",
    "a tired doctor",
    "our teacher",
    "the night watch",
]
THINGS = [
    "a copper kettle",
    "the blue gate",
    "three letters",
    "the last lantern",
    "a map of the coast",
    "some dry wood",
    "the broken clock",
    "a basket of pears",
    "the heavy door",
    "two wet coats",
    "the parish register",
    "a pair of scissors",
]
VERBS = [
    "found",
    "carried",
    "mended",
    "sold",
    "painted",
    "forgot",
    "counted",
    "hid",
    "borrowed",
    "returned",
    "measured",
    "wrapped",
]
PLACES = [
    "behind the mill",
    "near the harbour",
    "under the stairs",
    "on the long bridge",
    "in the upper room",
    "beside the well",
    "at the edge of the field",
    "before the town hall",
]
TIMES = [
    "at noon",
    "before dawn",
    "after the storm",
    "in late autumn",
    "on market day",
    "while it snowed",
    "the week after",
]
LINKS = [
    "because nobody asked",
    "so that it would last",
    "although it was late",
    "and said nothing",
    "until the bell rang",
]


def documents(number: int = 72, characters: int = 3000) -> list[str]:
    """Different texts of about that many characters each: one sentence a line, and a blank line now and then."""
    return [_document(random.Random(seed), characters) for seed in range(number)]


def _document(draw: random.Random, characters: int) -> str:
    lines: list[str] = []
    while sum(len(line) + 1 for line in lines) < characters:
        parts = [draw.choice(PEOPLE), draw.choice(VERBS), draw.choice(THINGS)]
        parts += [draw.choice(words) for words in (PLACES, TIMES, LINKS) if draw.random() < 0.6]
        sentence = " ".join(parts)
        lines.append(sentence[0].upper() + sentence[1:] + ".")
        if draw.random() < 0.15:
            lines.append("")
    return "\n".join(lines)[:characters]
