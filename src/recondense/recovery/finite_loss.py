"""Ends a training at the first loss that is not finite, with its cause, before a checkpoint is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from recondense import processes
from recondense.config.schema import RecoveryConfig
from recondense.recovery import shared_passes
from recondense.recovery.losses import TopK, chunks
from recondense.recovery.module import RecoveryModule
from recondense.recovery.shared_passes import CountedTokens, PassInputs
from recondense.recovery.teachers import TeacherOutput

CHECK_EVERY = 10  # steps, because reading a loss waits for the GPU
CHUNK = 512  # tokens whose logits are computed at a time


class _Step(NamedTuple):
    number: int
    loss: Tensor
    batches: Sequence[Mapping[str, Tensor]]


class StopAtNonFiniteLoss(L.Callback):
    """Raises a UserError that names stage, step and cause.

    Losses are read after the first step, every ten steps, before a checkpoint and at the end. They are means over all
    processes, so that all end together; the first one says why.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []  # whose losses have not been read
        self._batches: list[Mapping[str, Tensor]] = []  # of the current step
        self._begun = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches.append(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, self._batches = _Step(trainer.global_step, pl_module.step_loss, self._batches), []
        self._steps.append(step)
        if not self._begun or step.number % CHECK_EVERY == 0 or step.loss.device.type == "cpu":
            self._check(pl_module)
        self._begun = True

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._check(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._check(pl_module)

    def _check(self, module: RecoveryModule) -> None:
        """Read the losses of the steps since the last call.

        Raises:
            UserError: one of them is not finite.
        """
        steps, self._steps = self._steps, []
        losses = torch.stack([step.loss for step in steps]).tolist() if steps else []
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                processes.refuse(f"{module.stage}: the loss of step {step.number} is {loss}: {_cause(module, step)}")


def _cause(module: RecoveryModule, step: _Step) -> str:
    """Return why the loss of a step is not finite, and what helps."""
    settings = module.settings
    if settings.objective == "distill":
        answers = [_is_finite(_teach(module, batch)) for batch in step.batches]
        if not all(all(finite) for finite in processes.gather(answers)):
            return _teacher_problem(settings)
    if step.number == 1:
        return (
            "the model's predictions are not finite before it is trained. Check its weights (model.path), or use "
            "another model.dtype or trainer.precision"
        )
    return f"the training diverges. Lower recovery.learning_rate={settings.learning_rate:g}, or check the training data"


def _teacher_problem(settings: RecoveryConfig) -> str:
    if settings.teacher == "model":
        path = f"recovery.teacher_path={settings.teacher_path}"
        return f"the predictions of the teacher ({path}) are not finite. Download it again, or use another one"
    return (
        "the predictions of the teacher, the original, are not finite. Download the model (model.path) again, or use "
        "another one"
    )


def _teach(module: RecoveryModule, batch: Mapping[str, Tensor]) -> TeacherOutput:
    """Return the teacher's answer to a batch of the training once more."""
    ids = batch["input_ids"]
    tokens = CountedTokens.select(ids, batch.get("labels"), last=True)
    arguments = shared_passes.forward_arguments(module.model, ids, batch.get("position_ids"))
    return module.teacher.teach(PassInputs(arguments, tokens, batch.get("window")))


@torch.no_grad()
def _is_finite(answer: TeacherOutput) -> bool:
    """Return whether the logits of a teacher's answer are finite."""
    target = answer.target
    if target is None:
        return True
    if isinstance(target, TopK):
        return bool(target.logits_TK.isfinite().all())
    parts = chunks(len(target.hidden_TD), CHUNK)
    return all(bool(target.head.logits(target.hidden_TD[part]).isfinite().all()) for part in parts)
