"""A teacher's predictions on disk: the most likely tokens at every position of the training windows, computed once.

A folder has safetensors files with a fixed number of windows each. A killed run resumes at the first missing file.
Files are memory-mapped, so training reads only the rows of a batch's windows.

Shapes: N windows, B windows of a batch, S tokens of a window, K kept predictions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from recondense.data.loader import Table, num_rows
from recondense.files import fingerprint, hold_lock, remove_partial
from recondense.models import checked_tensors, decoder, forward
from recondense.models.forward import model_inputs
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.progress import progress
from recondense.recovery.losses import TopK, top_k
from recondense.recovery.shared_passes import PassInputs
from recondense.recovery.teachers import TeacherOutput

WINDOWS_PER_FILE = 64
FILES_PER_READING = 64  # number of files written each time the weights of a streamed teacher are read
SMALL_VOCABULARY = 2**16  # up to this size, an id takes two bytes


class CachedTeacher:
    """A teacher whose predictions for N windows are on disk.

    Args:
        folder: the folder of the files.
        num_windows: N.
        windows_per_file: windows per file; the last file may have fewer.
    """

    answers_any_text = False

    def __init__(self, folder: Path, num_windows: int, windows_per_file: int = WINDOWS_PER_FILE) -> None:
        self.folder = folder
        self.num_windows = num_windows
        self.windows_per_file = windows_per_file
        self._open = cache(lambda path: safe_open(path, framework="pt"))
        self._intact: set[Path] = set()

    def __deepcopy__(self, memo: Any) -> CachedTeacher:
        return self  # copies of a student read the same files

    def teach(self, inputs: PassInputs, layers: Sequence[int] = ()) -> TeacherOutput:
        assert inputs.window_B is not None, "a teacher on disk needs the numbers of the windows"
        assert not layers, "a teacher on disk has no hidden states"
        columns = self.read(inputs.window_B.tolist())
        return TeacherOutput(TopK(*(inputs.tokens.select_rows(column).to(inputs.device) for column in columns)))

    @property
    def files(self) -> list[Path]:
        """The files of all windows."""
        count = -(-self.num_windows // self.windows_per_file)
        return [self.folder / f"{index:05d}-of-{count:05d}.safetensors" for index in range(count)]

    @property
    def missing(self) -> list[int]:
        """The indices of the files that do not exist yet, or are damaged. All files are read, but only once."""
        paths = self.files
        self._intact |= {path for path in paths if path not in self._intact and checked_tensors.is_intact(path)}
        return [index for index, path in enumerate(paths) if path not in self._intact]

    def rows_of(self, index: int) -> range:
        """Return the numbers of the windows in a file."""
        return range(index * self.windows_per_file, min((index + 1) * self.windows_per_file, self.num_windows))

    def read(self, windows: Sequence[int]) -> TopK:
        """Read the predictions for some windows: ids and logits (B, S, K), and the rest (B, S)."""
        rows: list[list[Tensor]] = []
        files = self.files
        for window in windows:
            index, row = divmod(window, self.windows_per_file)
            file: Any = self._open(files[index])
            rows.append([file.get_slice(name)[row] for name in TopK._fields])
        ids, logits, rest = (torch.stack(column) for column in zip(*rows, strict=True))
        return TopK(ids.to(torch.int64), logits, rest)

    def write(self, index: int, kept: TopK) -> None:
        """Write the predictions of one file, under a temporary name that is then changed."""
        columns = {name: column.contiguous() for name, column in kept._asdict().items()}
        checked_tensors.save_checked(columns, self.files[index])


def cache_key(weights: str, windows: Table, k: int, temperature: float, precision: str) -> str:
    """Return the name of a folder of predictions, a fingerprint of everything on which they depend.

    Args:
        weights: the fingerprint of the teacher's weights.
        windows: the ids, and positions if there are any.
        k: number of predictions per position.
        temperature: the temperature for the logsumexp of the other logits.
        precision: the precision in which the teacher computes.
    """
    digest = hashlib.sha256()
    for name in ("input_ids", "position_ids"):
        if name in windows:
            values = windows[name]
            digest.update(f"{name} {tuple(values.shape)}".encode() + np.asarray(values, dtype="<i8").tobytes())
    return fingerprint(weights, digest.hexdigest(), k, temperature, precision, WINDOWS_PER_FILE)


def keep_predictions(
    original: Callable[[], AbstractContextManager[PreTrainedModel]],
    windows: Table,
    folder: Path,
    k: int,
    temperature: float,
    batch_size: int,
    autocast: AbstractContextManager[Any],
    windows_per_file: int = WINDOWS_PER_FILE,
) -> CachedTeacher:
    """Run the teacher on the windows whose predictions are not on disk yet.

    Args:
        original: makes a context that yields the teacher.
        windows: N windows.
        folder: the folder of the files.
        k: K, at most V - 1.
        temperature: the temperature for the logsumexp of the other logits.
        batch_size: windows per forward pass.
        autocast: a context that sets the precision of the passes.
        windows_per_file: windows per file; the last file may have fewer.

    Returns:
        The teacher, with all predictions on disk.
    """
    teacher = CachedTeacher(folder, num_rows(windows), windows_per_file)
    if not teacher.missing:
        return teacher
    with hold_lock(folder / ".lock", "runs the same teacher"):
        remove_partial(folder)
        total = sum(len(teacher.rows_of(index)) for index in teacher.missing)
        with progress("the teacher's predictions", total) as bar, original() as model, eval_mode(model), autocast:
            missing, together = teacher.missing, FILES_PER_READING if layer_store(model).streamed else 1
            for first in range(0, len(missing), together):
                indices = missing[first : first + together]
                batches = {index: _batches(windows, teacher.rows_of(index), batch_size) for index in indices}
                states = _states(model, [batch for of_file in batches.values() for batch in of_file])
                for index, of_file in batches.items():
                    predictions = []
                    for batch in of_file:
                        predictions.append(_predictions(model, next(states), k, temperature))
                        bar.advance(num_rows(batch))
                    teacher.write(index, TopK(*(torch.cat(column) for column in zip(*predictions, strict=True))))
    return teacher


def _batches(windows: Table, rows: range, batch_size: int) -> list[Table]:
    return [
        {name: column[start : min(start + batch_size, rows.stop)] for name, column in windows.items()}
        for start in range(rows.start, rows.stop, batch_size)
    ]


@torch.no_grad()
def _states(model: PreTrainedModel, batches: Sequence[Table]) -> Iterator[Tensor]:
    """Yield the final hidden states (B, S, D) of each batch."""

    def inputs(batch: Table) -> dict[str, Any]:
        moved = {name: batch[name].to(decoder.device(model)) for name in ("input_ids", "position_ids") if name in batch}
        return {**model_inputs(model, moved["input_ids"], moved.get("position_ids")), "use_cache": False}

    if layer_store(model).streamed:
        yield from forward.layer_by_layer(model, [inputs(batch) for batch in batches])
        return
    for batch in batches:
        hidden_BSD: Tensor = forward.run(model, inputs(batch)).logits
        yield hidden_BSD.view(*batch["input_ids"].shape, -1)


@torch.no_grad()
def _predictions(model: PreTrainedModel, hidden_BSD: Tensor, k: int, temperature: float) -> TopK:
    """Compute the predictions for one batch, on the CPU. Logits keep the dtype of the head, so they are not rounded."""
    with decoder.lm_head(model) as head:
        vocabulary = len(head.weight_VD)
        kept = top_k(hidden_BSD.flatten(0, 1), head, min(k, vocabulary - 1), temperature)
    size = hidden_BSD.shape[:2]
    ids = kept.ids_TK.to(torch.uint16 if vocabulary <= SMALL_VOCABULARY else torch.int32)
    return TopK(ids.view(*size, -1).cpu(), kept.logits_TK.view(*size, -1).cpu(), kept.rest_T.view(size).cpu())
