"""The stages of a recovery, resolved: what a stage does not say comes from the recovery and from the run's data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from recondense.config.reader import read_dataclass
from recondense.config.schema import CalibrationConfig, Config, DataConfig, RecoveryConfig, expand_homes
from recondense.errors import ConfigError

LONGEST_NAME = 64
NAME = re.compile(rf"[A-Za-z][A-Za-z0-9_-]{{0,{LONGEST_NAME - 1}}}")  # part of a folder's name, and of those of metrics
TAKEN = ("control", "pretrain", "recovery")  # names of the other fits of a run
OF_ALL = ("stages", "control")  # settings of the recovery as a whole


@dataclass(frozen=True)
class Stage:
    """One fit of a recovery.

    Args:
        name: prefix of its metrics; `recovery` where there are no stages.
        where: what the config calls it, for messages.
        folder: of its checkpoints, within the run's.
        data: what it trains on.
        own_texts: whether its documents are others than the run's.
    """

    name: str
    where: str
    folder: str
    recovery: RecoveryConfig
    data: DataConfig
    own_texts: bool = False


def stages_of(config: Config) -> list[Stage]:
    """The stages in order; the recovery itself is the only one where it lists none.

    Raises:
        ConfigError: a stage that cannot be read.
    """
    messages: list[str] = []
    found = read_stages(config, messages)
    if messages:
        raise ConfigError(messages)
    return found


def read_stages(config: Config, messages: list[str]) -> list[Stage]:
    """`stages_of`, with what is wrong in `messages`."""
    if config.recovery.stages is None:
        return [Stage("recovery", "recovery", "checkpoints", config.recovery, config.data)]
    found = [_read(config, index, values, messages) for index, values in enumerate(config.recovery.stages)]
    if not found:
        messages.append("recovery.stages is an empty list: name at least one stage, or set it to null.")
    for index, stage in enumerate(found):
        if not NAME.fullmatch(stage.name) or stage.name in TAKEN:
            messages.append(
                f"{stage.where}.name={stage.name}: must be a word of at most {LONGEST_NAME} letters, digits, - and "
                f"_ that begins with a letter, and none of {', '.join(TAKEN)}."
            )
        elif stage.name in [other.name for other in found[:index]]:
            messages.append(f"{stage.where}.name={stage.name}: another stage has that name; give each its own.")
    return found


def _read(config: Config, index: int, values: Mapping[str, Any], messages: list[str]) -> Stage:
    where = f"recovery.stages[{index}]"
    own = {key: value for key, value in values.items() if key not in ("data", "sequence_length", *OF_ALL)}
    messages += [
        f"{where}.{name}: is a setting of the whole recovery; set recovery.{name}." for name in OF_ALL if name in values
    ]
    if own.get("steps") is not None and own.get("epochs") is not None:
        messages.append(f"{where}: steps={own['steps']} and epochs={own['epochs']} are both given; set one of them.")
    base = {key: value for key, value in asdict(config.recovery).items() if key not in OF_ALL}
    if "steps" in own and own.get("epochs") is None:
        base["epochs"] = None
    base["name"] = own.get("objective", config.recovery.objective)
    recovery = cast(RecoveryConfig, read_dataclass(RecoveryConfig, _over(base, own), where, messages))
    data = _data(config, values.get("data"), recovery.name, f"{where}.data", messages)
    if "sequence_length" in values:
        length = read_dataclass(DataConfig, {"sequence_length": values["sequence_length"]}, where, messages)
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


def _data(config: Config, values: Any, name: str, where: str, messages: list[str]) -> DataConfig:
    """A stage's data: the run's, the run's with changes, or (where it names a source) data of its own."""
    if values is None:
        return config.data
    if not isinstance(values, Mapping):
        messages.append(
            f"{where}={values}: expected a group of settings, such as "
            "{source: texts, form: alpaca, train: {path: ...}}."
        )
        return config.data
    if "calibration" in values:
        messages.append(
            f"{where}.calibration: a stage trains; the run's data.calibration is what the method searches on."
        )
        values = {key: value for key, value in values.items() if key != "calibration"}
    if "source" in values:
        base: dict[str, Any] = {"name": name, "sequence_length": config.data.sequence_length}
    else:
        if "dataset" in values:
            messages.append(
                f"{where}.dataset={values['dataset']}: other settings of it would be the run's; give source too."
            )
        base = {key: value for key, value in asdict(config.data).items() if key != "calibration"}
    data = cast(DataConfig, read_dataclass(DataConfig, _over(base, values), where, messages))
    calibration = CalibrationConfig() if "source" in values else config.data.calibration
    return replace(expand_homes(data), calibration=calibration)


def without_teacher(recovery: RecoveryConfig) -> RecoveryConfig:
    """The same recovery of a model that is its own original: next-token training in place of distillation.

    What learns from another model goes on doing so.
    """

    def objective(own: Mapping[str, Any]) -> Any:
        wanted, teacher = own.get("objective", recovery.objective), own.get("teacher", recovery.teacher)
        return "finetune" if wanted == "distill" and teacher != "model" else wanted

    stages = recovery.stages
    if stages is not None:
        stages = tuple({**stage, "objective": objective(stage)} for stage in stages)
    return replace(recovery, objective=objective({}), stages=stages)


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others, group by group."""
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        merged[key] = _over(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def control_settings(recovery: RecoveryConfig) -> RecoveryConfig:
    """The same steps on the original, by next-token training: what training alone brings."""
    return replace(recovery, name="control", objective="finetune", trainable="experts", control=False)
