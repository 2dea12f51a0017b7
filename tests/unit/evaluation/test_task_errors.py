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
from recondense.evaluation.task_data import invalid_text
from recondense.evaluation.task_errors import naming

FUNCTIONS = """
def no_documents(data):
    return data.select([])

def needs_key(data):
    return {}["testt"]

def fails(*arguments):
    raise ZeroDivisionError("division by zero")

def answers(document, results):
    return {"acc": 1.0}

def texts(document, results):
    return {"acc": "right"}

def lists(document, results):
    return {"acc": [1.0, 0.0]}

def more_metrics(document, results):
    return {"acc": 1.0, "more": "right"}

def no_metrics(document, results):
    return 1.0

def exits(*arguments):
    import sys
    sys.exit(3)

def empty(**arguments):
    raise StopIteration

def winogrande_text(doc):
    return doc["answer"]

def winogrande_target(doc):
    return doc["sentence"].split("_")[1].strip()

def winogrande_choice(doc):
    return [doc["sentence"].split("_")[0] + doc[option] for option in ("option1", "option2")]
"""
WINOGRANDE = {
    "doc_to_text": "!function functions.winogrande_text",
    "doc_to_target": "!function functions.winogrande_target",
    "doc_to_choice": "!function functions.winogrande_choice",
}
STREETS = [
    {"sentence": "The _ is wet today.", "option1": "street", "option2": "sun", "answer": answer}
    for answer in (0, 1, 1, 0)
]
GENERATES = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{q}}"}
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
        ({"test_split": "testt"}, "test_split is 'testt', but the dataset json has no such split. Its splits: test."),
        ({"test_split": None, "validation_split": "vall"}, "validation_split is 'vall', but the dataset json has no"),
        ({"num_fewshot": 2, "fewshot_split": "trainn"}, "fewshot_split is 'trainn', but the dataset json has no su"),
        ({"process_docs": function("needs_key")}, "my_task: there is no 'testt'."),
        ({"rows": [*ROWS, {**ROWS[0], "q": "a \ud800 b"}]}, "data.jsonl, line 7: the text is not valid Unicode, bec"),
        ({"rows": [*ROWS, {**ROWS[0], "c": ["\udc00", "b"]}]}, "data.jsonl, line 7: the text is not valid Unicode, "),
        ({"rows": [*ROWS, ["no object"]]}, "my_task: ArrowInvalid: JSON parse error: "),
        ({"doc_to_text": '{{q}} {{"\\ud800"}}'}, "document 0: the text is not valid Unicode, because \\ud800 alone is"),
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
        ({"filter_list": [{"name": "x", "filter": [{"function": "nonsense"}]}]}, ": Unknown filter 'nonsense'. Avail"),
        ({"num_fewshot": 2, "fewshot_split": "train"}, "my_task: "),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        ({"metric_list": [{"metric": "acc"}, {"metric": "nonsense"}]}, "lm-eval has no metric nonsense; name one"),
        ({"metric_list": [{"metric": "nonsense", "aggregation": "mean"}]}, "lm-eval has no metric nonsense; name"),
        ({**GENERATES, "metric_list": [{"metric": "no", "aggregation": "mean"}]}, "lm-eval has no metric no; name"),
        ({"metric_list": [{"metric": "a"}, {"metric": "b"}]}, "lm-eval has no metric a or b; name one of its own"),
        ({**GENERATES, "metric_list": [{"metric": "acc"}]}, "my_task: TypeError: "),
        ({**GENERATES, "metric_list": [{"metric": "acc_norm", "aggregation": "nanmean"}]}, "my_task: "),
        ({**GENERATES, "metric_list": [{"metric": "exact_match"}, {"metric": "brier_score"}]}, "my_task: "),
        ({**GENERATES, "metric_list": [{"metric": "acc", "aggregation": "median"}]}, "the metric acc are no numbers"),
        ({"doc_to_text": function("exits")}, "my_task: its code calls sys.exit(3)."),
        ({"doc_to_text": function("exits"), "functions": "raise SystemExit"}, "my_task: its code calls sys.exit()."),
        ({"process_docs": function("exits")}, "my_task: its code calls sys.exit(3)."),
        ({"custom_dataset": function("empty")}, "my_task: there are no documents in its data."),
        ({**WINOGRANDE, "rows": [*STREETS, {**STREETS[0], "answer": 7}]}, "document 4: doc_to_text gives 7."),
        ({**WINOGRANDE, "rows": [*STREETS, {**STREETS[0], "answer": None}]}, "doc_to_text gives None. Give the number"),
        ({"rows": []}, "my_task: there are no documents in its data."),
        ({"rows": [{"q": "a", "c": "text", "a": 0}]}, "my_task: "),
        ({"rows": [{"q": "a", "c": [], "a": 0}]}, "my_task: "),
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
    assert "\n" not in problem and "\\n" not in problem and len(problem) < 900


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    (folder / "data.jsonl").write_bytes((folder / "data.jsonl").read_bytes().replace(b"Number 5", b"\xed\xa0\x80"))
    [problem] = render(check_local_tasks(None, folder))
    assert f"my_task: {folder}/data.jsonl is not UTF-8 text (byte" in problem and "0xED, line 6)" in problem


