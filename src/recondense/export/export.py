"""EXPORT: write a student as a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recondense.config.run_records import run_inside
from recondense.config.schema import ExportConfig, from_dict
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models.layer_store import layer_store
from recondense.models.model_files import history_of
from recondense.surgery.student import Student


def export(
    student: Student,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    settings: ExportConfig | None = None,
    *,
    card: str | Callable[[Path], str] | None = None,
    overwrite: bool = False,
    verify: str | None = None,
) -> str:
    """Write a student to a folder that can be read by `load`, or by transformers without recondense.

    Before the folder gets its name, it is checked that transformers loads from it the model that was exported.

    Args:
        student: a student returned by `apply`; it is not changed.
        tokenizer: saved beside the weights; None saves no tokenizer.
        folder: the folder to write. An earlier export in it is replaced only when the new one is complete.
        settings: all settings of the export; None for the defaults.
        card: the beginning of the folder's README.md, or a function that returns it, given the folder with the weights.
            None writes a short text that refers to the plan.
        overwrite: whether to replace a folder that contains anything but an export.
        verify: "shapes" compares names and shapes with the class that loads the folder, "logits" also what transformers
            computes from it, and "auto" does so if the model fits into memory twice. None for the value in `settings`.

    Returns:
        "stock" if the folder loads as the family's own class, or "bundled" if it has its own modeling file.

    Raises:
        UserError: the format in `settings` cannot express the student; the folder contains other files, and `overwrite`
            is False; it contains a run, or the weights of a streamed model, which are still read; or there is no
            such `verify`.
        WrongExport: the written folder is not the model. Nothing is left of it, and an earlier export is unchanged.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> rc.export(student, tokenizer, output)
        'stock'
        >>> condensed, tokenizer = rc.load(output)
    """
    folder = Path(folder).resolve()
    _check_folder(folder, student, overwrite)
    if verify is not None:
        settings = from_dict({"export": {**asdict(settings or ExportConfig()), "verify": verify}}).export
    if card is None:
        card = f"# {student.plan.model}, compressed by recondense\n\nThe operations are in `plan.json`.\n"
    plan = replace(student.plan, history=history_of(student.model))
    return write_folder(student.model, tokenizer, plan, folder, card, settings)


def _check_folder(folder: Path, student: Student, overwrite: bool) -> None:
    """Refuse a folder whose replacement would lose something."""
    source = Path(student.model.config.name_or_path or "").resolve()
    if layer_store(student.model).streamed and source.is_dir() and folder in (source, *source.parents):
        raise UserError(f"{folder}: the model is streamed from this folder; export to another one")
    if not folder.exists():
        return
    holds_export = folder.is_dir() and (
        not any(folder.iterdir()) or {"plan.json", "config.json"} <= set(os.listdir(folder))
    )
    if not overwrite and not holds_export:
        raise UserError(f"{folder}: holds other files than an export; choose another folder, or set overwrite=True")
    if (run := run_inside([folder])) is not None:
        raise UserError(f"{folder}: the export would delete the run in {run}; choose another folder")
