"""How a run starts: what it reads is read before the old run goes, and is the same each time it goes on."""

from __future__ import annotations

import json
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
    # The weights, then a line of the training text; what is wrong with either is only seen when all of it is read.
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    lines = Path(texts["train"]).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:3]) + '{"other": 1}\n')
    distill = (*half[:2], "recovery=distill", "callbacks.profile.enabled=false", "overwrite=true")
    for model, train in ((broken, texts["train"]), (folder, str(tmp_path / "train.jsonl"))):
        code, err = command(*arguments(model, {**texts, "train": train}, out, "half", *distill))
        assert code == 2, err
        assert files(out / "half") == before, "the new run cannot begin, so the old one stays"
    code, err = command(*arguments(folder, texts, out, "half", *distill))
    assert code == 0, err
    assert json.loads((out / "half" / "summary.json").read_text())["recovery"] == "distill"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of no method that was stopped in its recovery, the first stage of two, and one of a method."""
    base = tmp_path_factory.mktemp("begun")
    model_folder(base / "model")
    text_files(base / "texts")
    paper_tasks(base / "tasks")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RecoveryModule, "training_step", _stop)
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
        ("none", _other_weights, "the weights"),
        ("none", _other_tokenizer, "the tokenizer"),
        ("none", _other_text("train"), "the train texts"),
        ("none", _other_text("validation"), "the validation texts"),
        ("none", _other_plan, "the plan.json of the model"),
        ("searched", _other_weights, "the weights"),
        ("searched", _other_tokenizer, "the tokenizer"),
        ("searched", _other_text("train"), "the train texts"),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(
    begun: Path, tmp_path: Path, run: str, change: Callable[[Path], None], names: str
) -> None:
    """Other inputs are refused and named, whatever they are used for; with the old ones it goes on."""
    kept = {name: tmp_path / name for name in ("model", "texts")}
    for name, path in kept.items():
        shutil.copytree(begun / name, path)
    before = files(begun / run / "run")
    steps = [step()] if run == "searched" else []
    settings = _settings(begun, run)
    change(begun)
    try:
        with pytest.raises(UserError) as error:
            pipeline.run(settings, steps)
    finally:
        for name, path in kept.items():
            shutil.rmtree(begun / name)
            shutil.copytree(path, begun / name)
    assert str(error.value) == (
        f"run_dir={begun / run / 'run'}: {names} changed since this run began; overwrite=true starts it anew"
    )
    assert files(begun / run / "run") == before


def test_the_other_inputs_are_kept_too(begun: Path) -> None:
    inputs = json.loads((begun / "searched" / "run" / "inputs.json").read_text())
    plan = Plan.load(begun / "searched" / "run" / "plan.json")
    assert {name: inputs[name] for name in ("weights", "calibration")}.items() <= plan.fingerprint.items()
    assert {"sft/train texts", "calibration texts", "tokenizer"} <= inputs.keys()


def test_results_of_unknown_inputs_are_refused(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "none", begun / "lost")
    settings = _settings(begun, "lost")
    for content, message in ((None, r"results \(stages.* and no inputs.json"), ("[", "inputs.json: cannot be read")):
        (begun / "lost" / "run" / "inputs.json").unlink(missing_ok=True)
        if content is not None:
            (begun / "lost" / "run" / "inputs.json").write_text(content)
        with pytest.raises(UserError, match=message):
            pipeline.run(settings, [])


def test_a_teacher_and_task_files_are_inputs(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher is loaded when its stage begins, and compared then."""
    tasks, teacher = paper_tasks(tmp_path / "tasks"), model_folder(tmp_path / "teacher")
    settings = _settings(begun, "taught").resolved()
    settings["recovery"] |= {"objective": "distill", "teacher": "model", "teacher_path": str(teacher), "stages": None}
    settings["evaluation"] |= {"include_path": str(tasks), "tasks": []}
    monkeypatch.setattr(RecoveryModule, "training_step", _stop)
    with pytest.raises(Stop):
        pipeline.run(from_dict(settings), [])
    file = next(tasks.glob("*.jsonl"))
    text = file.read_text()
    file.write_text(text + text)
    with pytest.raises(UserError, match="the task files changed since"):
        pipeline.run(from_dict(settings), [])
    file.write_text(text)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(teacher)
    with pytest.raises(UserError, match=f"the weights of the teacher {teacher} changed since"):
        pipeline.run(from_dict(settings), [])


# --------------------------------------------------------------------------------------- texts before the weights


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", ["field", "empty", "all taken", "too few", "own"])
def test_texts_are_read_before_the_model(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, embedded: bool
) -> None:
    """Also before the embedded model is trained."""
    texts = {name: tmp_path / f"{name}.jsonl" for name in ("calibration", "train", "validation", "own")}
    for name, path in texts.items():
        write(path, [f"{name} {number}" for number in range(20)])
    values = _settings(begun, "unread").resolved()
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
    assert not (tmp_path / "run" / "config.yaml").exists(), "a run that could not begin leaves nothing that binds it"


# ----------------------------------------------------------------------------------------------------- the upload


def test_the_same_command_tries_an_upload_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does nothing else; what has been uploaded is not uploaded again."""
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
    assert code == 2 and "the connection broke" in err and "the same command uploads it" in err
    before = files(out / "run")
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("nothing is done anew"))
    code, err = command(*push)
    assert code == 2 and "the connection broke" in err
    assert files(out / "run") == before and uploads == []
    Api.works = True
    for _ in range(2):
        code, err = command(*push)
        assert code == 0, err
    assert uploads == [1]
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["artifacts"].pop("hub") == "me/mine"
    assert summary == json.loads(before["summary.json"])


def test_an_upload_of_what_is_gone_is_refused(
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
    assert code == 2 and f"{out / 'run' / 'model'} is no longer there; overwrite=true makes it again" in err
