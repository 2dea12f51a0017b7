"""The tokens with which texts and windows begin, for tokenizers with and without BOS."""

from __future__ import annotations

import pytest
from support.small import beginning_with, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from recondense.data.special_tokens import leading_tokens, start_of_text, start_of_window


def declared() -> PreTrainedTokenizerFast:
    """A tokenizer that has a BOS token but does not put it before texts, such as OLMoE's."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


TOKENIZERS = {
    "none": (byte_tokenizer, [], []),  # such as Qwen1.5-MoE's
    "declared": (declared, [], [257]),
    "written": (lambda: beginning_with("<s>", bos=True), [257], [257]),  # such as DeepSeekMoE's
    "two": (lambda: beginning_with("[gMASK]", "<sop>"), [257, 258], [257, 258]),  # such as GLM's, without a BOS token
    "other": (lambda: beginning_with("<x>", end=True), [257], [257]),  # and an end-of-text token behind the text
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_text_and_a_window_begin_with(name: str) -> None:
    make, leading, forced = TOKENIZERS[name]
    tokenizer = make()
    assert leading_tokens(tokenizer) == leading
    assert [start_of_text(tokenizer, bos) for bos in (None, True, False)] == [leading, forced, []]
    assert [start_of_window(tokenizer, bos) for bos in (None, True, False)] == [[], forced, []]
