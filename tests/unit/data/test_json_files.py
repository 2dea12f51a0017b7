"""Objects in JSON files: their texts, and one sentence for each thing that is wrong in them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from recondense.data.text_files import TextFile, read_texts
from recondense.errors import UserError


def write(folder: Path, content: str | bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def texts(path: Path, field: str = "text") -> list[str]:
    return [text for _, text in read_texts(path, field)]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("null", "null"),
        ("12", "a number"),
        ("1.5", "a number"),
        ("NaN", "a number"),
        ("true", "true"),
        ("false", "false"),
        ('["a"]', "a list"),
        ('{"a": "b"}', "an object"),
    ],
)
def test_the_type_of_a_value_that_is_no_text_is_named(tmp_path: Path, value: str, kind: str) -> None:
    path = write(tmp_path, f'{{"text": "one"}}\n\n{{"id": 1, "text": {value}}}\n')
    with pytest.raises(UserError, match=rf"^line 3 has no text in 'text', but {kind}; give it a text or remove it"):
        texts(path)


@pytest.mark.parametrize("line", ["null", "12", "true", '["one"]'])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r'^line 2 has no text in .*; write objects, such as {"text": "..."}'):
        texts(write(tmp_path, f'{{"text": "one"}}\n{line}\n'))


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({"messages": []}, "chat"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"question": "a", "answer": "b"}, "commonsense"),
    ],
)
def test_records_get_the_remedy_for_records(tmp_path: Path, values: dict[str, object], form: str) -> None:
    with pytest.raises(UserError, match=rf"set data.form={form} for such records, or data.text_field"):
        texts(write(tmp_path, json.dumps(values)))


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.JSON"])
def test_a_list_of_objects_is_read(tmp_path: Path, indent: int | None, name: str) -> None:
    documents = [{"text": "one"}, {"text": "two\nlines"}]
    assert texts(write(tmp_path, "\ufeff \n" + json.dumps(documents, indent=indent), name)) == ["one", "two\nlines"]
    bad = write(tmp_path, json.dumps([*documents, {"text": None}], indent=indent), name)
    with pytest.raises(UserError, match=r"^record 3 has no text in 'text', but null"):
        texts(bad)


LISTS = ({"data": [{"text": "a"}]}, {"version": 1, "rows": [{"text": "a"}], "tags": []})
COLUMNS = (
    {"text": ["a", "b"], "id": [1, 2]},
    {"text": ["a"], "version": 3},
    {"text": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}},  # as pandas writes it
    {"instruction": ["a"], "output": ["b"]},
    {"messages": [[{"role": "user", "content": "a"}]]},
)


@pytest.mark.parametrize("form", [None, "auto", "chat"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_one_object_of_records_is_named(tmp_path: Path, form: str | None, indent: int | None) -> None:
    for values in LISTS:
        with pytest.raises(UserError, match=r"^is one object, in which '(data|rows)' is the list of records; write th"):
            list(read_texts(write(tmp_path, json.dumps(values, indent=indent), "a.json"), form=form))
    values = {"train": [{"text": "a"}], "validation": [{"text": "b"}]}
    with pytest.raises(UserError, match=r"'train' and 'validation' are lists of records; write one of these lists al"):
        list(read_texts(write(tmp_path, json.dumps(values, indent=indent), "a.json"), form=form))
    for values in COLUMNS if form is None else COLUMNS[3:]:
        with pytest.raises(UserError, match=r"^is one object of columns \('.*read_json\('a.json'\).to_json\('te"):
            list(read_texts(write(tmp_path, json.dumps(values, indent=indent), "a.json"), form=form))


def test_a_field_with_a_list_in_one_of_several_objects_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"text": [{"a": 1}], "data": [{"text": "a"}]})] * 2
    with pytest.raises(UserError, match=r"^line 1 has no text in 'text', but a list"):
        texts(write(tmp_path, "\n".join(lines)))


def test_one_object_over_several_lines_is_read(tmp_path: Path) -> None:
    assert texts(write(tmp_path, json.dumps({"text": "one", "id": 1}, indent=2), "a.json")) == ["one"]
    with pytest.raises(UserError, match=r"^line 1 has no text in 'text' \(its keys: data\)"):
        texts(write(tmp_path, json.dumps({"data": "one"}, indent=2), "a.json"))
    with pytest.raises(UserError, match=r"^line 1 is not JSON"):
        texts(write(tmp_path, '{\n"text": "one"\n}\n{\n"text": "two"\n}\n', "a.json"))


def test_fields_of_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path, '{"meta": {"en": {"text": "one"}}, "meta.en.text": "two"}\n{"meta": {"en": {"text": "x"}}}\n'
    )
    assert texts(path, "meta.en.text") == ["two", "x"]
    for field in ("meta.de.text", "meta.en.text.more", ".", "meta."):
        with pytest.raises(UserError, match="has no text in"):
            texts(path, field)


@pytest.mark.parametrize("form", [None, "auto"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ' + "[" * 50_000 + "]" * 50_000 + "}", "line 2 is nested too deep"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "line 2 is nested too deep"),
        ('{"id": ' + "1" * 5000 + ', "text": "one"}', "line 2 has a number of too many digits"),
        ('{"text": "one", "text": "two"}', "line 2 has the key 'text' twice"),
        ('{"text": "one"', "line 2 is not JSON"),
        ("{'text': 'one'}", "line 2 is not JSON"),
        ('{"text": "one"},', "line 2 is not JSON"),
        ('{"text": "a\tb"}', "line 2 is not JSON"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, line: str, message: str, form: str | None) -> None:
    good = '{"text": "one", "instruction": "a", "output": "b"}\n'
    with pytest.raises(UserError, match=message) as caught:
        list(read_texts(write(tmp_path, f"{good}{line}\n{good}"), form=form))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "one", "meta": {"url": 1, "url": 2}}',
        '{"text": "one", "id": 1, "id": 2}',
        '[{"id": 1, "text": "one", "id": 2}]',
        '{"more": [{"a": 1, "a": 2}], "text": "one"}',
    ],
)
def test_a_key_that_is_not_read_may_stand_twice(tmp_path: Path, line: str) -> None:
    assert texts(write(tmp_path, line)) == ["one"]


@pytest.mark.parametrize(("field", "line"), [("m.a", '{"m": {"a": "x"}, "m": 2}'), ("a", '{"a": "x", "a": "y"}')])
def test_the_field_that_is_read_stands_once(tmp_path: Path, field: str, line: str) -> None:
    with pytest.raises(UserError, match=r"line 1 has the key '[ma]' twice"):
        texts(write(tmp_path, line), field)


@pytest.mark.parametrize("where", ["nested", "digits"])
def test_lists_name_what_cannot_be_read(tmp_path: Path, where: str) -> None:
    inner = {"nested": "[" * 50_000 + "]" * 50_000, "digits": "1" * 5000}[where]
    with pytest.raises(UserError, match=r"is nested too deep|too many digits"):
        texts(write(tmp_path, f'[{{"text": "one", "more": {inner}}}]'))


def test_line_ends_marks_and_separators_of_unicode(tmp_path: Path) -> None:
    """A document keeps its own separators; only line ends of files end lines."""
    odd = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1c"
    lines = json.dumps({"text": odd}, ensure_ascii=False), json.dumps({"text": "next"})
    for end in ("\n", "\r\n", "\r"):
        assert texts(write(tmp_path, "\ufeff" + end.join(lines) + end)) == [odd, "next"]
        assert texts(write(tmp_path, end.join(["one", "two", "", "three"]), "a.txt")) == ["one\ntwo", "three"]
    joined = "\ufeff" + lines[1] + "\n\ufeff" + lines[1] + "\n"  # two files with byte order marks, joined
    assert texts(write(tmp_path, joined)) == ["next", "next"]
    assert texts(write(tmp_path, '{"text": "one", "score": NaN, "more": -Infinity}')) == ["one"]
    assert texts(write(tmp_path, '{"text": "nul \\u0000 inside"}')) == ["nul \0 inside"]


def test_a_very_long_line(tmp_path: Path) -> None:
    long = "word " * 1_000_000
    assert texts(write(tmp_path, json.dumps({"text": long}))) == [long]
    assert texts(write(tmp_path, long, "a.txt")) == [long.rstrip()]


EMPTY = [
    "",
    " ",
    "\n\t ",
    "\u200b\u200c\u200d",
    "\ufeff",
    "\u00a0\u3000",
    "\x00\x01\x7f",
    "\u2060\u00ad\u200e",
    "\u2028",
]


def file_of(path: Path) -> TextFile:
    return TextFile(str(path), "text", None, "data", "data.train.path")


def test_invisible_documents_are_empty(tmp_path: Path) -> None:
    path = write(
        tmp_path, "".join(json.dumps({"text": text}) + "\n" for text in [*EMPTY, "one", ".", "\u0301", "\u200bx"])
    )
    assert [text for _, text in file_of(path).read()] == ["one", ".", "\u0301", "\u200bx"]
    assert len(file_of(path).read(keep_empty=True)) == len(EMPTY) + 4
    for content, name in [
        *((json.dumps({"text": text}), "a.jsonl") for text in EMPTY),
        *(
            (content, name)
            for content in ("", "\n", " \n\n\t\n", "\ufeff", "\u200b\n")
            for name in ("a.txt", "a.jsonl")
        ),
        ("[]", "a.json"),
    ]:
        if (content, name) != ("\u200b\n", "a.jsonl"):
            with pytest.raises(UserError, match="the file has no text; give a file with at least one document"):
                file_of(write(tmp_path, content, name)).read()


@pytest.mark.parametrize(
    ("escaped", "expected"),
    [
        ("half \\ud83d here", "half \ufffd here"),
        ("\\udc00 first", "\ufffd first"),
        ("last \\uD800", "last \ufffd"),
        ("\\ude00\\ud83d turned", "\ufffd\ufffd turned"),
        ("whole \\ud83d\\ude00", "whole \U0001f600"),
        ("\\ud83d\\ud83d\\ude00", "\ufffd\U0001f600"),
    ],
)
def test_lone_surrogates_are_replaced_and_counted(
    tmp_path: Path, escaped: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, f'{{"text": "one"}}\n{{"text": "{escaped}"}}\n')
    with caplog.at_level(logging.INFO, "recondense"):
        assert [text for _, text in file_of(path).read()] == ["one", expected]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == ("\ufffd" in expected)
    assert all(line.startswith(f"data.train.path={path}: 1 texts had lone surrogates") for line in lines)


def test_records_with_lone_surrogates_are_repaired(tmp_path: Path) -> None:
    path = write(tmp_path, '{"instruction": "half \\ud83d", "output": "\\udc00 answer"}\n')
    file = TextFile(str(path), "text", "auto", "data", "data.train.path")
    [(number, record)] = file.read()
    assert number == 1 and record.values == {"instruction": "half \ufffd", "input": "", "output": "\ufffd answer"}  # type: ignore[attr-defined]
