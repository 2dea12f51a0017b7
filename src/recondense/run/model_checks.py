"""Checks of the models of a run, the original and its teachers, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from recondense.config.problems import Problem
from recondense.config.schema import Config, ModelConfig
from recondense.config.stages import Stage
from recondense.errors import ConfigError, UserError
from recondense.models import model_classes, quantized
from recondense.models.config_checks import Checkpoint, check_config, config_problems, size_problems
from recondense.models.library_errors import library_calls
from recondense.models.published_configs import recorded_config
from recondense.run.resolved_run import Run


def check_model(config: Config) -> Checkpoint:
    """Check the model that a run starts from.

    Args:
        config: settings of the run. With `plan_only`, only the config is checked.
    """
    model = config.model
    if model.path is None or config.plan_only:
        try:
            planned = planned_config(model, config.plan_only)
        except ConfigError as error:
            return Checkpoint(None, None, tuple(Problem("", text) for text in error.messages))
        except UserError as error:
            return Checkpoint(None, None, (Problem("", str(error)),))
        return Checkpoint(planned, None, tuple(quantized.check(planned.to_dict(), "model.path", model.path)))
    from recondense.models.checkpoint_checks import check_checkpoint  # late: imports tokenizers

    return check_checkpoint(model.path, model, any_family=not Path(model.path).is_dir())


def planned_config(model: ModelConfig, plan_only: bool = False) -> PretrainedConfig:
    """Return the config of the model that a run starts from.

    Args:
        model: settings of the model.
        plan_only: whether to use the package's copy of a hub id's config, without access to the hub.

    Raises:
        UserError: transformers cannot read the config, does not know the model type or refuses its values, or the hub
            id is unknown or cannot be reached.
    """
    if model.path is None:
        return _pretrain_config(dict(model.pretrain or {}))
    where = f"model.path={model.path}"
    try:
        if plan_only and not Path(model.path).is_dir():
            return recorded_config(model.path)
        checked = check_config(model.path, model)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if checked.problems:
        raise ConfigError(f"{where}: {text}." for text in checked.problems)
    return checked.config


def _pretrain_config(pretrain: dict[str, Any]) -> PretrainedConfig:
    """Return the config of the embedded model, which is trained on first use."""
    from transformers import Qwen2MoeConfig

    values = {"vocab_size": pretrain.get("vocab_size"), **pretrain.get("config", {})}
    problems = list(size_problems(values))
    if not problems:
        with library_calls("model.pretrain.config"):
            config = Qwen2MoeConfig(**values)
        problems = config_problems(config)
    if problems:
        raise ConfigError(f"model.pretrain.config: {text}." for text in problems)
    return config


def check_teachers(run: Run, original: Checkpoint) -> Iterator[Problem]:
    """Yield the problems of all models other than the original that teach a stage.

    Args:
        run: the run.
        original: the checked original.
    """
    stages: dict[tuple[str, str | None], Stage] = {}
    for stage in run.stages:
        recovery = stage.recovery
        if (recovery.objective, recovery.teacher) == ("distill", "model") and recovery.teacher_path is not None:
            stages.setdefault((recovery.teacher_path, recovery.teacher_revision), stage)
    for stage in stages.values():
        yield from _check_teacher(stage, run.config.model, original)


def _check_teacher(stage: Stage, model: ModelConfig, original: Checkpoint) -> Iterator[Problem]:
    from recondense.models.checkpoint_checks import check_checkpoint
    from recondense.recovery.teachers import require_same_vocabulary

    setting, path = f"{stage.where}.teacher_path", str(stage.recovery.teacher_path)
    if not (Path(path) / "config.json").is_file() and Path(path).is_dir():
        return  # the fast checks report it
    settings = replace(model, path=path, revision=stage.recovery.teacher_revision, tokenizer=None)
    teacher = check_checkpoint(path, settings, setting, any_family=True)
    yield from teacher.problems
    if teacher.config is None or teacher.problems:
        return
    if not model_classes.has_attention(teacher.config, model.attention):
        text = f"model_type {teacher.config.model_type} of {setting}={path} does not support it. Use eager."
        yield Problem("model.attention", text, model.attention)
    if original.config is None:
        return
    size, expected = teacher.config.get_text_config().vocab_size, original.config.vocab_size
    if size != expected:
        text = f"its head has {size} logits, but the student's has {expected}. Both need the same vocabulary."
        yield Problem(setting, text, path)
    elif original.tokenizer is not None:
        try:
            require_same_vocabulary(teacher.tokenizer, original.tokenizer, path)
        except UserError as error:
            yield Problem("", str(error).replace("recovery.teacher_path=", f"{setting}=", 1))
