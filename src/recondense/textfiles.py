"""Documents of local text files: JSON lines, or plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

JSON_LINES = (".jsonl", ".ndjson", ".json")
# WikiText marks an article by a line " = Title = " (its sections have " = = ").
ARTICLE = re.compile(r"^ ?= [^=]+ = ?$")


def read_texts(path: Path, text_field: str = "text") -> Iterator[tuple[int, str]]:
    """Documents of a local file, with the line at which each starts (from 1).

    JSON lines (.jsonl, .ndjson, .json): one object a line, its `text_field` is a document; blank lines are skipped.
    Anything else is plain text: a document is an article when the file is in WikiText's form (it starts with a line
    " = Title = "), otherwise a block between blank lines.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or a line has no such field; the line is named, not the file.
    """
    reader = _json_lines if path.suffix.lower() in JSON_LINES else _plain
    try:
        yield from reader(path, text_field)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); give a file that is there and readable.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8.") from None


def documents(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Join lines to documents, each with the number of its first line: WikiText's articles, or blank-line blocks."""
    block: list[str] = []
    start, articles = 1, None
    for number, line in enumerate(lines, start=1):
        if articles is None and line.strip():
            articles = is_article(line)
        ends = is_article(line) if articles else not line.strip()
        if ends and block:
            yield start, _join(block)
            block = []
        if block or line.strip():
            start = start if block else number
            block.append(line)
    if block:
        yield start, _join(block)


def is_article(line: str) -> bool:
    """Whether a line is the title of a WikiText article."""
    return ARTICLE.match(line.rstrip("\n")) is not None


def _join(lines: list[str]) -> str:
    return "\n".join(line.rstrip("\n") for line in lines).rstrip()


def _plain(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        yield from documents(file)


def _json_lines(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg}); write one object a line.") from None
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                found = f"its keys: {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise ValueError(f"line {number} has no text under {text_field!r} ({found}); set data.text_field.")
            yield number, text
