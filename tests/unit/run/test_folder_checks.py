"""The folders of a run: what an earlier run left in them, and whether they can be written."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recondense.config.problems import render
from recondense.config.schema import Config, RecoveryConfig, from_dict
from recondense.run import folder_checks
from recondense.run.folder_checks import OtherVersion, check_cache, check_run_folder, differences, stored_run


def messages(config: Config, stored: Config | OtherVersion | None) -> list[str]:
    return render(check_run_folder(config, stored))


def test_differences_name_dotted_settings() -> None:
    one = Config(seed=1, recovery=RecoveryConfig(steps=2)).identity()
    assert differences(one, Config().identity()) == ["recovery.steps", "seed"]
    assert differences({"method": {"refit": None}}, {"method": {}}) == ["method.refit"]


def test_the_run_folder_of_the_same_config_is_resumed(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    assert messages(config, None) == []
    (tmp_path / ".lock").touch()
    assert messages(config, None) == []
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert messages(config, config) == []
    other = dataclasses.replace(config, seed=3)
    assert "different: seed" in messages(other, config)[0]
    assert messages(dataclasses.replace(other, overwrite=True), config) == []


def _with(config: Config, ratio: float | None, **budgets: Any) -> Config:
    """The config with a ratio of its method; None leaves it out, as a version without this setting does."""
    method = {key: value for key, value in config.method.items() if key != "memory_ratio"}
    method |= {} if ratio is None else {"memory_ratio": ratio}
    return dataclasses.replace(config, method=method, model=dataclasses.replace(config.model, budgets=budgets))


@pytest.mark.parametrize("before", [None, 0.8])
@pytest.mark.parametrize("overrides", [[], ["method=reap"]], ids=str)
def test_a_default_that_has_changed_since_is_named_as_one(
    tmp_path: Path, before: float | None, overrides: list[str]
) -> None:
    method = {"name": "reap", "steps": ["reap"]}
    config = dataclasses.replace(Config(run_dir=str(tmp_path)), method=method)
    old = _with(config, before, used={"memory_ratio": before}, open=["memory_ratio"])
    new = _with(config, 0.7, used={"memory_ratio": 0.7}, open=["memory_ratio"])
    [message] = render(check_run_folder(new, old, overrides))
    assert message.endswith(
        "the folder contains a run of a version of recondense with other defaults (different: method.memory_ratio). "
        "Choose another run_dir, or set overwrite=true to replace that run."
    )
    new = dataclasses.replace(new, seed=2)
    [message] = render(check_run_folder(new, old, [*overrides, "seed=2"]))
    assert "a run with another config (different: seed). The defaults of its version of" in message
    assert "differ too (method.memory_ratio). Choose" in message


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (["seed=2", "recovery.steps=3"], ""),
        (["seed=2", "+recovery=none"], ""),
        (["experiment=demo"], ""),
        (["seed=2"], "This command does not set recovery.steps. That run does, or the defaults of its version of "),
        (["method=reap"], "This command does not set recovery.steps, seed. That run does, or the defaults of its "),
    ],
)
def test_settings_that_the_command_does_not_set(tmp_path: Path, overrides: list[str], more: str) -> None:
    """That run may have set them, as its config.yaml does not say what its command was."""
    config = Config(run_dir=str(tmp_path), seed=2, recovery=RecoveryConfig(steps=3))
    [message] = render(check_run_folder(config, Config(run_dir=str(tmp_path)), overrides))
    assert f"another config (different: recovery.steps, seed). {more or 'Choose another run_dir'}" in message


def test_a_run_resumes_with_another_engine(tmp_path: Path) -> None:
    """Checkpoints do not depend on the engine, so it is not part of a run's identity, as its processes are not."""
    one = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": "auto"}})
    (tmp_path / "config.yaml").write_text(one.to_yaml())
    for strategy in ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"):
        other = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": strategy, "devices": 2}})
        assert other.run_hash() == one.run_hash() and messages(other, one) == []
    other = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": "ddp", "precision": "bf16-true"}})
    assert "different: trainer.precision" in messages(other, one)[0]


