"""Token ids of calibration texts."""

from __future__ import annotations

import pytest
from support.small import byte_tokenizer

from recondense.data.calibration_set import make_calibration_set


def test_calibration_texts_are_cut_and_kept_separate() -> None:
    calibration = make_calibration_set(["abcdef", "gh", "ignored"], byte_tokenizer(), num_samples=2, max_length=4)
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(ids) for ids in calibration.ids] == ["abcd", "gh"]
    assert (len(calibration), calibration.num_tokens) == (2, 6)
    [(input_ids_BS, mask_BS)] = calibration.batches(8)
    assert mask_BS.tolist() == [[True] * 4, [True, True, False, False]]
    assert input_ids_BS.tolist() == [calibration.ids[0], [*calibration.ids[1], 0, 0]]


def test_batches_cover_all_texts_in_order() -> None:
    calibration = make_calibration_set(["a", "bbb", "cc", "dddd", "e"], byte_tokenizer(), num_samples=5, max_length=9)
    batches = list(calibration.batches(2))
    assert [tuple(mask.shape) for _, mask in batches] == [(2, 3), (2, 4), (1, 1)]
    rows = [ids[mask].tolist() for batch in batches for ids, mask in zip(*batch, strict=True)]
    assert rows == calibration.ids


def test_the_fingerprint_depends_on_ids_and_on_where_texts_end() -> None:
    def fingerprint(*texts: str) -> str:
        return make_calibration_set(texts, byte_tokenizer(), len(texts), 8).fingerprint()

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc"), fingerprint("c", "ab")}) == 4


def test_too_few_or_empty_calibration_texts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_samples=3: there are 2 calibration texts; lower it"):
        make_calibration_set(["a", "b"], byte_tokenizer(), 3, 8)
    with pytest.raises(ValueError, match=r"2 of 4 texts have no token \(indices from 0: 1, 3\)"):
        make_calibration_set(["a", "", "b", ""], byte_tokenizer(), 4, 8)


def test_a_special_token_alone_is_no_text() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert make_calibration_set(["ab"], tokenizer, 1, 8).ids[0][0] == 0
    with pytest.raises(ValueError, match="texts have no token"):
        make_calibration_set([""], tokenizer, 1, 8)
