"""Read documents of local files: JSON lines, plain text, or records of supervised fine-tuning."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from recondense.config.problems import Problem
from recondense.data.file_formats import ENCODING, bad_byte, refuse_json, refuse_other_formats, require_file
from recondense.data.instruction_records import Record, detect_form, read_record
from recondense.data.json_files import read_values, refuse_one_object, refuse_repeated, text_of, unit
from recondense.data.valid_text import is_empty, repair
from recondense.errors import UserError

log = logging.getLogger(__name__)
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
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
        """Return the first documents, each with the number of its first line. Lone surrogates become U+FFFD.

        Args:
            limit: the maximum number of documents; None for all.
            keep_empty: also return documents without a visible character.

        Raises:
            UserError: the file does not exist, cannot be read, or has no document.
        """
        documents, problems = self.check(limit, keep_empty=keep_empty)
        if problems:
            raise UserError(str(problems[0]))
        repaired = [
            (number, text.repaired() if isinstance(text, Record) else repair(text)) for number, text in documents
        ]
        count = sum(text is not before for (_, text), (_, before) in zip(repaired, documents, strict=True))
        if count:
            log.info("%s", self.problem(f"{count} texts had lone surrogates, halves of characters; now U+FFFD"))
        return repaired

    def check(
        self, limit: int | None = None, *, keep_empty: bool = False
    ) -> tuple[list[tuple[int, str]], list[Problem]]:
        """Read documents like `read`, but return an error as a list with one problem, and texts as they are."""
        try:
            texts = read_texts(require_file(self.path), self.text_field, self.form, self.where)
            documents = list(islice((text for text in texts if keep_empty or not is_empty(text[1])), limit))
        except UserError as error:
            return [], [self.problem(str(error))]
        return documents, [] if documents else [
            self.problem("the file has no text; give a file with at least one document.")
        ]

    def place(self, number: int) -> str:
        """Return the words for the place of a document in the file, from its number: a line, or a record of a list."""
        path = require_file(self.path)
        return f"{unit(path) if _is_json(path, self.form) else 'line'} {number}"

    def problem(self, text: str) -> Problem:
        """Return a Problem with the file's setting and path."""
        return Problem(self.setting, text, self.path)


def read_texts(
    path: Path, text_field: str = "text", form: str | None = None, where: str = "data"
) -> Iterator[tuple[int, str]]:
    """Yield the documents of a local file, each with the number of its first line (from 1).

    JSON files (.jsonl, .ndjson, .jsonlines, .json) have one object per line, whose `text_field` is a document, or are
    one list of such objects; blank lines are skipped. Any other file is plain text. In WikiText's format (the first
    line is " = Title = ") a document is an article; otherwise it is a paragraph, ended by a blank line.

    Args:
        path: the file.
        text_field: the field of a JSON object that is a document; not used with `form`.
        form: the form of the file's records (see instruction_records.py), which are one per line or all in one JSON
            list; "auto" for the form of the first record. Each document is then a `Record`. In a list, its number
            counts records.
        where: the dotted name in the config of the group with text_field and form, for messages.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or has another format, or a line does not have the field or is
            not such a record. The message names the line, not the file.
    """
    try:
        refuse_other_formats(path)
        if form is not None:
            yield from _records(path, form, where)
        elif _is_json(path, form):
            yield from _json_texts(path, text_field, where)
        else:
            refuse_json(path)
            yield from _plain(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); give a readable file.") from None
    except UnicodeDecodeError:
        raise bad_byte(path) from None


def _is_json(path: Path, form: str | None) -> bool:
    return form is not None or path.suffix.lower() in JSON_LINES


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
        yield from split_documents(_without_nul(file))


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(f"line {number} has a NUL character, which text has not; is it a file of another format?")
        yield line


def _json_texts(path: Path, text_field: str, where: str) -> Iterator[tuple[int, str]]:
    what = unit(path)
    for number, values in read_values(path):
        try:
            yield number, text_of(values, text_field, where)
        except UserError as error:
            refuse_one_object(path, text_field)
            raise UserError(f"{what} {number} {error}") from None


def _records(path: Path, form: str, where: str) -> Iterator[tuple[int, str]]:
    what = unit(path)
    for number, values in read_values(path):
        try:
            refuse_repeated(values)
        except UserError as error:
            raise UserError(f"{what} {number} {error}") from None
        try:
            if form == "auto" and isinstance(values, dict):
                form = detect_form(values)
            yield number, read_record(values, form, f"{path}, {what} {number}")
        except UserError as error:
            refuse_one_object(path)
            remedy = f"fix it, or set {where}.form to the form of the file."
            raise UserError(f"{what} {number} {error}; {remedy}") from None
