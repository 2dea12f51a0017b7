"""Files that are not the text that they are taken for: each is one sentence with a remedy, and prose stays prose."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from recondense.data.text_files import TextFile, read_texts
from recondense.errors import UserError

LINES = '{"text": "one"}\n{"text": "two"}\n'


def refusal(path: Path, form: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        list(read_texts(path, form=form))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(folder: Path, name: str) -> Path:
    import pandas

    pandas.DataFrame({"text": ["one", "two"]}).to_parquet(folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a"])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (gzip.compress(LINES.encode(), mtime=0), ["gzip", "gunzip"]),
        (bz2.compress(LINES.encode()), ["bzip2", "bunzip2"]),
        (lzma.compress(LINES.encode()), ["xz", "unxz"]),
        (b"\x28\xb5\x2f\xfd\x24\x00", ["Zstandard", "unzstd"]),
        (b"%PDF-1.7\n%\xe2\xe3", ["PDF", "pdftotext"]),
        (b"\xff\xff\xff\xff\x10\x00", ["Arrow", "JSON lines"]),
        (b"SQLite format 3\x00more", ["SQLite", "export"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["Git LFS pointer", "git lfs pull"]),
        (b"<!DOCTYPE html>\n<html>", ["HTML page", "download the file itself"]),
        (b"\n<?xml version='1.0'?>\n<a/>", ["XML", "extract"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_formats_are_recognized_by_their_first_bytes(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    message = refusal(write(tmp_path, name, content))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("form", [None, "auto"])
def test_archives_and_tables_are_recognized(tmp_path: Path, form: str | None) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as archive:
        archive.writestr("a.txt", "one")
    assert "zip archive" in refusal(tmp_path / "a.jsonl", form)
    message = refusal(parquet(tmp_path, "table.jsonl"), form)
    assert "Parquet" in message and "read_parquet('table.jsonl')" in message
    assert "read_csv('a.csv')" in refusal(write(tmp_path, "a.csv", "text\none\n"), form)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.TSV", "a.html", "a.xml", "a.docx", "a.parquet", "a.arrow", "a.jsonl.gz", "a.txt.zst", "a.pdf"]
)
def test_plain_text_with_another_formats_suffix_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path, name, "one, two\nthree, four\n"))
    assert message.startswith("is a") and "; " in message and message.endswith(".")


@pytest.mark.parametrize(
    "name", ["a", "a.txt", "a.md", "a.py", "a.rst", "a.tex", "a.log", "a.yaml", "a.text", "a.v2", "val.pt"]
)
def test_other_suffixes_are_plain_text(tmp_path: Path, name: str) -> None:
    assert [text for _, text in read_texts(write(tmp_path, name, "one\n\ntwo\n"))] == ["one", "two"]


@pytest.mark.parametrize(
    "text", ["<html> is the first tag of a page.", "<?xml version is how a file begins.", "< html"]
)
def test_prose_about_markup_is_plain_text(tmp_path: Path, text: str) -> None:
    assert [document for _, document in read_texts(write(tmp_path, "a.txt", text))] == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_unicode_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    message = refusal(write(tmp_path, name, LINES.encode(encoding)))
    assert f"iconv -f UTF-{'32' if '32' in encoding else '16'}" in message


@pytest.mark.parametrize(
    ("content", "byte", "line"),
    [
        ("one\ntwo\ncafé".encode("latin-1"), "byte 11 is 0xE9", "line 3"),
        ("\u201cquoted\u201d".encode("cp1252"), "byte 0 is 0x93", "line 1"),
        (b"one\n" * 5000 + b"caf\xc3", "byte 20003 is 0xC3", "line 5001"),  # cut in the middle of a character
        (b"half \xed\xa0\xbd", "byte 5 is 0xED", "line 1"),
    ],
)
def test_a_byte_that_is_no_utf_8_is_named_with_its_line(tmp_path: Path, content: bytes, byte: str, line: str) -> None:
    message = refusal(write(tmp_path, "a.txt", content))
    assert byte in message and line in message and "iconv -f WINDOWS-1252 -t UTF-8" in message


@pytest.mark.parametrize("at", [1, 5000, 100_000])
def test_plain_text_has_no_nul(tmp_path: Path, at: int) -> None:
    assert "NUL character" in refusal(write(tmp_path, "a.txt", "x" * at + "\0" + "y" * 10))


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        f"\n\n  {LINES}",
        f"\ufeff{LINES}",
        '{"text": "one"}\n\n{"text": "two"}\n',
        json.dumps([{"text": "one"}]),
        json.dumps([{"text": "one"}, {"text": "two"}], indent=2),
        json.dumps({"text": "one", "more": {"a": [1, 2]}}, indent=4) + "\n",
        json.dumps({"text": "one"}, indent=1) + "\n" + json.dumps({"text": "two"}, indent=1),
        '["one", "two"]\n',
        '{"text": "one"},\n{"text": "two"}\n',
        '{"title": "front matter"}\nand prose\n',
        "[1, 2, 3]",
        "{}\n",
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_json_with_the_name_of_plain_text_is_refused(tmp_path: Path, content: str) -> None:
    for name in ("a.txt", "a", "a.md"):
        assert "rename it to .jsonl" in refusal(write(tmp_path, name, content))


@pytest.mark.parametrize(
    "content",
    [
        "[A link](https://example.org) begins this page.\n",
        "[1] A footnote, and its text.\n",
        "[1]\n\nA footnote on a line of its own.\n",
        "[x] done\n[ ] to do\n",
        "[[wiki link]] and text\n",
        "[section]\nkey = value\n",
        "{% extends 'base.html' %}\n<p>\n",
        "{\n  int x = 1;\n}\n",
        "{ echo hello; }\n",
        "{'a': 1, 'b': 2}\n",
        "{{ template }}\n",
        "[]\nlist = []\n",
        "{}\nis an empty object\n",
        '{"a": 1}.items()\n',
        '["a", "b"].forEach(print)\n',
        '{"text": "one"\nis not closed\n',
        "[INFO] 12:00 started\n",
        "[\n",
    ],
)
def test_text_that_begins_with_a_bracket_but_is_no_json_is_plain(tmp_path: Path, content: str) -> None:
    documents = [text for _, text in read_texts(write(tmp_path, "a.md", content))]
    assert "\n\n".join(documents) == content.rstrip()


def test_text_that_begins_like_a_format_is_plain(tmp_path: Path) -> None:
    for content in ("PAR1 is a gene", "BZh is no word", "Rar! said he", "ARROW1 is a road", "7z and PK and <html"):
        assert [text for _, text in read_texts(write(tmp_path, "a.txt", content))] == [content]


def of_file(path: Any) -> str:
    documents, problems = TextFile(str(path), "text", None, "data", "data.train.path").check()
    assert documents == [] and len(problems) == 1
    return str(problems[0])


def test_what_is_no_ordinary_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a pipe or a device" in of_file(tmp_path / "pipe.jsonl")
    assert "is a pipe or a device" in of_file("/dev/null")
    assert "is a folder; give a file." in of_file(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in (tmp_path / "link", "~nobody_at_all/x.txt", "", tmp_path / "a" / "b.txt"):
        assert "there is no such file" in of_file(name) or "is a folder" in of_file(name)
    assert "cannot be read (File name too long)" in of_file(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINES)
    path.chmod(0)
    assert "cannot be read (Permission denied)" in of_file(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.jsonl", LINES)
    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied); give a readable file." in of_file(path)
