"""Recognize files that are not the UTF-8 text that they are taken for: other formats, other encodings, pages."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from recondense.errors import UserError

ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
HEAD = 4096  # bytes of a file that are looked at

UNPACK = "unpack it"
EXTRACT = "extract its text"
EXPORT = "export its texts as JSON lines"
CONVERT = (
    "convert it to JSON lines, for example with pandas.{}('{}').to_json('texts.jsonl', orient='records', lines=True)"
)
# The first bytes of formats, the name and the remedy; {} is the file's name.
BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed (gzip)", "decompress it, for example with gunzip"),
    (b"BZh91AY&SY", "compressed (bzip2)", "decompress it, for example with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed (xz)", "decompress it, for example with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed (Zstandard)", "decompress it, for example with unzstd"),
    (b"\x04\x22\x4d\x18", "compressed (LZ4)", "decompress it, for example with unlz4"),
    (b"PK\x03\x04", "a zip archive, as office documents and e-books are", EXTRACT),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"PAR1\x15", "a Parquet file", CONVERT.format("read_parquet", "{}")),
    (b"ARROW1\x00", "an Arrow file", CONVERT.format("read_feather", "{}")),
    (b"\xff\xff\xff\xff", "an Arrow stream", "convert it to JSON lines with datasets.Dataset.from_file('{}').to_json"),
    (b"SQLite format 3\x00", "an SQLite database", EXPORT),
    (b"\x89HDF\r\n", "an HDF5 file", EXPORT),
    (b"\x93NUMPY", "an array of NumPy", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"%PDF-", "a PDF document", "extract its text, for example with pdftotext"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", "save it as plain text"),
    (b"\x89PNG\r\n", "a picture", "give a file of text"),
    (b"\xff\xd8\xff", "a picture", "give a file of text"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
)
# Patterns of the beginning in lower case: prose about HTML may begin with a tag too.
PAGES = (
    (rb"<!doctype html", "an HTML page", "download the file itself, or extract the page's text"),
    (rb"<html[^>]*>\s*<", "an HTML page", "download the file itself, or extract the page's text"),
    (rb"<\?xml\s+version\s*=", "an XML file", EXTRACT),
)
# UTF-32 first: its mark begins with that of UTF-16.
MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# Formats that would be read as plain text although they are no prose, by their suffixes.
ROWS = (
    (".csv", "a CSV table", CONVERT.format("read_csv", "{}")),
    (".tsv .tab", "a table", CONVERT.format("read_table", "{}")),
    (".parquet .pq", "a Parquet file", CONVERT.format("read_parquet", "{}")),
    (".arrow .feather", "an Arrow file", CONVERT.format("read_feather", "{}")),
    (".xls .xlsx .ods", "a spreadsheet", CONVERT.format("read_excel", "{}")),
    (".xml .xhtml", "an XML file", EXTRACT),
    (".html .htm", "an HTML page", EXTRACT),
    (".pdf", "a PDF document", "extract its text, for example with pdftotext"),
    (".doc .docx .odt .rtf .ppt .pptx", "an office document", "save it as plain text"),
    (".epub .mobi", "an e-book", EXTRACT),
    (".gz .bz2 .xz .zst .lz4 .z", "a compressed file", "decompress it"),
    (".zip .7z .rar .tar .tgz", "an archive", UNPACK),
    (".pkl .pickle .pth .npy .npz .safetensors", "a file of Python or of arrays", EXPORT),
    (".h5 .hdf5 .db .sqlite .sqlite3 .orc .avro", "a database", EXPORT),
    (".png .jpg .jpeg .gif .webp", "a picture", "give a file of text"),
)
SUFFIXES = {suffix: row[1:] for row in ROWS for suffix in row[0].split()}


def require_file(name: str) -> Path:
    """Return the path of an ordinary file; `name` may begin with ~.

    Raises:
        UserError: there is none. The message is a clause without a subject; the caller adds the file's name.
    """
    path = Path(os.path.expanduser(name))
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise UserError("is a folder; give a file.")
        if path.exists():
            raise UserError("is a pipe or a device, which can be read only once; write the text to a file.")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); give a readable file.") from None
    raise UserError("there is no such file.")


def refuse_other_formats(path: Path) -> None:
    """Refuse a file that is no UTF-8 text, as far as its name and its beginning show.

    Raises:
        UserError: it is something else; the message says what, and how to convert it, in a clause without a subject.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    body = head.removeprefix(b"\xef\xbb\xbf")
    start = body.lstrip().lower()
    known = next((entry for entry in BEGINNINGS if body.startswith(entry[0])), None)
    known = known or next((entry for entry in PAGES if re.match(entry[0], start)), None)
    kind = known[1:] if known else ("a tar archive", UNPACK) if head[257:262] == b"ustar" else None
    kind = kind or (SUFFIXES.get(path.suffix.lower()) if head else None)
    if kind is not None:
        raise UserError(f"is {kind[0]}; {kind[1].format(path.name)}.")
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if encoding is not None:
        raise UserError(f"is {encoding} text, not UTF-8; {_iconv(encoding)}.")
    if (index := head.find(b"\x00")) >= 0:
        raise UserError(
            f"has a NUL character (byte {index}), which text has not; it is a binary file, or UTF-16 text without a "
            f"byte order mark: {_iconv('UTF-16LE')}."
        )


def refuse_json(path: Path) -> None:
    """Refuse a file of plain text that is JSON: its first line is an object or a list, or the entire file is.

    Code and Markdown may begin with a brace or a bracket. A list of numbers, such as the footnote [1], or an empty one
    is refused only if nothing follows.

    Raises:
        UserError: it is JSON. The message is a clause without a subject.
    """
    with path.open(encoding=ENCODING) as file:
        if _first_character(file.read(HEAD)) not in ("{", "["):
            return
        file.seek(0)
        text = file.read().lstrip("\ufeff \t\r\n")
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except RecursionError:  # nothing else is nested so deep
        value, end = {"": None}, len(text)
    except ValueError:
        return
    rest = text[end:]
    items = value if isinstance(value, list) else [value]
    speaks = any(isinstance(item, dict | list | str) and item for item in items)
    if not rest.strip() or (speaks and not rest.partition("\n")[0].strip(" \t,")):
        raise UserError(
            "is JSON, but its name is that of plain text; rename it to .jsonl (one object per line, or one list), or "
            "put a line of text first."
        )


def bad_byte(path: Path) -> UserError:
    """Return the error of a file that cannot be decoded: the first byte that is no UTF-8, and its line."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return UserError(
                    f"is not UTF-8 text (byte {offset + error.start} is 0x{byte:02X}, line {number}); if it is "
                    f"Latin-1 or from Windows, {_iconv('WINDOWS-1252')}."
                )
            offset += len(line)
    return UserError("is not UTF-8 text; convert it to UTF-8.")  # it changes while it is read


def begins_with_list(path: Path) -> bool:
    """Return whether the first character of a JSON file is that of a list."""
    with path.open(encoding=ENCODING) as file:
        return _first_character(file.read(HEAD)) == "["


def _first_character(text: str) -> str:
    return text.lstrip("\ufeff \t\r\n")[:1]


def _iconv(encoding: str) -> str:
    return f"convert it with iconv -f {encoding} -t UTF-8"
