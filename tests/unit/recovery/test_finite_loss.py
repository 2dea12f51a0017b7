"""A training ends at the first loss that is not finite, with its cause, and saves no weights that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recoveries import QUIET, data, module_of, prepared, recovery
from support.tiny_models import condense_plan, qwen2_moe

from recondense.errors import UserError
from recondense.models import decoder
from recondense.recovery import finite_loss
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teachers import OtherTeacher


def message(module: RecoveryModule, folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        fit(module, data(module), folder, QUIET, seed=0)
    for path in folder.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(bool(value.isfinite().all()) for value in state.values()), path
    return str(raised.value)


def broken(part: str, value: float = math.nan) -> Any:
    """A model with one weight that is not finite."""
    model = qwen2_moe(seed=3)
    weights = {"norm": model.model.norm.weight, "head": model.lm_head.weight, "token": model.model.embed_tokens.weight}
    weights[part].data.view(-1)[0] = value
    return model


def trained_parameter(module: RecoveryModule) -> torch.nn.Parameter:
    return next(value for value in module.parameters() if value.requires_grad)


@pytest.mark.parametrize(
    ("part", "value", "accumulate"), [("norm", math.nan, 1), ("head", math.nan, 2), ("norm", math.inf, 3)]
)
def test_a_teacher_that_is_not_finite_is_named(tmp_path: Path, part: str, value: float, accumulate: int) -> None:
    model = qwen2_moe()
    settings = recovery(teacher="model", teacher_path="some/teacher", accumulate_grad_batches=accumulate)
    teacher = OtherTeacher(broken(part, value), model, "some/teacher")
    text = message(prepared(model, condense_plan(model, [1, 2]), settings, teacher), tmp_path)
    assert text.startswith(
        "recovery: the loss of step 1 is nan: the predictions of the teacher (recovery.teacher_path="
    )
    assert "some/teacher" in text and not list(tmp_path.glob("*.ckpt"))


def test_the_original_is_named(tmp_path: Path) -> None:
    module = module_of()
    block = module.student.originals[1]
    next(block.parameters()).data.view(-1)[0] = math.nan
    assert "the predictions of the teacher, the original, are not finite" in message(module, tmp_path)


def test_weights_of_the_student_that_are_not_finite_from_the_start(tmp_path: Path) -> None:
    module = module_of(objective="finetune")
    with decoder.lm_head(module.model) as head:
        head.weight_VD.data[3] = math.nan
    text = message(module, tmp_path)
    assert "the loss of step 1 is nan: the model's predictions are not finite before it is trained" in text


@pytest.mark.parametrize(("objective", "every"), [("finetune", 1), ("distill", 100)])
def test_a_training_that_diverges(tmp_path: Path, objective: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(objective=objective, steps=30, checkpoint_every=every)
    parameter = trained_parameter(module)
    step = RecoveryModule.training_step
    reached = []

    def spoiled(self: RecoveryModule, batch: Any, batch_index: int) -> Any:
        reached.append(batch_index)
        if batch_index == 3:
            parameter.data.fill_(math.nan)
        return step(self, batch, batch_index)

    monkeypatch.setattr(RecoveryModule, "training_step", spoiled)
    text = message(module, tmp_path)
    assert text == (
        "recovery: the loss of step 4 is nan: the training diverges. Lower recovery.learning_rate=0.003, or check the "
        "training data"
    )
    assert reached == [0, 1, 2, 3]


def test_losses_on_a_gpu_are_read_every_ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step that is not finite is named, however late its loss is read."""
    callback, module = finite_loss.StopAtNonFiniteLoss(), module_of(objective="finetune")
    reads: list[int] = []
    check = callback._check

    def counted(module: RecoveryModule) -> None:
        reads.append(len(callback._steps))
        check(module)

    monkeypatch.setattr(callback, "_check", counted)

    class Trainer:
        accumulate_grad_batches, global_step = 1, 0

    class OnGpu(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    trainer = Trainer()
    with pytest.raises(UserError, match="the loss of step 17 is inf: the training diverges"):
        for number in range(1, 31):
            trainer.global_step = number
            module.step_loss = torch.tensor(math.inf if number >= 17 else 1.0).as_subclass(OnGpu)
            callback.on_train_batch_end(trainer, module, None, {}, number - 1)
    assert reads == [1, 9, 10] and number == 20
    callback.on_save_checkpoint(trainer, module, {})


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the step before them was finite."""
    module = module_of(objective="finetune", steps=4, checkpoint_every=2)
    parameter = trained_parameter(module)
    save = RecoveryModule.on_save_checkpoint

    def spoiled(self: RecoveryModule, checkpoint: dict[str, Any]) -> None:
        parameter.data.view(-1)[0] = math.inf
        save(self, checkpoint)

    monkeypatch.setattr(RecoveryModule, "on_save_checkpoint", spoiled)
    text = message(module, tmp_path)
    assert text.startswith("recovery: the training diverges: ") and "is not finite any more" in text
    assert not list(tmp_path.glob("*.ckpt"))
