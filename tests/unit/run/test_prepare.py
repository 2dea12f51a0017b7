"""What a run makes before it loads weights, and the mistakes that show there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.small import byte_tokenizer, small_model
from tokenizers.pre_tokenizers import Whitespace
from transformers import Qwen2TokenizerFast

from recondense.config.schema import from_dict
from recondense.config.stages import require_stages
from recondense.errors import UserError
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS, PERPLEXITY
from recondense.run import prepare as module
from recondense.run.prepare import Prepared, prepare
from recondense.run.resolved_run import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model's config and tokenizer, and without weights."""
    small_model().config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": f"text {number} " * 20}) + "\n" for number in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "other.jsonl").write_text("".join(row.replace("text ", "other ") for row in rows))
    return tmp_path


def prepared(
    folder: Path, train: str | None = None, recovery: dict[str, Any] | None = None, **changes: Any
) -> Prepared:
    if train is not None:
        (folder / "train.jsonl").write_text(train)
    other = {"path": str(folder / "other.jsonl")}
    data = {
        "name": "texts",
        "source": "texts",
        "sequence_length": 16,
        "train": {"path": str(folder / "train.jsonl")},
        "validation": other,
        "calibration": {**other, "num_samples": 2, "max_length": 8},
    }
    values = {
        "model": {"path": str(folder / "model")},
        "cache_dir": str(folder / "cache"),
        "data": data,
        "recovery": {"objective": "finetune", "steps": 5, "batch_size": 1, **(recovery or {})},
        "evaluation": {"name": "heldout", "perplexity_windows": 2, "tasks": list(HELDOUT_TASKS)},
        **changes,
    }
    config = from_dict(values)
    return prepare(Run(config, require_stages(config), ("a step",)))


def test_everything_is_made_without_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = prepared(folder)
    tokens = result.tokens
    assert tokens.calibration is not None and len(tokens.calibration) == 2
    assert tokens.validation is not None and tokens.validation.shape == (2, 16)
    assert tokens.stages["recovery"].train["input_ids"].shape[1] == 16
    assert tokens.stages["recovery"].validation is None and set(tokens.sha256) == {"train", "validation", "calibration"}
    assert list(result.tasks.names) == [PERPLEXITY] and "too few lines" in caplog.text
    nothing = prepared(folder, recovery={"objective": "none"}, evaluation={"perplexity_windows": 0})
    assert nothing.tokens.stages == {} and nothing.tokens.validation is None and list(nothing.tasks.names) == []


@pytest.mark.parametrize(
    ("train", "recovery", "message"),
    [
        ('{"text": "ab"}\n', {}, "the train text: 1 texts give 3 tokens, fewer than one window"),
        (None, {"epochs": 0.1, "warmup_steps": 40}, r"recovery.warmup_steps=40: recovery.epochs=0.1 of \d+ windows"),
        (None, {"stages": [{"name": "late", "sequence_length": 9000}]}, "fewer than one window of .*=9000"),
        ('{"text": "ok"}\n{"text": 3}\n', {}, "line 2 has no text in 'text', but a number"),
        ('{"text": "ok"}\nno JSON', {}, "line 2 is not JSON"),
    ],
)  # fmt: skip
def test_mistakes_in_training_text_show_before_weights(
    folder: Path, train: str | None, recovery: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(folder, train, recovery)


def test_the_embedding_must_have_rows_for_what_lm_eval_begins_with(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(folder / "model")
    with pytest.raises(
        UserError, match=r"^evaluation.tasks: the tokenizer's token '<s>' has the id 257, but .* 257 rows"
    ):
        prepared(folder)
    assert list(prepared(folder, evaluation={"perplexity_windows": 2}).tasks.names) == []


def test_texts_are_read_before_the_model_is_located(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locating it may train the embedded model, or download one."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was located")

    monkeypatch.setattr(module, "locate", refuse)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        prepared(folder, "oops\n")


def test_a_tokenizer_that_loads_as_another_one_is_refused_before_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = byte_tokenizer()
    wrong = Qwen2TokenizerFast(tokenizer_object=right.backend_tokenizer, unk_token=None)
    wrong.backend_tokenizer.pre_tokenizer = Whitespace()
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: wrong)
    message = r"^model\.path=.*transformers saves the tokenizer, a Qwen2Tokenizer, and loads it as another one: for "
    for form in ("auto", "stock", "bundled"):
        with pytest.raises(UserError, match=message):
            prepared(folder, export={"format": form})
    for export in ({"enabled": False}, {"verify": "shapes"}):
        prepared(folder, export=export)


def test_a_tokenizer_whose_class_does_not_fit_its_file_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 30
    tokenizer.save_pretrained(folder / "model")
    prepared(folder)
    for text in ("gives other ids", "model of type", "sequence length is longer"):
        assert text not in caplog.text
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    values = json.loads((folder / "model" / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "model" / "tokenizer.json").write_text(json.dumps(values))
    prepared(folder)
    assert "transformers loads the tokenizer as a Qwen2Tokenizer, which gives other ids than its tokenizer.json" in (
        caplog.text
    )
