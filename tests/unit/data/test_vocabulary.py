"""Tokenizers with more tokens than the model's embedding has rows: used ids are refused, others change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.corpus import documents
from support.small import byte_tokenizer
from support.tiny_models import condense_plan, qwen2_moe
from transformers import PreTrainedTokenizerBase

import recondense as rc
from recondense.config.schema import from_dict
from recondense.config.stages import require_stages
from recondense.data.corpus import Corpora
from recondense.data.instruction_records import read_record
from recondense.data.texts import Texts, Tokenizing
from recondense.data.tokens import Tokens
from recondense.data.vocabulary import filler
from recondense.evaluation.lm_eval import _with_padding
from recondense.surgery.apply import apply

ROWS = len(byte_tokenizer())
TEXTS = documents(4, 200)
RECORD = read_record({"instruction": "Add.", "input": "", "output": "3"}, "alpaca")


def longer(**special: Any) -> PreTrainedTokenizerBase:
    """A tokenizer with the same ids for the same texts, and more."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(special or {"additional_special_tokens": ["<|im_start|>"]})
    assert len(tokenizer) == ROWS + 1
    return tokenizer


def tokens(tokenizer: PreTrainedTokenizerBase, rows: int | None = ROWS, **splits: Any) -> Tokens:
    corpora = Corpora(**{"train": TEXTS, "validation": TEXTS, "calibration": TEXTS, **splits})
    config = from_dict(
        {
            "data": {"sequence_length": 256, "calibration": {"num_samples": 4, "max_length": 16}},
            "evaluation": {"perplexity_windows": None},
            "recovery": {"objective": "finetune", "validate_every": 1},
        }
    )
    return Tokenizing(Texts(corpora), tokenizer, rows).tokens(config, require_stages(config))


@pytest.mark.parametrize("split", ["train", "validation", "calibration"])
@pytest.mark.parametrize("text", ["<|im_start|>", "at the end <|im_start|>", "in <|im_start|> the middle"])
def test_an_id_without_a_row_is_named_with_its_split(split: str, text: str) -> None:
    name = {"train": "training"}.get(split, split)
    expected = rf"^the {name} texts: the tokenizer's token '<\|im_start\|>' has the id {ROWS}, but .* only {ROWS} rows"
    documents = [text + " x" * 300, *TEXTS] if split != "calibration" else [text, *TEXTS]
    with pytest.raises(rc.UserError, match=expected + r".*; use the tokenizer of this model \(model.tokenizer\), take"):
        tokens(longer(), **{split: documents})


def test_a_longer_tokenizer_whose_ids_are_not_used_gives_the_same_tokens() -> None:
    expected, others = tokens(byte_tokenizer()), tokens(longer())
    assert others.calibration == expected.calibration
    assert others.validation is not None and expected.validation is not None
    assert torch.equal(others.validation, expected.validation)
    train = others.stages["recovery"].train["input_ids"]
    assert torch.equal(train, expected.stages["recovery"].train["input_ids"])
    assert (
        int(tokens(longer(), rows=None, train=["<|im_start|>" * 300]).stages["recovery"].train["input_ids"].max())
        == ROWS
    )


@pytest.mark.parametrize("records", [[RECORD], [RECORD] * 9])
def test_padding_needs_no_row_of_its_own(records: list[Any]) -> None:
    tokenizer = longer(pad_token="[PAD]")
    assert tokenizer.pad_token_id == ROWS
    table = tokens(tokenizer, train=records).stages["recovery"].train
    assert int(table["input_ids"].max()) < ROWS
    same = tokens(byte_tokenizer(), train=records).stages["recovery"].train
    assert torch.equal(table["labels"], same["labels"])


def test_the_filler_is_an_id_that_exists() -> None:
    tokenizer = longer(pad_token="[PAD]")
    end = tokenizer.eos_token_id
    assert filler(tokenizer, ROWS + 1) == filler(tokenizer, None) == ROWS
    assert filler(tokenizer, ROWS) == end
    tokenizer.eos_token = None
    assert filler(tokenizer, ROWS) == 0
    assert filler(longer(eos_token="<|new_end|>"), ROWS) == 0


@pytest.mark.parametrize("special", [{"pad_token": "[PAD]"}, {"eos_token": "<|new_end|>"}, {"unk_token": "<unk>"}])
def test_the_padding_of_lm_eval_has_a_row(special: dict[str, str]) -> None:
    tokenizer = longer(**special)
    before = tokenizer.pad_token_id
    padding = _with_padding(tokenizer, ROWS).pad_token_id
    assert padding is not None and padding < ROWS and tokenizer.pad_token_id == before
    assert _with_padding(tokenizer, ROWS + 1).pad_token_id == before


def test_the_verbs_refuse_an_id_without_a_row() -> None:
    model = qwen2_moe(vocab_size=ROWS, max_position_embeddings=256)
    student = apply(model, condense_plan(model, [1]))
    texts = [f"<|im_start|>{text}" for text in TEXTS]
    for verb in (
        lambda texts: rc.calibrate(model, longer(), texts, 2, 16),
        lambda texts: rc.evaluate(model, longer(), texts, 16),
        lambda texts: rc.evaluate(student, longer(), texts, 16),
        lambda texts: rc.recover(student, longer(), texts, steps=1, sequence_length=16, batch_size=2),
    ):
        with pytest.raises(rc.UserError, match=rf"'<\|im_start\|>' has the id {ROWS}, but .* only {ROWS} rows"):
            verb(texts)
    assert rc.evaluate(model, longer(), TEXTS, 16) == rc.evaluate(model, byte_tokenizer(), TEXTS, 16)