def test_characters_of_two_halves_and_backslashes_are_text(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "q": "\U0001f600 and \\ud800"}]
    assert check_local_tasks(None, task_folder(tmp_path, rows=rows)) == []
    assert invalid_text({"dataset_kwargs": {"data_files": [str(tmp_path / "data.*"), "no/where"]}}) == ""


def test_a_task_without_mistakes(tmp_path: Path) -> None:
    assert check_local_tasks(None, task_folder(tmp_path)) == []
    assert check_local_tasks(["piqa"], tmp_path) == [], "lm-eval's tasks are not loaded"
    words = [{**row, "a": row["c"][row["a"]]} for row in ROWS]
    assert check_local_tasks(["my_task"], task_folder(tmp_path, rows=words)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {**WINOGRANDE, "rows": STREETS},
        {"process_results": function("answers"), "doc_to_target": "q"},
        {"process_results": function("fails")},
        {"metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_mutual_info", "brier_score", "f1")]},
        {"metric_list": None},
        {**GENERATES, "metric_list": [{"metric": name} for name in ("exact_match", "bleu", "chrf", "ter", "bypass")]},
        {**GENERATES, "doc_to_target": "c", "metric_list": [{"metric": "exact_match"}]},
        {**GENERATES, "metric_list": [{"metric": "exact_match"}], "repeats": 3, "filter_list": [
            {"name": "x", "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "majority_vote"},
                                     {"function": "take_first"}]}]},
        {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{q}}",
         "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
        {"output_type": "loglikelihood_rolling", "doc_to_choice": None, "doc_to_target": "{{q}}", "doc_to_text": "",
         "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    ],
)  # fmt: skip
def test_tasks_of_every_kind_are_accepted(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert check_local_tasks(None, task_folder(tmp_path, **changes)) == []
    assert not caplog.messages


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rows": [*ROWS, {**ROWS[0], "a": -1}]}, "1 of its first 7 documents have no answer (doc_to_target is -1)"),
        ({"rows": [{**row, "a": -1} for row in ROWS]}, "6 of its first 6 documents have no answer"),
        ({**WINOGRANDE, "rows": [*STREETS, {**STREETS[0], "answer": -1}]}, "have no answer (doc_to_text is -1)"),
        (
            {"metric_list": [{"metric": "acc"}, {"metric": "bleu"}]},
            "bleu is not measured in a task with output_type mult",
        ),
        ({"rows": [*ROWS, {**ROWS[0], "c": ["one"]}]}, "1 of its first 7 documents have a single choice"),
    ],
)
def test_a_document_without_a_question_is_a_warning(
    tmp_path: Path, changes: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert check_local_tasks(None, task_folder(tmp_path, **changes)) == []
    [message] = caplog.messages
    assert message.startswith("evaluation.tasks: my_task: ") and warning in message


def test_figures_and_errors_of_a_task_of_several_inputs(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    folder = task_folder(tmp_path, rows=STREETS, **WINOGRANDE)
    figures = run_tasks(qwen2_moe(vocab_size=len(tokenizer)), tokenizer, ["my_task"], include_path=folder)["my_task"]
    assert figures == {"acc": 0.5, "acc_stderr": pytest.approx(1 / 12**0.5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_results": function("fails")}, "ZeroDivisionError: division by zero"),
        ({"metric_list": [{"metric": "acc", "aggregation": function("fails"), "higher_is_better": True}],
          "process_results": function("answers")}, "ZeroDivisionError: division by zero"),
        ({"process_results": function("texts")}, "TypeError: "),
        ({"process_results": function("lists")}, "TypeError: "),
        ({"process_results": function("more_metrics")}, "TypeError: "),
        ({"process_results": function("no_metrics")}, "process_results gives 1.0, which is no object of metrics"),
        ({"process_results": function("exits")}, r"its code calls sys.exit\(3\)"),
    ],
)  # fmt: skip
def test_a_mistake_that_shows_after_the_evaluation(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tokenizer = byte_tokenizer()
    model = qwen2_moe(vocab_size=len(tokenizer))
    with pytest.raises(UserError, match=rf"evaluation\.tasks: my_task: {message}"):
        run_tasks(model, tokenizer, ["my_task"], include_path=task_folder(tmp_path, **changes), limit=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GENERATES | {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"max_gen_toks": 4}},
        {"output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}", "doc_to_text": "", "doc_to_choice": None,
         "metric_list": [{"metric": "word_perplexity"}]},
    ],
)  # fmt: skip
def test_a_token_without_a_row_of_the_embedding(tmp_path: Path, changes: dict[str, Any]) -> None:
    """In any kind of task: the embedding is not asked for it."""
    tokenizer = byte_tokenizer()
    model = qwen2_moe(vocab_size=len(tokenizer))
    tokenizer.add_tokens("Number")
    message = (
        r"^the prompts of evaluation.tasks: the tokenizer's token 'Number' has the id 257, .* only 257 rows .*; use"
    )
    with pytest.raises(UserError, match=message):
        run_tasks(model, tokenizer, ["my_task"], include_path=task_folder(tmp_path, **changes), limit=2)
    run_tasks(model, byte_tokenizer(), ["my_task"], include_path=tmp_path, limit=2)


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
