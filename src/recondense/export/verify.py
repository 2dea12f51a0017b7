"""Check a written folder before it gets its name: does transformers load from it the model that was exported?

`shapes_problem` reads only the headers of the files. `outputs_problem` loads the folder with transformers and runs it
beside the student. Each layer of the loaded model gets the hidden states of the student: rounding does not add up from
layer to layer, a router sees the same tokens in both models, and a difference belongs to one layer.

Legend: B batch, S sequence, D hidden size or vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.config.schema import ExportConfig
from recondense.models import decoder, headers, reload
from recondense.models.hooks import capture_outputs, eval_mode
from recondense.models.layer_store import layer_store

log = logging.getLogger(__name__)

WINDOWS, LENGTH = 8, 32  # tokens that are compared: every expert should get some of them
ROOM = 1.3  # free memory that the comparison needs, in sizes of the exported weights
SAMPLE = "The check of an export: 3 + 4 = 7, naïve cafés,\n\n  tabs\tand 数学 🙂"
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


def compares_outputs(model: PreTrainedModel, folder: Path, settings: ExportConfig) -> bool:
    """Return whether `settings.verify` asks for `outputs_problem`; auto does if the model fits into memory twice.

    The loaded model is on the device of the student: on another device, its kernels would round differently.

    Args:
        model: the student.
        folder: the written folder.
        settings: settings of the export.
    """
    if layer_store(model).streamed:
        log.info("export.verify: the model is streamed, so only names and shapes of the export are checked")
        return False
    if settings.verify != "auto":
        return settings.verify == "logits"
    needed = ROOM * sum(file.stat().st_size for file in headers.list_files(folder))
    free = free_bytes(decoder.device(model))
    if needed <= free:
        return True
    log.info(
        "export.verify=auto: only names and shapes of the export are checked; loading it beside the model needs "
        "%.1f GB of memory, and %.1f GB are free",
        needed / 1e9,
        free / 1e9,
    )
    return False


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; torch's unused reserve on a GPU is free."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reserve)


def shapes_problem(folder: Path) -> str:
    """Compare names, shapes and dtypes in the files of a folder with the class that will load them.

    Returns:
        How they differ, in words; empty if they do not.
    """
    with reload.only_the_folders_code(folder):
        outline = reload.load_outline(folder)
        name, dtype = type(outline).__name__, outline.config.dtype
        files = headers.list_files(folder)
        if difference := str(headers.compare(outline, files)):
            return f"its files do not match {name}: {difference}"
    for tensor in headers.read_headers(files):
        stored = FLOATS.get(tensor.dtype)  # None for integers, which are indices
        if stored not in (None, dtype, torch.float32):  # some families keep a few weights in fp32
            return f"{tensor.key} is stored as {tensor.dtype}, but its config says {dtype}"
    return ""


def outputs_problem(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, retained: Sequence[int]
) -> str:
    """Load a folder with transformers, and compare its tokenizer, layers and logits with those of the student.

    Args:
        model: the student; it does not change.
        tokenizer: its tokenizer; None if the folder has none.
        folder: the written folder.
        retained: for each decoder layer in the folder, the layer of the student.

    Returns:
        How they differ, in words; empty if they differ by rounding only.
    """
    if tokenizer is not None and (problem := _tokenizer_problem(tokenizer, folder)):
        return problem
    ids_BS = token_windows(model, tokenizer)
    with torch.no_grad(), reload.only_the_folders_code(folder):
        with eval_mode(model), capture_outputs(list(decoder.decoder_layers(model))) as states:
            logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        reloaded, info = reload.load_like(folder, model)
        if faults := {name: sorted(map(str, value)) for name, value in info.items() if value}:
            return f"transformers does not load it as it is: {faults}"
        layers = decoder.decoder_layers(reloaded)
        if len(layers) != len(retained):
            return f"it has {len(layers)} decoder layers instead of {len(retained)}"
        with _follow(layers, [states[layer] for layer in retained]) as differences:
            actual_BSV = reloaded(input_ids=ids_BS, use_cache=False).logits
        differences.append(_compare("the head", actual_BSV, logits_BSV, logits_BSV.mean(-1, keepdim=True)))
        del reloaded, layers
    return _summarize(differences)


def token_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Return windows (B, S) of random token ids; the first one is text, if there is a tokenizer."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type,union-attr]
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    ids_BS = torch.randint(0, rows, (WINDOWS, length), generator=torch.Generator().manual_seed(0))
    text = [] if tokenizer is None else tokenizer(SAMPLE).input_ids[:length]
    if text and max(text) < rows:
        ids_BS[0, : len(text)] = torch.tensor(text)
    return ids_BS.to(decoder.device(model))


def _tokenizer_problem(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    reloaded = reload.load_tokenizer(folder)
    for text in (SAMPLE, *tokenizer.all_special_tokens):
        expected, actual = tokenizer(text).input_ids, reloaded(text).input_ids
        if expected != actual:
            return f"its tokenizer gives other ids for {text!r}: {actual} instead of {expected}"
    return ""


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

    def compare(index: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            actual = output[0] if isinstance(output, tuple) else output
            differences.append(_compare(f"decoder layer {index}", actual, states[index], args[0]))
            return (states[index], *output[1:]) if isinstance(output, tuple) else states[index]

        return hook

    handles = [layer.register_forward_hook(compare(index)) for index, layer in enumerate(layers)]
    try:
        yield differences
    finally:
        for handle in handles:
            handle.remove()


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


def _summarize(differences: Sequence[Difference]) -> str:
    """Return the problem, or log the largest difference if there is none."""
    wrong = [difference for difference in differences if difference.share > EXCEPTIONS]
    if not wrong:
        largest = max(differences, key=lambda difference: difference.largest)
        log.info(
            "the export was loaded again and computes the same: outputs differ by at most %.1e of their spread (%s)",
            largest.largest,
            largest.part,
        )
        return ""
    worst = max(wrong, key=lambda difference: difference.share * min(difference.largest, 1e6))
    return (
        f"transformers computes something else from it: {worst.share:.0%} of the outputs of {worst.part} differ by "
        f"more than rounding, the largest by {worst.largest:.2g} times their spread ({len(wrong)} of "
        f"{len(differences)} parts differ)"
    )
