"""Records in local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recondense.data.instruction_records import Record, read_record
from recondense.data.text_files import read_texts

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "output": "ok"}]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("form", ["auto", "alpaca"])
def test_files_hold_a_list_or_lines(tmp_path: Path, listed: bool, form: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(
        json.dumps(ALPACA, indent=1) if listed else "".join(f"{json.dumps(record)}\n\n" for record in ALPACA)
    )
    documents = list(read_texts(path, form=form))
    assert [text for _, text in documents] == [read_record(record, "alpaca") for record in ALPACA]
    assert all(isinstance(text, Record) for _, text in documents)
    assert [number for number, _ in documents] == ([1, 2] if listed else [1, 3])


def test_a_byte_order_mark_and_an_enclosing_field_are_read(tmp_path: Path) -> None:
    """Windows writes the first; the second is in cais/mmlu's auxiliary_train."""
    question = {"question": "Q?", "choices": ["a", "b", "c"], "answer": 1, "subject": ""}
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"train": question}) + "\n", encoding="utf-8-sig")
    [(number, text)] = read_texts(path, form="auto")
    assert (number, text) == (1, read_record(question, "commonsense"))
    path.write_text("a text", encoding="utf-8-sig")
    assert list(read_texts(path.rename(tmp_path / "plain.txt"))) == [(1, "a text")]


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ('{"body": 1}', "auto", "line 1 has no known form .*; fix it, or set data.form"),
        (f"{json.dumps(ALPACA[0])}\n[1]", "auto", "line 2 is of type list"),
        (
            json.dumps([ALPACA[0], {"messages": CHAT}]),
            "auto",
            "record 2 is not a record of form alpaca: it has no 'instruction'",
        ),
        ("[1", "auto", r"is not JSON \(line 1: "),
        ("{", "alpaca", "line 1 is not JSON"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, content: str, form: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(path, form=form))
