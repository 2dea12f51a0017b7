"""RECOVER: train a student in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.config.checks import check_recovery
from recondense.config.problems import render
from recondense.config.schema import RecoveryConfig, TrainerConfig, from_dict
from recondense.data.loader import RecoveryData
from recondense.data.windows import pack
from recondense.errors import ConfigError, UserError
from recondense.files import JsonFolder, fingerprint
from recondense.models.layer_store import layer_store
from recondense.models.loading import weights_fingerprint
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
        UserError: a setting does not exist or is invalid, there is too little text, or there is nothing to train; the
            folder has another call's checkpoints; a streamed model is to be distilled.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> before = rc.evaluate(student, tokenizer, texts, sequence_length=32)
        >>> student = rc.recover(student, tokenizer, texts, steps=4, sequence_length=32, learning_rate=1e-2)
        >>> rc.evaluate(student, tokenizer, texts, sequence_length=32)["kl_to_original"] < before["kl_to_original"]
        True
    """
    recovery = _read_settings({"objective": objective, "steps": steps, **settings})
    windows_NS = pack(texts, tokenizer, sequence_length, "the training text")
    _check_folder(folder, student, recovery, windows_NS, seed)
    _load_streamed(student, recovery)
    data = RecoveryData(windows_NS, None, recovery.batch_size, recovery.steps * recovery.accumulate_grad_batches, seed)
    module = RecoveryModule(student, recovery, tokenizer=tokenizer)
    with TemporaryDirectory() as temporary:
        fit(module, data, Path(folder or temporary, "checkpoints"), TrainerConfig(), seed)
    return student


def _read_settings(settings: dict[str, Any]) -> RecoveryConfig:
    """Return the settings of a recovery, which contradict neither each other nor this call."""
    for name in ("stages", "epochs", "control", "teacher", "teacher_path", "validate_every"):
        if settings.get(name) not in (None, False, 0, "shared"):
            raise UserError(f"recovery.{name}={settings[name]}: `recover` does not support this; use train.py")
    if settings["objective"] == "none":
        raise UserError("recovery.objective=none: there is nothing to train. Use distill or finetune")
    values = {"name": settings["objective"], "checkpoint_every": settings["steps"], **settings}
    recovery = from_dict({"recovery": values}).recovery
    if problems := render(check_recovery(recovery, "recovery")):
        raise ConfigError(problems)
    return recovery


def _load_streamed(student: Student, recovery: RecoveryConfig) -> None:
    """Load the weights of a streamed model: a training needs all of them in memory."""
    if not layer_store(student.model).streamed:
        return
    if recovery.objective == "distill":
        raise UserError("objective=distill: the original of a streamed model is not in memory. Use finetune")
    student.load_into_memory()


def _check_folder(
    folder: str | Path | None, student: Student, recovery: RecoveryConfig, windows_NS: Tensor, seed: int
) -> None:
    """Keep in the folder what its checkpoints depend on. Of the student's weights, the original's stand for all.

    Raises:
        UserError: the folder has the checkpoints of another call.
    """
    if folder is None:
        return
    weights = ""
    if student.has_original:
        with student.original() as model:
            weights = weights_fingerprint(model)
    call = {
        "model": weights,
        "plan": fingerprint(student.plan.to_dict()["operations"]),
        "settings": fingerprint(asdict(recovery)),
        "texts": fingerprint(windows_NS.tolist()),
        "seed": str(seed),
    }
    earlier = JsonFolder(Path(folder)).setdefault("call", call)
    if differences := [name for name, value in call.items() if earlier.get(name) != value]:
        raise UserError(
            f"{folder}: holds the training of a call with another {' and '.join(differences)}; give another folder"
        )
