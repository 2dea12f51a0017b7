"""RECOVER: regain the quality that compression cost, by training the student."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.config.checks import check_recovery
from recondense.config.problems import render
from recondense.config.run_identity import identity_of
from recondense.config.schema import RecoveryConfig, TrainerConfig, from_dict
from recondense.data.loader import RecoveryData
from recondense.data.vocabulary import require_rows
from recondense.data.windows import pack
from recondense.errors import ConfigError, UserError
from recondense.files import JsonFolder, fingerprint
from recondense.models.layer_store import layer_store
from recondense.models.tokenizers import embedding_rows
from recondense.recovery.fit import fit
from recondense.recovery.local import LocalRecovery
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
    """Train a student, by default the experts of the layers that the plan changed; `trainable` may list other parts.

    Args:
        student: a student returned by `apply`; it is trained in place. Its original does not change.
        tokenizer: the model's tokenizer.
        texts: documents, which are joined and cut into windows of `sequence_length` tokens.
        objective: "distill" to learn the original's predictions, "finetune" to predict the next token, or "local" to
            train each changed layer on the outputs of the original's block. A streamed model then stays streamed.
        steps: number of optimizer steps (of each layer if local), each on `batch_size` windows, which repeat if needed.
        sequence_length: tokens per window.
        seed: the seed of the order of the windows.
        folder: a folder for checkpoints, from which a call with the same arguments resumes; None for a temporary one.
        settings: other settings of conf/recovery, such as batch_size, learning_rate or trainable.

    Returns:
        The student.

    Raises:
        UserError: a setting does not exist, is invalid or needs the command; there is too little text, a token without
            a row in the embedding, or nothing to train; `folder` is another call's; or a loss is not finite.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> before = rc.evaluate(student, tokenizer, texts, sequence_length=32)
        >>> student = rc.recover(student, tokenizer, texts, steps=4, sequence_length=32, learning_rate=1e-2)
        >>> rc.evaluate(student, tokenizer, texts, sequence_length=32)["kl_to_original"] < before["kl_to_original"]
        True
    """
    recovery = _read_settings(student, {"objective": objective, "steps": steps, **settings})
    windows_NS = _windows(student, tokenizer, texts, sequence_length)
    if folder is None:
        with TemporaryDirectory() as temporary:
            _train(student, tokenizer, recovery, windows_NS, seed, Path(temporary))
    elif (checkpoints := _begin(Path(folder), student, recovery, windows_NS, seed)) not in student.trainings:
        _train(student, tokenizer, recovery, windows_NS, seed, checkpoints)
    return student


def _windows(student: Student, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    windows_NS = pack(texts, tokenizer, length, "the training text")
    require_rows(int(windows_NS.max()), embedding_rows(student.model.config), tokenizer, "the training text")
    return windows_NS


def _train(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    recovery: RecoveryConfig,
    windows_NS: Tensor,
    seed: int,
    checkpoints: Path,
) -> None:
    data = RecoveryData(windows_NS, None, recovery.batch_size, recovery.steps * recovery.accumulate_grad_batches, seed)
    if recovery.objective == "local":
        storage = layer_store(student.model).tensor_storage()
        LocalRecovery(student, recovery, data, checkpoints, TrainerConfig(), storage).run()
        student.trainings.add(checkpoints)
        return
    student.load_into_memory()
    fit(RecoveryModule(student, recovery, tokenizer=tokenizer), data, checkpoints, TrainerConfig(), seed)
    student.trainings.add(checkpoints)  # loading them once more would undo what comes after


def _read_settings(student: Student, settings: dict[str, Any]) -> RecoveryConfig:
    """Return the settings of a recovery, which contradict neither each other nor this call or the student."""
    for name in ("stages", "epochs", "control", "teacher", "teacher_path", "validate_every"):
        if settings.get(name) not in (None, False, 0, "shared"):
            raise UserError(f"recovery.{name}={settings[name]}: `recover` does not support this; use train.py")
    if settings["objective"] == "none":
        raise UserError("recovery.objective=none: there is nothing to train. Use distill, finetune or local")
    values = {"name": settings["objective"], "checkpoint_every": settings["steps"], **settings}
    recovery = from_dict({"recovery": values}).recovery
    if problems := render(check_recovery(recovery, "recovery")):
        raise ConfigError(problems)
    if layer_store(student.model).streamed and recovery.objective == "distill":
        raise UserError("objective=distill: the original of a streamed model is not in memory. Use local or finetune")
    if layer_store(student.model).streamed and recovery.objective == "local" and recovery.fold_coefficients:
        raise UserError("fold_coefficients=True: the blocks of a streamed model are not changed before they train")
    return recovery


def _begin(folder: Path, student: Student, recovery: RecoveryConfig, windows_NS: Tensor, seed: int) -> Path:
    """Return the folder of the checkpoints, after a comparison of this call with the one that began them.

    Raises:
        UserError: the checkpoints belong to another call.
    """
    call = {
        "model": student.original_fingerprint(),
        "plan": fingerprint(student.plan.to_dict()["operations"]),
        "settings": fingerprint(identity_of(recovery)),
        "texts": sha256(windows_NS.numpy().tobytes()).hexdigest()[:16],
        "sequence_length": str(windows_NS.shape[1]),
        "seed": str(seed),
    }
    checkpoints, calls = folder.resolve() / "checkpoints", JsonFolder(folder, "Use another folder")
    if not any(checkpoints.glob("*.ckpt")):
        calls["call"] = call
    earlier = calls.setdefault("call", call)
    if differences := [name for name, value in call.items() if earlier.get(name) != value]:
        raise UserError(
            f"{folder}: contains the training of a call with another {' and another '.join(differences)}. Use another "
            "folder"
        )
    return checkpoints
