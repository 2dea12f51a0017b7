"""Resolve the stages of a recovery: settings that a stage does not have come from the recovery and the run's data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from recondense.config.problems import Problem, render, suggestion
from recondense.config.schema import CalibrationConfig, Config, DataConfig, RecoveryConfig
from recondense.config.types import Part
from recondense.config.validation import validated
from recondense.errors import ConfigError

LONGEST_NAME = 64
NAME = re.compile(rf"[A-Za-z][A-Za-z0-9_-]{{0,{LONGEST_NAME - 1}}}")  # part of the names of a folder and of metrics
TAKEN = ("control", "pretrain", "recovery")  # names of the other fits of a run
OF_ALL = ("stages", "control")  # settings of the recovery that a stage cannot have
STAGE_SETTINGS = (
    *(field.name for field in fields(RecoveryConfig) if field.name not in OF_ALL),
    "data",
    "sequence_length",
)
OF_WINDOWS = ("sequence_length", "packing", "bos", "answer_only")  # how documents become windows
DATA_SETTINGS = tuple(field.name for field in fields(DataConfig) if field.name != "calibration")
Stages = tuple["Stage", ...]


@dataclass(frozen=True)
class Stage:
    """One fit of a recovery.

    Args:
        name: the prefix of the stage's metrics; `recovery` if the recovery lists no stages.
        where: the dotted name of the stage in the config, for messages.
        folder: the folder of the stage's checkpoints, relative to the run's folder.
        recovery: the resolved settings of the training.
        data: the texts that the stage trains on.
        own_texts: whether the stage trains on other documents than the run's.
    """

    name: str
    where: str
    folder: str
    recovery: RecoveryConfig
    data: DataConfig
    own_texts: bool = False


def require_stages(config: Config) -> Stages:
    """Return the stages in order. A recovery that lists no stages is a single stage.

    Raises:
        ConfigError: the settings of a stage are invalid.
    """
    stages, problems = resolve_stages(config)
    if problems:
        raise ConfigError(render(problems))
    return stages


def resolve_stages(config: Config) -> tuple[Stages, list[Problem]]:
    """Return the stages and their problems. An invalid setting is replaced by that of the recovery."""
    if config.recovery.stages is None:
        return (Stage("recovery", "recovery", "checkpoints", config.recovery, config.data),), []
    problems: list[Problem] = []
    if not config.recovery.stages:
        problems.append(Problem("recovery.stages", "name at least one stage, or set it to null.", [], True))
    stages: list[Stage] = []
    for index, values in enumerate(config.recovery.stages):
        stage = _resolve(config, index, values, problems)
        if not NAME.fullmatch(stage.name) or stage.name in TAKEN:
            limit = (
                f"must begin with a letter, have at most {LONGEST_NAME} letters, digits, - and _, and be none of "
                f"{', '.join(TAKEN)}."
            )
            problems.append(Problem(f"{stage.where}.name", limit, stage.name, True))
        elif stage.name in [other.name for other in stages]:
            text = "another stage has this name. Names must be unique."
            problems.append(Problem(f"{stage.where}.name", text, stage.name, True))
        stages.append(stage)
    return tuple(stages), problems


def _resolve(config: Config, index: int, values: Mapping[str, Any], problems: list[Problem]) -> Stage:
    where = f"recovery.stages[{index}]"
    values = _without_unknown(values, STAGE_SETTINGS, OF_ALL, where, problems)
    changes = {key: value for key, value in values.items() if key not in ("data", "sequence_length", *OF_ALL)}
    for name in OF_ALL:
        if name in values:
            problems.append(
                Problem(f"{where}.{name}", f"belongs to the recovery, not to a stage; set recovery.{name}.")
            )
    if changes.get("steps") is not None and changes.get("epochs") is not None:
        both = f"steps={changes['steps']} and epochs={changes['epochs']} are both set; set only one of them."
        problems.append(Problem(where, both, of_value=True))
    base = {key: value for key, value in asdict(config.recovery).items() if key not in OF_ALL}
    if "steps" in changes and changes.get("epochs") is None:
        base["epochs"] = None
    base["name"] = changes.get("objective", config.recovery.objective)
    recovery, mistakes = validated(RecoveryConfig, _merge(base, changes), where)
    problems += mistakes
    data = _resolve_data(config, values.get("data"), recovery.name, f"{where}.data", problems)
    if "sequence_length" in values:
        length, mistakes = validated(DataConfig, {"sequence_length": values["sequence_length"]}, where)
        problems += mistakes
        data = replace(data, sequence_length=length.sequence_length)
    # Other windows of the same documents are made without reading them again.
    elsewhere = replace(data, **{name: getattr(config.data, name) for name in OF_WINDOWS})
    return Stage(
        recovery.name,
        where,
        f"checkpoints/{index}-{recovery.name}",
        replace(recovery, control=config.recovery.control),
        data,
        elsewhere != config.data,
    )


def _resolve_data(config: Config, values: Any, name: str, where: str, problems: list[Problem]) -> DataConfig:
    """Return a stage's data: the run's data, possibly with changes, or separate data if the stage names a source."""
    if values is None:
        return config.data
    if not isinstance(values, Mapping):
        example = "{source: texts, form: alpaca, train: {path: ...}}"
        problems.append(Problem(where, f"expected a group of settings, such as {example}.", values))
        return config.data
    if "calibration" in values:
        text = "a stage only trains and has no calibration set; set data.calibration of the run."
        problems.append(Problem(f"{where}.calibration", text))
        values = {key: value for key, value in values.items() if key != "calibration"}
    values = _without_unknown(values, DATA_SETTINGS, (), where, problems)
    if "source" in values:
        base: dict[str, Any] = {"name": name, "sequence_length": config.data.sequence_length}
    else:
        if "dataset" in values:
            text = "the other settings would be those of the run's dataset; set source too."
            problems.append(Problem(f"{where}.dataset", text, values["dataset"], True))
        base = {key: value for key, value in asdict(config.data).items() if key != "calibration"}
    data, mistakes = validated(DataConfig, _merge(base, values), where)
    problems += mistakes
    return replace(data, calibration=CalibrationConfig() if "source" in values else config.data.calibration)


def _without_unknown(
    values: Mapping[str, Any], settings: Sequence[str], refused: Sequence[str], where: str, problems: list[Problem]
) -> dict[str, Any]:
    """Return the values whose names are known; the others become problems.

    Args:
        values: of a stage, or of its data.
        settings: the names that they can have.
        refused: other names, which have problems of their own.
        where: the dotted name of `values` in the config.
        problems: the problems of unknown names are appended to it.
    """
    known = {key: value for key, value in values.items() if key in (*settings, *refused)}
    for key in (str(key) for key in values if key not in known):
        text = f"there is no such setting. {suggestion(key, settings, prefix=f'{where}.')}"
        problems.append(Problem(f"{where}.{key}", text))
    return known


def without_teacher(recovery: RecoveryConfig) -> RecoveryConfig:
    """Return the settings for an uncompressed model: next-token training instead of learning from the original.

    Distillation from another model is unchanged.
    """
    other_teacher = recovery.objective == "distill" and recovery.teacher == "model"
    if recovery.objective not in ("distill", "local") or other_teacher:
        return recovery
    return replace(recovery, objective="finetune")


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge changes into settings, recursively."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def control_settings(recovery: RecoveryConfig) -> RecoveryConfig:
    """Return the settings of the control: next-token training of the original, for the same number of steps.

    The same parts train, with the experts in place of adapters.
    """
    experts: Part = "experts"
    parts = tuple(dict.fromkeys(experts if part == "lora" else part for part in recovery.parts))
    return replace(recovery, name="control", objective="finetune", trainable=parts, control=False)
