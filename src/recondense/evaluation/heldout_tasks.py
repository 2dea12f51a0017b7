"""Two lm-eval tasks made from held-out documents: perplexity, and a multiple choice of the line that comes next."""

from __future__ import annotations

import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recondense.errors import UserError
from recondense.files import write_aside

PERPLEXITY = "heldout_perplexity"
NEXT_LINE = "heldout_next_line"
HELDOUT_TASKS = (PERPLEXITY, NEXT_LINE)

MAX_CHARACTERS = 3000  # of a perplexity document
CONTEXT_LINES = 8  # that a question shows
WRAP = 100  # characters; longer lines (prose) are broken between words
SHORTEST = 12  # characters of a line worth guessing
WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class _Line:
    """A line that a question can ask for or offer.

    Args:
        document, index: its place.
        text: without indentation.
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
) -> list[str]:
    """Write the two tasks as lm-eval YAML files with their data beside them; equal arguments write equal bytes.

    heldout_perplexity: log-likelihood of `num_texts` documents, each cut at 3,000 characters. It is per byte, because
    a word of source text is anything between blanks.
    heldout_next_line: shows 8 lines, and `num_choices` lines of which one follows them; the others come from other
    documents. Lines qualify if they have 12 characters and two words, and occur once in all documents. The metric that
    tells most is acc_mutual_info. It ranks by ln P(line | lines before) - ln P(line), so that short and common lines
    have no advantage (a weak model's acc and acc_norm are near chance).

    Args:
        folder: where to write; pass it to `run_tasks` as `include_path`.
        texts: held-out documents, at least two.
        num_questions: at most; there are fewer if the texts have fewer lines.
        seed: of the selection.

    Returns:
        the names of the tasks.

    Raises:
        UserError: the texts are too few to ask a single question.
    """
    rng = random.Random(seed)
    documents = [text for text in texts if text.strip()]
    chosen = sorted(rng.sample(range(len(documents)), min(num_texts, len(documents))))
    rolling = [{"text": _cut(documents[index])} for index in chosen]
    questions = _questions([_lines(text) for text in documents], num_choices, num_questions, rng)
    if not questions:
        raise UserError(
            f"evaluation: {len(documents)} held-out texts have too few lines for one question of {NEXT_LINE} with "
            f"{num_choices} choices; give more validation text, or take the task out of evaluation.tasks."
        )
    _write(folder, PERPLEXITY, rolling, _perplexity_task())
    _write(folder, NEXT_LINE, questions, _next_line_task())
    return list(HELDOUT_TASKS)


def _questions(
    documents: Sequence[Sequence[str]], num_choices: int, num_questions: int, rng: random.Random
) -> list[dict[str, Any]]:
    candidates = _candidates(documents)
    asked = [line for line in candidates if line.index >= CONTEXT_LINES]
    rng.shuffle(asked)
    questions: list[dict[str, Any]] = []
    for line in asked:
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
    """The lines that qualify, in order: of some length, and different from all others."""
    lines_of_length = [
        _Line(number, index, line.strip())
        for number, lines in enumerate(documents)
        for index, line in enumerate(lines)
        if len(line.strip()) >= SHORTEST and len(set(WORD.findall(line))) >= 2
    ]
    counts = Counter(line.text for line in lines_of_length)
    return [line for line in lines_of_length if counts[line.text] == 1]


def _draw_others(line: _Line, candidates: Sequence[_Line], count: int, rng: random.Random) -> list[_Line] | None:
    """`count` different lines of other documents; None if a bounded number of draws does not give as many."""
    drawn: dict[_Line, None] = {}  # in the order of the draws
    for _ in range(100 * count):
        other = candidates[rng.randrange(len(candidates))]
        if other.document != line.document:
            drawn[other] = None
        if len(drawn) == count:
            return list(drawn)
    return None


def _lines(text: str) -> list[str]:
    """The lines of a text without blank ones; long lines are wrapped."""
    lines: list[str] = []
    for line in text.expandtabs().splitlines():
        line = line.rstrip()
        if len(line) > WRAP:
            lines += textwrap.wrap(line, WRAP, break_long_words=False, break_on_hyphens=False)
        elif line:
            lines.append(line)
    return lines


def _cut(text: str) -> str:
    """The beginning of a text, up to the end of a line if there is one."""
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
        # The user's cache is neither needed nor filled.
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder.absolute() / "cache")},
        "test_split": "test",
        "num_fewshot": 0,
        **settings,
        "metadata": {"version": 1.0},
    }
    _write_changed(folder / f"{task}.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _write_changed(path: Path, text: str) -> None:
    """Write a file unless it has that text already: the cache of `datasets` goes by the time of the last change."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_aside(path, text)
