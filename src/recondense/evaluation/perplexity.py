"""EVALUATE: the perplexity of a model on packed windows, and its divergence from the original.

Shapes: M windows, B windows of a batch, S tokens of a window, T predicted tokens, C tokens of a chunk, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.data.arguments import require_number
from recondense.data.vocabulary import require_rows
from recondense.data.windows import pack
from recondense.errors import UserError
from recondense.models import decoder, forward
from recondense.models.decoder import Head
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import TensorList
from recondense.models.tokenizers import embedding_rows
from recondense.progress import ProgressBar, progress
from recondense.recovery.losses import chunks
from recondense.surgery.student import Student

CHUNK_ELEMENTS = 2**22  # logits computed at a time: 16 MiB in fp32
FAR = 60.0  # nats; a larger difference between logits is too large for exp in fp32


def evaluate(
    student: Student | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sequence_length: int = 256,
    batch_size: int = 8,
) -> dict[str, float]:
    """Measure a student, or any causal LM, on texts.

    Args:
        student: a student returned by `apply`, or a model.
        tokenizer: the model's tokenizer.
        texts: documents, which are joined and cut into windows of `sequence_length` tokens.
        sequence_length: tokens per window.
        batch_size: windows per forward pass.

    Returns:
        loss (nats per token) and perplexity. For a student also kl_to_original (nats per token), unless its plan
        changes nothing or its original has been released.

    Raises:
        UserError: the texts have fewer tokens than one window, `texts` is a string instead of a list, the model's
            embedding has no row for a token, or the loss is not finite.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> sorted(rc.evaluate(model, tokenizer, texts, sequence_length=32))
        ['loss', 'perplexity']
    """
    require_number("batch_size", batch_size, 1)
    windows_NS = pack(texts, tokenizer, sequence_length)
    model = student if isinstance(student, PreTrainedModel) else student.model
    require_rows(int(windows_NS.max()), embedding_rows(model.config), tokenizer, "the texts")
    if isinstance(student, PreTrainedModel):
        return perplexity(student, windows_NS, batch_size)
    reference = student.original if student.has_original else None
    return perplexity(student.model, windows_NS, batch_size, reference)


def perplexity(
    model: PreTrainedModel,
    windows_MS: Tensor,
    batch_size: int,
    reference: Callable[[], AbstractContextManager[Any]] | None = None,
    description: str | None = None,
    name: str = "the model",
) -> dict[str, float]:
    """Measure the mean loss over the predicted tokens of all windows, and the divergence from the original.

    loss = −mean_t log q_t(target),  kl_to_original = mean_t Σ_v p_t(v) (log p_t(v) − log q_t(v)),
    where q is the model's next-token distribution and p the original's. Both are summed over tokens in fp64.

    Args:
        model: a causal LM. It runs on its device, in the precision of the caller's autocast; its mode is restored.
        windows_MS: ids; every token of a window except the first is predicted.
        batch_size: B, windows per forward pass.
        reference: makes a context that yields the original, or None if `model` itself is the original inside it.
        description: the description of the progress bar; None shows no bar.
        name: the model's name, for the error message.

    Returns:
        loss (nats), perplexity, and kl_to_original (nats) if `reference` is given.

    Raises:
        UserError: there is no window with two tokens, or the loss is not finite.
    """
    if windows_MS.ndim != 2 or windows_MS.shape[0] == 0 or windows_MS.shape[1] < 2:
        raise UserError(
            f"perplexity: windows have shape {tuple(windows_MS.shape)}; at least one window of two tokens is needed."
        )
    device = decoder.device(model)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    batches = [batch_BS.to(device) for batch_BS in windows_MS.split(batch_size)]
    with eval_mode(model), torch.no_grad(), _bar(description, len(windows_MS)) as bar:
        for ids_BS, (hidden_BSD, original) in zip(batches, _pairs(model, batches, reference), strict=True):
            with decoder.lm_head(model) as head:
                sums += _sums(hidden_BSD, original, ids_BS, head)
            if bar is not None:
                bar.advance(len(ids_BS))
    count = windows_MS.shape[0] * (windows_MS.shape[1] - 1)
    loss, divergence = (sums / count).tolist()
    if not math.isfinite(loss):
        text = f"its logits are not finite (the mean loss over {count} tokens is {loss})"
        raise UserError(f"perplexity: {name}: {text}. Check its weights, or use another model.dtype")
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return figures if reference is None else {**figures, "kl_to_original": divergence}


def _pairs(
    model: PreTrainedModel, batches: Sequence[Tensor], reference: Callable[[], AbstractContextManager[Any]] | None
) -> Iterator[tuple[Tensor, tuple[Tensor, Head] | None]]:
    """Yield the hidden states before the head (B, S, D) of the model, and those of the original with its head.

    A streamed model first computes those of all batches, layer by layer.
    """
    states = _run_streamed(model, batches)
    original_states, original_head = None, None
    if reference is not None:
        with _evaluated(model, reference) as original, decoder.lm_head(original) as original_head:
            original_states = _run_streamed(original, batches)
    for index, ids_BS in enumerate(batches):
        hidden_BSD = _hidden(model, ids_BS) if states is None else states[index]
        if reference is None or original_head is None:
            yield hidden_BSD, None
        elif original_states is not None:
            yield hidden_BSD, (original_states[index], original_head)
        else:
            with _evaluated(model, reference) as original:
                original_BSD = _hidden(original, ids_BS)
            yield hidden_BSD, (original_BSD, original_head)


@contextmanager
def _evaluated(
    model: PreTrainedModel, reference: Callable[[], AbstractContextManager[Any]]
) -> Iterator[PreTrainedModel]:
    """Inside is the original in evaluation mode. Blocks of its own keep theirs when `model` is set to it."""
    with reference() as original:
        original = original or model
        with eval_mode(original):
            yield original


def _run_streamed(model: PreTrainedModel, batches: Sequence[Tensor]) -> TensorList | None:
    """Compute the hidden states before the head of all batches, layer by layer; None for a model in memory."""
    if not layer_store(model).streamed:
        return None
    with progress("layer by layer", len(decoder.decoder_layers(model))) as bar:
        return forward.layer_by_layer(model, [{"input_ids": ids_BS} for ids_BS in batches], bar.advance)


def _hidden(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    hidden_BSD: Tensor = forward.run(model, {"input_ids": ids_BS, "use_cache": False}).logits
    return hidden_BSD


def _sums(hidden_BSD: Tensor, original: tuple[Tensor, Head] | None, ids_BS: Tensor, head: Head) -> Tensor:
    """Return the summed loss and divergence of a batch (2,), fp64, computed from the logits of a chunk at a time."""
    sums = torch.zeros(2, dtype=torch.float64, device=ids_BS.device)
    hidden_TD, labels_T = hidden_BSD[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()
    original_TD = None if original is None else original[0][:, :-1].flatten(0, 1)
    for part in chunks(len(hidden_TD), max(1, CHUNK_ELEMENTS // len(head.weight_VD))):
        logits_CV = head.logits(hidden_TD[part]).float()
        sums[0] += F.cross_entropy(logits_CV, labels_T[part], reduction="none").double().sum()
        if original is not None and original_TD is not None:
            original_CV = original[1].logits(original_TD[part]).float()
            sums[1] += kl_divergence(original_CV, logits_CV).double().sum()
    return sums


def kl_divergence(original_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Compute KL(softmax(original) ‖ softmax(logits)) without cancellation; the result is never negative.

    KL = ln E_p[exp e] = ln(1 + E_p[exp(e) − 1 − e]),  e = d − E_p[d],  d = logits − original,  p = softmax(original)

    Every term of the mean is at least 0, so fp32 keeps its precision even if the distributions are close. Rows in which
    any e is too large for exp are computed by the definition in fp64.

    Args:
        original_TV, logits_TV: logits (T, V), fp32.

    Returns:
        The divergence of each token (T,), in nats.
    """
    p_TV = original_TV.softmax(-1)
    e_TV = logits_TV - original_TV
    e_TV -= (p_TV * e_TV).sum(-1, keepdim=True)
    far_T = ~(e_TV.amax(-1) < FAR)
    kl_T = (e_TV.expm1() - e_TV).mul_(p_TV).sum(-1).log1p_()
    if far_T.any():
        log_p, log_q = original_TV[far_T].double().log_softmax(-1), logits_TV[far_T].double().log_softmax(-1)
        kl_T[far_T] = (log_p.exp() * (log_p - log_q)).sum(-1).to(kl_T.dtype)
    return kl_T


@contextmanager
def _bar(description: str | None, total: int) -> Iterator[ProgressBar | None]:
    if description is None:
        yield None
    else:
        with progress(description, total) as bar:
            yield bar
