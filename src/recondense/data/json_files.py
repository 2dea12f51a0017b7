"""Read the objects of JSON files, and name what is wrong in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from recondense.config.problems import json_type
from recondense.data.file_formats import CONVERT, ENCODING, begins_with_list
from recondense.data.instruction_records import detect_form
from recondense.errors import UserError


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON file, with the numbers of their lines, or of the entries of one list; from 1.

    A file holds one value per line, one list, or a single object over several lines.

    Raises:
        UserError: it is not JSON. The message is a clause without a subject that names the line.
    """
    if begins_with_list(path):
        yield from enumerate(_whole(path), start=1)
    else:
        yield from _lines(path)


def unit(path: Path) -> str:
    """Return what the numbers of a JSON file's values count: records of its list, or lines."""
    return "record" if begins_with_list(path) else "line"


def text_of(values: Any, field: str, where: str) -> str:
    """Return the text in a field of an object; a name such as meta.text is that of a field of a field.

    Args:
        values: the object.
        field: the name of the field.
        where: the dotted name in the config of the group with text_field and form.

    Raises:
        UserError: there is no such field, or it is no text. The message is a clause without a subject.
    """
    if not isinstance(values, Mapping):
        kind = json_type(values)
        raise UserError(f'has no text in {field!r} ({kind}); write objects, such as {{{json.dumps(field)}: "..."}}.')
    refuse_repeated(values, field)
    try:
        value = field_of(values, field)
    except KeyError:
        keys = ", ".join(map(str, values))
        raise UserError(f"has no text in {field!r} (its keys: {keys}); set {_remedy(values, where)}.") from None
    if not isinstance(value, str):
        raise UserError(
            f"has no text in {field!r}, but {json_type(value)}; give it a text or remove it, or set {where}.text_field "
            "to another field."
        )
    return value


def refuse_one_object(path: Path, field: str | None = None) -> None:
    """Refuse a file that is one object with all of the records or texts in it, as lists or as columns.

    Args:
        path: a JSON file in which a text or a record was not where it should be.
        field: the name of the field of a text; None for records.

    Raises:
        UserError: it is such an object. The message is a clause without a subject.
    """
    (_, values), *more = islice(read_values(path), 2)
    if more or not isinstance(values, Mapping):
        return
    sizes = {name: len(value) for name, value in values.items() if _is_column(value)}
    if field in sizes or (sizes and len(sizes) == len(values) and len({*sizes.values()}) == 1):
        names = " and ".join(map(repr, [*sizes][:2]))
        convert = CONVERT.format("read_json", path.name)
        raise UserError(f"is one object of columns ({names}), not a list of records; {convert}.")
    lists = [name for name, value in values.items() if isinstance(value, list) and _are_records(value)]
    if lists and not _has_form(values):
        names = " and ".join(map(repr, lists[:2]))
        here = f"{names} {'are lists' if len(lists) > 1 else 'is the list'} of records"
        one = "one of these lists" if len(lists) > 1 else "that list"
        raise UserError(f"is one object, in which {here}; write {one} alone, or its records one per line.")


def _is_column(value: Any) -> bool:
    """Return whether a value is a list of values, or an object of them by their numbers, as pandas writes it."""
    if isinstance(value, Mapping):
        return bool(value) and all(key == str(number) for number, key in enumerate(value))
    return isinstance(value, list) and bool(value) and not _are_records(value)


def _are_records(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) for value in values)


def _has_form(values: Mapping[str, Any]) -> bool:
    try:
        return bool(detect_form(values))
    except UserError:
        return False


def field_of(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; a name such as meta.text is that of a field of a field, if no field has this name.

    Raises:
        KeyError: there is no such field.
    """
    if name in values:
        return values[name]
    first, _, rest = name.partition(".")
    if rest and isinstance(values.get(first), Mapping):
        return field_of(values[first], rest)
    raise KeyError(name)


def _remedy(values: Mapping[str, Any], where: str) -> str:
    form = f"{where}.form={detect_form(values)} for such records, or " if _has_form(values) else ""
    return f"{form}{where}.text_field"


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding=ENCODING) as file:
        first = True
        for number, line in enumerate(file, start=1):
            line = line.lstrip("\ufeff")  # left where files were joined
            if not line.strip():
                continue
            try:
                value = _parse(line)
            except json.JSONDecodeError as error:
                if first and line.strip()[0] == "{" and (single := _single(path)) is not None:
                    yield number, single
                    return
                raise UserError(f"line {number} is not JSON ({error.msg}); write one object per line.") from None
            except UserError as error:
                raise UserError(f"line {number} {error}") from None
            yield number, value
            first = False


def _single(path: Path) -> Any:
    """Return the object that an entire file is; None if it is none."""
    try:
        return _parse(path.read_text(encoding=ENCODING))
    except (json.JSONDecodeError, UserError):
        return None


def _whole(path: Path) -> list[Any]:
    try:
        values: list[Any] = _parse(path.read_text(encoding=ENCODING).lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        text = f"is not JSON (line {error.lineno}: {error.msg}); write a list, or one object per line."
        raise UserError(text) from None
    return values


def _parse(text: str) -> Any:
    """Return a JSON value.

    Raises:
        JSONDecodeError: it is not JSON.
        UserError: it is, but cannot be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, UserError):
        raise
    except RecursionError:
        raise UserError("is nested too deep; remove the field that is.") from None
    except ValueError:  # Python limits the digits of numbers
        raise UserError("has a number of too many digits; write it as a text.") from None


class _Repeating(dict[str, Any]):
    """An object in which a key stands more than once; the last value counts."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = {name for name in names if names.count(name) > 1}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _Repeating(pairs)


def refuse_repeated(values: Any, field: str | None = None) -> None:
    """Refuse an object that has a key twice, so that it is not clear which value is meant.

    Args:
        values: the object.
        field: the only field that is read; None for all.

    Raises:
        UserError: it has. The message is a clause without a subject.
    """
    repeated = values.repeated if isinstance(values, _Repeating) else set()
    if twice := sorted(repeated if field is None else repeated & {field, field.partition(".")[0]}):
        raise UserError(f"has the key {twice[0]!r} twice; remove one of them.")
