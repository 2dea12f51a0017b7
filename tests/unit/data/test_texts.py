"""All token ids of a run: each text is tokenized once, whatever it is used for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.corpus import documents
from support.small import byte_tokenizer

from recondense.config.schema import from_dict
from recondense.config.stages import require_stages
from recondense.data.calibration_set import make_calibration_set
from recondense.data.corpus import Corpora
from recondense.data.instruction_records import read_record
from recondense.data.texts import Texts, Tokenizing
from recondense.data.windows import pack
from recondense.errors import UserError

TRAIN, VALIDATION, CALIBRATION = (
    [f"{split}: {text}" for text in documents(count, 300)]
    for split, count in (("train", 6), ("validation", 3), ("calibration", 5))
)


def config(**recovery: Any) -> Any:
    return from_dict(
        {
            "data": {"sequence_length": 16, "calibration": {"num_samples": 4, "max_length": 8}},
            "evaluation": {"perplexity_windows": None},
            "recovery": {"objective": "finetune", **recovery},
        }
    )


def counted(tokenizer: Any) -> tuple[Any, Counter[str]]:
    """A tokenizer that counts how often it is given each text."""
    counts: Counter[str] = Counter()

    class Counted(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            counts.update([text] if isinstance(text, str) else text)
            return super().__call__(text, *args, **kwargs)

    tokenizer.__class__ = Counted
    return tokenizer, counts


def tokenizing(tokenizer: Any, **splits: Any) -> Tokenizing:
    texts = {"train": TRAIN, "validation": VALIDATION, "calibration": CALIBRATION, **splits}
    return Tokenizing(Texts(Corpora(**texts)), tokenizer)


@pytest.mark.parametrize("lengths", [[16], [16, 16], [16, 32, 64]])
def test_no_text_is_tokenized_twice(lengths: list[int]) -> None:
    tokenizer, counts = counted(byte_tokenizer())
    stages = [{"name": f"s{index}", "sequence_length": length} for index, length in enumerate(lengths)]
    settings = config(stages=stages, validate_every=1)
    tokens = tokenizing(tokenizer).tokens(settings, require_stages(settings))
    used = (*TRAIN, *VALIDATION, *CALIBRATION[:4])
    assert {text: counts[text] for text in used} == dict.fromkeys(used, 1)
    plain = byte_tokenizer()
    assert tokens.validation is not None and torch.equal(tokens.validation, pack(VALIDATION, plain, 16))
    assert tokens.calibration == make_calibration_set(CALIBRATION, plain, 4, 8)
    for index, length in enumerate(lengths):
        stage = tokens.stages[f"s{index}"]
        assert torch.equal(stage.train["input_ids"], pack(TRAIN, plain, length))
        assert stage.validation is not None
        assert torch.equal(stage.validation["input_ids"], pack(VALIDATION, plain, length))


def test_stages_with_equal_windows_share_them() -> None:
    settings = config(stages=[{"name": "one"}, {"name": "two"}])
    tokens = tokenizing(byte_tokenizer()).tokens(settings, require_stages(settings))
    one, two = (tokens.stages[name].train["input_ids"] for name in ("one", "two"))
    assert one is two


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", [None, "<|endoftext|> $A", "$A <|endoftext|>"])
@pytest.mark.parametrize("length", [2, 8, 1000])
def test_calibration_texts_are_truncated_as_the_tokenizer_does(side: str, template: str | None, length: int) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = side
    if template is not None:
        special = [("<|endoftext|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    expected = tokenizer(CALIBRATION, truncation=True, max_length=length)["input_ids"]
    assert make_calibration_set(CALIBRATION, tokenizer, 5, length).ids == expected


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["ab"]}, "the train text: 1 texts give 3 tokens, fewer than one window"),
        ({"validation": ["ab", "c"]}, "the validation text: 2 texts give 5 tokens"),
        ({"calibration": ["ab", "\u200b"]}, "calibration set: 1 of 2 texts have no token .*or no visible character"),
        ({"train": [read_record({"instruction": "a", "output": ""}, "alpaca")]}, "none of 1 has an answer"),
    ],
)
def test_too_little_text_shows_before_weights(splits: dict[str, Any], message: str) -> None:
    settings = config()
    with pytest.raises(UserError, match=message):
        tokenizing(byte_tokenizer(), **splits).tokens(settings, require_stages(settings))
