"""EXPORT: a student as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recondense.config.schema import ExportConfig
from recondense.export.write_folder import write_folder
from recondense.plan import History
from recondense.surgery.student import Student


def export(
    student: Student,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    settings: ExportConfig | None = None,
    *,
    card: str | Callable[[Path], str] | None = None,
    history: History | None = None,
) -> str:
    """Write a student to a folder that `load`, and transformers alone, read back.

    Args:
        student: from `execute` or `recover`; it is not changed.
        tokenizer: saved beside the weights; None: none.
        folder: replaced if it exists; written aside, then renamed.
        settings: layout and size of the shards.
        card: text of README.md, or a function that makes it from the folder once the weights are written. None: a line
            that names the plan.
        history: what was done to the model before this plan. None: what the folder says that the model came from.

    Returns:
        "stock" if the family's own class holds the student, else "bundled": the folder carries its class.

    Raises:
        UserError: the settings ask for a layout that cannot hold the student.

    Example:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> rc.export(student, tokenizer, output)
        'stock'
        >>> condensed, tokenizer = rc.load(output)
    """
    if history is None:
        history = History.load(student.model.config.name_or_path)
    if card is None:
        card = f"# {student.plan.model}, compressed by recondense\n\nWhat was decided is in `plan.json`.\n"
    plan = replace(student.plan, history=history)
    return write_folder(student.model, tokenizer, plan, Path(folder), card, settings)
