"""CALIBRATE: record a Tape of a model on calibration texts, given directly or by the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.calibration.tape import TEXTS_PER_BATCH, Tape
from recondense.config.schema import WORK, Config
from recondense.data.calibration_set import CalibrationSet, make_calibration_set
from recondense.data.vocabulary import require_rows
from recondense.files import fingerprint
from recondense.models import decoder
from recondense.models.layer_shapes import refuse_bundled_classes
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Disk, Memory, Storage
from recondense.models.tokenizers import embedding_rows
from recondense.progress import progress

Timed = Callable[[str], AbstractContextManager[None]]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    num_samples: int = 100,
    max_length: int = 256,
    *,
    storage: Storage | None = None,
    split: bool = False,
) -> Tape:
    """Record the hidden states that enter each decoder layer of a model on calibration texts.

    The states of a batch of texts have the shape (B, S, D): texts, tokens, hidden size.

    Args:
        model: a causal LM; it is not changed.
        tokenizer: the model's tokenizer.
        texts: documents, of which the first `num_samples` are used.
        num_samples: number of texts.
        max_length: maximum number of tokens per text; longer texts are truncated. The tape keeps the token ids of the
            whole texts, from which CD-MoE takes its coefficients.
        storage: where the states are kept; None keeps them in memory.
        split: divide the texts among the processes of a run; all processes must call this function.

    Returns:
        The tape. From it, a search can start a forward pass at any layer.

    Raises:
        UserError: there are fewer texts than `num_samples`, a text has no tokens, `texts` is a string instead of a
            list, the model's embedding has no row for a token, a hidden state is not finite, or the model is a bundled
            export that `load` did not load.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> tape.num_layers == model.config.num_hidden_layers
        True
    """
    refuse_bundled_classes(model)
    calibration = make_calibration_set(texts, tokenizer, num_samples, max_length)
    require_rows(calibration.highest_id(), embedding_rows(model.config), tokenizer, "the calibration texts")
    return _record(model, calibration, storage, split)


def _record(model: PreTrainedModel, calibration: CalibrationSet, storage: Storage | None, split: bool) -> Tape:
    batches = list(calibration.batches(TEXTS_PER_BATCH))
    with progress("calibrating", len(decoder.decoder_layers(model))) as bar:
        tape = Tape.record(model, batches, bar.advance, storage, split)
    tape.calibration_set = calibration
    return tape


def retape(tape: Tape) -> Tape:
    """Record a new tape of the same texts with the model as it is now, in memory."""
    batches = [(batch.input_ids_BS, batch.mask_BS) for batch in tape.texts.all]
    with progress("calibrating", tape.num_layers) as bar:
        again = Tape.record(tape.model, batches, bar.advance)
    again.calibration_set = tape.calibration_set
    return again


def make_recorder(
    config: Config,
    model: PreTrainedModel,
    calibration: CalibrationSet | None,
    folder: Path,
    timed: Timed = lambda name: nullcontext(),
    split: bool = False,
) -> Callable[[], Tape]:
    """Return a function that records a tape of the run's calibration set, with the model as it is at the call.

    Args:
        config: the config of the run.
        model: the model to record.
        calibration: the run's calibration set.
        folder: the run's folder; a tape on disk is written there.
        timed: measures the time of a named part of the run.
        split: divide the texts among the processes; otherwise each process records all of them.
    """

    def record() -> Tape:
        assert calibration is not None
        with timed("calibrate"):
            return _record(model, calibration, _storage(config, model, folder), split)

    return record


def _storage(config: Config, model: PreTrainedModel, folder: Path) -> Storage:
    """Return where a tape is kept. The tape of a streamed model stays on disk, for a resumed run."""
    settings, store = config.data.calibration, layer_store(model)
    if settings.tape == "memory" or (settings.tape == "auto" and not store.streamed):
        return Memory()
    dtype = torch.bfloat16 if settings.tape_dtype == "bfloat16" else None
    key = fingerprint(store.fingerprint(), settings.tape_dtype, TEXTS_PER_BATCH)
    name = f"tape-{key}" if store.streamed else "tape"
    return Disk(folder / WORK / name, dtype, decoder.device(model), keeps=store.streamed)


def describe_rounding(config: Config, model: PreTrainedModel) -> list[str]:
    """Return the dtype to which the tape rounds states, as part of a search's fingerprint; empty without rounding."""
    rounds = config.data.calibration.tape_dtype == "bfloat16" and model.dtype != torch.bfloat16
    return ["tape in bfloat16"] if rounds else []
