"""lm-eval's tasks on a live model: without a network, and without side effects."""

from __future__ import annotations

import json
import logging
import math
import random
import socket
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from support.heldout_texts import records, texts
from support.small import byte_tokenizer, small_model
from transformers import Qwen2MoeForCausalLM

from recondense.config.problems import render
from recondense.data.stdlib import stdlib_corpora
from recondense.evaluation import lm_eval, task_limits
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS, NEXT_LINE, PERPLEXITY, write_heldout_tasks
from recondense.evaluation.lm_eval import check_tasks, folder_tasks, run_tasks


@pytest.fixture(scope="module")
def model() -> Qwen2MoeForCausalLM:
    return small_model()


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    corpus = stdlib_corpora().validation
    assert corpus is not None
    write_heldout_tasks(folder, corpus, num_questions=12, num_texts=3)
    return folder


@pytest.mark.parametrize("offline", [True, False])
def test_heldout_tasks_need_no_network(
    model: Qwen2MoeForCausalLM,
    tasks_folder: Path,
    offline: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a look-up over the network")

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", offline)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    state, tokenizer = random.getstate(), byte_tokenizer()
    torch_state = torch.get_rng_state()
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    model.train()
    results = run_tasks(model, tokenizer, HELDOUT_TASKS, include_path=tasks_folder)
    assert all(module.training for module in model.modules())
    model.eval()
    assert list(results) == list(HELDOUT_TASKS)
    assert set(results[PERPLEXITY]) == {"byte_perplexity", "bits_per_byte"}
    metrics = ["acc", "acc_norm", "acc_mutual_info"]
    assert sorted(results[NEXT_LINE]) == sorted([*metrics, *(f"{metric}_stderr" for metric in metrics)])
    assert all(isinstance(value, float) for metrics in results.values() for value in metrics.values())
    assert 0 <= results[NEXT_LINE]["acc"] <= 1
    # Nothing else has changed, and nothing was printed.
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert tokenizer.pad_token is None and datasets.config.HF_HUB_OFFLINE is offline
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if not record.name.startswith("recondense")]
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_byte_perplexity_is_that_of_the_model(model: Qwen2MoeForCausalLM, tmp_path: Path) -> None:
    """A token is one byte, so lm-eval's figure for a text that fits into the context is the model's loss."""
    documents = [text[:400] for text in texts()]
    write_heldout_tasks(tmp_path, documents, num_texts=1)
    [record] = records(tmp_path, PERPLEXITY)
    metrics = run_tasks(model, byte_tokenizer(), [PERPLEXITY], include_path=tmp_path)[PERPLEXITY]
    ids = torch.tensor([[0, *byte_tokenizer()(record["text"])["input_ids"]]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert math.log(metrics["byte_perplexity"]) == pytest.approx(loss, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_tasks_run_in_the_callers_precision(model: Qwen2MoeForCausalLM, tasks_folder: Path) -> None:
    def bits() -> float:
        return run_tasks(model, byte_tokenizer(), [PERPLEXITY], include_path=tasks_folder, limit=1)[PERPLEXITY][
            "bits_per_byte"
        ]

    with torch.autocast("cpu", torch.bfloat16):
        rounded = bits()
    assert bits() == bits() != rounded
    assert rounded == pytest.approx(bits(), rel=0.05)


def test_unknown_tasks_are_named_with_the_nearest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Index:
        all_tasks = ("arc_challenge", "arc_easy", "piqa")

    monkeypatch.setattr(lm_eval, "_all_tasks", lambda folders: Index())
    assert check_tasks(["piqa", *HELDOUT_TASKS]) == []
    problems = render(check_tasks(["arc_chalenge", "piqa", "zzzz", "heldout_next_lines"]))
    assert len(problems) == 3
    assert "no task 'arc_chalenge'; did you mean arc_challenge?" in problems[0]
    assert "'zzzz'" in problems[1] and "did you mean" not in problems[1]
    assert "did you mean heldout_next_line" in problems[2]
    with pytest.raises(ValueError, match="no task 'zzzz'"):
        run_tasks(small_model(), byte_tokenizer(), ["zzzz"])


def test_tasks_of_a_folder(tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known without reading lm-eval's list of tasks, which takes ten seconds."""
    monkeypatch.setattr(lm_eval, "_all_tasks", lambda folders: pytest.fail("lm-eval's list was read"))
    for name, content in {
        "one": {"task": "one", "tag": "numbers", "dataset_path": "json"},
        "remote": {"task": "remote", "dataset_path": "somebody/questions"},
        "linked": {"task": "linked", "dataset_path": "json", "dataset_kwargs": {"data_files": "https://x.org/a.json"}},
        "both": {"group": "both", "task": ["one", "remote"]},
        "_base": {"test_split": "test"},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert folder_tasks(tmp_path) == ["linked", "one", "remote"]
    assert folder_tasks([tmp_path, tasks_folder]) == sorted(["linked", "one", "remote", *HELDOUT_TASKS])
    assert check_tasks(None, tmp_path) == check_tasks(["one", "both", "numbers"], tmp_path) == []
    manager = lm_eval._manager(["one", "remote", "linked"], tmp_path)
    assert lm_eval._on_disk(manager, ["one"])
    assert not lm_eval._on_disk(manager, ["one", "remote"]) and not lm_eval._on_disk(manager, ["linked"])


def test_the_tasks_of_a_group_share_the_total_limit(
    model: Qwen2MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group with a group of two tasks, a tag of two tasks, and a task with few examples."""
    monkeypatch.setattr(lm_eval, "_all_tasks", lambda folders: lm_eval._local_tasks(folders))
    metrics = [{"metric": "count", "aggregation": "!function functions.total", "higher_is_better": True}]
    for name, size in {"one": 9, "two": 9, "three": 9, "four": 9, "five": 2}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(size)))
        content = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "none",
            "doc_to_target": "text", "process_results": "!function functions.count", "metric_list": metrics,
        }  # fmt: skip
        content |= {"tag": "tagged"} if name in ("three", "four") else {}
        text = yaml.safe_dump(content).replace("'", "")
        (tmp_path / f"{name}.yaml").write_text(text)
    functions = (
        "def count(document, results):\n    return {'count': 1}\n\n\ndef total(counts):\n    return sum(counts)\n"
    )
    (tmp_path / "functions.py").write_text(functions)
    for name, parts in {"inner": ["one", "two"], "outer": ["inner"]}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": parts}))
    manager = lm_eval._local_tasks(tmp_path)
    names = ["outer", "tagged", "five"]
    loaded = lm_eval._load(manager, names)
    for limits, sizes in {
        (None, 7): (3, 3, 3, 3, 2), (2, 7): (2, 2, 2, 2, 2), (0.5, 20): (5, 5, 5, 5, 1)
    }.items():  # fmt: skip
        samples = task_limits.limits(manager, loaded, names, *limits)["samples"]
        assert [samples[name] for name in ("one", "two", "three", "four", "five")] == [[*range(n)] for n in sizes]
    for order in (["tagged", "three"], ["three", "tagged"]):  # what is named has its whole share
        samples = task_limits.limits(manager, lm_eval._load(manager, order), order, None, 8)["samples"]
        assert {name: len(numbers) for name, numbers in samples.items()} == {"three": 8, "four": 4}
    single = lm_eval._load(manager, ["one", "five"])
    assert task_limits.limits(manager, single, ["one", "five"], 5, 7) == {"limit": 5}
    assert task_limits.limits(manager, loaded, names, None, 1) == {"limit": 1}
    results = run_tasks(model, byte_tokenizer(), ["three", "five"], include_path=tmp_path, total_limit=7)
    assert {name: metrics["count"] for name, metrics in results.items()} == {"three": 7, "five": 2}


def test_names_and_numbers_of_results() -> None:
    metrics = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact,strict": 1,
        "n,none": math.nan,
        "flag,none": True,
    }
    assert lm_eval._numbers(metrics) == {"acc": 0.5, "exact_strict": 1.0}
