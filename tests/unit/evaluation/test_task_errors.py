"""Mistakes in somebody's lm-eval tasks are sentences that name the task, before a model is loaded where possible."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.small import byte_tokenizer
from support.tiny_models import qwen2_moe

from recondense.config.problems import render
from recondense.errors import UserError
from recondense.evaluation.lm_eval import check_local_tasks, run_tasks
from recondense.evaluation.task_errors import naming

FUNCTIONS = """
def no_documents(data):
    return data.select([])

def fails(*arguments):
    raise ZeroDivisionError("division by zero")

def answers(document, results):
    return {"acc": 1.0}
"""
ROWS = [{"q": f"Number {number}", "c": ["one", "two", "three"], "a": number % 3} for number in range(6)]


def task_folder(folder: Path, rows: list[Any] | None = None, functions: str = FUNCTIONS, **changes: Any) -> Path:
    """Write a task of multiple choice, with some of its settings changed; None removes one."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    settings = {
        "task": "my_task", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "doc_to_text": "{{q}}", "doc_to_choice": "c", "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
        **changes,
    }  # fmt: skip
    text = yaml.safe_dump({name: value for name, value in settings.items() if value is not None})
    (folder / "task.yaml").write_text(re.sub(r"'(!function \S+)'", r"\1", text))
    (folder / "functions.py").write_text(functions)
    return folder


def function(name: str) -> Any:
    return f"!function functions.{name}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_split": "testt"}, "there is no 'testt'"),
        ({"test_split": None}, "my_task: "),
        ({"doc_to_text": "{{question}}"}, "'question' is undefined"),
        ({"doc_to_text": "{{q"}, "TemplateSyntaxError: "),
        ({"doc_to_text": "{{q | nonsense}}"}, "No filter named 'nonsense'"),
        ({"doc_to_text": "{{q.x.y}}"}, "UndefinedError: "),
        ({"doc_to_choice": "d"}, "my_task: "),
        ({"doc_to_choice": "{{q}}"}, "my_task: "),
        ({"doc_to_choice": "{{c[0]}}"}, "my_task: "),
        ({"doc_to_target": "{{b}}"}, "my_task: "),
        ({"doc_to_target": "{{a + 7}}"}, "my_task: "),
        ({"doc_to_target": "q"}, "doc_to_target gives 'Number 0', which is none of the choices."),
        ({"metric_list": [{"metric": "accuracyy"}]}, "my_task: "),
        ({"metric_list": [{"metric": "acc", "aggregation": "meann"}]}, "the metric acc has no aggregation."),
        ({"output_type": "multiple_choices"}, "my_task: "),
        ({"filter_list": [{"name": "x", "filter": [{"function": "nonsense"}]}]}, "my_task: "),
        ({"num_fewshot": 2, "fewshot_split": "train"}, "my_task: "),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        ({"rows": []}, "my_task: "),
        ({"rows": [{"q": "a", "c": "text", "a": 0}]}, "my_task: "),
        ({"rows": [{"q": "a", "c": ["one"], "a": 0}]}, "doc_to_choice gives ['one']. Give at least two texts."),
        ({"rows": [{"q": "a", "c": [1, 2], "a": 0}]}, "my_task: "),
        ({"rows": [*ROWS, {"q": "a", "c": ["x", "y"], "a": None}]}, "doc_to_target gives None."),
        ({"process_docs": function("fails")}, "ZeroDivisionError: division by zero"),
        ({"process_docs": function("no_documents")}, "my_task: "),
        ({"doc_to_text": function("fails")}, "ZeroDivisionError: division by zero"),
        ({"doc_to_text": function("missing")}, "my_task: "),
        ({"doc_to_text": function("fails"), "functions": "import not_installed"}, "No module named 'not_installed'"),
        ({"doc_to_text": function("fails"), "functions": "def fails("}, "my_task: "),
    ],
)
def test_a_mistake_is_found_without_a_model(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    [problem] = render(check_local_tasks(None, task_folder(tmp_path, **changes)))
    assert problem.startswith("evaluation.tasks: my_task: ") and message in problem
    assert "\n" not in problem and len(problem) < 900


def test_a_task_without_mistakes(tmp_path: Path) -> None:
    assert check_local_tasks(None, task_folder(tmp_path)) == []
    assert check_local_tasks(["piqa"], tmp_path) == [], "lm-eval's tasks are not loaded"
    words = [{**row, "a": row["c"][row["a"]]} for row in ROWS]
    assert check_local_tasks(["my_task"], task_folder(tmp_path, rows=words)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"process_results": function("fails")},
        {"metric_list": [{"metric": "acc", "aggregation": function("fails"), "higher_is_better": True}],
         "process_results": function("answers")},
    ],
)  # fmt: skip
def test_a_mistake_that_shows_after_the_evaluation(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    model = qwen2_moe(vocab_size=len(tokenizer))
    with pytest.raises(UserError, match=r"evaluation\.tasks: my_task: ZeroDivisionError: division by zero"):
        run_tasks(model, tokenizer, ["my_task"], include_path=task_folder(tmp_path, **changes), limit=2)


def test_an_error_of_the_model_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    model = qwen2_moe(vocab_size=len(tokenizer))

    def forward(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ZeroDivisionError, match="a defect of ours"):
        run_tasks(model, tokenizer, ["my_task"], include_path=task_folder(tmp_path), limit=2)


def test_errors_of_our_tasks_and_of_the_disk_keep_their_type() -> None:
    with pytest.raises(KeyError), naming("heldout_next_line"):
        raise KeyError("a defect of ours")
    with pytest.raises(OSError, match="No space left"), naming("my_task"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}", "doc_to_text": "", "doc_to_choice": None,
          "metric_list": [{"metric": "word_perplexity"}]}, False),
        ({"output_type": "generate_until", "doc_to_target": "{{q}}", "doc_to_choice": None,
          "metric_list": [{"metric": "exact_match"}]}, True),
    ],
)  # fmt: skip
def test_a_tokenizer_without_bos_and_eos(tmp_path: Path, changes: dict[str, Any], refused: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    model = qwen2_moe(vocab_size=len(tokenizer))
    folder = task_folder(tmp_path, **changes)
    if refused:
        with pytest.raises(UserError, match="my_task: the task generates text, but the tokenizer has no eos token"):
            run_tasks(model, tokenizer, ["my_task"], include_path=folder, limit=2)
    else:
        assert run_tasks(model, tokenizer, ["my_task"], include_path=folder, limit=2)["my_task"]
