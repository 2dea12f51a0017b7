"""Hydra's options of the command: --cfg and --info, and overrides before and after options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.refusals import assert_refused
from support.runs import arguments, model_folder, text_files

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--cfg", "job", "method=foo"], ["recondense: method=foo: there is no such method. Choices: "]),
        (["--cfg", "all", "recovery.stepz=4", "metod=x"], ["2 problems", "Did you mean recovery.steps?"]),
        (["--info", "config", "method=cdmoee"], ["Did you mean cdmoe?"]),
        (["--cfg", "job", "--resolve", "seed=${foo}"], ["seed=${foo}: cannot be resolved"]),
        (["--cfg", "job", "-m"], ["recondense: --multirun --cfg: only one of these options"]),
        (["--resolve"], ["recondense: --resolve: is only for --cfg."]),
    ],
)
def test_what_only_shows_settings_is_refused_alike(command: Command, words: list[str], parts: list[str]) -> None:
    assert_refused(*command(*words), parts)


def test_wrong_and_missing_values_are_shown(command: Command) -> None:
    assert command("--cfg", "job", "evaluation=local", "seed=${foo}", "recovery.steps=many") == (0, "")


def test_overrides_before_and_after_options(command: Command) -> None:
    code, err = command("method=reap", "-m", "method.memory_ratio=0.05,0.06", "--config-name=train", "recovery=none")
    assert_refused(code, err, ["recondense: 2 problems", "method.memory_ratio=0.05", "method.memory_ratio=0.06"])


@pytest.mark.parametrize("sweep", [False, True])
def test_a_value_from_the_environment_as_the_message_says(
    command: Command, as_one_command: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sweep: bool
) -> None:
    monkeypatch.setenv("SEED", "3")
    code, error = command("seed=${oc.env:SEED}", "method=none", "recovery=none")
    remedy = error.partition("write '")[2].partition("'.")[0]
    assert code == 2 and remedy == 'seed="${oc.decode:${oc.env:SEED}}"'
    quick = ("recovery=none", "evaluation=none", "export.enabled=false", "callbacks.profile.enabled=false", remedy)
    words = arguments(model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path, "run", *quick)
    if sweep:
        words = ["-m", *(word for word in words if not word.startswith("run_dir=")), "method.num_experts=1,2"]
    code, error = command(*words, "method.num_layers=1")
    assert code == 0, error
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("**/config.yaml")]
    assert [config["seed"] for config in configs if "seed" in config] == [3] * (1 + sweep)
