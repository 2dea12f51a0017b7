"""Words and line breaks of any script, also of those that are written without blanks."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby

WORD = re.compile(r"[^\W\d_]{2,}")
# Scripts that put no blanks between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han. A run of them is many words.
WITHOUT_BLANKS = re.compile(
    "[\u0e01-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3021-\u3029"
    "\u3031-\u3035\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
JOINERS = "\u200d\ufe0e\ufe0f"  # they belong to the symbols on both sides, or to the one before
SKIN = range(0x1F3FB, 0x1F400)  # skin tones, which belong to the emoji before


def words(line: str) -> set[str]:
    """Return the different words of a line: two letters or more with their marks, or a character without blanks."""
    if line.isascii():
        return set(WORD.findall(line))
    runs = ((kind, "".join(run)) for kind, run in groupby(line, key=_kind))
    letters = {run for kind, run in runs if kind == "letter" and len(run) > 1}
    return letters | {character for character in line if _kind(character) == "word"}


@cache
def _kind(character: str) -> str:
    if WITHOUT_BLANKS.match(character):
        return "word" if unicodedata.category(character).startswith("L") else "mark"
    return "letter" if character.isalpha() or unicodedata.category(character).startswith("M") else ""


def width(text: str) -> int:
    """Return the columns of a text: two for an ideograph, which says as much as several letters, otherwise one."""
    return len(text) if text.isascii() else sum(map(_columns, text))


@cache
def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(line: str, columns: int) -> list[str]:
    """Break a line that is too long at blanks, and where there are none between characters that need none."""
    if not any(map(_breaks, line)):
        return textwrap.wrap(line, columns, break_long_words=False, break_on_hyphens=False)
    lines = [""]
    for piece in _pieces(line):
        if lines[-1] and width(lines[-1]) + width(piece.rstrip()) > columns:
            lines.append("")
        lines[-1] += piece
    return [stripped for text in lines if (stripped := text.strip())]


@cache
def _breaks(character: str) -> bool:
    """Return whether a line may be broken beside a character: one of a script without blanks, or a symbol."""
    if character.isascii():
        return False
    return WITHOUT_BLANKS.match(character) is not None or unicodedata.category(character) == "So"


def _pieces(line: str) -> Iterator[str]:
    """Yield what must stay on one line: words with the blanks after them, and characters with their marks."""
    piece = ""
    for character in line:
        if piece and _begins(piece, character):
            yield piece
            piece = ""
        piece += character
    if piece:
        yield piece


def _begins(piece: str, character: str) -> bool:
    """Return whether a character begins a piece after another one."""
    category = unicodedata.category(character)
    if character in JOINERS or piece[-1] == "\u200d" or category[0] in "MZ" or ord(character) in SKIN:
        return False
    if category in ("Pe", "Pf", "Po") and not character.isascii():  # closing marks do not begin a line
        return False
    return piece[-1].isspace() or _breaks(character) or _breaks(piece[-1])
