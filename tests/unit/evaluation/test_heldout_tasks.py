"""Tasks made of held-out documents: deterministic, and of lines with content."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from support.heldout_texts import records, texts

from recondense.evaluation.heldout_tasks import (
    CONTEXT_LINES,
    HELDOUT_TASKS,
    NEXT_LINE,
    PERPLEXITY,
    note_tables,
    write_heldout_tasks,
)


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


def random_lines(letters: str, length: int, blanks: bool, documents: int = 6, lines: int = 14) -> list[str]:
    """Documents of random lines, for scripts with words between blanks or without."""
    rng = random.Random(0)

    def line() -> str:
        if not blanks:
            return "".join(rng.choice(letters) for _ in range(length))
        return " ".join("".join(rng.choice(letters) for _ in range(4)) for _ in range(length // 4))

    return ["\n".join(line() for _ in range(lines)) for _ in range(documents)]


HAN = "".join(map(chr, range(0x4E00, 0x4F00)))
SCRIPTS = {
    "Chinese": (HAN, 30, False),
    "short Chinese lines": (HAN, 8, False),
    "Japanese": ("".join(map(chr, [*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)])) + HAN[:40], 30, False),
    "Thai": ("".join(map(chr, [*range(0x0E01, 0x0E2F), 0x0E34, 0x0E49])), 40, False),
    "Khmer": ("".join(map(chr, range(0x1780, 0x17B4))), 40, False),
    "Arabic": ("".join(map(chr, range(0x0621, 0x063B))), 40, True),
    "Devanagari": ("".join(map(chr, [*range(0x0915, 0x093A), 0x093E, 0x093F, 0x0940])), 40, True),
    "Korean": ("".join(map(chr, range(0xAC00, 0xAD00))), 40, True),
    "Cyrillic": ("".join(map(chr, range(0x0430, 0x0450))), 40, True),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_questions_are_made_of_every_script(tmp_path: Path, script: str) -> None:
    letters, length, blanks = SCRIPTS[script]
    documents = random_lines(letters, length, blanks)
    assert write_heldout_tasks(tmp_path, documents, num_questions=20) == list(HELDOUT_TASKS)
    questions = records(tmp_path, NEXT_LINE)
    assert len(questions) == 20
    for question in questions:
        following = f"{question['context']}\n{question['choices'][question['label']]}"
        assert any(following in text for text in documents)
    one_line = [text.replace("\n", " " if blanks else "") for text in random_lines(letters, length, blanks, lines=90)]
    assert write_heldout_tasks(tmp_path / "wrapped", one_line, num_questions=20) == list(HELDOUT_TASKS)


@pytest.mark.parametrize(
    "documents",
    [
        ["\n".join("\U0001f600\U0001f680\u2764" * 9 + "\U0001f44d" * index for index in range(14)) for _ in range(6)],
        ["\n".join(str(index * number) * 9 for index in range(1, 14)) for number in range(3, 9)],
        texts(1),
        texts(1) * 6,
        ["one line of text"] * 4,
        ["short", "texts"],
    ],
)
def test_what_gives_no_question_still_gives_perplexity(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(ValueError, match="have too few lines for one question"):
        write_heldout_tasks(tmp_path, documents)
    assert write_heldout_tasks(tmp_path, documents, strict=False) == [PERPLEXITY]
    assert len(records(tmp_path, PERPLEXITY)) == len(documents)
    assert not (tmp_path / f"{NEXT_LINE}.yaml").exists()


def test_no_text_gives_no_task(tmp_path: Path) -> None:
    assert write_heldout_tasks(tmp_path, ["\u200b", " \n"], strict=False) == []


@pytest.mark.parametrize("kind", ["text", "bytes", "folder", "link"])
def test_damaged_task_files_are_written_again(tmp_path: Path, kind: str) -> None:
    write_heldout_tasks(tmp_path, texts())
    paths = sorted(path for path in tmp_path.iterdir() if path.is_file())
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(path.name)
        else:
            path.write_bytes(b"\xff" if kind == "bytes" else b"{}")
    write_heldout_tasks(tmp_path, texts())
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("name", ["cache/json/a.arrow", "cache/json/dataset_info.json", "tables.json"])
@pytest.mark.parametrize("kind", ["cut", "zeros", "gone", "folder"])
def test_damaged_tables_of_datasets_are_removed(tmp_path: Path, name: str, kind: str) -> None:
    """`datasets` then makes them again; intact ones stay, and so do those that were never noted."""
    write_heldout_tasks(tmp_path, texts())
    table = tmp_path / "cache" / "json" / "a.arrow"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"table")
    (table.parent / "dataset_info.json").write_text("{}")
    write_heldout_tasks(tmp_path, texts())
    note_tables(tmp_path)
    write_heldout_tasks(tmp_path, texts())
    assert table.exists()
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(content[:-2] if kind == "cut" else bytes(len(content)))
    write_heldout_tasks(tmp_path, texts())
    assert (tmp_path / "cache").exists() == (name == "tables.json" and kind == "gone")
