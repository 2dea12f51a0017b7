"""Validate plain containers with pydantic: types, ranges and unknown names, all problems together, in plain words."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from recondense.config.problems import Problem, reads_as_other, show, suggestion
from recondense.config.types import Number, Switch, Whole

Group = TypeVar("Group")
Place = tuple[str | int, ...]  # the keys and indices that lead to a value
STRICT: dict[Any, Any] = {int: Whole, float: Number, bool: Switch}
NAMES = {int: "a whole number", float: "a finite number", str: "a string"}
LISTS = (tuple, list, Sequence)  # origins of the annotations of lists
UNKNOWN = "unexpected_keyword_argument"
BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def validated(kind: type[Group], values: Any, where: str = "") -> tuple[Group, list[Problem]]:
    """Return an instance of a dataclass, and the problems of its values; invalid values are replaced by defaults.

    Args:
        kind: the dataclass.
        values: plain containers.
        where: the dotted name of `values` in the config.
    """
    if not isinstance(values, Mapping):
        return kind(), [Problem(where, "expected a group of settings.", values)]
    problems: list[Problem] = []
    while True:
        try:
            return _adapter(cast(Hashable, kind)).validate_python(values), problems
        except ValidationError as error:
            mistakes = _mistakes(error, kind, values)
            problems += [mistake.problem(_name(where, mistake.place)) for mistake in mistakes]
            values = _without(values, [_key(mistake.place) for mistake in mistakes])


def type_problems(hints: Mapping[str, Any], values: Mapping[str, Any], name_of: Callable[[str], str]) -> list[Problem]:
    """Return the problems of values that do not match their annotations.

    Args:
        hints: annotations by name. An annotation that pydantic does not know accepts every value.
        values: values by name.
        name_of: returns the dotted name in the config for a name.
    """
    problems = []
    for name, value in values.items():
        try:
            adapter = TypeAdapter(_strict(hints[name]), config=ConfigDict(arbitrary_types_allowed=True))
        except Exception:  # an annotation that pydantic cannot handle may raise anything
            continue
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            mistakes = _mistakes(error, hints[name], value)
            problems += [mistake.problem(_name(name_of(name), mistake.place)) for mistake in mistakes]
    return problems


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True)
class _Mistake:
    """All errors that pydantic reports for one value.

    Args:
        place: where the value is.
        value: the invalid value.
        hint: the annotation of the value; for an unknown setting, the annotation of its group.
        errors: pydantic's errors; a union has one for each member.
    """

    place: Place
    value: Any
    hint: Any
    errors: Sequence[Mapping[str, Any]]

    def problem(self, name: str) -> Problem:
        by_type = {error["type"]: error for error in self.errors}
        if UNKNOWN in by_type:
            leaf = str(self.place[-1])
            choices = [field.name for option in _options(self.hint) if is_dataclass(option) for field in fields(option)]
            hint = suggestion(leaf, choices, prefix=name.removesuffix(leaf))
            return Problem(name, f"there is no such setting. {hint}")
        of_value = not by_type.keys().isdisjoint((*BOUNDS, "value_error", "string_pattern_mismatch"))
        return Problem(name, self._text(name, by_type), self.value, of_value)

    def _text(self, name: str, by_type: Mapping[str, Mapping[str, Any]]) -> str:
        if "value_error" in by_type:
            return f"{by_type['value_error']['ctx']['error']}."
        description = _description(self.hint)
        if "string_pattern_mismatch" in by_type:
            return f"{description}."
        if any(kind in by_type for kind in BOUNDS):
            return _interval(self.hint) + (f"; {description}." if description else ".")
        options = _options(self.hint)
        if any(get_origin(option) is Literal for option in options) and all(_is_choice(option) for option in options):
            return f"there is no such choice. {suggestion(show(self.value), _choices(self.hint))}"
        expected = f"expected {_join(_alternatives(self.hint))}"
        if isinstance(self.value, str) and str not in options and reads_as_other(self.value):
            variable = name.rpartition(".")[2].rstrip("]0123456789[").upper()
            return (
                f"{expected}, not a string. To read a value from the environment, write "
                f"'{name}=\"${{oc.decode:${{oc.env:{variable}}}}}\"'."
            )
        listed = any(_fits(option, [self.value]) for option in options if get_origin(option) in LISTS)
        return f"{expected}." + (f" Write {name}=[{show(self.value)}]." if listed else "")


def _mistakes(error: ValidationError, hint: Any, values: Any) -> list[_Mistake]:
    """Group the errors by value, in the order of the settings."""
    errors: dict[Place, list[Mapping[str, Any]]] = {}
    for entry in error.errors(include_url=False):
        errors.setdefault(_place(entry["loc"], values), []).append(entry)
    inner = {place for place in errors if not any(other[: len(place)] == place != other for other in errors)}
    return [
        _Mistake(
            place,
            functools.reduce(lambda value, part: value[part], place, values),
            _hint_at(hint, place[:-1] if entries[0]["type"] == UNKNOWN else place),
            entries,
        )
        for place, entries in errors.items()
        if place in inner
    ]


def _place(location: Sequence[str | int], values: Any) -> Place:
    """Return the place of a value. Pydantic's locations also contain members of unions and missing entries."""
    place: list[str | int] = []
    for part in location:
        known = range(len(values)) if isinstance(values, list | tuple) else values
        if isinstance(known, Mapping | range) and part in known:
            place.append(part)
            values = values[part]
    return tuple(place)


