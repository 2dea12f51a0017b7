"""A run's scores beside those that the papers published: means over a paper's tasks, and the rows nearest to a run.

Mean: of each task acc_norm where lm-eval has it (arc_challenge, arc_easy, hellaswag, openbookqa, piqa), else acc
(boolq, mmlu, rte, winogrande); every task weighs the same. CD-MoE's scores of DeepSeekMoE-16B, task by task, are
those: 77.4 on HellaSwag and 44.2 on OpenBookQA are acc_norm. MoE-I² does not say; the same is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recondense.report.published import (
    CDMOE,
    MODELS,
    MOEI2,
    PAPER_TASKS,
    PAPER_TITLES,
    Model,
    Result,
    find,
    published_model,
)

KINDS = {"drop_moe": "layer_drop", "drop_layer": "block_drop", "merge": "msmoe"}  # operations, and the papers' words
# The ratio of a paper's rows, and its heading: of the whole model's bytes, or of the routed experts' parameters.
RATIOS = {CDMOE: ("memory_ratio", "memory\nratio"), MOEI2: ("removed_expert_ratio", "experts'\ncut")}
SAME_CUT = 0.005  # of the routed experts' parameters


@dataclass(frozen=True)
class Setting:
    """What was done to a model, in the terms of a published row.

    Args:
        method: as in `Result`; None: nothing that either paper did.
        removed_expert_ratio: share of the routed experts' parameters that is gone.
    """

    method: str | None
    num_layers: int | None = None
    num_experts: int | None = None
    removed_expert_ratio: float | None = None


def task_means(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over the tasks of each paper, between 0 and 1; a paper of which a task is missing is absent.

    Args:
        tasks: metrics of each task, as `tasks.run_tasks` gives them.
    """
    scores = {name: metrics.get("acc_norm", metrics.get("acc")) for name, metrics in tasks.items()}
    means = {}
    for paper, names in PAPER_TASKS.items():
        known = [score for name in names if (score := scores.get(name)) is not None]
        if len(known) == len(names):
            means[paper] = sum(known) / len(known)
    return means


def recognise(model_type: str, hidden_size: int, num_layers: int, num_experts: int, compressed: bool) -> Model | None:
    """Find the published model that a config is, or was before it was compressed.

    Args:
        compressed: the folder has a plan: it may have lost experts and layers, but no more than there were.
    """
    exact = published_model(model_type, hidden_size, num_layers, num_experts)
    if exact is not None or not compressed:
        return exact
    for model in MODELS:
        same = (model_type, hidden_size) == (model.model_type, model.hidden_size)
        if same and num_layers <= model.num_layers and num_experts <= model.num_experts:
            return model
    return None


def setting_of(operations: Mapping[str, Mapping[str, float]], removed_expert_ratio: float) -> Setting:
    """What a plan did, in the terms of a published row.

    Args:
        operations: `summary.operation_counts`.
        removed_expert_ratio: of the whole plan; experts in condensed layers count as retained.
    """
    kinds = set(operations) - {"refit"}
    if not kinds:
        return Setting("original")
    if kinds == {"condense"}:
        counts = operations["condense"]
        layers, kept = int(counts["layers"]), counts["retained"] / counts["layers"]
        return Setting("cdmoe", layers, int(kept)) if kept == int(kept) else Setting(None)
    if "prune" in kinds and kinds <= {"prune", "factorize"}:
        return Setting("moei2", removed_expert_ratio=removed_expert_ratio)
    if len(kinds) == 1 and (method := KINDS.get(kinds.pop())) is not None:
        [counts] = (counts for name, counts in operations.items() if name != "refit")
        return Setting(method, int(counts["layers"]))
    return Setting(None)


def nearest_rows(model: Model, paper: str, setting: Setting) -> list[Result]:
    """The original's row, and those of the same setting, before and after fine-tuning, or else of the nearest one."""
    rows = list(find(model.name, paper=paper, method="original"))
    if setting.method in (None, "original"):
        return rows
    done = find(model.name, paper=paper, method=setting.method)
    nearest = min(done, key=lambda row: _distance(row, setting), default=None)
    if nearest is None:
        return rows
    return rows + [row for row in done if _distance(row, setting) == _distance(nearest, setting)]


