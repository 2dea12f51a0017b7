"""Everything that a run depends on besides its config: stored when it starts, and compared at each later start.

inputs.json has the fingerprints of what was read, the states of the files it was read from and of the exported files,
and the versions of the packages that can change a result.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.config.schema import Config
from recondense.data.loader import Table
from recondense.data.tokens import Tokens
from recondense.errors import UserError
from recondense.files import Damaged, fingerprint, hash_file, read_checked, write_checked
from recondense.models.loading import weights_fingerprint
from recondense.models.model_files import read_history
from recondense.models.tokenizers import tokenizer_fingerprint
from recondense.plan import Plan
from recondense.report.summary import MEASURING_PACKAGES
from recondense.run import input_files
from recondense.run.input_files import Changes
from recondense.run.resolved_run import Run
from recondense.run.run_folder import INPUTS, RESULTS, has_summary

FILES, EXPORT, VERSIONS = "files", "export", "versions"  # entries of inputs.json that are no fingerprints
OF_RUN = " of this run"  # after the path of a plan in the folder, in inputs.json
START_OVER = "use overwrite=true to start over"

log = logging.getLogger(__name__)


def inputs_of(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens
) -> dict[str, str]:
    """Return the fingerprints of a run's inputs by name.

    The names are `weights`, `tokenizer`, `<split> texts`, `calibration`, `validation windows`, `<stage> windows`,
    `plan.json of the model`, and `task files`.

    Args:
        config: settings of the run.
        model: the model before compression.
        tokenizer: the model's tokenizer.
        tokens: token ids of the run. Those of the calibration set are an input too.
    """
    inputs = {"weights": weights_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
    inputs |= {f"{split} texts": sha256 for split, sha256 in tokens.sha256.items()}
    if tokens.calibration is not None:
        inputs["calibration"] = tokens.calibration.fingerprint()
    tables: dict[str, Table | None] = {
        "validation": None if tokens.validation is None else {"input_ids": tokens.validation}
    }
    tables |= {name: stage.train for name, stage in tokens.stages.items()}
    tables |= {f"{name}/validation": stage.validation for name, stage in tokens.stages.items()}
    inputs |= {f"{name} windows": _hash_table(table) for name, table in tables.items() if table is not None}
    if config.model.path is not None:  # the plan of an earlier run determines which layers are trained
        history = Plan("", history=read_history(config.model))
        inputs["plan.json of the model"] = fingerprint(history.to_dict())
    if config.evaluation.include_path is not None:
        inputs["task files"] = task_files_fingerprint(Path(config.evaluation.include_path))
    return inputs


def _hash_table(table: Table) -> str:
    """Return a hash (16 hexadecimal digits) of a table of windows."""
    digest = xxhash.xxh3_64()
    for name, column in sorted(table.items()):
        digest.update(f"{name} {tuple(column.shape)}\n".encode())
        digest.update(np.ascontiguousarray(np.asarray(column, dtype="<i8")).data)
    return digest.hexdigest()


def compare_files(run: Run, folder: Path) -> Changes:
    """Compare the files of a run, if it began earlier, with those that it began with. No weights are loaded.

    All processes must call this function together.

    Args:
        run: the run.
        folder: the run's folder.

    Returns:
        The inputs that are no longer there. Only a run that is not done needs them, and says so when it reads them.

    Raises:
        UserError: an input changed since the run began; or the plan or the export of a run that is done was changed.
    """
    changes = processes.run_on_first(lambda: _compare_files(run, folder))
    if changes.changed:
        raise UserError(f"run_dir={folder}: {_join(changes.changed)} changed since this run began; {START_OVER}")
    return changes


def _compare_files(run: Run, folder: Path) -> Changes:
    if run.config.overwrite:
        return Changes((), ())
    known = _stored(folder)
    changes = input_files.compare(run, known.get(FILES, {}))
    if not has_summary(run.config):
        return changes
    changed, gone = list(changes.changed), list(changes.gone)
    paths = {folder / name.removesuffix(OF_RUN): value for name, value in known.items() if name.endswith(OF_RUN)}
    changed += [str(path) for path, value in paths.items() if path.exists() and _hash_plan(Plan.load(path)) != value]
    if EXPORT in known and (folder / "model").exists():
        names = input_files.different_files(exported_files(folder), known[EXPORT])
        changed += [str(folder / "model" / name) for name in names if (folder / "model" / name).exists()]
        gone += [str(folder / "model" / name) for name in names if not (folder / "model" / name).exists()]
    return Changes(changed, gone)


def keep_inputs(folder: Path, inputs: Mapping[str, str], remedy: str = START_OVER) -> None:
    """Store the inputs of a run in its folder, after comparing them with those stored by earlier calls.

    All processes must call this function together.

    Args:
        folder: the run's folder.
        inputs: fingerprints by name. Inputs that are loaded later are stored by a later call.
        remedy: what the user can do about a change.

    Raises:
        UserError: an input changed since the run began, or the folder has results but no record of their inputs.
    """
    known = processes.broadcast(_stored(folder) if processes.is_first() else None)
    changed = [name for name, value in inputs.items() if known.get(name, value) != value]
    # The token ids follow from the tokenizer and the texts.
    changed = [name for name in changed if not _is_ids(name)] or changed
    if changed:
        names = _join([f"the {name}" for name in changed])
        raise UserError(f"run_dir={folder}: {names} changed since this run began; {remedy}")
    if processes.is_first() and not known.keys() >= inputs.keys():
        _store(folder, {**known, **inputs})


def _is_ids(name: str) -> bool:
    return name == "calibration" or name.endswith(" windows")


def keep_plan(folder: Path, plan: Plan, name: str = "plan.json") -> None:
    """Store the plan of a run as one of its inputs, after comparing it with that of an earlier start.

    A plan is never edited in the folder of its run: what the run has made belongs to the plan that it found. All
    processes must call this function together.

    Args:
        folder: the run's folder.
        plan: the plan.
        name: its file in the folder.

    Raises:
        UserError: the plan changed.
    """
    remedy = f"delete {folder / name}, and the plan is searched again, or {START_OVER}"
    keep_inputs(folder, {name + OF_RUN: _hash_plan(plan)}, remedy)


def keep_plan_of_rounds(folder: Path, plan: Plan) -> None:
    """Write the plan of all rounds to plan.json, unless an earlier start has, see `keep_plan`; that one is compared."""
    path = folder / "plan.json"
    keep_plan(folder, plan)
    stored = processes.broadcast(load_plan(path) if processes.is_first() else None)
    if stored is not None:
        keep_plan(folder, stored)
    elif processes.is_first():
        plan.save(path)


def load_plan(path: Path) -> Plan | None:
    """Return the plan that an earlier start has written; None if there is none."""
    if not os.path.lexists(path):
        return None
    try:
        return Plan.load(path)
    except UserError as error:
        raise UserError(f"{error}. Delete this file, and the plan is searched again; or {START_OVER}") from None


def _hash_plan(plan: Plan) -> str:
    return fingerprint(plan.to_json())


def keep_files(run: Run, folder: Path) -> None:
    """Store the states of the files that a run reads and the versions of packages; a change of these is logged."""
    if not processes.is_first():
        return
    known = _stored(folder)
    versions = {name: version(name) for name in MEASURING_PACKAGES}
    for name, before in known.get(VERSIONS, {}).items():
        if versions.get(name) != before:
            log.warning("this run began with %s %s and goes on with %s", name, before, versions.get(name))
    new = {FILES: input_files.input_states(run, known.get(FILES, {})), VERSIONS: versions}
    if any(known.get(name) != value for name, value in new.items()):
        _store(folder, {**known, **new})


def keep_export(folder: Path) -> None:
    """Store the states of the exported files. Only the first process may call this function."""
    _store(folder, {**_stored(folder), EXPORT: input_files.file_states(exported_files(folder), {})})


def exported_files(folder: Path) -> dict[str, Path]:
    """Return the files of a run's export by name, without README.md, which may be edited."""
    model = folder / "model"
    paths = [path for path in input_files.all_files(model) if path.name != "README.md"]
    return {str(path.relative_to(model)): path for path in paths}


def _store(folder: Path, inputs: Mapping[str, Any]) -> None:
    write_checked(folder / INPUTS, inputs, indent=1)


def _stored(folder: Path) -> dict[str, Any]:
    """Return the content of inputs.json; empty before the run has begun.

    Raises:
        UserError: the file is damaged, or missing although there are results.
    """
    path = folder / INPUTS
    try:
        return read_checked(path)
    except FileNotFoundError:
        if results := [name for name in RESULTS if (folder / name).exists()]:
            raise UserError(
                f"run_dir={folder}: the folder contains results ({', '.join(results)}) but no {INPUTS}, which records "
                f"the inputs of the run; {START_OVER}"
            ) from None
        return {}
    except Damaged as error:
        raise UserError(f"{path} is damaged: {error}; {START_OVER}") from None


def _join(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)}{' and ' if others else ''}{last}"


def task_files_fingerprint(folder: Path) -> str:
    """Return a fingerprint (16 hexadecimal digits) of the files of a task folder that can change a result."""
    files = input_files.deciding_files(folder)
    return fingerprint([[str(path.relative_to(folder)), hash_file(path)] for path in files])