def _key(place: Place) -> Place:
    """Return the place of the setting that contains a value; for an entry of a list, that of the list."""
    while isinstance(place[-1], int):
        place = place[:-1]
    return place


def _without(values: Any, places: Sequence[Place]) -> Any:
    """Return a copy of plain containers without the settings at some places."""
    if not places:
        return values
    removed = {place[0] for place in places if len(place) == 1}
    rest = {
        part: [place[1:] for place in places if place[0] == part and len(place) > 1]
        for place in places
        for part in place[:1]
    }
    if isinstance(values, Mapping):
        return {key: _without(value, rest.get(key, [])) for key, value in values.items() if key not in removed}
    return [_without(value, rest.get(index, [])) for index, value in enumerate(values)]


def _name(where: str, place: Place) -> str:
    for part in place:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    return where


# ------------------------------------------------------------------------------------------------------ annotations


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union without None, or the annotation itself, as plain types."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for member in get_args(hint) for option in _options(member))
    return () if hint in (None, types.NoneType) else (hint,)


def _annotations(hint: Any) -> Iterator[Any]:
    """Yield the metadata of an annotation, including that of all members of a union."""
    if get_origin(hint) is Annotated:
        inner, *beside = get_args(hint)
        yield from _annotations(inner)
        for entry in beside:
            yield entry
            yield from entry.metadata if isinstance(entry, FieldInfo) else ()
    elif get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from _annotations(member)


def _description(hint: Any) -> str | None:
    descriptions = (entry.description for entry in _annotations(hint) if isinstance(entry, FieldInfo))
    return next(filter(None, descriptions), None)


def _hint_at(hint: Any, place: Place) -> Any:
    """Return the annotation for a place in a value; Any if the dataclasses do not describe it."""
    for part in place:
        for option in _options(hint):
            if is_dataclass(option) and isinstance(part, str):
                hint = get_type_hints(option, include_extras=True).get(part, Any)
                break
            if get_origin(option) in LISTS and isinstance(part, int):
                items = get_args(option)
                hint = items[min(part, len(items) - 1)] if items[-1] is not Ellipsis else items[0]
                break
        else:
            return Any
    return hint


def _strict(hint: Any) -> Any:
    """Return an annotation without conversions from one plain type to another."""
    if hint in STRICT:
        return STRICT[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (None, Literal):
        return hint
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_strict, arguments))]  # noqa: UP007
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *arguments[1:])]
    return origin[tuple(map(_strict, arguments))]


def _fits(hint: Any, value: Any) -> bool:
    try:
        TypeAdapter(_strict(hint)).validate_python(value)
    except ValidationError:
        return False
    return True


def _is_choice(option: Any) -> bool:
    """Return whether a member of a union is a Literal, or a list of Literals."""
    return get_origin(option) is Literal or (get_origin(option) in LISTS and all(map(_is_choice, get_args(option)[:1])))


def _choices(hint: Any) -> list[str]:
    return [str(word) for option in _options(hint) if get_origin(option) is Literal for word in get_args(option)]


def _alternatives(hint: Any) -> list[str]:
    """Return the types and words that a value may be, in words."""
    words: list[str] = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words += map(str, get_args(option))
        elif get_origin(option) in LISTS:
            items = get_args(option)
            count = f" of {len(items)}" if get_origin(option) is tuple and items[-1] is not Ellipsis else ""
            words.append(f"a list{count} (each {_join(_alternatives(items[0]))})")
        else:
            words += ["true", "false"] if option is bool else [NAMES.get(option, "a group of settings")]
    return words


def _join(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _interval(hint: Any) -> str:
    """Return the range of a number in words."""
    bounds = {type(entry): entry for entry in _annotations(hint) if isinstance(entry, Ge | Gt | Le | Lt)}
    lower: Any = bounds.get(Ge) or bounds.get(Gt)
    upper: Any = bounds.get(Le) or bounds.get(Lt)
    if upper is None:
        return f"must be at least {lower.ge}" if isinstance(lower, Ge) else f"must be above {lower.gt}"
    assert lower is not None
    first = f"[{lower.ge}" if isinstance(lower, Ge) else f"({lower.gt}"
    return f"must be in {first}, {upper.le}]" if isinstance(upper, Le) else f"must be in {first}, {upper.lt})"
