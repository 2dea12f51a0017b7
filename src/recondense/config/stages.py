"""The stages of a recovery, resolved: what a stage does not say comes from the recovery and from the run's data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from recondense.config.problems import Problem, render
from recondense.config.schema import CalibrationConfig, Config, DataConfig, RecoveryConfig
from recondense.config.validation import validated
from recondense.errors import ConfigError

LONGEST_NAME = 64
NAME = re.compile(rf"[A-Za-z][A-Za-z0-9_-]{{0,{LONGEST_NAME - 1}}}")  # part of a folder's name, and of those of metrics
TAKEN = ("control", "pretrain", "recovery")  # names of the other fits of a run
OF_ALL = ("stages", "control")  # settings that no stage has
Stages = tuple["Stage", ...]


@dataclass(frozen=True)
class Stage:
    """One fit of a recovery.

    Args:
        name: prefix of its metrics; `recovery` where there are no stages.
        where: its name in the config, for messages.
        folder: of its checkpoints, within the run's.
        data: the texts that it trains on.
        own_texts: whether its documents are others than the run's.
    """

    name: str
    where: str
    folder: str
    recovery: RecoveryConfig
    data: DataConfig
    own_texts: bool = False


def require_stages(config: Config) -> Stages:
    """The stages in order; the recovery itself is the only one where it lists none.

    Raises:
        ConfigError: a stage that cannot be read.
    """
    stages, problems = resolve_stages(config)
    if problems:
        raise ConfigError(render(problems))
    return stages


def resolve_stages(config: Config) -> tuple[Stages, list[Problem]]:
    """The stages, and what is wrong with them; the recovery's setting takes the place of a wrong one."""
    if config.recovery.stages is None:
        return (Stage("recovery", "recovery", "checkpoints", config.recovery, config.data),), []
    problems: list[Problem] = []
    if not config.recovery.stages:
        problems.append(Problem("recovery.stages", "name at least one stage, or set it to null.", []))
    stages: list[Stage] = []
    for index, values in enumerate(config.recovery.stages):
        stage = _resolve(config, index, values, problems)
        if not NAME.fullmatch(stage.name) or stage.name in TAKEN:
            limit = (
                f"must be a word of at most {LONGEST_NAME} letters, digits, - and _ that begins with a letter, and "
                f"none of {', '.join(TAKEN)}."
            )
            problems.append(Problem(f"{stage.where}.name", limit, stage.name))
        elif stage.name in [other.name for other in stages]:
            problems.append(
                Problem(f"{stage.where}.name", "another stage has that name; give each its own.", stage.name)
            )
        stages.append(stage)
    return tuple(stages), problems


def _resolve(config: Config, index: int, values: Mapping[str, Any], problems: list[Problem]) -> Stage:
    where = f"recovery.stages[{index}]"
    given = {key: value for key, value in values.items() if key not in ("data", "sequence_length", *OF_ALL)}
    for name in OF_ALL:
        if name in values:
            problems.append(
                Problem(f"{where}.{name}", f"belongs to the recovery, not to a stage; set recovery.{name}.")
            )
    if given.get("steps") is not None and given.get("epochs") is not None:
        both = f"steps={given['steps']} and epochs={given['epochs']} are both given; set one of them."
        problems.append(Problem(where, both))
    base = {key: value for key, value in asdict(config.recovery).items() if key not in OF_ALL}
    if "steps" in given and given.get("epochs") is None:
        base["epochs"] = None
    base["name"] = given.get("objective", config.recovery.objective)
    recovery, mistakes = validated(RecoveryConfig, _over(base, given), where)
    problems += mistakes
    data = _resolve_data(config, values.get("data"), recovery.name, f"{where}.data", problems)
    if "sequence_length" in values:
        length, mistakes = validated(DataConfig, {"sequence_length": values["sequence_length"]}, where)
        problems += mistakes
        data = replace(data, sequence_length=length.sequence_length)
    elsewhere = replace(data, sequence_length=config.data.sequence_length, packing=config.data.packing)
    return Stage(
        recovery.name,
        where,
        f"checkpoints/{index}-{recovery.name}",
        replace(recovery, control=config.recovery.control),
        data,
        elsewhere != config.data,
    )


def _resolve_data(config: Config, values: Any, name: str, where: str, problems: list[Problem]) -> DataConfig:
    """A stage's data: the run's, the run's with changes, or (where it names a source) data of its own."""
    if values is None:
        return config.data
    if not isinstance(values, Mapping):
        example = "{source: texts, form: alpaca, train: {path: ...}}"
        problems.append(Problem(where, f"expected a group of settings, such as {example}.", values))
        return config.data
    if "calibration" in values:
        searched = "a stage trains; the run's data.calibration is what the method searches on."
        problems.append(Problem(f"{where}.calibration", searched))
        values = {key: value for key, value in values.items() if key != "calibration"}
    if "source" in values:
        base: dict[str, Any] = {"name": name, "sequence_length": config.data.sequence_length}
    else:
        if "dataset" in values:
            others = "other settings of it would be the run's; give source too."
            problems.append(Problem(f"{where}.dataset", others, values["dataset"]))
        base = {key: value for key, value in asdict(config.data).items() if key != "calibration"}
    data, mistakes = validated(DataConfig, _over(base, values), where)
    problems += mistakes
    return replace(data, calibration=CalibrationConfig() if "source" in values else config.data.calibration)


def without_teacher(recovery: RecoveryConfig) -> RecoveryConfig:
    """The same settings for a model that is its own original: next-token training in place of distillation.

    Distillation from another model stays.
    """
    if recovery.objective != "distill" or recovery.teacher == "model":
        return recovery
    return replace(recovery, objective="finetune")


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others, group by group."""
    merged = dict(base)
    for key, value in given.items():
        before = merged.get(key)
        merged[key] = _over(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def control_settings(recovery: RecoveryConfig) -> RecoveryConfig:
    """The same steps on the original, by next-token training: what training alone brings."""
    return replace(recovery, name="control", objective="finetune", trainable="experts", control=False)
