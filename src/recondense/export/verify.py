"""Check a written folder before it gets its name: does transformers load from it the model that was exported?

`check_files` reads only the headers of the files. `check_outputs` loads the folder with transformers and runs it beside
the student. Each layer of the loaded model gets the hidden states of the student: rounding does not add up from
layer to layer, a router sees the same tokens in both models, and a difference belongs to one layer.

Legend: B batch, S sequence, D hidden size or vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.errors import UserError, WrongExport
from recondense.models import decoder, headers, reload
from recondense.models.free_memory import free_bytes
from recondense.models.hooks import capture_outputs, eval_mode, forward_hooks
from recondense.models.layer_store import layer_store
from recondense.models.tokenizers import SAMPLE

log = logging.getLogger(__name__)

WINDOWS, LENGTH = 8, 32  # tokens that are compared: every expert should get some of them
ROOM = 1.3  # free memory that the comparison needs, in sizes of the exported weights
# Share of the outputs that may differ by more than rounding: a router may choose the other one of two equal experts.
EXCEPTIONS = 0.01
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Difference(NamedTuple):
    """How the outputs of a part of the model differ.

    Args:
        part: a decoder layer or the head.
        share: the share of the outputs that differ by more than rounding.
        largest: the largest difference, in units of the outputs' spread.
    """

    part: str
    share: float
    largest: float


def check_files(written: Path, folder: Path) -> None:
    """Compare names, shapes and dtypes in the files of a folder with the class that will load them.

    Args:
        written: the folder under its temporary name.
        folder: its final name, for messages.

    Raises:
        WrongExport: they differ.
    """
    with reload.only_the_folders_code(written):
        with _naming(folder):
            outline = reload.load_outline(written)
        dtype, files = outline.config.dtype, headers.list_files(written)
        if difference := str(headers.compare(outline, files)):
            raise WrongExport(folder, f"its files do not match {type(outline).__name__}: {difference}")
    for tensor in headers.read_headers(files):
        stored = FLOATS.get(tensor.dtype)  # None for integers, which are indices
        if stored not in (None, dtype, torch.float32):  # some families keep a few weights in fp32
            raise WrongExport(folder, f"{tensor.key} is stored as {tensor.dtype}, but its config says {dtype}")


def check_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    written: Path,
    folder: Path,
    retained: Sequence[int],
    setting: str,
) -> None:
    """Load a folder with transformers if `setting` says so, and compare what it computes with the student.

    Args:
        model: the student; it does not change.
        tokenizer: its tokenizer; None if the folder has none.
        written: the folder under its temporary name.
        folder: its final name, for messages.
        retained: for each decoder layer in the folder, the layer of the student.
        setting: `verify` of the export's settings.

    Raises:
        UserError: transformers loads another tokenizer than the one that it has saved.
        WrongExport: the layers or the logits differ by more than rounding.
    """
    if not _compares_outputs(model, written, setting):
        return
    if tokenizer is not None and (problem := reload.tokenizer_problem(tokenizer, written)):
        raise UserError(f"{folder} was not written, because {problem}")
    try:
        differences = _differences(model, token_windows(model, tokenizer), written, folder, retained)
    except torch.OutOfMemoryError:
        if setting == "logits":
            raise
        log.info(
            "export.verify=auto: only names and shapes of the export were checked; it did not fit beside the model"
        )
        return
    wrong = [difference for difference in differences if difference.share > EXCEPTIONS]
    if wrong:
        worst = max(wrong, key=lambda difference: difference.share * min(difference.largest, 1e6))
        raise WrongExport(
            folder,
            f"transformers computes something else from it: {worst.share:.0%} of the outputs of {worst.part} differ by "
            f"more than rounding, the largest by {worst.largest:.2g} times their spread ({len(wrong)} of "
            f"{len(differences)} parts differ)",
        )
    largest = max(differences, key=lambda difference: difference.largest)
    text = "the export was loaded again and computes the same: outputs differ by at most %.1e of their spread (%s)"
    log.info(text, largest.largest, largest.part)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name the folder in errors that transformers, or the folder's code, raises while it reads the folder."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError):  # the disk or the memory, not the folder
        raise
    except Exception as error:
        raise WrongExport(folder, f"transformers does not load it: {type(error).__name__}: {error}") from error


def _compares_outputs(model: PreTrainedModel, written: Path, setting: str) -> bool:
    """Return whether outputs are compared; with auto they are if the model fits into memory twice.

    The loaded model is on the device of the student: on another device, its kernels would round differently.
    """
    if layer_store(model).streamed:
        log.info("export.verify: the model is streamed, so only names and shapes of the export are checked")
        return False
    if setting != "auto":
        return setting == "logits"
    needed = ROOM * sum(file.stat().st_size for file in headers.list_files(written))
    free = free_bytes(decoder.device(model))
    if needed > free:
        log.info(
            "export.verify=auto: only names and shapes of the export are checked; loading it beside the model needs "
            "%.1f GB of memory, and %.1f GB are free",
            needed / 1e9,
            free / 1e9,
        )
    return needed <= free


def token_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Return windows (B, S) of random token ids; the first one is text, if there is a tokenizer."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type,union-attr]
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    ids_BS = torch.randint(0, rows, (WINDOWS, length), generator=torch.Generator().manual_seed(0))
    text = [] if tokenizer is None else tokenizer(SAMPLE).input_ids[:length]
    if text and max(text) < rows:
        ids_BS[0, : len(text)] = torch.tensor(text)
    return ids_BS.to(decoder.device(model))


def _differences(
    model: PreTrainedModel, ids_BS: Tensor, written: Path, folder: Path, retained: Sequence[int]
) -> list[Difference]:
    """Return the differences of all decoder layers of the loaded folder and of the logits, see `check_outputs`."""
    with torch.no_grad(), reload.only_the_folders_code(written):
        with eval_mode(model), capture_outputs(list(decoder.decoder_layers(model))) as states:
            logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        with _naming(folder):
            reloaded, info = reload.load_like(written, model)
        if faults := {name: sorted(map(str, value)) for name, value in info.items() if value}:
            raise WrongExport(folder, f"transformers does not load it as it is: {faults}")
        layers = decoder.decoder_layers(reloaded)
        if len(layers) != len(retained):
            raise WrongExport(folder, f"it has {len(layers)} decoder layers instead of {len(retained)}")
        with _follow(layers, [states[layer] for layer in retained]) as differences, _naming(folder):
            actual_BSV = reloaded(input_ids=ids_BS, use_cache=False).logits
        differences.append(_compare("the head", actual_BSV, logits_BSV, logits_BSV.mean(-1, keepdim=True)))
        return differences


@contextmanager
def _follow(layers: nn.ModuleList, states: Sequence[Tensor]) -> Iterator[list[Difference]]:
    """Give each layer the student's hidden states inside the context, and compare what it makes of them.

    Args:
        layers: the layers of the loaded model.
        states: the student's hidden states (B, S, D) after each of these layers.

    Yields:
        A list to which the differences are appended in the order of the layers.
    """
    differences: list[Difference] = []

    def compare(index: int, args: tuple[Any, ...], actual: Tensor) -> Tensor:
        differences.append(_compare(f"decoder layer {index}", actual, states[index], args[0]))
        return states[index]

    with forward_hooks(list(layers), compare):
        yield differences


def _compare(part: str, actual_BSD: Tensor, expected_BSD: Tensor, before_BSD: Tensor) -> Difference:
    """Compare outputs. The spread of a token is the root mean square of what the part added to `before_BSD`.

    A difference is more than rounding if it exceeds the sum of two bounds: a share of the spread, and the spacing of
    numbers of the output's size, because the output is rounded after the part's own contribution is added.
    """
    eps = torch.finfo(expected_BSD.dtype).eps
    share = max(1e-3, 4 * eps)  # of products whose factors are rounded once or twice
    rows = zip(expected_BSD, before_BSD, strict=True)
    spreads = [(after_SD.float() - before_SD.float()).square().mean(-1).sqrt() for after_SD, before_SD in rows]
    usual = torch.stack(spreads).nan_to_num().median()
    outside, largest = 0, 0.0
    for actual_SD, expected_SD, spread_S in zip(actual_BSD.float(), expected_BSD.float(), spreads, strict=True):
        spread_S1 = spread_S.nan_to_num().maximum(usual)[:, None]
        same = (actual_SD == expected_SD) | (actual_SD.isnan() & expected_SD.isnan())
        difference = (actual_SD - expected_SD).abs().masked_fill(same, 0.0)
        outside += int((~(same | (difference <= share * spread_S1 + eps * expected_SD.abs()))).sum())
        largest = max(largest, float((difference / spread_S1.clamp_min(1e-30)).nan_to_num(nan=torch.inf).max()))
    return Difference(part, outside / expected_BSD.numel(), largest)
