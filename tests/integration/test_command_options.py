"""Hydra's options of the command: --cfg and --info, and overrides before and after options."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.refusals import assert_refused

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
