"""The special tokens at the beginning of a text or a window, such as BOS."""

from __future__ import annotations

from itertools import takewhile

from transformers import PreTrainedTokenizerBase


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, such as a BOS token; may be empty."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]


def start_of_text(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> list[int]:
    """Return the special tokens with which a text of its own begins.

    Args:
        tokenizer: the model's tokenizer.
        bos: True for those that the tokenizer puts before a text, and if it puts none, its BOS token, if it has one;
            None for those that it puts before a text; False for none.
    """
    if bos is False:
        return []
    leading = leading_tokens(tokenizer)
    if bos and not leading and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)]
    return leading


def start_of_window(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> list[int]:
    """Return the special tokens with which a window of several packed texts begins; with None it begins with none."""
    return start_of_text(tokenizer, bos) if bos else []
