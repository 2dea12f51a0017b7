"""A run that is done compares what it was made from, without weights, and needs none of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.log_handlers import restore_loggers
from support.refusals import assert_refused
from support.runs import arguments, config, model_folder, one_command, paper_tasks, step, text_files
from support.tiny_models import qwen2_moe

from recondense.config.schema import Config, from_dict
from recondense.errors import UserError
from recondense.run import pipeline

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that is done, with task files and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("model", "teacher"):
        model_folder(folder / name)
    paper_tasks(folder / "tasks")
    with restore_loggers():
        pipeline.run(_settings(folder), [step()])
        yield folder


def _settings(base: Path) -> Config:
    more = {"teacher": "model", "teacher_path": str(base / "teacher"), "steps": 1}
    settings = config(base / "model", text_files(base / "texts"), base / "out", **more).resolved()
    settings["evaluation"] |= {"include_path": str(base / "tasks"), "tasks": []}
    return from_dict(settings)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _other_weights(path: Path) -> None:
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})


CHANGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "weights": ("model/model.safetensors", _other_weights, "model.path={0}/model (model.safetensors)"),
    "config": ("model/config.json", lambda path: _edit(path, "{", '{"more": 1,'), "model.path={0}/model (config.json)"),
    "tokenizer": ("model/tokenizer.json", lambda path: _edit(path, "{", "{ "), "model.path={0}/model (tokenizer.json)"),
    "removed": ("model/generation_config.json", lambda path: path.unlink(), "(generation_config.json)"),
    "calibration": ("texts/calibration.jsonl", lambda path: path.write_text("x\n"), "data.calibration.path={0}"),
    "train": ("texts/train.jsonl", lambda path: path.write_bytes(path.read_bytes()[:-9]), "data.train.path={0}"),
    "validation": ("texts/validation.jsonl", lambda path: _edit(path, "e", "a"), "data.validation.path={0}"),
    "task": ("tasks/new.yaml", lambda path: path.write_text("task: new\n"), "include_path={0}/tasks (new.yaml)"),
    "teacher": ("teacher/model.safetensors", _other_weights, "recovery.teacher_path={0}/teacher (model.safetensors)"),
    "plan": ("out/run/plan.json", lambda path: _edit(path, '"layer": 1', '"layer": 0'), "out/run/plan.json"),
    "damaged plan": ("out/run/plan.json", lambda path: path.write_text("{}"), "out/run/plan.json"),
    "export": ("out/run/model/model.safetensors", _other_weights, "out/run/model/model.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_end_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    name, make, expected = CHANGES[change]
    path, before = base / name, tmp_path / "before"
    if path.exists():
        shutil.copy2(path, before)
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("weights are loaded"))
    make(path)
    try:
        with pytest.raises(UserError) as error:
            pipeline.run(_settings(base), [step()])
    finally:
        path.unlink(missing_ok=True)
        if before.exists():
            shutil.copy2(before, path)
    assert expected.format(base) in str(error.value)
    assert change == "damaged plan" or "changed since this run began; use overwrite=true" in str(error.value)
    pipeline.run(_settings(base), [step()])


@pytest.mark.parametrize("change", ["touched", "copied", "other files beside it"])
def test_what_changes_no_content_is_no_change(base: Path, tmp_path: Path, change: str) -> None:
    if change == "touched":
        for path in [*(base / "model").iterdir(), *(base / "texts").iterdir(), *(base / "out/run/model").iterdir()]:
            os.utime(path, (1, 1))
    elif change == "copied":
        shutil.copytree(base / "model", tmp_path / "copy", copy_function=shutil.copyfile)
        shutil.rmtree(base / "model")
        shutil.copytree(tmp_path / "copy", base / "model", copy_function=shutil.copyfile)
    else:
        (base / "model" / "notes.md").write_text("mine")
        (base / "model" / "results.json").write_text("{}")
        (base / "tasks" / "cache").mkdir(exist_ok=True)
        (base / "out" / "run" / "model" / "README.md").write_text("mine")
    pipeline.run(_settings(base), [step()])


def test_a_run_that_is_done_needs_no_inputs(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even to check the command; another command does."""
    settings = ("method=cdmoe", "method.num_experts=2", "recovery=none", "callbacks.profile.enabled=false")
    model, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    done = arguments(model, texts, out, "run", *settings)
    with one_command():
        code, err = command(*done)
        assert code == 0, err
        summary = json.loads((out / "run" / "summary.json").read_text())
        shutil.rmtree(model)
        Path(texts["calibration"]).unlink()
        code, err = command(*done)
        assert code == 0, err
        assert json.loads((out / "run" / "summary.json").read_text()) == summary
        assert_refused(*command(*done, "seed=3"), [str(out / "run")])
        assert_refused(*command(*done, "overwrite=true"), ["model.path"])
        (out / "run" / "summary.json").write_text("{}")
        assert_refused(*command(*done), [f"{out / 'run' / 'summary.json'} is damaged", "Delete this file"])
        (out / "run" / "config.yaml").write_text("seed: [")
        assert_refused(*command(*done), [str(out / "run")])


def _small_experts(**settings: Any) -> Any:
    return qwen2_moe(**settings, moe_intermediate_size=8)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (["method=cdmoe"], ["method.num_layers=1"]),  # the default is out of reach, and lowered
        (["method=cdmoe", "model=qwen_moe"], ["method.memory_ratio=0.75"]),
        (["method=reap", "method.memory_ratio=0.95"], ["model=general"]),
        (["method=reap", "run_dir=null"], ["model.budgets.default={memory_ratio: 0.7}"]),
        (["method=cdmoe", "run_dir=null"], ["method.num_experts=1"]),
    ],
)
def test_a_run_that_is_done_needs_no_model_for_its_defaults(
    settings: list[str], more: list[str], command: Command, tmp_path: Path
) -> None:
    """Neither for the choice of `model=`, nor for the budget that the method reaches."""
    model, texts, out = (
        model_folder(tmp_path / "model", _small_experts),
        text_files(tmp_path / "texts"),
        tmp_path / "out",
    )
    without = [text for text in arguments(model, texts, out, "run") if not text.startswith("model=")]
    done = [*without, "recovery=none", "callbacks.profile.enabled=false", *settings]
    with one_command():
        code, err = command(*done)
        assert code == 0, err
        [summary] = out.rglob("summary.json")
        shutil.rmtree(model)
        code, err = command(*done)
        assert code == 0, err
        assert_refused(*command(*done, *more), ["model.path"])
        assert [*out.rglob("summary.json")] == [summary]
