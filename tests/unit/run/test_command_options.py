"""Options may stand anywhere among the overrides."""

from __future__ import annotations

import pytest
from hydra._internal.utils import get_args_parser

from recondense.run.command_options import options_first


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a=1 -m b=2", "-m a=1 b=2"),
        ("a=1 --config-name own b=2 -m c=3", "--config-name own -m a=1 b=2 c=3"),
        ("-m a=1 b=2", "-m a=1 b=2"),
        ("a=1 b=2 -m", "a=1 b=2 -m"),
        ("a=1 --unknown b=2", "a=1 --unknown b=2"),
        ("", ""),
    ],
)
def test_overrides_are_put_together(words: str, expected: str) -> None:
    assert options_first(words.split(), get_args_parser()) == expected.split()
