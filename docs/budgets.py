"""Write the table of default budgets in docs/methods.md: `python docs/budgets.py`, from the repository."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from recondense.config.problems import Problem
from recondense.config.schema import Config, from_dict
from recondense.errors import UserError
from recondense.models import families, model_classes
from recondense.plan import Plan
from recondense.report.operation_counts import operation_counts
from recondense.run.build_steps import build_steps
from recondense.run.model_checks import planned_config
from recondense.run.reachable_budget import reachable
from recondense.run.search_path import CONFIGS, initialize_hydra
from recondense.run.sizes import compare
from recondense.run.unknown_overrides import compose_run

PAGE = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- default budgets: written by docs/budgets.py -->", "<!-- end of the default budgets -->"
METHODS = ("cdmoe", "moei2", "cdmoe_moei2")
HEADINGS = (
    "`model=`",
    "`method=`",
    "memory",
    "routed experts kept",
    "layers",
    "experts per layer",
    "mean rank",
    "from",
)


def table() -> str:
    """Return a line for each model and method: what the command does to the model by default."""
    models = sorted(path.stem for path in (CONFIGS / "model").glob("[!_]*.yaml") if path.stem != "general")
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row(model, method) for model in models for method in METHODS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(name: str, method: str) -> list[str]:
    """Return the cells of a model and a method."""
    config = reachable(composed(f"model={name}", f"method={method}"))
    planned = planned_config(config.model, plan_only=True)
    facts = families.facts(planned)
    steps = build_steps(config.method)
    start = [f"`{name}`", f"`{method}`"]
    try:
        if problems := [problem for step in steps for problem in step.check(facts)]:
            raise UserError(problems[0])
        sizes = compare(model_classes.on_meta(planned), steps)
    except UserError as error:
        return [*start, f"refused: {str(error).removeprefix(f'method={method}: ').partition('.')[0]}", *[""] * 5]
    counts = operation_counts(Plan("", sizes.operations), facts.num_experts)
    return [
        *start,
        f"{sizes.after.total / sizes.before.total:.4f}",
        f"{sizes.after.routed_experts / sizes.before.routed_experts:.4f}",
        *(["the search decides", "", ""] if method == "cdmoe_moei2" else shape_cells(counts)),
        config.model.budgets["from"] if config.model.budgets["of_shape"] else "no published row",
    ]


def shape_cells(counts: dict[str, dict[str, float]]) -> list[str]:
    """Return the number of changed layers, the mean number of experts that they keep, and the mean rank of factors."""
    main = counts.get("condense") or counts.get("prune") or {}
    layers = int(max(count["layers"] for count in counts.values()))
    experts = f"{main['retained'] / main['layers']:.4g} of {main['of'] / main['layers']:.4g}" if main else ""
    if "fewest" in main:
        experts = f"mean {experts}"
    rank = f"{counts['factorize']['mean']:.4g}" if "factorize" in counts else ""
    return [f"{layers}", experts, rank]


def composed(*overrides: str) -> Config:
    """Return the config of a command, as the command composes it."""
    problems: list[Problem] = []
    arguments: Any = Namespace(config_path=None, config_dir=None, overrides=list(overrides))
    with initialize_hydra("train", arguments) as loader:
        values = compose_run("train", [*overrides, "plan_only=true"], loader, problems)
    assert values is not None and not problems
    return from_dict(values)


def written(text: str) -> str:
    """Return the text of the page with a new table."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
