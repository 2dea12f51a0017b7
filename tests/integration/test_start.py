"""How a run starts: it reads its inputs before it deletes an old run, and resumes only with the same inputs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import arguments, config, model_folder, paper_tasks, step, text_files
from support.small import byte_tokenizer
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from recondense.config.schema import Config, from_dict
from recondense.errors import UserError
from recondense.models import loading
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.run import pipeline, tiny

Command = Callable[..., tuple[int, str]]


class Stop(Exception):
    pass


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def test_overwrite_never_deletes_what_the_run_reads(command: Command, tmp_path: Path) -> None:
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    half = ("method=cdmoe", "method.num_layers=[1]", "recovery=none", "callbacks.profile.enabled=false")
    code, err = command(*arguments(folder, texts, out, "half", *half))
    assert code == 0, err
    before = files(out / "half")
    code, err = command(*arguments(out / "half" / "model", texts, out, "half", *half, "overwrite=true"))
    assert code == 2 and f"overwrite=true would delete {out / 'half' / 'model'}. Choose another run_dir." in err
    assert files(out / "half") == before
    # Bad weights, then a bad line of the training text: both show only when the whole file is read.
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    lines = Path(texts["train"]).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:3]) + '{"other": 1}\n')
    distill = (*half[:2], "recovery=distill", "callbacks.profile.enabled=false", "overwrite=true")
    for model, train in ((broken, texts["train"]), (folder, str(tmp_path / "train.jsonl"))):
        code, err = command(*arguments(model, {**texts, "train": train}, out, "half", *distill))
        assert code == 2, err
        assert files(out / "half") == before, "the new run cannot start, so the old one stays"
    code, err = command(*arguments(folder, texts, out, "half", *distill))
    assert code == 0, err
    assert json.loads((out / "half" / "summary.json").read_text())["recovery"] == "distill"


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that stopped in the first of two recovery stages: one without a method, and one with a method."""
    base = tmp_path_factory.mktemp("stopped")
    model_folder(base / "model")
    text_files(base / "texts")
    paper_tasks(base / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecoveryModule, "training_step", _stop)
        for name, steps in (("none", []), ("searched", [step()])):
            with pytest.raises(Stop):
                pipeline.run(_settings(base, name), steps)
    return base


def _stop(*_: Any) -> Any:
    raise Stop


def _settings(base: Path, name: str) -> Config:
    stage = {"name": "sft", "steps": 1, "data": {"source": "texts", "train": {"path": str(base / "texts/more.jsonl")}}}
    write(base / "texts" / "more.jsonl", ["more text " * 20])
    return config(
        *(base / "model", text_files(base / "texts"), base / name),
        **{"objective": "finetune", "name": "finetune", "stages": [{"name": "first", "steps": 2}, stage]},
    )


def _other_weights(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(base / "model")


def _other_tokenizer(base: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("never seen in any text")])
    tokenizer.save_pretrained(base / "model")


