"""Unpacked texts: one padded window each, with BOS and without padding in the loss; and losses that include prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.recoveries import prepared
from support.small import beginning_with, byte_tokenizer
from support.tiny_models import EVERY, condense_plan
from torch import Tensor

from recondense.data.examples import Example, cut_texts, make_examples, make_windows
from recondense.data.instruction_records import Record, read_record
from recondense.data.labels import MASKED, target_mask
from recondense.errors import UserError

TEXTS = ("the first text is long", "second", "", "x", "one more text")
MMLU = {"question": "How many legs has an ant?", "choices": ["2", "4", "6", "8"], "answer": 2, "subject": "biology"}
RECORDS = (
    read_record({"instruction": "Go.", "input": "", "output": "yes"}, "alpaca"),
    read_record({"train": MMLU}, "commonsense"),  # nested, as in cais/mmlu's auxiliary_train
    read_record({"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}, "chat"),
)


def bos_tokenizer() -> Any:
    return beginning_with("<s>", bos=True)


def real_tokens(example: Example) -> list[int]:
    return [token for token, target in zip(example.ids, example.targets, strict=True) if target]


@pytest.mark.parametrize(("bos", "before"), [(None, [257]), (True, [257]), (False, [])])
def test_a_text_is_cut_to_one_window(bos: bool | None, before: list[int], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = bos_tokenizer()
    with caplog.at_level(logging.INFO, logger="recondense"):
        examples = cut_texts(TEXTS, tokenizer, 10, "the training text", bos)
    long = [text for text in TEXTS if len(text) > (0 if before else 1)]
    expected = [[*before, *tokenizer(text, add_special_tokens=False)["input_ids"]][:10] for text in long]
    assert [example.ids for example in examples.kept] == expected
    assert all(example.targets == [False, *[True] * (len(example.ids) - 1)] for example in examples.kept)
    assert (examples.left_out, examples.cut) == (len(TEXTS) - len(long), 2)
    assert f"the training text: {len(TEXTS) - len(long)} of 5 texts are left out: they have no token" in caplog.text


def test_a_window_of_a_text_is_padded_and_the_padding_is_no_target() -> None:
    tokenizer = bos_tokenizer()
    examples = cut_texts(TEXTS, tokenizer, 10)
    windows = make_windows(examples.kept, 10, 7, together=False)
    assert set(windows) == {"input_ids", "labels"} and windows["input_ids"].shape == (4, 10)
    for row, example in enumerate(examples.kept):
        size = len(example.ids)
        assert windows["input_ids"][row].tolist() == [*example.ids, *[7] * (10 - size)]
        assert windows["labels"][row].tolist() == [MASKED, *example.ids[1:], *[MASKED] * (10 - size)]
    assert int(target_mask(windows["labels"]).sum()) == sum(len(example.ids) - 1 for example in examples.kept)


def test_a_cut_text_has_no_end_of_text_token() -> None:
    tokenizer = byte_tokenizer()
    assert all(tokenizer.eos_token_id not in example.ids for example in cut_texts(["ab", "abcdef"], tokenizer, 4).kept)


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        (["", ""], 8, "the text: none of 2 texts has a token to predict"),
        ("one text", 8, "texts is one text"),
        (["abc"], 2, "sequence_length=2: it must be a whole number, at least 3"),  # two tokens before each text
    ],
)
def test_texts_that_cannot_be_cut(texts: Any, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut_texts(texts, beginning_with("[gMASK]", "<sop>"), length, "the text")


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("length", [500, 40])
def test_without_answer_only_every_token_is_a_target(record: Record, length: int) -> None:
    tokenizer = bos_tokenizer()
    [example] = make_examples([record], tokenizer, length, answer_only=False).kept
    assert example.ids[0] == tokenizer.bos_token_id and real_tokens(example) == example.ids[1:]
    if length == 500:
        [answer] = make_examples([record], tokenizer, length).kept
        assert answer.ids == example.ids and 0 < len(real_tokens(answer)) < len(real_tokens(example))
    else:  # the answer lies beyond the window
        with pytest.raises(UserError, match=r"has an answer within data\.sequence_length=40"):
            make_examples([record], tokenizer, length)


def test_the_mmlu_form_asks_for_a_numbered_answer() -> None:
    assert RECORDS[1].values["output"] == "the correct answer is answer3"
    assert "Answer1: 2 Answer2: 4 Answer3: 6 Answer4: 8" in RECORDS[1].values["instruction"]


@pytest.mark.parametrize(("bos", "start"), [(None, []), (False, []), (True, [257])])
def test_bos_before_records(bos: bool | None, start: list[int]) -> None:
    """A tokenizer that has BOS but does not write it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    [example] = make_examples(RECORDS[:1], tokenizer, 500, bos=bos).kept
    [plain] = make_examples(RECORDS[:1], byte_tokenizer(), 500).kept
    assert example.ids == [*start, *plain.ids]
    [written] = make_examples(RECORDS[:1], bos_tokenizer(), 500, bos=bos).kept
    assert written.ids == [*([] if bos is False else [257]), *plain.ids]


def by_hand(model: Any, sequences: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood of every token but the first of each sequence, each run alone and unpadded."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in sequences:
            log_probabilities: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            for position, token in enumerate(ids[1:]):
                total -= float(log_probabilities[position, token])
                count += 1
    return total / count


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "mixtral"])
@pytest.mark.parametrize("kind", ["texts", "records"])
def test_the_loss_is_that_of_each_text_alone(family: str, kind: str) -> None:
    """Prompt tokens count and padding does not; computed from the definition, text by text."""
    tokenizer = bos_tokenizer()
    model = EVERY[family](vocab_size=len(tokenizer), max_position_embeddings=512)
    module = prepared(model, condense_plan(model, [1, 2]), objective="finetune")
    module.eval()
    length = 12 if kind == "texts" else 300
    examples = (
        cut_texts(TEXTS, tokenizer, length)
        if kind == "texts"
        else make_examples(RECORDS, tokenizer, length, answer_only=False)
    ).kept
    with torch.no_grad():
        losses = module.losses(**make_windows(examples, length, 0, together=False))
    expected = by_hand(module.model, [example.ids for example in examples])
    assert losses["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)
    if kind == "records":
        answers = make_examples(RECORDS, tokenizer, length).kept
        with torch.no_grad():
            others = module.losses(**make_windows(answers, length, 0, together=False))
        assert others["cross_entropy"].item() != pytest.approx(expected, rel=1e-3)
