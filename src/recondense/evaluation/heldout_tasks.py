"""Make two lm-eval tasks from held-out documents: perplexity, and multiple choice of the next line."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recondense.data.valid_text import is_empty
from recondense.errors import UserError
from recondense.evaluation.words import width, words, wrap
from recondense.files import Damaged, discard, hash_file, read_checked, write_aside, write_checked

PERPLEXITY = "heldout_perplexity"
NEXT_LINE = "heldout_next_line"
HELDOUT_TASKS = (PERPLEXITY, NEXT_LINE)

MAX_CHARACTERS = 3000  # of a perplexity document
CONTEXT_LINES = 8  # lines that a question shows
WRAP = 100  # columns; longer lines (prose) are broken between words
SHORTEST = 12  # columns; shorter lines are not used as choices
CACHE, TABLES = "cache", "tables.json"  # where `datasets` keeps a folder's data as tables; their hashes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Line:
    """A line that can be a choice of a question.

    Args:
        document: index of the line's document.
        index: index of the line in its document.
        text: the line without indentation.
    """

    document: int
    index: int
    text: str


def write_heldout_tasks(
    folder: Path,
    texts: Sequence[str],
    *,
    num_choices: int = 4,
    num_questions: int = 200,
    num_texts: int = 20,
    seed: int = 0,
    strict: bool = True,
) -> list[str]:
    """Write the two tasks as lm-eval YAML files, with their data beside them. Equal arguments write equal bytes.

    heldout_perplexity measures the log-likelihood of `num_texts` documents, each cut at 3,000 characters. It is
    normalized per byte, because words are not well defined in source code.

    heldout_next_line shows 8 lines and `num_choices` candidates for the next line. One follows in the document, the
    others come from other documents. A candidate has at least 12 columns (an ideograph is two) and two words, and
    occurs only once in all documents. The most informative metric is acc_mutual_info. It ranks by ln P(line | context)
    - ln P(line), so that short and common lines have no advantage (acc and acc_norm of a weak model are near chance).

    Args:
        folder: the folder to write to; pass it to `run_tasks` as `include_path`.
        texts: held-out documents, at least two.
        num_choices: number of candidates per question.
        num_questions: maximum number of questions; there are fewer if the texts have too few lines.
        num_texts: maximum number of documents for the perplexity.
        seed: the seed of the selection.
        strict: whether texts that give no question are refused; otherwise heldout_next_line is left out.

    Returns:
        The names of the tasks.

    Raises:
        UserError: the texts are too few for a single question, and `strict` is set.
    """
    rng = random.Random(seed)
    documents = [text for text in texts if not is_empty(text)]
    indices = sorted(rng.sample(range(len(documents)), min(num_texts, len(documents))))
    rolling = [{"text": _cut(documents[index])} for index in indices]
    questions = _questions([_lines(text) for text in documents], num_choices, num_questions, rng)
    if not questions and strict:
        raise _no_question(len(documents), num_choices)
    _check_tables(folder)
    tasks = {PERPLEXITY: (rolling, _perplexity_task()), NEXT_LINE: (questions, _next_line_task())}
    for name, (examples, settings) in tasks.items():
        if examples:
            _write(folder, name, examples, settings)
    return [name for name, (examples, _) in tasks.items() if examples]


def _no_question(num_texts: int, num_choices: int) -> UserError:
    return UserError(
        f"evaluation: {num_texts} held-out texts have too few lines for one question of {NEXT_LINE} with {num_choices} "
        f"choices: a line must have two words, occur once, and follow {CONTEXT_LINES} others; give more and longer "
        "validation texts, or remove the task from evaluation.tasks."
    )


def _questions(
    documents: Sequence[Sequence[str]], num_choices: int, num_questions: int, rng: random.Random
) -> list[dict[str, Any]]:
    candidates = _candidates(documents)
    answers = [line for line in candidates if line.index >= CONTEXT_LINES]
    rng.shuffle(answers)
    questions: list[dict[str, Any]] = []
    for line in answers:
        if len(questions) == num_questions:
            break
        others = _draw_others(line, candidates, num_choices - 1, rng)
        if others is None:
            continue
        before = documents[line.document][line.index - CONTEXT_LINES : line.index]
        choices = [documents[choice.document][choice.index] for choice in (line, *others)]
        order = list(range(num_choices))
        rng.shuffle(order)
        questions.append(
            {
                "context": "\n".join(before),
                "choices": [choices[position] for position in order],
                "label": order.index(0),
            }
        )
    return questions


def _candidates(documents: Sequence[Sequence[str]]) -> list[_Line]:
    """Return the lines that can be choices, in order: long enough, and different from all others."""
    long_lines = [
        _Line(number, index, line.strip())
        for number, lines in enumerate(documents)
        for index, line in enumerate(lines)
        if width(line.strip()) >= SHORTEST and len(words(line)) >= 2
    ]
    counts = Counter(line.text for line in long_lines)
    return [line for line in long_lines if counts[line.text] == 1]


def _draw_others(line: _Line, candidates: Sequence[_Line], count: int, rng: random.Random) -> list[_Line] | None:
    """Draw `count` different lines of other documents; return None if 100 draws per line do not suffice."""
    drawn: dict[_Line, None] = {}  # in the order in which they were drawn
    for _ in range(100 * count):
        other = candidates[rng.randrange(len(candidates))]
        if other.document != line.document:
            drawn[other] = None
        if len(drawn) == count:
            return list(drawn)
    return None


def _lines(text: str) -> list[str]:
    """Return the lines of a text without blank ones; long lines are wrapped."""
    lines: list[str] = []
    for line in text.expandtabs().splitlines():
        line = line.rstrip()
        if width(line) > WRAP:
            lines += wrap(line, WRAP)
        elif line:
            lines.append(line)
    return lines


def _cut(text: str) -> str:
    """Return the beginning of a text, up to MAX_CHARACTERS and if possible to the end of a line."""
    if len(text) <= MAX_CHARACTERS:
        return text
    end = text.rfind("\n", 1, MAX_CHARACTERS)
    return text[: end if end > 0 else MAX_CHARACTERS]


def _perplexity_task() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": name} for name in ("byte_perplexity", "bits_per_byte")],
    }


def _next_line_task() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "\n",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm", "acc_mutual_info")
        ],
    }


def _write(folder: Path, task: str, records: Iterable[dict[str, Any]], settings: dict[str, Any]) -> None:
    data = folder.absolute() / f"{task}.jsonl"
    _write_changed(data, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    config = {
        "task": task,
        "dataset_path": "json",
        # A separate cache: the user's is not needed and not filled.
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder.absolute() / CACHE)},
        "test_split": "test",
        "num_fewshot": 0,
        **settings,
        "metadata": {"version": 1.0},
    }
    _write_changed(folder / f"{task}.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _write_changed(path: Path, text: str) -> None:
    """Write a file unless it already has this text: the cache of `datasets` depends on the modification time."""
    try:
        problem = "" if path.read_text(encoding="utf-8") == text else "it has another text"
    except FileNotFoundError as error:
        problem = "" if not path.is_symlink() else str(error)
        if not problem:
            write_aside(path, text)
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem:
        log.warning("%s is damaged (%s) and is made again", path, problem)
        discard(path)
        write_aside(path, text)


def note_tables(folder: Path) -> None:
    """Note the hashes of the tables that `datasets` has made for the tasks of a folder; it checks none itself."""
    try:
        known = read_checked(folder / TABLES)
    except (FileNotFoundError, Damaged):
        known = {}
    paths = [path for path in (folder / CACHE).rglob("*") if path.suffix in (".arrow", ".json")]
    new = [path for path in paths if str(path.relative_to(folder)) not in known]
    if new:
        write_checked(folder / TABLES, {**known, **{str(path.relative_to(folder)): hash_file(path) for path in new}})


def _check_tables(folder: Path) -> None:
    """Remove the tables of a folder, with a warning, if one of them is not as it was; `datasets` makes them again."""
    try:
        hashes = read_checked(folder / TABLES)
        problem = next((f"{name} is not as it was" for name in hashes if hash_file(folder / name) != hashes[name]), "")
    except FileNotFoundError as error:
        problem = "" if str(error.filename) == str(folder / TABLES) else str(error)
    except (OSError, Damaged) as error:
        problem = str(error)
    if problem:
        log.warning("%s is damaged (%s) and is made again", folder / CACHE, problem)
        discard(folder / CACHE)
        discard(folder / TABLES)
