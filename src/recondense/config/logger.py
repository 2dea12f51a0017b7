"""Settings of the loggers, and W&B's environment variables, which count where the config says nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from recondense.config.problems import Problem
from recondense.config.types import Switch
from recondense.config.validation import validated

PROJECT = "recondense"  # where neither the config nor a variable names one
# The limits of W&B: it refuses a run with other names.
Project = Annotated[
    str,
    Field(
        pattern=r"^[^/\\#?%:\n]{1,128}$",
        description=r"the name of a W&B project has 1 to 128 characters and none of / \ # ? % :",
    ),
]
Entity = Annotated[
    str,
    Field(
        pattern=r"^[^/\\#?%:\s]{1,128}$",
        description=r"the name of a W&B user or team has 1 to 128 characters, no spaces and none of / \ # ? % :",
    ),
]
Name = Annotated[
    str,
    Field(pattern=r"^\S(.{0,126}\S)?$", description="W&B takes 1 to 128 characters on one line, without outer spaces"),
]
Tag = Annotated[
    str, Field(pattern=r"^\S(.{0,62}\S)?$", description="a tag of W&B has 1 to 64 characters, without outer spaces")
]
VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}
MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
TRUE = ("true", "1", "yes", "on", "y", "t")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WandbConfig:
    """Logging to Weights & Biases. Where a setting is null or empty, W&B's variable counts, see `with_variables`."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: Project | None = None
    entity: Entity | None = None
    name: Name | None = None
    group: Name | None = None
    job_type: Name | None = None
    tags: tuple[Tag, ...] = ()
    notes: str | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoggerConfig:
    """Where metrics are logged."""

    csv: Switch = True
    wandb: WandbConfig = Field(default_factory=WandbConfig)


def mode_of_variables(environment: Mapping[str, str]) -> str | None:
    """Return the mode that WANDB_DISABLED or WANDB_MODE asks for: online, offline or disabled; None without them."""
    if environment.get("WANDB_DISABLED", "").lower() in TRUE:
        return "disabled"
    mode = environment.get("WANDB_MODE", "").lower()
    return "disabled" if mode == "disabled" else MODES.get(mode)


def with_variables(settings: WandbConfig, environment: Mapping[str, str]) -> WandbConfig:
    """Return the settings with W&B's variables in place of those that are null or empty.

    Args:
        settings: the settings of the config.
        environment: the environment variables, already checked by `check_variables`.
    """
    return replace(settings, **_values_of_variables(settings, environment))


def name_in_sweep(settings: WandbConfig, environment: Mapping[str, str], sweep: str, run: str) -> WandbConfig:
    """Return the settings of one run of a sweep: in the sweep's group, and with a name of its own.

    Args:
        settings: the settings of the config.
        environment: the environment variables.
        sweep: the name of the sweep, for the group where nobody names one.
        run: what tells the run from the others; it is appended to a name from the config or WANDB_NAME.
    """
    given = with_variables(settings, environment)
    name = f"{given.name[:100]}-{run}" if given.name else None
    return replace(given, group=given.group or sweep[:128].strip(), name=name)


def check_variables(settings: WandbConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Yield the variables of W&B that would be followed and with which it would not start.

    Args:
        settings: the settings of the config.
        environment: the environment variables.
    """
    if "disabled" in (settings.mode, mode_of_variables(environment) if settings.mode == "auto" else None):
        return
    mode, url = environment.get("WANDB_MODE", ""), environment.get("WANDB_BASE_URL", "")
    if mode and mode not in (*MODES, "disabled"):
        yield Problem("WANDB_MODE", "W&B has no such mode. Use online, offline or disabled.", mode)
    if url and not _is_url(url):
        yield Problem("WANDB_BASE_URL", "is no address of a W&B server. Write https://host or http://host:port.", url)
    _, problems = validated(WandbConfig, _values_of_variables(settings, environment))
    for problem in problems:
        yield replace(problem, setting=VARIABLES[problem.setting.partition("[")[0]])


def _values_of_variables(settings: WandbConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that variables give to settings that are null or empty."""
    values: dict[str, Any] = {}
    for entry in fields(settings):
        text = environment.get(VARIABLES.get(entry.name, ""), "")
        if text.strip() and not getattr(settings, entry.name):
            tags = [tag.strip() for tag in text.split(",") if tag.strip()]
            values[entry.name] = tags if entry.name == "tags" else text
    return values


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
