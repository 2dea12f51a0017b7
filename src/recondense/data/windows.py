"""Pack texts into windows of token ids.

Legend: N windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.data.arguments import list_texts, require_number
from recondense.errors import UserError
from recondense.progress import track

TEXTS_PER_CALL = 64  # fast tokenizers process the texts of a call in parallel
Ids = np.ndarray[Any, np.dtype[np.int64]]
SLOW_CHARACTERS = 20_000_000  # with more characters than this, a progress bar is shown


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    name: str = "text",
    start: Sequence[int] = (),
) -> Tensor:
    """Join documents with the end-of-text token and cut them into windows; the incomplete last window is dropped.

    Args:
        texts: documents.
        tokenizer: the model's tokenizer. Its only special token in the text is the end-of-text token after each
            document, if it has one.
        length: S, tokens per window; at least 2, because a window's first token is not predicted.
        name: a name for the texts in messages.
        start: the tokens with which each window begins, such as BOS; they count as tokens of the window.

    Returns:
        ids (N, S), int64.

    Raises:
        UserError: all documents together are shorter than one window, or `texts` is one text.
    """
    require_number("sequence_length", length, max(2, len(start) + 1))
    documents = list_texts(texts)
    return cut_windows(join_texts(documents, tokenizer, name), len(documents), length, name, start)


def join_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: str) -> Ids:
    """Return the ids of all texts, each followed by the end-of-text token; the arguments are those of `pack`."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[Ids] = [np.empty(0, dtype=np.int64)]
    parts += [np.asarray([*ids, *end], dtype=np.int64) for ids in token_ids(texts, tokenizer, name)]
    return np.concatenate(parts)


def cut_windows(ids: Ids, num_texts: int, length: int, name: str, start: Sequence[int] = ()) -> Tensor:
    """Cut the joined ids of some texts into windows.

    Args:
        ids: the ids, from `join_texts`.
        num_texts: number of texts, for messages.
        length, name, start: as for `pack`.

    Raises:
        UserError: there are fewer ids than one window has.
    """
    require_number("sequence_length", length, max(2, len(start) + 1))
    room = length - len(start)
    count = len(ids) // room
    if count == 0:
        raise UserError(
            f"{name}: {num_texts} texts give {len(ids)} tokens, fewer than one window of "
            f"data.sequence_length={length}; give more text or lower data.sequence_length."
        )
    windows = torch.from_numpy(ids[: count * room].reshape(count, room))
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), windows], dim=1) if start else windows


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[int]]:
    """Yield the ids of each text, without special tokens.

    Args:
        texts: documents.
        tokenizer: the model's tokenizer.
        name: a name for the texts on the progress bar.
    """
    starts: Any = range(0, len(texts), TEXTS_PER_CALL)
    if sum(map(len, texts)) > SLOW_CHARACTERS:
        starts = track(starts, f"tokenizing {name}")
    for start in starts:
        yield from tokenizer(
            texts[start : start + TEXTS_PER_CALL],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # no warning if a document is longer than the model's context
        )["input_ids"]
