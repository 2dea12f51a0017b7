"""Fingerprints of all that a run reads besides its config: kept when it begins, and compared when it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.calibration.record import calibration
from recondense.config.schema import Config
from recondense.data.texts import Texts
from recondense.errors import UserError
from recondense.files import fingerprint, write_aside
from recondense.models.loading import tokenizer_fingerprint, weights_fingerprint
from recondense.models.model_files import read_history
from recondense.plan import Plan
from recondense.run.run_folder import INPUTS, RESULTS

TASK_FILES = (".yaml", ".py", ".json", ".jsonl", ".csv", ".txt", ".parquet")


def inputs_of(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, calibrates: bool
) -> dict[str, str]:
    """Return fingerprints by what they are of: `weights`, `tokenizer`, each split's texts, the `calibration` set and files.

    Args:
        calibrates: whether the run has a calibration set; its tokens are an input too.
    """
    inputs = {"weights": weights_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
    inputs |= {f"{split} texts": sha256 for split, sha256 in texts.sha256().items()}
    if calibrates:
        inputs["calibration"] = calibration(config, tokenizer, texts).fingerprint()
    if config.model.path is not None:  # says which layers train that were compressed before
        history = Plan("", history=read_history(config.model))
        inputs["plan.json of the model"] = fingerprint(history.to_dict())
    if config.evaluation.include_path is not None:
        inputs["task files"] = task_files_fingerprint(Path(config.evaluation.include_path))
    return inputs


def keep_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Keep the inputs of a run in its folder; those that are kept there already must be the same.

    All processes come here together.

    Args:
        folder: of the run.
        inputs: fingerprints by name. What is only loaded later is kept by a later call.

    Raises:
        UserError: inputs that changed since the run began; a folder that does not say what its results were made of.
    """
    known = processes.broadcast(_kept(folder) if processes.is_first() else None)
    changed = [name for name, value in inputs.items() if known.get(name, value) != value]
    if len(changed) > 1 and "calibration" in changed:  # which is what a tokenizer makes of texts
        changed.remove("calibration")
    if changed:
        *names, last = (f"the {name}" for name in changed)
        raise UserError(
            f"run_dir={folder}: {', '.join(names)}{' and ' if names else ''}{last} changed since this run began; "
            "overwrite=true starts it anew"
        )
    if processes.is_first() and not known.keys() >= inputs.keys():
        write_aside(folder / INPUTS, json.dumps({**known, **inputs}, indent=1) + "\n")


def _kept(folder: Path) -> dict[str, str]:
    """Return the content of inputs.json; empty before the run has begun."""
    path = folder / INPUTS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if results := [name for name in RESULTS if (folder / name).exists()]:
            raise UserError(
                f"run_dir={folder}: holds results ({', '.join(results)}) and no {INPUTS}, which says what they were "
                "made of; overwrite=true starts it anew"
            ) from None
        return {}
    except (ValueError, TypeError):
        raise UserError(f"{path}: cannot be read as JSON; overwrite=true starts the run anew") from None


def task_files_fingerprint(folder: Path) -> str:
    """Return sixteen hexadecimal digits of all files of a task folder that can change a result."""
    return fingerprint([[str(path.relative_to(folder)), _sha256(path)] for path in deciding_files(folder)])


def deciding_files(folder: Path) -> list[Path]:
    """Return files of a task folder that can change a result: tasks, their functions and data, but not a cache of the data."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in TASK_FILES]
    return [path for path in files if "cache" not in path.relative_to(folder).parts]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
