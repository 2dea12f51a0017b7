"""What callers give as texts and as lengths, checked before it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from recondense.data.valid_text import repair
from recondense.errors import UserError

log = logging.getLogger(__name__)


def list_texts(texts: Iterable[str]) -> list[str]:
    """Return texts as a list. Lone surrogates, which no tokenizer accepts, become U+FFFD, and are counted in the log.

    Args:
        texts: any iterable of strings, such as a list or a generator; but not one string, whose items are characters.

    Raises:
        UserError: it is one text, or something in it is not a text.
    """
    if isinstance(texts, str):
        raise UserError("texts is one text; give a list of texts, such as [text].")
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise UserError(f"texts is a {type(texts).__name__}; give a list of texts.")
    documents = list(texts)
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise UserError(f"texts[{index}] is a {type(text).__name__}, not a text (str); give a list of texts.")
    repaired = [repair(text) for text in documents]
    if count := sum(text is not before for text, before in zip(repaired, documents, strict=True)):
        log.info("%d of %d texts had lone surrogates, halves of characters; now U+FFFD", count, len(documents))
    return repaired


def require_number(name: str, value: Any, least: int) -> None:
    """Check a whole number.

    Raises:
        UserError: it is not a whole number, or it is below `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise UserError(f"{name}={value}: it must be a whole number, at least {least}.")
