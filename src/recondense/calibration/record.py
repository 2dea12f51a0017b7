"""The calibration of a run: tapes the model on its calibration set, as its settings say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.calibration.tape import TEXTS_PER_BLOCK, Tape
from recondense.config.schema import WORK, Config
from recondense.data.calibration_set import CalibrationSet, calibration_set
from recondense.data.texts import Texts
from recondense.files import fingerprint
from recondense.models import decoder
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Disk, Memory, Storage
from recondense.progress import progress

Timed = Callable[[str], AbstractContextManager[None]]


def recorder(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    folder: Path,
    timed: Timed = lambda name: nullcontext(),
    split: bool = False,
) -> Callable[[], Tape]:
    """A function that tapes the model on the run's calibration set, as the model is when it is called.

    Args:
        folder: of the run; a tape on disk goes there.
        timed: measures the time of a named part of the run.
        split: the processes share the texts; otherwise each tapes all of them.
    """

    def record() -> Tape:
        batches = list(calibration(config, tokenizer, texts).blocks(TEXTS_PER_BLOCK))
        with timed("calibrate"), progress("calibrating", len(decoder.decoder_layers(model))) as bar:
            return Tape.record(model, batches, bar.advance, _storage(config, model, folder), split)

    return record


def _storage(config: Config, model: PreTrainedModel, folder: Path) -> Storage:
    """Where a tape goes; that of a streamed model stays on disk for a run that resumes."""
    settings, store = config.data.calibration, layer_store(model)
    if settings.tape == "memory" or (settings.tape == "auto" and not store.streamed):
        return Memory()
    dtype = torch.bfloat16 if settings.tape_dtype == "bfloat16" else None
    key = fingerprint(store.fingerprint(), settings.tape_dtype, TEXTS_PER_BLOCK)
    name = f"tape-{key}" if store.streamed else "tape"
    return Disk(folder / WORK / name, dtype, decoder.device(model), keeps=store.streamed)


def rounded(config: Config, model: PreTrainedModel) -> list[str]:
    """The type that the tape rounds states to, as part of a search's fingerprint; empty if it does not round."""
    rounds = config.data.calibration.tape_dtype == "bfloat16" and model.dtype != torch.bfloat16
    return ["tape in bfloat16"] if rounds else []


def calibration(config: Config, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> CalibrationSet:
    """The run's calibration set."""
    settings = config.data.calibration
    documents = texts.documents("calibration", tokenizer) or []
    return calibration_set(documents, tokenizer, settings.num_samples, settings.max_length)
