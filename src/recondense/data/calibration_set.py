"""The calibration set: token ids of texts, truncated to a maximum length and whole.

Legend: B texts of a batch, S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.data.arguments import list_texts, require_number
from recondense.data.valid_text import is_empty
from recondense.errors import UserError


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids of the calibration texts, in order. They are truncated, not packed.

    Args:
        ids: the ids of each text up to the maximum length, with the tokenizer's special tokens.
        whole: the ids of the whole texts; None if no text is longer than the maximum length.
    """

    ids: list[list[int]]
    whole: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))

    def highest_id(self) -> int:
        """Return the largest token id."""
        return max(map(max, self.whole or self.ids))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the ids."""
        sha256 = hashlib.sha256()
        for ids in self.ids:
            sha256.update(len(ids).to_bytes(8, "big") + np.asarray(ids, dtype="<i8").tobytes())
        return sha256.hexdigest()

    def up_to(self, max_length: int | None) -> list[list[int]]:
        """Return the ids of each text up to another length; None for the whole texts.

        If the length makes no difference, the list is `ids` itself.
        """
        longest = max(map(len, self.ids))  # if there are whole texts, the maximum length of the set
        if max_length == longest or (self.whole is None and (max_length is None or max_length > longest)):
            return self.ids
        return [ids[:max_length] for ids in self.whole or self.ids]

    def batches(self, texts_per_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the texts in order, in batches of a fixed size.

        Args:
            texts_per_batch: B; the last batch may have fewer texts.

        Yields:
            input_ids_BS (int64, padded on the right with 0) and mask_BS (bool, True for tokens, False for padding).
        """
        for start in range(0, len(self.ids), texts_per_batch):
            batch = self.ids[start : start + texts_per_batch]
            length = max(map(len, batch))
            input_ids_BS = torch.zeros(len(batch), length, dtype=torch.long)
            mask_BS = torch.zeros(len(batch), length, dtype=torch.bool)
            for row, ids in enumerate(batch):
                input_ids_BS[row, : len(ids)] = torch.tensor(ids)
                mask_BS[row, : len(ids)] = True
            yield input_ids_BS, mask_BS


def require_samples(texts: Sequence[str], num_samples: int) -> None:
    """Check that there are enough calibration texts.

    Raises:
        UserError: there are fewer than `num_samples`.
    """
    if len(texts) < num_samples:
        raise UserError(
            f"data.calibration.num_samples={num_samples}: there are {len(texts)} calibration texts; lower it or give "
            "more texts."
        )


def make_calibration_set(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, max_length: int
) -> CalibrationSet:
    """Tokenize the first `num_samples` texts with special tokens, each truncated to `max_length` tokens.

    Raises:
        UserError: there are fewer texts than `num_samples`, a text has only special tokens, or `texts` is one text.
    """
    require_number("num_samples", num_samples, 1)
    require_number("max_length", max_length, 1)
    documents = list_texts(texts)
    require_samples(documents, num_samples)
    documents = documents[:num_samples]
    settings: Any = {"padding": False, "return_attention_mask": False, "return_special_tokens_mask": True}
    # `verbose`: no warning if a text is longer than the model's context.
    encoded = tokenizer(documents, verbose=False, **settings)
    whole, masks = [list(ids) for ids in encoded["input_ids"]], encoded["special_tokens_mask"]
    if tokenizer.truncation_side == "right" and not any(mask[-1:] == [1] for mask in masks):
        cut = [ids[:max_length] for ids in whole]  # no special token follows the text
        masks = [mask[:max_length] for mask in masks]
    else:
        truncated = tokenizer(documents, truncation=True, max_length=max_length, **settings)
        cut, masks = [list(ids) for ids in truncated["input_ids"]], truncated["special_tokens_mask"]
    empty = [index for index, mask in enumerate(masks) if all(mask) or is_empty(documents[index])]
    if empty:
        shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise UserError(
            f"calibration set: {len(empty)} of {num_samples} texts have no token (indices from 0: {shown}), or no "
            "visible character; remove them."
        )
    return CalibrationSet(cut, whole if any(len(ids) > max_length for ids in whole) else None)
