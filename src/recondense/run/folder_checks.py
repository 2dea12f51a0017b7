"""Checks of the folders that a run writes to: whether they can be written, and what an earlier run left in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recondense.config.problems import Problem
from recondense.config.run_records import is_run
from recondense.config.schema import Config, read
from recondense.files import probe_folder
from recondense.run.run_folder import CONFIG, CONTENTS, INPUTS, has_summary, owners, run_to_keep

GROUPS = {"model", "method", "recovery", "data", "evaluation", "export"}  # a config with all of them is one of ours
IN_CACHE = ("models", "search", "evaluations", "tasks", "teacher")  # subfolders of the cache


@dataclass(frozen=True)
class OtherVersion:
    """A run whose config this version cannot read.

    Args:
        reason: what is wrong with it, in words.
    """

    reason: str


def check_run_folder(
    config: Config, stored: Config | OtherVersion | None, overrides: Sequence[str] = ()
) -> Iterator[Problem]:
    """Yield the problems of the run's folder.

    Args:
        config: settings of the run.
        stored: config of an earlier run in the folder; None if there is none.
        overrides: what the command sets, as it is written.
    """
    folder = config.run_folder()
    remedy = "Choose another run_dir, or set overwrite=true to replace that run."
    if problem := _check_name("run_dir" if config.run_dir else "output_dir", folder):
        yield problem
    elif folder.is_file():
        yield Problem("run_dir", "is a file; a folder is needed.", folder)
    elif (outer := _outer_run(config)) is not None:
        text = f"the folder is among the results of another run, {outer}, which may delete it. Choose another run_dir."
        yield Problem("run_dir", text, folder)
    elif stored is not None and not has_summary(config) and (problem := run_to_keep(folder)):
        yield problem
    elif isinstance(stored, OtherVersion):
        if not config.overwrite:
            text = f"the folder contains a run of another version of recondense ({stored.reason}). {remedy}"
            yield Problem("run_dir", text, folder)
    elif stored is not None:
        if not config.overwrite and stored.run_hash() != config.run_hash():
            text = f"the folder contains a run {_other_config(stored, config, overrides)} {remedy}"
            yield Problem("run_dir", text, folder)
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        text = "the folder is not empty and contains no run of recondense. Choose another run_dir."
        yield Problem("run_dir", text, folder)
    elif not _may_write(parent := _existing(folder)):
        text = f"{parent} is not writable. Choose another output_dir or run_dir."
        yield Problem("run_dir", text, folder)


def _other_config(stored: Config, config: Config, overrides: Sequence[str]) -> str:
    """Return in which settings a stored run differs, and which of them are defaults, in words."""
    names = differences(stored.identity(), config.identity())
    given = [name for name in names if _sets(overrides, name, names)]
    defaults = [name for name in names if name not in given]
    changed = all(_was_default(stored, config, name) for name in defaults)
    if defaults and changed and not given:
        return f"of a version of recondense with other defaults (different: {_join(defaults)})."
    if defaults and changed:
        more = f" The defaults of its version of recondense differ too ({_join(defaults)})."
        return f"with another config (different: {_join(given)}).{more}"
    more = " That run does, or the defaults of its version of recondense are others."
    experiment = any(text.startswith("experiment=") for text in overrides)  # which may set them
    more = f" This command does not set {_join(defaults)}.{more}" if defaults and not experiment else ""
    return f"with another config (different: {_join(names)}).{more}"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _sets(overrides: Sequence[str], name: str, different: Sequence[str]) -> bool:
    """Return whether a command sets a setting that differs. The same choice of a group sets none."""
    for key in (text.partition("=")[0].lstrip("+~").partition("@")[0] for text in overrides):
        chosen = key not in ("model", "method", "data", "evaluation") or f"{key}.name" in different
        if chosen and (name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")):
            return True
    return False


def _was_default(stored: Config, config: Config, name: str) -> bool:
    """Return whether neither run sets a setting of the method: one does not know it, or both leave it to the model."""
    section, _, setting = name.partition(".")
    if section != "method" or not {setting} <= stored.method.keys() & config.method.keys():
        return section == "method"
    budgets = [run.model.budgets for run in (stored, config)]
    if not all(setting in budget.get("open", ()) for budget in budgets):
        return False
    one, other = (budget.get("asked", budget.get("used", {})).get(setting) for budget in budgets)
    return one != other


def stored_run(folder: Path) -> Config | OtherVersion | None:
    """Return the config of the run in a folder; None if there is no run of recondense.

    A config that cannot be read belongs to a run if the folder contains nothing but what a run writes, with its inputs.
    """
    path = folder / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = None
    if isinstance(values, dict) and all(isinstance(values.get(group), dict) for group in GROUPS):
        config, problems = read(values)
        names = ", ".join(dict.fromkeys(problem.setting for problem in problems))
        return OtherVersion(f"{path} differs in {names}") if problems else config
    entries = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else set()
    if INPUTS in entries and entries <= set(CONTENTS):
        return OtherVersion(f"{path} is {'not valid' if path.exists() else 'missing'}")
    return None


def _outer_run(config: Config) -> Path | None:
    """Return the folder of another run of whose results this run would be a part; None if there is none."""
    folders = (folder for folder in owners(config.run_folder()) if folder.is_dir() and is_run(os.listdir(folder)))
    return next((folder for folder in folders if stored_run(folder) is not None), None)


def check_cache(config: Config) -> Iterator[Problem]:
    """Yield a problem if the cache cannot be written. Nothing stays in it."""
    folder = Path(config.cache_dir)
    remedy = "Choose another cache_dir."
    if problem := _check_name("cache_dir", folder):
        yield problem
    elif folder.exists() and not folder.is_dir():
        yield Problem("cache_dir", f"is a file; a folder is needed. {remedy}", folder)
    else:
        for place in (_existing(folder), *(folder / name for name in IN_CACHE if (folder / name).exists())):
            try:
                probe_folder(place)
            except OSError as error:
                text = f"{place} cannot be written ({error.strerror}). {remedy}"
                yield Problem("cache_dir", text, folder)
                return


def _check_name(setting: str, folder: Path) -> Problem | None:
    """Return a problem if a folder would be created with the name of a variable that no shell has replaced."""
    if not (variable := re.search(r"\$\{?([A-Za-z_]\w*)", str(folder))) or folder.exists():
        return None
    text = f"no shell has replaced {variable[0]}. Write double quotes, or ${{oc.env:{variable[1]}}}."
    return Problem(setting, text, folder)


def _existing(folder: Path) -> Path:
    """Return the nearest folder or file above a path that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def _may_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the dotted names of the settings in which two resolved configs differ.

    Args:
        one, other: the configs, as plain containers.
        path: dotted name of the section that they are.
    """
    names = []
    for key in [*one, *(key for key in other if key not in one)]:
        value, other_value = one.get(key), other.get(key)
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and isinstance(other_value, Mapping):
            names += differences(value, other_value, where)
        elif value != other_value or (key in one) != (key in other):
            names.append(where)
    return names
