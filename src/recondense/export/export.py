"""EXPORT: write a student as a Hugging Face folder."""

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
    """Write a student to a folder that can be read by `load`, or by transformers without recondense.

    Args:
        student: a student returned by `apply`; it is not changed.
        tokenizer: saved beside the weights; None saves no tokenizer.
        folder: the folder to write; an existing folder is replaced after all files are written.
        settings: format and shard size; None for the defaults.
        card: the beginning of README.md, or a function that makes it from the folder after the weights are written.
            None: a short text that refers to the plan.
        history: the operations that were applied to the model before this plan. None reads them from the folder from
            which the model was loaded.

    Returns:
        "stock" if the folder loads as the family's own class, or "bundled" if it has its own modeling file.

    Raises:
        UserError: `settings` ask for a format that cannot express the student.

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
        card = f"# {student.plan.model}, compressed by recondense\n\nThe operations are in `plan.json`.\n"
    plan = replace(student.plan, history=history)
    return write_folder(student.model, tokenizer, plan, Path(folder), card, settings)
