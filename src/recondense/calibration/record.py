"""The calibration of a run: its texts, taped as its settings say."""

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
from recondense.models import decoder, streaming
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
    """What tapes the model on the run's calibration set, as it is when called.

    Args:
        folder: of the run; a tape on disk lies in it.
        split: the processes share the texts; without it each tapes all of them.
    """

    def record() -> Tape:
        blocks = list(calibration(config, tokenizer, texts).blocks(TEXTS_PER_BLOCK))
        with timed("calibrate"), progress("calibrating", len(decoder.decoder_layers(model))) as bar:
            return Tape.record(model, blocks, bar.advance, _storage(config, model, folder), split)

    return record


def _storage(config: Config, model: PreTrainedModel, folder: Path) -> Storage:
    """Where a tape lies; that of a model larger than memory is found again by a run that goes on."""
    settings, streamed = config.data.calibration, streaming.is_streamed(model)
    if settings.tape == "memory" or (settings.tape == "auto" and not streamed):
        return Memory()
    dtype = torch.bfloat16 if settings.tape_dtype == "bfloat16" else None
    name = (
        f"tape-{fingerprint(streaming.standing(model), settings.tape_dtype, TEXTS_PER_BLOCK)}" if streamed else "tape"
    )
    return Disk(folder / WORK / name, dtype, decoder.device(model), keeps=streamed)


def rounded(config: Config, model: PreTrainedModel) -> list[str]:
    """What the tape's states are rounded to: part of what decides a search."""
    rounds = config.data.calibration.tape_dtype == "bfloat16" and model.dtype != torch.bfloat16
    return ["tape in bfloat16"] if rounds else []


def calibration(config: Config, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> CalibrationSet:
    """The run's calibration set."""
    settings = config.data.calibration
    documents = texts.documents("calibration", tokenizer) or []
    return calibration_set(documents, tokenizer, settings.num_samples, settings.max_length)