def is_same(row: Result, setting: Setting) -> bool:
    """Whether a row's setting is the run's."""
    if row.method == "original":
        return True
    experts, layers, cut = _distance(row, setting)
    return experts == layers == 0 and cut <= SAME_CUT


def _distance(row: Result, setting: Setting) -> tuple[float, float, float]:
    """How far a row's setting is: experts kept first, then layers, then what was cut."""

    def apart(one: float | None, other: float | None) -> float:
        return 0.0 if one is None or other is None else abs(one - other)

    return (
        apart(row.num_experts, setting.num_experts),
        apart(row.num_layers, setting.num_layers),
        apart(row.removed_expert_ratio, setting.removed_expert_ratio),
    )


def published_rows(model: Model | None, setting: Setting, papers: list[str], differs: list[str]) -> dict[str, Any]:
    """The published rows that `summary.json` keeps, as JSON values; `rows` is empty for an unknown model.

    Args:
        papers: whose means the run has.
        differs: settings of the evaluation that no paper has, as texts.
    """
    published: dict[str, Any] = {"model": model.name} if model is not None else {}
    if differs:
        published["differs"] = differs
    rows = [(row, row.setting) for paper in papers if model is not None for row in nearest_rows(model, paper, setting)]
    published["rows"] = [
        {
            **{key: value for key, value in vars(row).items() if value not in (None, (), "", False)},
            **({"tasks": dict(row.tasks)} if row.tasks else {}),
            "setting": words,
            "same": is_same(row, setting),
        }
        for row, words in rows
    ]
    return published


def tables(summary: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each paper whose tasks were run: the mean of each stage, then the published rows.

    Args:
        summary: as `summary.json` holds it.

    Returns:
        title, headings and rows of texts; a figure that is not known is a dash, a column without any is left out.
    """
    texts = []
    for paper, title in PAPER_TITLES.items():
        key, heading = RATIOS[paper]
        rows = []
        for name, stage in summary.get("stages", {}).items():
            if paper in stage.get("task_mean", {}):
                earlier = summary.get("published", {}).get("earlier", False)
                # The run's own ratio is to what it was given, which was compressed before.
                ratio = None if earlier or name in ("original", "control") else _ratio_of(summary, key)
                mean = f"{100 * stage['task_mean'][paper]:.2f}"
                called = "as given" if earlier and name == "original" else name
                rows.append([f"this run: {called}", mean, _or_dash(ratio, "{:.4f}"), "-", ""])
        if not rows:
            continue
        for row in summary.get("published", {}).get("rows", ()):
            if row["paper"] == paper:
                words = f"published: {row['setting']}{'' if row['same'] else ' (the nearest)'}"
                figures = [_or_dash(row.get(key), "{:.4g}"), _or_dash(row.get("speedup"), "{:.2f}x")]
                source = "; ".join(row[part] for part in ("source", "note") if part in row)
                rows.append([words, f"{row['mean']:.2f}", *figures, source])
        headings = ["", "mean, %", heading, "speed", "source"]
        told = [index for index, cells in enumerate(zip(*rows, strict=True)) if not set(cells) <= {"-", ""}]
        shown = [[row[index] for index in told] for row in [headings, *rows]]
        texts.append((f"mean of the {len(PAPER_TASKS[paper])} tasks of {title}", shown[0], shown[1:]))
    return texts


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Lines that say why the published rows cannot be compared, or that there are none."""
    published = summary.get("published")
    if published is None:
        return []
    if not published["rows"]:
        return [f"published results: none for this model ({summary.get('model')})"]
    differs = ", ".join(published.get("differs", ()))
    return [f"published results: over all examples, zero-shot; this run has {differs}"] if differs else []


def _ratio_of(summary: Mapping[str, Any], key: str) -> float | None:
    """This run's figure of the kind that a paper's rows have."""
    ratios: Mapping[str, float] = summary.get("ratios", {})
    if key == "memory_ratio":
        return ratios.get("memory")
    kept = ratios.get("routed_expert_parameters")
    return None if kept is None else 1 - kept


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
