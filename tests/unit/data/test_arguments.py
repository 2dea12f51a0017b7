"""Texts and lengths that callers give: the verbs take any iterable of texts and refuse a single one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpus import documents
from support.small import byte_tokenizer
from support.tiny_models import condense_plan, qwen2_moe

import recondense as rc
from recondense.data.arguments import list_texts, require_number
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

TEXTS = documents(4, 200)


def student() -> Student:
    model = qwen2_moe(vocab_size=len(byte_tokenizer()), max_position_embeddings=256)
    return apply(model, condense_plan(model, [1]))


def calibrate(texts: Any, num_samples: Any = 2, max_length: Any = 16) -> Any:
    return rc.calibrate(student().model, byte_tokenizer(), texts, num_samples, max_length)


def evaluate(texts: Any, **changes: Any) -> Any:
    return rc.evaluate(student(), byte_tokenizer(), texts, **{"sequence_length": 16, **changes})


def recover(texts: Any, **changes: Any) -> Any:
    settings = {"sequence_length": 16, "steps": 1, "batch_size": 2, **changes}
    return rc.recover(student(), byte_tokenizer(), texts, **settings)


VERBS = (calibrate, evaluate, recover)


@pytest.mark.parametrize("verb", VERBS)
def test_one_text_is_refused(verb: Any) -> None:
    """Its characters would be taken for texts, and give figures."""
    with pytest.raises(rc.UserError, match="texts is one text; give a list of texts"):
        verb(TEXTS[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (b"bytes", "texts is a bytes"),
        ({"text": "a"}, "texts is a dict"),
        (None, "texts is a NoneType"),
        (Path("file"), r"texts is a \w*Path; give a list of texts"),
        (["a", 3], r"texts\[1\] is a int, not a text"),
        ([["a", "b"]], r"texts\[0\] is a list, not a text"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(rc.UserError, match=message):
        list_texts(texts)


def test_any_iterable_of_texts_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", logger="lightning.pytorch")
    tapes = [calibrate(texts) for texts in (TEXTS, tuple(TEXTS), iter(TEXTS))]
    assert all(torch.equal(tape.states[0][0], tapes[0].states[0][0]) for tape in tapes)
    assert evaluate(TEXTS) == evaluate(text for text in TEXTS)
    assert isinstance(recover(text for text in TEXTS), Student)


@pytest.mark.parametrize("value", [0, -1, 1, 2.5, True, "16", None])
def test_a_window_has_at_least_two_tokens(value: Any) -> None:
    for verb in (evaluate, recover):
        with pytest.raises(rc.UserError, match=rf"sequence_length={value}: it must be a whole number, at least 2"):
            verb(TEXTS, sequence_length=value)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_impossible_numbers_are_refused(value: Any) -> None:
    with pytest.raises(rc.UserError, match=f"num_samples={value}: "):
        calibrate(TEXTS, num_samples=value)
    with pytest.raises(rc.UserError, match=f"max_length={value}: "):
        calibrate(TEXTS, max_length=value)
    with pytest.raises(rc.UserError, match=f"batch_size={value}: "):
        evaluate(TEXTS, batch_size=value)
    require_number("size", torch.tensor(3), 3)


@pytest.mark.parametrize("half", ["\ud83d", "\udc00", "\ude00\ud83d"])
def test_lone_surrogates_are_replaced_and_counted(half: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="recondense"):
        assert list_texts(text for text in ("one", f"half {half}")) == ["one", "half " + "\ufffd" * len(half)]
    assert "1 of 2 texts had lone surrogates" in caplog.text
    texts = [f"{half}{text}" for text in TEXTS]
    replaced = ["\ufffd" * len(half) + text for text in TEXTS]
    assert evaluate(texts) == evaluate(replaced)
    assert torch.equal(calibrate(texts).states[0][0], calibrate(replaced).states[0][0])
    assert isinstance(recover(texts), Student)


@pytest.mark.parametrize("empty", ["", " \n", "\u200b\ufeff"])
def test_empty_texts(empty: str) -> None:
    """Windows go on with the next text; a calibration set is not made of them."""
    with pytest.raises(
        rc.UserError, match=r"1 of 2 texts have no token \(indices from 0: 1\), or no visible character"
    ):
        calibrate([TEXTS[0], empty])
    assert set(evaluate([*TEXTS, empty])) == set(evaluate(TEXTS))
    with pytest.raises(rc.UserError, match="fewer than one window"):
        evaluate([empty])
