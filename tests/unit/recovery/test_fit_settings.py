"""A fit changes nothing but weights, however it ends."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.recoveries import data, recovery, trained
from support.settings_around import differences, settings_around
from support.tiny_models import EVERY, bits, condense_plan, same_bits, windows

from recondense.callbacks.graceful_stop import GracefulStop
from recondense.callbacks.profile import ProfileMemoryAndSpeed
from recondense.callbacks.progress import TrainingProgress
from recondense.config.schema import TrainerConfig
from recondense.operations import Prune
from recondense.plan import Plan
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery.apply import apply

PRUNED = Plan("tiny", tuple(Prune(layer, (0, 1, 2, 4)) for layer in (1, 2)))
# Lightning warns of this whenever a fit resumes.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class StopAt(L.Callback):
    """Fails before the given batch."""

    def __init__(self, batch: int, error: type[BaseException] = RuntimeError) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == self.batch:
            raise self.error("stopped")


class Terminate(L.Callback):
    """Sends a SIGTERM during training."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def module_of(
    family: str = "qwen2_moe", dtype: torch.dtype = torch.float32, plan: Plan | None = None, **changes: Any
) -> RecoveryModule:
    """A module as a run passes it to its first fit: surgery is done, nothing trains yet."""
    model = EVERY[family]()
    fp32_parts = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in fp32_parts):  # as loading leaves it
            parameter.data = parameter.data.to(dtype)
    student = apply(model, plan or condense_plan(model, [1, 2]))
    model.eval()
    return RecoveryModule(student, recovery(**changes))


def original_bits(module: RecoveryModule) -> dict[str, torch.Tensor]:
    with module.student.original() as model:
        return bits(model)


ROUTERS: dict[str, Any] = {"family": "ernie4_5_moe", "dtype": torch.bfloat16}  # whose routers are in fp32
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hidden states, validated": {"hidden_share": 0.5, "validate_every": 2},
    "activations again": {"activation_checkpointing": True},
    "compiled": {"trainer": {"compile": True}},
    "fused experts in bf16": {"dtype": torch.bfloat16, "plan": PRUNED},
    "fused experts of fp32 in bf16": {"plan": PRUNED, "trainer": {"precision": "bf16-mixed"}},
    "all in bf16": {"dtype": torch.bfloat16, "trainer": {"precision": "bf16-true"}},
    "all in bf16 but routers": {**ROUTERS, "plan": PRUNED, "trainer": {"precision": "bf16-true"}},
    "all weights": {**ROUTERS, "plan": Plan("tiny"), "trainable": "all", "objective": "finetune"},
    "all weights, all in bf16": {
        **ROUTERS, "plan": Plan("tiny"), "trainable": "all", "objective": "finetune",
        "trainer": {"precision": "bf16-true"},
    },
    "routers": {**ROUTERS, "plan": PRUNED, "trainable": "routers"},
    "all but experts, compiled": {
        **ROUTERS, "plan": PRUNED, "trainable": ("routers", "norms", "attention"), "trainer": {"compile": True},
    },
    "all weights beside an original": {"trainable": "all", "activation_checkpointing": True},
    "deterministic": {"trainer": {"deterministic": True}},
}  # fmt: skip


FUSED, AGAIN, ALL = "fused experts in bf16", "activations again", "all weights"
ENDS = [*((name, "done") for name in CASES), *((name, "fails") for name in (FUSED, AGAIN, ALL)), (FUSED, "interrupted")]


@pytest.mark.filterwarnings("ignore")  # warnings of a compiler about its own code
@pytest.mark.parametrize(("name", "ends"), ENDS)
def test_settings_are_as_before(tmp_path: Path, name: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    case = dict(CASES[name])
    trainer = TrainerConfig(progress_bar=False, **case.pop("trainer", {}))
    module = module_of(**case)
    datamodule = data(module, windows(3, 8, seed=5))
    before, original = settings_around(module), original_bits(module)
    if ends == "done":
        fit(module, datamodule, tmp_path, trainer, seed=0)
    else:
        error = RuntimeError if ends == "fails" else KeyboardInterrupt
        with pytest.raises((error, SystemExit)):
            fit(module, datamodule, tmp_path, trainer, seed=0, callbacks=[StopAt(3, error)])
    assert differences(before, settings_around(module)) == {}
    assert datamodule.trainer is None
    assert same_bits(original, original_bits(module)) or case.get("plan") == Plan("tiny")
    torch.compiler.reset()


@pytest.mark.parametrize("stopped", [False, True])
def test_settings_are_as_before_with_the_callbacks_of_a_run(tmp_path: Path, stopped: bool) -> None:
    """Signal handlers are among the settings."""
    module = module_of()
    profile = ProfileMemoryAndSpeed(prompt_length=4, new_tokens=1, repetitions=1)
    callbacks = [profile, TrainingProgress("recover"), *([Terminate()] if stopped else []), GracefulStop()]
    before = settings_around(module)
    with pytest.raises(SystemExit) if stopped else nullcontext():
        fit(module, data(module), tmp_path, TrainerConfig(progress_bar=False), seed=0, callbacks=callbacks)
    assert differences(before, settings_around(module)) == {}


@pytest.mark.parametrize("deterministic", [False, True])
def test_unusual_settings_are_as_before(tmp_path: Path, deterministic: bool) -> None:
    """Those of a notebook: gradients off, algorithms that only warn, a seed and random numbers of its own."""
    module = module_of()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("PL_GLOBAL_SEED", "11")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.rand(3)
        try:
            before = settings_around(module)
            settings = TrainerConfig(progress_bar=False, deterministic=deterministic)
            fit(module, data(module), tmp_path, settings, seed=0)
            assert differences(before, settings_around(module)) == {}
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_finished_fit_is_loaded_without_changing_settings(tmp_path: Path) -> None:
    first, again = (module_of(dtype=torch.bfloat16, plan=PRUNED) for _ in range(2))
    fit(first, data(first), tmp_path, TrainerConfig(progress_bar=False), seed=0)
    before = settings_around(again)
    fit(again, data(again), tmp_path, TrainerConfig(progress_bar=False), seed=0)
    assert differences(before, settings_around(again)) == {}
    assert same_bits(trained(first), trained(again))


@pytest.mark.parametrize("trainable", ["experts", "lora", "routers", ("experts", "norms", "attention"), "all"])
def test_a_module_resumes_after_a_failure(tmp_path: Path, trainable: Any) -> None:
    """The same module object, as in a notebook, resumes from the last checkpoint."""
    plan = PRUNED if trainable == "routers" else None
    uninterrupted, interrupted = (module_of(plan=plan, steps=6, trainable=trainable) for _ in range(2))
    settings = TrainerConfig(progress_bar=False)
    fit(uninterrupted, data(uninterrupted), tmp_path / "uninterrupted", settings, seed=0)
    for stop in (3, 5):
        with pytest.raises(RuntimeError, match="stopped"):
            fit(interrupted, data(interrupted), tmp_path / "interrupted", settings, seed=0, callbacks=[StopAt(stop)])
    fit(interrupted, data(interrupted), tmp_path / "interrupted", settings, seed=0)
    assert same_bits(trained(uninterrupted), trained(interrupted))
    assert not same_bits(trained(uninterrupted), bits(module_of(plan=plan).student.model))
    names = torch.load(tmp_path / "interrupted" / "final.ckpt", weights_only=True)["state_dict"].keys()
    assert not any(name.startswith("originals.") for name in names)
    assert trainable != "routers" or all("gate.weight" in name for name in names)
