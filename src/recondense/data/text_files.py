"""Documents of local files: JSON lines, plain text, or records of supervised fine-tuning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recondense.data.records import form_of, read_record
from recondense.errors import UserError

ENCODING = "utf-8-sig"  # UTF-8, with the mark at its head that some programs write
JSON_LINES = (".jsonl", ".ndjson", ".json")
# WikiText marks an article by a line " = Title = " (its sections have " = = ").
ARTICLE = re.compile(r"^ ?= [^=]+ = ?$")


def read_texts(path: Path, text_field: str = "text", form: str | None = None) -> Iterator[tuple[int, str]]:
    """Documents of a local file, with the line at which each starts (from 1).

    JSON lines (.jsonl, .ndjson, .json): one object a line, its `text_field` is a document; blank lines are skipped.
    Anything else is plain text: a document is an article when the file is in WikiText's form (it starts with a line
    " = Title = "), otherwise a block between blank lines.

    Args:
        form: of the file's records (see instructions.py), one a line or all in one JSON list, in place of texts: each
            is a `Record`, and its number counts records where they are in a list. auto: what the first one is.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or a line has no such field or is no such record; the line is
            named, not the file.
    """
    try:
        if form is not None:
            yield from _records(path, form)
        elif path.suffix.lower() in JSON_LINES:
            yield from _json_lines(path, text_field)
        else:
            yield from _plain(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); give a file that is there and readable.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8.") from None


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


def _plain(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding=ENCODING) as file:
        yield from documents(file)


def _json_lines(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    for number, record in _objects(path):
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = f"its keys: {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"line {number} has no text under {text_field!r} ({found}); set data.text_field.")
        yield number, text


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """What each line of a file holds, with its number."""
    with path.open(encoding=ENCODING) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} is not JSON ({error.msg}); write one object a line.") from None
            yield number, found


def _records(path: Path, form: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding=ENCODING) as file:
        listed = file.read(4096).lstrip().startswith("[")
    rows = enumerate(_list(path), start=1) if listed else _objects(path)
    for number, values in rows:
        try:
            if form == "auto" and isinstance(values, dict):
                form = form_of(values)
            yield number, read_record(values, form)
        except UserError as error:
            what = "record" if listed else "line"
            raise UserError(f"{what} {number} {error}; mend it, or set data.form to what the file holds.") from None


def _list(path: Path) -> list[Any]:
    try:
        found: list[Any] = json.loads(path.read_text(encoding=ENCODING))
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON (line {error.lineno}: {error.msg}); write a list or one object a line.") from None
    return found
