"""Words, widths and line breaks of scripts with and without blanks."""

from __future__ import annotations

import textwrap

import pytest

from recondense.evaluation.words import WORD, width, words, wrap

ENGLISH = "return None, x1 = compute_all(the_number, 12) or don't"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("two words", {"two", "words"}),
        ("a I 12 -- __", set()),
        (ENGLISH, set(WORD.findall(ENGLISH))),
        ("Größe über Maß", {"Größe", "über", "Maß"}),
        ("Gro\u0308\u00dfe", {"Gro\u0308\u00dfe"}),  # the mark is a character of its own
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u0940", {"\u0939\u093f\u0928\u094d\u0926\u0940", "\u0915\u0940"}),
        ("\u0645\u064e\u0631\u0652\u062d\u064e \u0648", {"\u0645\u064e\u0631\u0652\u062d\u064e"}),
        ("\u4f60\u597d\u3002", {"\u4f60", "\u597d"}),
        ("\u65e5\u672c\u306e\u30ab\u30ca", set("\u65e5\u672c\u306e\u30ab\u30ca")),
        ("\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27", set("\u0e01\u0e19\u0e02\u0e32\u0e27")),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", {"\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"}),
        ("\U0001f600\U0001f601\U0001f602", set()),
        ("\u0661\u0662\u0663 \u0967\u0968 123", set()),
        ("\u2500\u2502\u250c", set()),
    ],
)  # fmt: skip
def test_words(line: str, expected: set[str]) -> None:
    assert words(line) == expected


def test_widths() -> None:
    assert (width("abc"), width("\u00e4bc"), width("\u4f60\u597d"), width("\uff41a")) == (3, 3, 4, 3)


PROSE = "It is a truth universally acknowledged, that a single man in possession of a good fortune " * 4


@pytest.mark.parametrize("line", [PROSE, "x" * 300, "a-b " * 90, PROSE.replace("a", "\u00e4"), "\u0928\u093f " * 90])
def test_lines_with_blanks_break_at_blanks(line: str) -> None:
    expected = textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False)
    assert wrap(line, 100) == expected


@pytest.mark.parametrize(
    "line",
    [
        "\u4f60\u597d\u4e16\u754c\u3002" * 60,
        "\u3072\u3089\u304c\u306a\u30ab\u30bf\u30ab\u30ca" * 40,
        "\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27\u0e41\u0e25\u0e49\u0e27" * 40,
        "\u1781\u17d2\u1798\u17c2\u179a" * 60,
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f44d\U0001f3fd\u2764\ufe0f" * 40,
        "\u6df7\u5728 mixed \u4e00\u8d77 words \u548c\u6587\u5b57 " * 20,
    ],
)
def test_lines_without_blanks_break_between_characters(line: str) -> None:
    lines = wrap(line, 100)
    assert len(lines) > 2 and all(0 < width(part) <= 106 for part in lines)
    assert "".join("".join(lines).split()) == "".join(line.split())
    for part in lines:  # nothing begins with what belongs to the character before
        assert part[0] not in "\u200d\ufe0f\u3002\u0e34\u0e49\u17d2\u17c2" and part[-1] != "\u200d"
        assert not 0x1F3FB <= ord(part[0]) <= 0x1F3FF
