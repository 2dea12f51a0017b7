"""Tasks made of held-out documents: deterministic, and of lines with content."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from support.heldout_texts import records, texts

from recondense.evaluation.heldout_tasks import CONTEXT_LINES, HELDOUT_TASKS, NEXT_LINE, PERPLEXITY, write_heldout_tasks


def test_heldout_tasks_are_deterministic_and_written_once(tmp_path: Path) -> None:
    assert write_heldout_tasks(tmp_path / "a", texts()) == list(HELDOUT_TASKS)
    write_heldout_tasks(tmp_path / "b", texts())
    for task in HELDOUT_TASKS:
        first, second = (tmp_path / folder / f"{task}.jsonl" for folder in "ab")
        assert first.read_bytes() == second.read_bytes()
        config = yaml.safe_load((tmp_path / "a" / f"{task}.yaml").read_text())
        assert config["task"] == task and config["dataset_path"] == "json"
        assert config["dataset_kwargs"]["data_files"]["test"] == str(first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    write_heldout_tasks(tmp_path / "a", texts())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    write_heldout_tasks(tmp_path / "a", texts(), seed=1)
    assert (tmp_path / "a" / f"{NEXT_LINE}.jsonl").read_bytes() != (tmp_path / "b" / f"{NEXT_LINE}.jsonl").read_bytes()


def test_questions_ask_for_the_line_that_follows(tmp_path: Path) -> None:
    documents = texts()
    write_heldout_tasks(tmp_path, documents, num_questions=50, num_choices=4)
    questions = records(tmp_path, NEXT_LINE)
    assert len(questions) == 50 and len({str(question) for question in questions}) == 50
    assert {question["label"] for question in questions} == {0, 1, 2, 3}
    joined = [document.replace("\n\n", "\n") for document in documents]
    for question in questions:
        context, choices, label = question["context"], question["choices"], question["label"]
        [home] = [text for text in joined if f"{context}\n{choices[label]}\n" in text]
        assert context.count("\n") == CONTEXT_LINES - 1
        assert len(set(choices)) == 4
        assert all(choice not in home for index, choice in enumerate(choices) if index != label)


def test_lines_that_say_little_or_repeat_are_not_asked_for(tmp_path: Path) -> None:
    documents = [text + "return None, None\nelse:\n'''\nx = 1234567890123\n" for text in texts()]
    write_heldout_tasks(tmp_path, documents)
    offered = {choice.strip() for question in records(tmp_path, NEXT_LINE) for choice in question["choices"]}
    assert all(line.startswith("value_") for line in offered)


def test_prose_is_wrapped_and_documents_are_cut(tmp_path: Path) -> None:
    rng = random.Random(0)
    documents = [
        " ".join(rng.choice(("sun", "moon", "star", "cloud")) + str(rng.random()) for _ in range(900)) for _ in "ab"
    ]
    write_heldout_tasks(tmp_path, documents, num_questions=5)
    assert len(records(tmp_path, NEXT_LINE)) == 5
    assert [len(record["text"]) for record in records(tmp_path, PERPLEXITY)] == [3000, 3000]
    write_heldout_tasks(tmp_path, ["line of text\n" * 400, *texts()], num_texts=9)
    cut = records(tmp_path, PERPLEXITY)[0]["text"]
    assert len(cut) <= 3000 and cut.endswith("line of text")


def test_texts_that_give_no_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 held-out texts have too few lines for one question .* 4 choices"):
        write_heldout_tasks(tmp_path, texts(1))
    assert not list(tmp_path.iterdir())