Change = Callable[[Path, dict[str, Any]], None]


def _yaml(change: Callable[[dict[str, Any]], Any]) -> Change:
    def write(path: Path, values: dict[str, Any]) -> None:
        change(values)
        path.write_text(yaml.safe_dump(values))

    return write


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_yaml(lambda values: values.update(new_setting=1)), "config.yaml differs in new_setting)"),
        (_yaml(lambda values: values["recovery"].update(momentum=1)), "config.yaml differs in recovery.momentum)"),
        (_yaml(lambda values: values.update(seed=2**40)), "config.yaml differs in seed)"),
        (_yaml(lambda values: values["model"].update(dtype="float8")), "config.yaml differs in model.dtype)"),
        (_yaml(lambda values: values.pop("method")), "config.yaml is not valid)"),
        (lambda path, values: path.write_text(""), "config.yaml is not valid)"),
        (lambda path, values: path.write_text(path.read_text()[:70]), "config.yaml is not valid)"),
        (lambda path, values: path.write_bytes(b"\xff\xfe\x00"), "config.yaml is not valid)"),
        (lambda path, values: path.write_text("a: [\n"), "config.yaml is not valid)"),
        (lambda path, values: path.unlink(), "config.yaml is missing)"),
    ],
)
def test_a_run_of_another_version(tmp_path: Path, change: Change, reason: str) -> None:
    """It is told from a foreign folder, and overwrite=true starts anew in it."""
    config = Config(run_dir=str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    for name in ("inputs.json", "summary.json"):
        (tmp_path / name).write_text("{}")
    change(path, config.resolved())
    [message] = messages(config, stored_run(tmp_path))
    assert "contains a run of another version of recondense" in message and reason in message
    assert message.endswith("Choose another run_dir, or set overwrite=true to replace that run.")
    assert messages(dataclasses.replace(config, overwrite=True), stored_run(tmp_path)) == []


def test_a_setting_that_an_older_version_lacked(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    values = config.resolved()
    del values["metric"], values["recovery"]["validate_every"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert messages(config, stored_run(tmp_path)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "model: resnet\nlr: 0.1\n", "checkpoints": ""},
        {"config.yaml": "model: {a: 1}\nmethod: x\nrecovery: {}\n"},
        {"config.yaml": ""},
        {"config.yaml": "", "inputs.json": "{}", "thesis.tex": ""},
        {"inputs.json": "{}", "data.csv": ""},
        {"notes.txt": ""},
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_program_is_never_overwritten(
    tmp_path: Path, files: dict[str, str], overwrite: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    [message] = messages(Config(run_dir=str(tmp_path), overwrite=overwrite), stored_run(tmp_path))
    assert "the folder is not empty and contains no run of recondense. Choose another run_dir." in message


def make_run(folder: Path) -> Config:
    """Write what a run that has begun writes."""
    config = Config(run_dir=str(folder))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "inputs.json").write_text("{}")
    return config


def of_folder(**settings: Any) -> list[str]:
    config = Config(**settings)
    return messages(config, stored_run(config.run_folder()))


@pytest.mark.parametrize("place", ["stages/inner", "model", "work/a/b", "../link/stages/inner", "../to-stages/inner"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_run_is_inside_the_folder_of_another(tmp_path: Path, place: str, overwrite: bool) -> None:
    """Also through links into the other run's folder, and through links in it."""
    outer = tmp_path / "outer"
    make_run(outer)
    (tmp_path / "link").symlink_to(outer)
    (outer / "stages").mkdir()
    (tmp_path / "to-stages").symlink_to(outer / "stages")
    [message] = of_folder(run_dir=str(outer / place), overwrite=overwrite)
    assert f"among the results of another run, {outer}, " in message.replace(str(tmp_path / "link"), str(outer))
    assert message.endswith("Choose another run_dir.")
    assert of_folder(run_dir=str(outer), overwrite=overwrite) == of_folder(run_dir=str(tmp_path / "link")) == []
    assert of_folder(run_dir=str(tmp_path / "beside")) == []


def test_what_no_run_deletes_is_no_part_of_it(tmp_path: Path) -> None:
    """A folder of the user's in that of a run; and folders beside a copied config.yaml or somebody's inputs.json."""
    make_run(tmp_path / "outer")
    assert of_folder(run_dir=str(tmp_path / "outer" / "mine" / "a")) == []
    for name in ("config.yaml", "inputs.json"):
        (tmp_path / name).write_text(Config().to_yaml() if name == "config.yaml" else "{}")
        assert of_folder(run_dir=str(tmp_path / "stages" / "a")) == []
        (tmp_path / name).unlink()


def test_a_done_run_may_have_copies_of_its_files_in_its_export(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir()
    for name in ("config.yaml", "summary.json"):
        (tmp_path / "run" / "model" / name).write_text(config.to_yaml())
    assert len(of_folder(run_dir=str(tmp_path / "run"))) == 1
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert of_folder(run_dir=str(tmp_path / "run")) == []


def test_the_folder_of_an_experiment_can_be_a_run(tmp_path: Path) -> None:
    """As that of the demo, beside whose results the runs of its sweeps are."""
    make_run(tmp_path / "demo")
    assert of_folder(output_dir=str(tmp_path), experiment_name="demo") == []
    assert len(of_folder(output_dir=str(tmp_path / "demo"), experiment_name="stages")) == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["stages", "model/inner", "work/a/b"])
def test_a_run_inside_what_another_run_deletes_is_kept(tmp_path: Path, place: str, overwrite: bool) -> None:
    outer, link = tmp_path / "outer", tmp_path / "link"
    make_run(outer)
    link.symlink_to(outer)
    make_run(outer / place)
    for folder in (outer, link):
        [message] = of_folder(run_dir=str(folder), overwrite=overwrite)
        assert f"another run is in {folder / place}, where this run would delete it." in message


def test_what_no_run_deletes_may_be_a_run(tmp_path: Path) -> None:
    """A folder with another name, the target of a link, and the config.yaml of another program."""
    outer = tmp_path / "outer"
    make_run(outer)
    make_run(outer / "mine")
    make_run(tmp_path / "elsewhere")
    (outer / "stages").symlink_to(tmp_path / "elsewhere")
    (outer / "logs" / "wandb").mkdir(parents=True)
    (outer / "logs" / "wandb" / "config.yaml").write_text(Config().to_yaml())
    assert of_folder(run_dir=str(outer), overwrite=True) == []


def cache_messages(folder: Path | str) -> list[str]:
    return render(check_cache(Config(cache_dir=str(folder))))


def test_a_cache_that_can_be_written_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "cache" / "search").mkdir(parents=True)
    for folder in (tmp_path / "cache", tmp_path / "new" / "cache"):
        assert cache_messages(folder) == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "search"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "file: is a file; a folder is needed. Choose another cache_dir."),
        ("file/cache", "file cannot be written (Not a directory). Choose another cache_dir."),
        ("/proc/cache", "/proc cannot be written (No such file or directory). Choose another cache_dir."),
        ("/sys/kernel/cache", "/sys/kernel cannot be written ("),
        ("$SCRATCH/cache", "no shell has replaced $SCRATCH. Write double quotes, or ${oc.env:SCRATCH}."),
        ("link", "link: is a file; a folder is needed."),
    ],
)
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("file")
    [problem] = cache_messages(place)
    assert problem.startswith(f"cache_dir={place}: ") and message in problem


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["", "search", "evaluations"])
def test_a_part_of_the_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    """Read-only, another user's, or on a file system without room."""
    (tmp_path / name).mkdir(exist_ok=True)
    probe = folder_checks.probe_folder

    def fail(folder: Path) -> None:
        probe(folder)
        if folder == tmp_path / name:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_checks, "probe_folder", fail)
    [message] = cache_messages(tmp_path)
    assert f"{tmp_path / name} cannot be written ({os.strerror(code)}). Choose another cache_dir." in message
