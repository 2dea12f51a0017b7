"""Fingerprints of a run's inputs besides its config: stored when the run starts, and compared when it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.config.schema import Config
from recondense.data.tokens import Tokens
from recondense.errors import UserError
from recondense.files import fingerprint, write_aside
from recondense.models.loading import weights_fingerprint
from recondense.models.model_files import read_history
from recondense.models.tokenizers import tokenizer_fingerprint
from recondense.plan import Plan
from recondense.run.run_folder import INPUTS, RESULTS

TASK_FILES = (".yaml", ".py", ".json", ".jsonl", ".csv", ".txt", ".parquet")


def inputs_of(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens
) -> dict[str, str]:
    """Return the fingerprints of a run's inputs by name.

    The names are `weights`, `tokenizer`, `<split> texts`, `calibration`, `plan.json of the model`, and `task files`.

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
    if config.model.path is not None:  # the plan of an earlier run determines which layers are trained
        history = Plan("", history=read_history(config.model))
        inputs["plan.json of the model"] = fingerprint(history.to_dict())
    if config.evaluation.include_path is not None:
        inputs["task files"] = task_files_fingerprint(Path(config.evaluation.include_path))
    return inputs


def keep_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Store the inputs of a run in its folder, after comparing them with those stored by earlier calls.

    All processes must call this function together.

    Args:
        folder: the run's folder.
        inputs: fingerprints by name. Inputs that are loaded later are stored by a later call.

    Raises:
        UserError: an input changed since the run began, or the folder has results but no record of their inputs.
    """
    known = processes.broadcast(_stored(folder) if processes.is_first() else None)
    changed = [name for name, value in inputs.items() if known.get(name, value) != value]
    if len(changed) > 1 and "calibration" in changed:  # it follows from the tokenizer and the texts
        changed.remove("calibration")
    if changed:
        *names, last = (f"the {name}" for name in changed)
        raise UserError(
            f"run_dir={folder}: {', '.join(names)}{' and ' if names else ''}{last} changed since this run began; "
            "use overwrite=true to start over"
        )
    if processes.is_first() and not known.keys() >= inputs.keys():
        write_aside(folder / INPUTS, json.dumps({**known, **inputs}, indent=1) + "\n")


def _stored(folder: Path) -> dict[str, str]:
    """Return the content of inputs.json; empty before the run has begun.

    Raises:
        UserError: the file is damaged, or missing although there are results.
    """
    path = folder / INPUTS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if results := [name for name in RESULTS if (folder / name).exists()]:
            raise UserError(
                f"run_dir={folder}: the folder contains results ({', '.join(results)}) but no {INPUTS}, which records "
                "the inputs of the run; use overwrite=true to start over"
            ) from None
        return {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is not valid JSON; use overwrite=true to start over") from None


def task_files_fingerprint(folder: Path) -> str:
    """Return a fingerprint (16 hexadecimal digits) of the files of a task folder that can change a result."""
    return fingerprint([[str(path.relative_to(folder)), _sha256(path)] for path in deciding_files(folder)])


def deciding_files(folder: Path) -> list[Path]:
    """Return the files of a task folder that can change a result: tasks, functions and data, but no caches."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in TASK_FILES]
    return [path for path in files if "cache" not in path.relative_to(folder).parts]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
