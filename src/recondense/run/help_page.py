"""The page that --help prints: what the command does, examples, and the choices of every group."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from pathlib import Path

GROUPS = {
    "model": "the model to compress",
    "method": "how to compress it",
    "recovery": "how to recover its quality",
    "data": "texts for calibration, training and validation",
    "evaluation": "what to measure in addition to size and speed",
    "experiment": "settings of several groups under one name",
    "trainer": "processes and engines",
    "export": "the folder for other programs",
    "logger": "where to log figures",
    "callbacks": "what to do during a training",
}
PAGE = """\
Condense a Mixture-of-Experts language model, then recover what was lost.

The command loads a model, decides from calibration texts what to remove, removes it, and trains the rest. It evaluates
the original, the compressed and the recovered model, and exports the result as a Hugging Face folder. If you repeat a
command, it resumes an unfinished run or prints the results of a finished one.

Usage: {program} [group=choice] [setting=value] [-m]

Examples:
  {program} experiment=demo                         a small model that is trained first, without a download
  {program} model=qwen_moe method=cdmoe             nine of the 24 MoE layers, then distillation
  {program} model=mixtral plan_only=true            only the sizes, computed without weights
  {program} model.path=FOLDER recovery=none         your own model, compressed and evaluated
  {program} -m method.num_layers=2,4,6 seed=0,1     a sweep: one search, six runs, one table

`group=choice` selects a file of conf/, and `group.setting=value` changes one setting. Add --cfg job to print all
settings of a command, --info to print where they come from, and --hydra-help to print the options of Hydra.

{groups}
All settings: docs/configuration.md, and the comments in conf/.\
"""


def help_page(folder: Path, program: str = "recondense") -> str:
    """Return the help page, wrapped to the terminal's width.

    Args:
        folder: folder of the configs.
        program: name of the command, for the examples.
    """
    width = min(shutil.get_terminal_size((120, 40)).columns, 120)
    return PAGE.format(program=program, groups="\n".join(_group(folder, group, width) for group in GROUPS))


def _group(folder: Path, group: str, width: int) -> str:
    """Return the heading of a group and a line for each of its choices."""
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
    """Return the first sentence of the first comment in a YAML file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].rstrip(".")
