"""Settings, modules and data of recoveries of tiny models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recondense.config.schema import RecoveryConfig, TrainerConfig
from recondense.data.loader import RecoveryData
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teachers import Teacher
from recondense.surgery.apply import apply
from support.tiny_models import FAMILIES, condense_plan, recorded, windows

QUIET = TrainerConfig(progress_bar=False)


def recovery(**changes: Any) -> RecoveryConfig:
    settings: dict[str, Any] = {
        "name": "distill", "objective": "distill", "steps": 4, "batch_size": 2, "learning_rate": 3e-3,
        "checkpoint_every": 2, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1,
    }  # fmt: skip
    return RecoveryConfig(**{**settings, **changes})


def module_of(family: str = "qwen2_moe", layers: tuple[int, ...] = (1, 2), **changes: Any) -> RecoveryModule:
    """A prepared module with a new model of the same seed every time."""
    model = FAMILIES[family]()
    return prepared(model, condense_plan(model, layers), **changes)


def prepared(
    model: Any, plan: Plan, settings: RecoveryConfig | None = None, teacher: Teacher | None = None, **changes: Any
) -> RecoveryModule:
    """A module that is ready to train: its student is the model after the plan."""
    student = apply(model, plan, lambda: recorded(model))
    module = RecoveryModule(student, settings or recovery(**changes), teacher)
    module.prepare()
    return module


def data(module: RecoveryModule, validation: Tensor | None = None) -> RecoveryData:
    settings = module.settings
    batches = settings.steps * settings.accumulate_grad_batches
    return RecoveryData(windows(7, 8), validation, settings.batch_size, batches, seed=3)


def trained(module: RecoveryModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.model.state_dict().items()}
