"""Packed windows."""

from __future__ import annotations

import pytest
import torch
from support.small import byte_tokenizer

from recondense.data.windows import pack


def test_packing_joins_documents_with_eos_and_drops_the_tail() -> None:
    tokenizer = byte_tokenizer()
    windows = pack(["abc", "", "defgh"], tokenizer, 4)
    assert windows.dtype == torch.long and windows.shape == (2, 4)
    assert tokenizer.decode(windows.flatten()) == "abc<|endoftext|><|endoftext|>def"
    assert pack([str(number) * 50 for number in range(200)], tokenizer, 51).shape[0] >= 200


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the validation text: 2 texts give 5 tokens, fewer than one window of .*=8"):
        pack(["ab", "c"], byte_tokenizer(), 8, "the validation text")


def test_packing_without_an_eos_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert tokenizer.decode(pack(["ab", "cd"], tokenizer, 2).flatten()) == "abcd"


@pytest.mark.parametrize("start", [[257], [257, 258], []])
def test_every_window_begins_with_the_start(start: list[int]) -> None:
    """The start takes the place of text, and no text is lost between two windows."""
    tokenizer = byte_tokenizer()
    windows = pack(["abc", "", "defgh"], tokenizer, 4, start=start)
    room = 4 - len(start)
    assert windows.shape == (10 // room, 4)
    assert all(row[: len(start)] == start for row in windows.tolist())
    text = "abc<|endoftext|><|endoftext|>defgh<|endoftext|>"
    assert text.startswith(tokenizer.decode(windows[:, len(start) :].flatten()))


def test_a_window_has_room_for_more_than_its_start() -> None:
    with pytest.raises(ValueError, match="sequence_length=2: it must be a whole number, at least 3"):
        pack(["abc"], byte_tokenizer(), 2, start=[257, 258])
