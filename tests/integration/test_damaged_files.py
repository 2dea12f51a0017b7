"""Every file that a run writes may be damaged: the result is the same, or one sentence names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.log_handlers import restore_loggers
from support.runs import config, model_folder, step, text_files

from recondense.config.schema import Config
from recondense.errors import UserError
from recondense.files import discard
from recondense.recovery.module import RecoveryModule
from recondense.run import pipeline


class Stop(Exception):
    """Stands for a kill."""


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"x"


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-3],
    "zeros": lambda content: bytes(len(content)),
    "one bit": _flip,
    "a list": lambda content: b"[]\n",
    "an object": lambda content: b"{}\n",
    "an object of objects": lambda content: b'{"weights": {}, "stages": {}, "operations": {}, "schema": 1}\n',
    "a text": lambda content: b'"text"\n',
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "deep": lambda content: b"[" * 100_000,
}
DAMAGES = (*CONTENTS, "a folder", "a link to itself", "a link to nothing")


def damage(path: Path, kind: str) -> None:
    """Damage a file."""
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind](path.read_bytes()))
        return
    path.unlink()
    if kind == "a folder":
        path.mkdir()
        (path / "inside").write_text("text")
    else:
        os.symlink(path.name if kind == "a link to itself" else "nowhere", path)


class Runs:
    """A run that is done and one that was interrupted in its recovery, with their caches; they can be put back."""

    def __init__(self, base: Path) -> None:
        self.base = base
        model_folder(base / "model")
        text_files(base / "texts")
        self.start("done")
        with pytest.MonkeyPatch.context() as patch:
            train = RecoveryModule.training_step

            def stop(module: RecoveryModule, *batch: Any) -> Any:
                if module.trainer.global_step == 3:
                    raise Stop
                return train(module, *batch)

            patch.setattr(RecoveryModule, "training_step", stop)
            with pytest.raises(Stop):
                self.start("stopped")
        for name in ("done", "stopped"):
            shutil.copytree(base / name, base / "before" / name, symlinks=True)

    def start(self, name: str) -> None:
        pipeline.run(self.config(name), [step()])

    def config(self, name: str) -> Config:
        return config(
            self.base / "model", text_files(self.base / "texts"), self.base / name, teacher="cached", teacher_top_k=8
        )

    def files(self, name: str) -> list[Path]:
        folder = self.base / "before" / name
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    def put_back(self, name: str) -> None:
        discard(self.base / name)
        shutil.copytree(self.base / "before" / name, self.base / name, symlinks=True)

    def result(self, name: str, *, before: bool = False) -> tuple[str, Any, dict[str, bytes]]:
        """The plan, the figures and the exported files of a run."""
        folder = self.base / ("before" if before else "") / name / "run"
        model = {path.name: path.read_bytes() for path in (folder / "model").iterdir() if path.name != "README.md"}
        summary = json.loads((folder / "summary.json").read_text())
        return (folder / "plan.json").read_text(), summary["stages"], model

    def check(self, name: str, file: Path, kind: str) -> str:
        """Damage a file and start again; return what was said, or `equal` if the result is that of the other run."""
        self.put_back(name)
        path = self.base / name / file
        damage(path, kind)
        try:
            self.start(name)
        except (UserError, OSError) as error:
            text = str(error)
            parts = {str(path), str(path.parent), str(self.base / name / "run" / path.name)}
            assert any(part in text for part in parts) or "run_dir" in text, f"{file}, {kind}: {text}"
            assert "\n" not in text, f"{file}, {kind}: {text}"
            return text
        if name == "stopped" or (not file.match("run/model/*") and file != Path("run/plan.json")):
            assert self.result(name) == self.result("done", before=True), f"{file}, {kind}"
        return "equal"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with restore_loggers():
        yield Runs(tmp_path_factory.mktemp("damaged"))


def test_the_files_of_the_runs_are_those_that_are_known(runs: Runs) -> None:
    """A new kind of file needs a place in these tests, which damage all files that are there."""
    done, stopped = (
        {str(path.parent if path.parts[0] == "cache" else path) for path in runs.files(name)}
        for name in ("done", "stopped")
    )
    assert {"run/config.yaml", "run/inputs.json", "run/plan.json", "run/summary.json", "run/logs/metrics.csv"} <= done
    assert {"run/stages/original.json", "run/stages/compressed.json", "run/checkpoints/final.ckpt"} <= done
    assert "run/checkpoints/step=2.ckpt" in stopped and "run/summary.json" not in stopped
    assert {path.split("/")[1] for path in done if path.startswith("cache/")} == {"search", "evaluations", "teacher"}


def _check_done(runs: Runs, pairs: list[tuple[Path, str]]) -> None:
    """Nothing but a few files is read again."""
    for file, kind in pairs:
        said = runs.check("done", file, kind)
        if file.name in ("summary.json", "inputs.json"):
            assert file.name in said, f"{file}, {kind}: {said}"
        elif file.match("run/model/*") and file.name != "README.md":
            assert file.name in said or "link" in kind, f"{file}, {kind}: {said}"
        elif file.parts[0] == "cache":
            assert said == "equal", f"{file}, {kind}: {said}"


def test_a_run_that_is_done(runs: Runs) -> None:
    """One damage for each file, and all for two; the slow test tries all."""
    kinds = list(DAMAGES)
    files = runs.files("done")
    pairs = [(file, kinds[number % len(kinds)]) for number, file in enumerate(files)]
    _check_done(runs, [*pairs, *((Path("run", name), k) for name in ("summary.json", "inputs.json") for k in kinds)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_of_a_run_that_is_done(runs: Runs, kind: str) -> None:
    _check_done(runs, [(file, kind) for file in runs.files("done")])


QUICK = {
    "run/inputs.json": "one bit", "run/plan.json": "an object", "run/stages/original.json": "an object",
    "run/stages/seconds.json": "a list", "run/checkpoints/step=2.ckpt": "zeros",
    "run/plan.png": "a folder", "run/.lock": "a folder",
}  # fmt: skip


def test_a_run_that_was_interrupted(runs: Runs) -> None:
    """One damage for each kind of file; the slow test tries all."""
    said = {file: runs.check("stopped", Path(file), kind) for file, kind in QUICK.items()}
    assert said["run/plan.png"] == "equal"
    assert (
        "Delete this file" in said["run/stages/original.json"]
        and "Delete this file" in said["run/checkpoints/step=2.ckpt"]
    )
    assert "Delete this file" in said["run/plan.json"] and "searched again" in said["run/plan.json"]
    assert "overwrite=true" in said["run/inputs.json"]


def test_damaged_entries_of_the_cache_are_made_again(runs: Runs) -> None:
    """With a warning for each, and the result of an intact cache."""
    kinds = list(DAMAGES)
    runs.put_back("done")
    shutil.rmtree(runs.base / "done" / "run")
    entries = [file for file in runs.files("done") if file.parts[0] == "cache" and not file.name.startswith(".")]
    for number, file in enumerate(entries):
        damage(runs.base / "done" / file, kinds[number % len(kinds)])
    runs.start("done")
    assert runs.result("done") == runs.result("done", before=True)
    after = {file: (runs.base / "done" / file).read_bytes() for file in entries if file.suffix != ".json"}
    assert all(content == (runs.base / "before" / "done" / file).read_bytes() for file, content in after.items())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_of_an_interrupted_run(runs: Runs, kind: str) -> None:
    for file in runs.files("stopped"):
        runs.check("stopped", file, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_of_a_cache(runs: Runs, kind: str) -> None:
    for file in runs.files("done"):
        if file.parts[0] == "cache":
            runs.put_back("done")
            shutil.rmtree(runs.base / "done" / "run")
            damage(runs.base / "done" / file, kind)
            runs.start("done")
            assert runs.result("done") == runs.result("done", before=True), f"{file}, {kind}"
