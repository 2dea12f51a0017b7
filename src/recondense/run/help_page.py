"""The page of --help: what the command does, examples, and the choices of every group."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from pathlib import Path

GROUPS = {
    "model": "what is compressed",
    "method": "how",
    "recovery": "how quality is recovered",
    "data": "texts for calibration, training and validation",
    "evaluation": "what is measured beside size and speed",
    "experiment": "settings of all groups under one name",
    "trainer": "processes and engines",
    "export": "the folder that other programs load",
    "logger": "where figures go",
    "callbacks": "what follows a training",
}
PAGE = """\
Condense a Mixture-of-Experts language model, then recover what was lost.

A command loads a model, decides from calibration texts what to remove, removes it, trains what remains, measures the
original, the compressed and the recovered model, and exports the result as a Hugging Face folder. The same command
finds its own folder again: it resumes what is unfinished, and prints what is done.

Usage: {program} [group=choice] [setting=value] [-m]

Examples:
  {program} experiment=demo                         a small model, trained here: nothing is downloaded
  {program} model=qwen_moe method=cdmoe             a published setting
  {program} model=mixtral plan_only=true            the sizes that it would have, without weights
  {program} model.path=FOLDER recovery=none         your own model, compressed and measured
  {program} -m method.num_layers=2,4,6 seed=0,1     a sweep: one search, six students, a table

Every setting of conf/ can be set: a word of a group chooses a file of it, `group.setting=value` changes one setting.
Add --cfg job to print all settings of a command, --info for where they come from, --hydra-help for Hydra's own options.

{groups}
All settings: docs/configuration.md, and the comments in conf/.\
"""


def help_page(folder: Path, program: str = "recondense") -> str:
    """Return the page.

    Args:
        folder: with the configs.
        program: the word that starts the command.
    """
    width = min(shutil.get_terminal_size((120, 40)).columns, 120)
    return PAGE.format(program=program, groups="\n".join(_group(folder, group, width) for group in GROUPS))


def _group(folder: Path, group: str, width: int) -> str:
    """Return a heading, and a line for each choice."""
    lines = [f"{group}: {GROUPS[group]}"]
    paths = sorted((folder / group).rglob("[!_]*.yaml"))
    names = [path.relative_to(folder / group).with_suffix("").as_posix() for path in paths]
    column = max(map(len, names)) + 2
    for name, path in zip(names, paths, strict=True):
        lines.append(
            f"  {name:{column}}{textwrap.shorten(_first_comment(path), width - column - 2, placeholder='...')}"
        )
    return "\n".join(lines) + "\n"


def _first_comment(path: Path) -> str:
    """Return the first sentence of a YAML's first comment."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].rstrip(".")
