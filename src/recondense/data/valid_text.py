"""What a text is: valid Unicode with something to read in it."""

from __future__ import annotations

import unicodedata

INVISIBLE = frozenset(
    {"Zs", "Zl", "Zp", "Cc", "Cf"}
)  # spaces, control characters, zero-width characters and other marks


def repair(text: str) -> str:
    """Return a text whose lone surrogates, which no tokenizer accepts, are replaced by U+FFFD; most texts have none.

    A lone surrogate is half of a character beyond U+FFFF, such as an emoji that was cut in two. Two halves that belong
    together become their character. A valid text is returned itself.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_empty(text: str) -> bool:
    """Return whether a text has no visible character."""
    return all(character.isspace() or unicodedata.category(character) in INVISIBLE for character in text)
