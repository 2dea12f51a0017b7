"""Read documents of local files: JSON lines, plain text, or records of supervised fine-tuning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recondense.config.problems import Problem
from recondense.data.instruction_records import detect_form, read_record
from recondense.errors import UserError

ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
JSON_LINES = (".jsonl", ".ndjson", ".json")
# In WikiText, a line " = Title = " begins an article; sections have " = = ".
ARTICLE = re.compile(r"^ ?= [^=]+ = ?$")


@dataclass(frozen=True)
class TextFile:
    """A local file of documents, and its names in the config.

    Args:
        path: the path; may begin with ~.
        text_field, form: as for `read_texts`.
        where: the dotted name in the config of the group with text_field and form, for messages.
        setting: the setting that names the file, for messages.
    """

    path: str
    text_field: str
    form: str | None
    where: str
    setting: str

    def read(self, limit: int | None = None, *, keep_empty: bool = False) -> list[tuple[int, str]]:
        """Return the first documents, each with the number of its first line.

        Args:
            limit: the maximum number of documents; None for all.
            keep_empty: also return empty documents.

        Raises:
            UserError: the file does not exist, cannot be read, or has no document.
        """
        documents, problems = self.check(limit, keep_empty=keep_empty)
        if problems:
            raise UserError(str(problems[0]))
        return documents

    def check(
        self, limit: int | None = None, *, keep_empty: bool = False
    ) -> tuple[list[tuple[int, str]], list[Problem]]:
        """Read documents like `read`, but return an error as a list with one problem."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            return [], [self.problem(f"{'is a folder; give a file' if path.is_dir() else 'there is no such file'}.")]
        try:
            texts = read_texts(path, self.text_field, self.form, self.where)
            documents = list(islice((text for text in texts if text[1] or keep_empty), limit))
        except UserError as error:
            return [], [self.problem(str(error))]
        return documents, [] if documents else [
            self.problem("the file has no text; give a file with at least one document.")
        ]

    def problem(self, text: str) -> Problem:
        """Return a Problem with the file's setting and path."""
        return Problem(self.setting, text, self.path)


def read_texts(
    path: Path, text_field: str = "text", form: str | None = None, where: str = "data"
) -> Iterator[tuple[int, str]]:
    """Yield the documents of a local file, each with the number of its first line (from 1).

    JSON lines (.jsonl, .ndjson, .json) have one object per line, whose `text_field` is a document; blank lines are
    skipped. Any other file is plain text. In WikiText's format (the first line is " = Title = ") a document is an
    article; otherwise it is a paragraph, ended by a blank line.

    Args:
        path: the file.
        text_field: the field of a JSON object that is a document; not used with `form`.
        form: the form of the file's records (see instruction_records.py), which are one per line or all in one JSON
            list; "auto" for the form of the first record. Each document is then a `Record`. In a list, its number
            counts records.
        where: the dotted name in the config of the group with text_field and form, for messages.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or a line does not have the field or is not such a record.
            The message names the line, not the file.
    """
    try:
        if form is not None:
            yield from _records(path, form, where)
        elif path.suffix.lower() in JSON_LINES:
            yield from _json_lines(path, text_field, where)
        else:
            yield from _plain(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); give a readable file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8.") from None


def split_documents(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Join lines into documents, articles of WikiText or paragraphs; yield each with the number of its first line."""
    document: list[str] = []
    start, articles = 1, None
    for number, line in enumerate(lines, start=1):
        if articles is None and line.strip():
            articles = is_article(line)
        ends = is_article(line) if articles else not line.strip()
        if ends and document:
            yield start, _join(document)
            document = []
        if document or line.strip():
            start = start if document else number
            document.append(line)
    if document:
        yield start, _join(document)


def is_article(line: str) -> bool:
    """Return whether a line is the title of a WikiText article."""
    return ARTICLE.match(line.rstrip("\n")) is not None


def _join(lines: list[str]) -> str:
    return "\n".join(line.rstrip("\n") for line in lines).rstrip()


def _plain(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding=ENCODING) as file:
        yield from split_documents(file)


def _json_lines(path: Path, text_field: str, where: str) -> Iterator[tuple[int, str]]:
    for number, record in _objects(path):
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            content = f"its keys: {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"line {number} has no text in {text_field!r} ({content}); set {where}.text_field.")
        yield number, text


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON value of each line, with the line's number."""
    with path.open(encoding=ENCODING) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} is not JSON ({error.msg}); write one object per line.") from None
            yield number, value


def _records(path: Path, form: str, where: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding=ENCODING) as file:
        listed = file.read(4096).lstrip().startswith("[")
    rows = enumerate(_list(path), start=1) if listed else _objects(path)
    for number, values in rows:
        try:
            if form == "auto" and isinstance(values, dict):
                form = detect_form(values)
            yield number, read_record(values, form)
        except UserError as error:
            what = "record" if listed else "line"
            raise UserError(f"{what} {number} {error}; fix it, or set {where}.form to the form of the file.") from None


def _list(path: Path) -> list[Any]:
    try:
        records: list[Any] = json.loads(path.read_text(encoding=ENCODING))
    except json.JSONDecodeError as error:
        text = f"is not JSON (line {error.lineno}: {error.msg}); write a list, or one object per line."
        raise UserError(text) from None
    return records