def _other_text(name: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / "texts" / f"{name}.jsonl"
        path.write_text(path.read_text() + '{"text": "one more"}\n')

    return change


def _other_plan(base: Path) -> None:
    Plan("", step().outline(AutoModelForCausalLM.from_pretrained(base / "model"))).save(base / "model" / "plan.json")


@pytest.mark.parametrize(
    ("run", "change", "names"),
    [
        ("none", _other_weights, "model.path={0}/model (model.safetensors)"),
        ("none", _other_tokenizer, "model.path={0}/model (tokenizer.json)"),
        ("none", _other_text("train"), "data.train.path={0}/texts/train.jsonl"),
        ("none", _other_text("validation"), "data.validation.path={0}/texts/validation.jsonl"),
        ("none", _other_plan, "model.path={0}/model (plan.json)"),
        ("searched", _other_weights, "model.path={0}/model (model.safetensors)"),
        ("searched", _other_tokenizer, "model.path={0}/model (tokenizer.json)"),
        ("searched", _other_text("train"), "data.train.path={0}/texts/train.jsonl"),
    ],
)
def test_a_run_resumes_only_with_the_same_inputs(
    stopped_runs: Path, tmp_path: Path, run: str, change: Callable[[Path], None], names: str
) -> None:
    """Other inputs are refused and named, and the files of the run do not change."""
    copies = {name: tmp_path / name for name in ("model", "texts")}
    for name, path in copies.items():
        shutil.copytree(stopped_runs / name, path)
    before = files(stopped_runs / run / "run")
    steps = [step()] if run == "searched" else []
    settings = _settings(stopped_runs, run)
    change(stopped_runs)
    try:
        with pytest.raises(UserError) as error:
            pipeline.run(settings, steps)
    finally:
        for name, path in copies.items():
            shutil.rmtree(stopped_runs / name)
            shutil.copytree(path, stopped_runs / name)
    assert str(error.value) == (
        f"run_dir={stopped_runs / run / 'run'}: {names.format(stopped_runs)} changed since this run began; use "
        "overwrite=true to start over"
    )
    assert files(stopped_runs / run / "run") == before


def test_the_inputs_of_a_run_are_recorded(stopped_runs: Path) -> None:
    inputs = json.loads((stopped_runs / "searched" / "run" / "inputs.json").read_text())
    plan = Plan.load(stopped_runs / "searched" / "run" / "plan.json")
    assert {name: inputs[name] for name in ("weights", "calibration")}.items() <= plan.fingerprint.items()
    assert {"sft/train texts", "calibration texts", "tokenizer"} <= inputs.keys()


def test_results_of_unknown_inputs_are_refused(stopped_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped_runs / "none", stopped_runs / "lost")
    settings = _settings(stopped_runs, "lost")
    for content, message in ((None, r"results \(stages.* but no inputs.json"), ("[", "inputs.json is damaged")):
        (stopped_runs / "lost" / "run" / "inputs.json").unlink(missing_ok=True)
        if content is not None:
            (stopped_runs / "lost" / "run" / "inputs.json").write_text(content)
        with pytest.raises(UserError, match=message):
            pipeline.run(settings, [])


def test_a_teacher_and_task_files_are_inputs(
    stopped_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, teacher = paper_tasks(tmp_path / "tasks"), model_folder(tmp_path / "teacher")
    settings = _settings(stopped_runs, "taught").resolved()
    settings["recovery"] |= {"objective": "distill", "teacher": "model", "teacher_path": str(teacher), "stages": None}
    settings["evaluation"] |= {"include_path": str(tasks), "tasks": []}
    monkeypatch.setattr(RecoveryModule, "training_step", _stop)
    with pytest.raises(Stop):
        pipeline.run(from_dict(settings), [])
    file = next(tasks.glob("*.jsonl"))
    text = file.read_text()
    file.write_text(text + text)
    with pytest.raises(UserError, match=r"evaluation.include_path=.*jsonl.* changed since"):
        pipeline.run(from_dict(settings), [])
    file.write_text(text)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(teacher)
    with pytest.raises(UserError, match=f"teacher_path={teacher} .model.safetensors. changed since"):
        pipeline.run(from_dict(settings), [])


# --------------------------------------------------------------------------------------- texts before the weights


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", ["field", "empty", "all taken", "too few", "own"])
def test_texts_are_read_before_the_model(
    stopped_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, embedded: bool
) -> None:
    """They are also read before the embedded model is trained."""
    texts = {name: tmp_path / f"{name}.jsonl" for name in ("calibration", "train", "validation", "own")}
    for name, path in texts.items():
        write(path, [f"{name} {number}" for number in range(20)])
    values = _settings(stopped_runs, "unread").resolved()
    for name in ("calibration", "train", "validation"):
        values["data"][name]["path"] = str(texts[name])
    stage = values["recovery"]["stages"][1]
    stage["data"]["train"]["path"] = str(texts["own"])
    if kind in ("field", "own"):
        path = texts["train" if kind == "field" else "own"]
        path.write_text(path.read_text() + '{"words": "x"}\n')
    elif kind == "empty":
        write(texts["validation"], ["", ""])
    elif kind == "all taken":
        write(texts["train"], ["calibration 0", "validation 1"])
    else:
        values["data"]["calibration"]["num_samples"] = 21
    if embedded:
        values["model"] |= {"path": None, "pretrain": {"vocab_size": 8}}
    values["run_dir"] = str(tmp_path / "run")

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model comes first")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(tiny, "ensure", load)
    with pytest.raises(UserError, match=r"data\."):
        pipeline.run(from_dict(values), [step()])
    assert not (tmp_path / "run" / "config.yaml").exists(), "a run that cannot start leaves no config"


# ----------------------------------------------------------------------------------------------------- the upload


def test_the_same_command_tries_an_upload_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does nothing else, and does not upload twice."""
    uploads = []

    class Api:
        works = False

        def create_repo(self, *_: Any, **__: Any) -> None:
            if not self.works:
                raise OSError("the connection broke")

        def upload_folder(self, **_: Any) -> None:
            uploads.append(1)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "some token")
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    settings = ("method=cdmoe", "method.num_experts=2", "recovery=none", "export.push_to_hub=me/mine")
    push = arguments(folder, texts, out, "run", *settings, "callbacks.profile.enabled=false")
    code, err = command(*push)
    assert code == 2 and "the connection broke" in err and "run the same command again" in err
    before = files(out / "run")
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model is loaded again"))
    code, err = command(*push)
    assert code == 2 and "the connection broke" in err
    assert files(out / "run") == before and uploads == []
    Api.works = True
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed, monkeypatch.context() as patched:  # as `head` leaves it
        patched.setattr("sys.stdout", closed)
        code, err = command(*push)
    assert code == 0 and "Error" not in err, err
    assert uploads == [1]
    code, err = command(*push)
    assert code == 0 and uploads == [1], err
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["artifacts"].pop("hub") == "me/mine"
    earlier = json.loads(before["summary.json"])
    assert summary.pop("sha256") != earlier.pop("sha256") and summary == earlier


def test_an_upload_of_a_deleted_folder_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise OSError("no")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "some token")
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    settings = ("method=cdmoe", "method.num_experts=2", "recovery=none", "export.push_to_hub=me/mine")
    push = arguments(folder, texts, out, "run", *settings, "callbacks.profile.enabled=false")
    assert command(*push)[0] == 2
    shutil.rmtree(out / "run" / "model")
    code, err = command(*push)
    assert code == 2 and f"{out / 'run' / 'model'} no longer exists; run again with overwrite=true" in err
