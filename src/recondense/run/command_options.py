"""The options of a command, those of Hydra's parser: where they stand, and which exclude each other."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from recondense.errors import ConfigError

INSTEAD = ("run", "multirun", "cfg", "info", "shell_completion")  # Hydra does one of them


def options_first(words: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Return the words of a command with its overrides in one piece, as Hydra's parser wants them."""
    args, others = parser.parse_known_args(words)
    if not others or any(word.startswith("-") for word in others):
        return list(words)
    options = list(words)
    for override in (*args.overrides, *others):
        options.remove(override)
    return [*options, *args.overrides, *others]


def check_options(args: Namespace) -> None:
    """Check the options of a command.

    Raises:
        ConfigError: options that exclude each other.
    """
    given = [f"--{option.replace('_', '-')}" for option in INSTEAD if getattr(args, option)]
    if len(given) > 1:
        raise ConfigError([f"{' '.join(given)}: only one of these options can be given."])
    if args.resolve and not args.cfg:
        raise ConfigError(["--resolve: is only for --cfg."])
