"""The key of an evaluation: what can change its result, and nothing else; and a tokenizer's fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.heldout_texts import texts
from support.small import byte_tokenizer, small_model
from tokenizers import AddedToken

from recondense.config.schema import from_dict
from recondense.data.corpus import Corpora
from recondense.data.texts import Texts, Tokenizing
from recondense.errors import UserError
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS, NEXT_LINE, PERPLEXITY
from recondense.models.tokenizers import tokenizer_fingerprint
from recondense.run import measure
from recondense.run.measure import Evaluator, make_tasks

INPUTS = {"weights": "w", "tokenizer": "t"}


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`key(**evaluation)`: the name of the cache's entry for the original."""
    monkeypatch.setattr(Evaluator, "_evaluate", lambda *_: {})
    model, tokenizer = small_model(), byte_tokenizer()

    def name(
        text: str = "some words " * 20, inputs: Mapping[str, str] = INPUTS, length: int = 16, **evaluation: Any
    ) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        evaluation = {"name": "perplexity", "tasks": [], "perplexity_windows": None, **evaluation}
        settings = from_dict({"cache_dir": str(folder), "data": {"sequence_length": length}, "evaluation": evaluation})
        corpora = Corpora(validation=[text] if text else None)
        windows_NS = Tokenizing(Texts(corpora), tokenizer).tokens(settings, ()).validation
        tasks = make_tasks(settings, corpora.validation)
        evaluator = Evaluator.of_run(settings, tokenizer, windows_NS, tasks, inputs, lambda part: nullcontext())
        evaluator.evaluate_once(model, "original", None, [inputs["weights"]])
        [path] = (folder / "evaluations").glob("*.json")
        return path.stem

    return name


def test_what_cannot_change_a_result_is_not_in_the_key(key: Any) -> None:
    first = key()
    for same in ({"name": "tasks"}, {"every_n_steps": 5}, {"at_end": False}, {"limit": 3}, {"num_fewshot": 2}):
        assert key(**same) == first, same
    assert key(perplexity_windows=1000) == first, "there are fewer windows"
    assert key(inputs={**INPUTS, "tokenizer": "u"}) == first, "the windows are the same"
    tasks = {"tasks": ["some_task"], "limit": 3}
    assert key(**tasks, every_n_steps=5, at_end=False, name="x") == key(**tasks)


def test_what_may_change_a_result_is_in_the_key(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: dict[str, Any] = {"tasks": ["some_task"]}
    keys = [
        *(key(), key(text="other words " * 20), key(length=17), key(perplexity_windows=1), key(batch_size=3)),
        *(key(inputs={**INPUTS, "weights": "v"}), key(text=""), key(**tasks), key(**tasks, text="")),
        *(key(**tasks, limit=3), key(**tasks, num_fewshot=2), key(tasks=["other_task"])),
        key(**tasks, inputs={**INPUTS, "tokenizer": "u"}),
    ]
    for package in ("torch", "transformers", "lm-eval", "datasets"):
        with monkeypatch.context() as patched:
            patched.setattr(measure, "version", lambda name, package=package: "0" if name == package else "1")
            keys.append(key(**tasks))
    assert len(set(keys)) == len(keys)


def test_task_files_are_in_the_key(key: Any, tmp_path: Path) -> None:
    """Their content counts, and not their folder."""
    keys = []
    for number, content in enumerate(("a: 1", "a: 1", "a: 2")):
        folder = tmp_path / f"tasks-{number}"
        folder.mkdir()
        (folder / "task.yaml").write_text(content)
        keys.append(key(tasks=["some_task"], include_path=str(folder)))
    assert keys[0] == keys[1] != keys[2]


def test_a_tokenizers_fingerprint() -> None:
    first = tokenizer_fingerprint(byte_tokenizer())
    used = byte_tokenizer()
    used(["some text"], truncation=True, max_length=3)
    assert tokenizer_fingerprint(used) == first, "using it changes nothing"
    longer, chat, pad = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    longer.add_tokens([AddedToken("more")])
    chat.chat_template = "{{ messages }}"
    pad.pad_token = pad.eos_token
    assert len({first, *map(tokenizer_fingerprint, (longer, chat, pad))}) == 4


def test_a_default_task_that_cannot_be_made_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def tasks(validation: list[str] | None, *names: str) -> Any:
        evaluation = {"name": "heldout", "tasks": list(names)}
        return make_tasks(from_dict({"cache_dir": str(tmp_path), "evaluation": evaluation}), validation).names

    few = ["one text", "another text"]
    assert tasks(few, *HELDOUT_TASKS) == [PERPLEXITY]
    assert "too few lines, so these are not measured: heldout_next_line" in caplog.text
    assert tasks(few, "piqa", *HELDOUT_TASKS) == ["piqa", PERPLEXITY]
    assert tasks(few, PERPLEXITY) == [PERPLEXITY]
    assert tasks(None, *HELDOUT_TASKS, "piqa") == ["piqa"]
    assert tasks(texts(), *HELDOUT_TASKS) == list(HELDOUT_TASKS)
    with pytest.raises(UserError, match=r"too few lines for one question of heldout_next_line .*remove the task from"):
        tasks(few, NEXT_LINE)
