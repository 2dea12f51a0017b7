"""RECOVER: train a student in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from recondense.config.schema import TrainerConfig, from_dict
from recondense.data.loader import RecoveryData
from recondense.data.windows import pack
from recondense.errors import UserError
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery.student import Student


def recover(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    objective: str = "distill",
    steps: int = 200,
    *,
    sequence_length: int = 256,
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> Student:
    """Train a student: by default the experts of the layers that the plan changed.

    Args:
        student: a student returned by `apply`; it is trained in place. Its original does not change.
        tokenizer: the model's tokenizer.
        texts: documents; they are packed into windows of `sequence_length` tokens.
        objective: "distill" to learn the original's predictions, or "finetune" to predict the next token.
        steps: number of optimizer steps, each on `batch_size` windows. Windows repeat as often as needed.
        sequence_length: tokens per window.
        seed: the seed of the order of the windows.
        folder: a folder for checkpoints, from which the same call resumes. None uses a temporary folder.
        settings: other settings of conf/recovery, such as batch_size, learning_rate or trainable.

    Returns:
        The student.

    Raises:
        UserError: a setting does not exist or is invalid, there is too little text, or there is nothing to train.

    Example:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> before = rc.evaluate(student, tokenizer, texts, sequence_length=32)
        >>> student = rc.recover(student, tokenizer, texts, steps=4, sequence_length=32, learning_rate=1e-2)
        >>> rc.evaluate(student, tokenizer, texts, sequence_length=32)["kl_to_original"] < before["kl_to_original"]
        True
    """
    values = {"name": objective, "objective": objective, "steps": steps, "checkpoint_every": steps, **settings}
    recovery = from_dict({"recovery": values}).recovery
    _refuse_settings_of_runs(settings)
    windows_NS = pack(texts, tokenizer, sequence_length, "the training text")
    batches = recovery.steps * recovery.accumulate_grad_batches
    data = RecoveryData(windows_NS, None, recovery.batch_size, batches, seed)
    module = RecoveryModule(student, recovery, tokenizer=tokenizer)
    with TemporaryDirectory() as temporary:
        fit(module, data, Path(folder or temporary), TrainerConfig(), seed)
    return student


def _refuse_settings_of_runs(settings: dict[str, Any]) -> None:
    for name in ("stages", "epochs", "control", "teacher", "validate_every"):
        if settings.get(name) not in (None, False, 0, "shared"):
            raise UserError(f"recovery.{name}={settings[name]}: `recover` does not support this; use train.py")
