"""Pack texts into windows of token ids.

Legend: N windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.data.arguments import list_texts, require_number
from recondense.errors import UserError
from recondense.progress import track

TEXTS_PER_CALL = 64  # fast tokenizers process the texts of a call in parallel
SLOW_CHARACTERS = 20_000_000  # with more characters than this, a progress bar is shown


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, name: str = "text") -> Tensor:
    """Join documents with the end-of-text token and cut them into windows; the incomplete last window is dropped.

    Args:
        texts: documents.
        tokenizer: the model's tokenizer. Its only special token in the windows is the end-of-text token after each
            document, if it has one.
        length: S, tokens per window; at least 2, because a window's first token is not predicted.
        name: a name for the texts in messages.

    Returns:
        ids (N, S), int64.

    Raises:
        UserError: all documents together are shorter than one window, or `texts` is one text.
    """
    require_number("sequence_length", length, 2)
    documents = list_texts(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[np.ndarray[Any, np.dtype[np.int64]]] = [np.empty(0, dtype=np.int64)]
    starts: Any = range(0, len(documents), TEXTS_PER_CALL)
    if sum(map(len, documents)) > SLOW_CHARACTERS:
        starts = track(starts, f"tokenizing {name}")
    for start in starts:
        encoded = tokenizer(
            documents[start : start + TEXTS_PER_CALL],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # no warning if a document is longer than the model's context
        )
        parts += [np.asarray([*ids, *end], dtype=np.int64) for ids in encoded["input_ids"]]
    ids = np.concatenate(parts)
    count = len(ids) // length
    if count == 0:
        raise UserError(
            f"{name}: {len(documents)} texts give {len(ids)} tokens, fewer than one window of "
            f"data.sequence_length={length}; give more text or lower data.sequence_length."
        )
    return torch.from_numpy(ids[: count * length].reshape(count, length))
