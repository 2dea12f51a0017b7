"""Perplexity, divergence from the original, and lm-eval's tasks on a live model."""

from __future__ import annotations

import json
import logging
import math
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from support.small import byte_tokenizer, small_model
from torch import nn
from transformers import Qwen2MoeForCausalLM

from recondense.config.problems import render
from recondense.data.stdlib import stdlib_corpora
from recondense.errors import UserError
from recondense.evaluation import lm_eval
from recondense.evaluation.heldout_tasks import CONTEXT_LINES, HELDOUT_TASKS, NEXT_LINE, PERPLEXITY, write_heldout_tasks
from recondense.evaluation.lm_eval import check_tasks, folder_tasks, run_tasks
from recondense.evaluation.perplexity import kl_divergence, perplexity
from recondense.run import inputs

WINDOWS = torch.randint(1, 257, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Qwen2MoeForCausalLM:
    return small_model()


# ----------------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_the_mean_over_predicted_tokens(model: Qwen2MoeForCausalLM, batch_size: int) -> None:
    found = perplexity(model, WINDOWS, batch_size)
    with torch.no_grad():
        expected = model(input_ids=WINDOWS, labels=WINDOWS).loss.item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found == {"loss": found["loss"], "perplexity": math.exp(found["loss"])}


def test_perplexity_does_not_depend_on_the_chunks(model: Qwen2MoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(model, WINDOWS, 4)
    monkeypatch.setattr("recondense.evaluation.perplexity.CHUNK_ELEMENTS", 3 * 257)
    assert perplexity(model, WINDOWS, 4)["loss"] == pytest.approx(whole["loss"], rel=1e-7)  # products of other sizes


def test_divergence_from_the_original(model: Qwen2MoeForCausalLM) -> None:
    other = small_model(seed=1)

    @contextmanager
    def original() -> Iterator[None]:
        """The same object with the other model's head and layers."""
        mine, model.model = model.model, other.model
        yield
        model.model = mine

    found = perplexity(model, WINDOWS, 2, reference=original, description="evaluating")
    assert found["loss"] == perplexity(model, WINDOWS, 2)["loss"]
    with torch.no_grad(), original():
        log_p = model(input_ids=WINDOWS).logits[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        log_q = model(input_ids=WINDOWS).logits[:, :-1].double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert expected > 0.1 and found["kl_to_original"] == pytest.approx(expected, rel=1e-5)


def test_a_model_is_at_no_distance_from_itself(model: Qwen2MoeForCausalLM) -> None:
    @contextmanager
    def original() -> Iterator[None]:
        yield

    assert perplexity(model, WINDOWS, 2, reference=original)["kl_to_original"] == 0.0


@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0, 30.0])
def test_kl_keeps_its_digits_however_small(change: float) -> None:
    generator = torch.Generator().manual_seed(0)
    original = 3 * torch.randn(64, 300, generator=generator)
    logits = original + change * torch.randn(64, 300, generator=generator)
    log_p, log_q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(
        kl_divergence(original, logits).double(), expected, rtol=2e-3 if change < 1e-3 else 1e-5, atol=0
    )


def test_kl_of_far_logits_is_finite() -> None:
    original = torch.tensor([[0.0, -200.0, 1.0], [0.0, 0.0, 0.0]])
    logits = torch.tensor([[-200.0, 0.0, -150.0], [0.0, 0.0, 0.0]])
    log_p, log_q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    torch.testing.assert_close(kl_divergence(original, logits).double(), (log_p.exp() * (log_p - log_q)).sum(-1))


def test_modes_of_modules_are_restored(model: Qwen2MoeForCausalLM) -> None:
    layer = model.model.layers[0]
    layer.train()
    before = [module.training for module in model.modules()]
    perplexity(model, WINDOWS[:1], 1)
    assert [module.training for module in model.modules()] == before and any(before) and not all(before)
    model.eval()


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_that_predict_nothing_are_refused(model: Qwen2MoeForCausalLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one window of two tokens"):
        perplexity(model, torch.zeros(shape, dtype=torch.long), 1)


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = small_model()
    nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(UserError, match="the mean loss over 75 tokens is nan"):
        perplexity(broken, WINDOWS, 4)


# -------------------------------------------------------------------------------------------------- held-out tasks


def texts(count: int = 8) -> list[str]:
    return [
        "".join(f"{'    ' * (line % 3)}value_{name} = compute(number, {line * 7919})\n\n" for line in range(30))
        for name in "abcdefgh"[:count]
    ]


def records(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def test_heldout_tasks_are_deterministic_and_left_alone(tmp_path: Path) -> None:
    assert write_heldout_tasks(tmp_path / "a", texts()) == list(HELDOUT_TASKS)
    write_heldout_tasks(tmp_path / "b", texts())
    for task in HELDOUT_TASKS:
        first, second = (tmp_path / folder / f"{task}.jsonl" for folder in "ab")
        assert first.read_bytes() == second.read_bytes()
        config = yaml.safe_load((tmp_path / "a" / f"{task}.yaml").read_text())
        assert config["task"] == task and config["dataset_path"] == "json"
        assert config["dataset_kwargs"]["data_files"]["test"] == str(first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    write_heldout_tasks(tmp_path / "a", texts())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    write_heldout_tasks(tmp_path / "a", texts(), seed=1)
    assert (tmp_path / "a" / f"{NEXT_LINE}.jsonl").read_bytes() != (tmp_path / "b" / f"{NEXT_LINE}.jsonl").read_bytes()


def test_questions_ask_for_the_line_that_follows(tmp_path: Path) -> None:
    documents = texts()
    write_heldout_tasks(tmp_path, documents, num_questions=50, num_choices=4)
    questions = records(tmp_path, NEXT_LINE)
    assert len(questions) == 50 and len({str(question) for question in questions}) == 50
    assert {question["label"] for question in questions} == {0, 1, 2, 3}
    joined = [document.replace("\n\n", "\n") for document in documents]
    for question in questions:
        context, choices, label = question["context"], question["choices"], question["label"]
        [home] = [text for text in joined if f"{context}\n{choices[label]}\n" in text]
        assert context.count("\n") == CONTEXT_LINES - 1
        assert len(set(choices)) == 4
        assert all(choice not in home for index, choice in enumerate(choices) if index != label)


def test_lines_that_say_little_or_repeat_are_not_asked_for(tmp_path: Path) -> None:
    documents = [text + "return None, None\nelse:\n'''\nx = 1234567890123\n" for text in texts()]
    write_heldout_tasks(tmp_path, documents)
    offered = {choice.strip() for question in records(tmp_path, NEXT_LINE) for choice in question["choices"]}
    assert all(line.startswith("value_") for line in offered)


def test_prose_is_wrapped_and_documents_are_cut(tmp_path: Path) -> None:
    rng = random.Random(0)
    documents = [
        " ".join(rng.choice(("sun", "moon", "star", "cloud")) + str(rng.random()) for _ in range(900)) for _ in "ab"
    ]
    write_heldout_tasks(tmp_path, documents, num_questions=5)
    assert len(records(tmp_path, NEXT_LINE)) == 5
    assert [len(record["text"]) for record in records(tmp_path, PERPLEXITY)] == [3000, 3000]
    write_heldout_tasks(tmp_path, ["line of text\n" * 400, *texts()], num_texts=9)
    cut = records(tmp_path, PERPLEXITY)[0]["text"]
    assert len(cut) <= 3000 and cut.endswith("line of text")


def test_texts_that_give_no_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 held-out texts have too few lines for one question .* 4 choices"):
        write_heldout_tasks(tmp_path, texts(1))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- lm-eval's tasks


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    corpus = stdlib_corpora().validation
    assert corpus is not None
    write_heldout_tasks(folder, corpus, num_questions=12, num_texts=3)
    return folder


@pytest.mark.parametrize("offline", [True, False])
def test_own_tasks_need_no_network(
    model: Qwen2MoeForCausalLM,
    own_tasks: Path,
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
    found = run_tasks(model, tokenizer, HELDOUT_TASKS, include_path=own_tasks)
    assert all(module.training for module in model.modules())
    model.eval()
    assert list(found) == list(HELDOUT_TASKS)
    assert set(found[PERPLEXITY]) == {"byte_perplexity", "bits_per_byte"}
    metrics = ["acc", "acc_norm", "acc_mutual_info"]
    assert sorted(found[NEXT_LINE]) == sorted([*metrics, *(f"{metric}_stderr" for metric in metrics)])
    assert all(isinstance(value, float) for metrics in found.values() for value in metrics.values())
    assert 0 <= found[NEXT_LINE]["acc"] <= 1
    # Nothing else has changed, and nothing was said.
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert tokenizer.pad_token is None and datasets.config.HF_HUB_OFFLINE is offline
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if not record.name.startswith("recondense")]
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_byte_perplexity_is_that_of_the_model(model: Qwen2MoeForCausalLM, tmp_path: Path) -> None:
    """One byte a token, so lm-eval's figure for a text that fits into the context is the model's own loss."""
    documents = [text[:400] for text in texts()]
    write_heldout_tasks(tmp_path, documents, num_texts=1)
    [record] = records(tmp_path, PERPLEXITY)
    found = run_tasks(model, byte_tokenizer(), [PERPLEXITY], include_path=tmp_path)[PERPLEXITY]
    ids = torch.tensor([[0, *byte_tokenizer()(record["text"])["input_ids"]]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert math.log(found["byte_perplexity"]) == pytest.approx(loss, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_tasks_run_in_the_callers_precision(model: Qwen2MoeForCausalLM, own_tasks: Path) -> None:
    def bits() -> float:
        return run_tasks(model, byte_tokenizer(), [PERPLEXITY], include_path=own_tasks, limit=1)[PERPLEXITY][
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


def test_tasks_of_a_folder(own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known without lm-eval's own list, which takes ten seconds to read."""
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
    assert folder_tasks([tmp_path, own_tasks]) == sorted(["linked", "one", "remote", *HELDOUT_TASKS])
    assert check_tasks(None, tmp_path) == check_tasks(["one", "both", "numbers"], tmp_path) == []
    manager = lm_eval._manager(["one", "remote", "linked"], tmp_path)
    assert lm_eval._on_disk(manager, ["one"])
    assert not lm_eval._on_disk(manager, ["one", "remote"]) and not lm_eval._on_disk(manager, ["linked"])


def test_what_decides_a_folders_results(tmp_path: Path) -> None:
    for name in ("a.yaml", "deep/b.jsonl", "utils.py", "cache/json/info.json", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in inputs.deciding_files(tmp_path)]
    assert found == ["a.yaml", "deep/b.jsonl", "utils.py"]


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
