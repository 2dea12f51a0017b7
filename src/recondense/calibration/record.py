"""CALIBRATE: tape a model on calibration texts; those of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.calibration.tape import TEXTS_PER_BATCH, Tape
from recondense.config.schema import WORK, Config
from recondense.data.calibration_set import CalibrationSet, make_calibration_set
from recondense.data.texts import Texts
from recondense.files import fingerprint
from recondense.models import decoder
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Disk, Memory, Storage
from recondense.progress import progress

Timed = Callable[[str], AbstractContextManager[None]]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    num_samples: int = 100,
    max_length: int = 256,
    *,
    storage: Storage | None = None,
    split: bool = False,
) -> Tape:
    """Tape a model on calibration texts: the hidden states (B, S, D) that enter each decoder layer.

    Args:
        model: a causal LM; left bit-identical.
        tokenizer: of the model.
        texts: documents; the first `num_samples` of them count.
        num_samples: how many texts.
        max_length: tokens at which a text is cut.
        storage: where the states go; None: memory.
        split: the processes of a run share the texts; all must call this.

    Returns:
        The tape, from which a search reruns anything above a layer without the layers below.

    Raises:
        UserError: fewer texts than `num_samples`, a text without a token, or a hidden state that is not finite.

    Example:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> tape.num_layers == model.config.num_hidden_layers
        True
    """
    batches = list(make_calibration_set(texts, tokenizer, num_samples, max_length).batches(TEXTS_PER_BATCH))
    with progress("calibrating", len(decoder.decoder_layers(model))) as bar:
        return Tape.record(model, batches, bar.advance, storage, split)


def retape(tape: Tape) -> Tape:
    """Tape the same texts, in memory, with the model as it is now."""
    batches = [(batch.input_ids_BS, batch.mask_BS) for batch in tape.texts.all]
    with progress("calibrating", tape.num_layers) as bar:
        return Tape.record(tape.model, batches, bar.advance)


def make_recorder(
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
        settings, documents = config.data.calibration, texts.documents("calibration", tokenizer) or []
        with timed("calibrate"):
            return calibrate(
                model,
                tokenizer,
                documents,
                settings.num_samples,
                settings.max_length,
                storage=_storage(config, model, folder),
                split=split,
            )

    return record


def _storage(config: Config, model: PreTrainedModel, folder: Path) -> Storage:
    """Where a tape goes; that of a streamed model stays on disk for a run that resumes."""
    settings, store = config.data.calibration, layer_store(model)
    if settings.tape == "memory" or (settings.tape == "auto" and not store.streamed):
        return Memory()
    dtype = torch.bfloat16 if settings.tape_dtype == "bfloat16" else None
    key = fingerprint(store.fingerprint(), settings.tape_dtype, TEXTS_PER_BATCH)
    name = f"tape-{key}" if store.streamed else "tape"
    return Disk(folder / WORK / name, dtype, decoder.device(model), keeps=store.streamed)


def describe_rounding(config: Config, model: PreTrainedModel) -> list[str]:
    """The type that the tape rounds states to, as part of a search's fingerprint; empty if it does not round."""
    rounds = config.data.calibration.tape_dtype == "bfloat16" and model.dtype != torch.bfloat16
    return ["tape in bfloat16"] if rounds else []


def calibration(config: Config, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> CalibrationSet:
    """The run's calibration set."""
    settings = config.data.calibration
    documents = texts.documents("calibration", tokenizer) or []
    return make_calibration_set(documents, tokenizer, settings.num_samples, settings.max_length)
