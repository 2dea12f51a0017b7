"""Comparison of a run's scores with published ones: the mean over each paper's tasks, and the nearest published rows.

The mean is over acc_norm for the tasks where lm-eval reports it (arc_challenge, arc_easy, hellaswag, openbookqa, piqa)
and over acc for the others (boolq, mmlu, rte, winogrande), with equal weights. CD-MoE's scores per task for
DeepSeekMoE-16B agree with this: 77.4 on HellaSwag and 44.2 on OpenBookQA are acc_norm. MoE-I² does not name its
metric; it is assumed to be the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

KINDS = {"drop_moe": "layer_drop", "drop_layer": "block_drop", "merge": "msmoe"}  # operation: method in `published`
# Paper: (ratio that its rows state, heading of the column). CD-MoE states the share of the model's bytes that remains,
# MoE-I² the share of the routed experts' parameters that was removed.
RATIOS = {CDMOE: ("memory_ratio", "memory\nratio"), MOEI2: ("removed_expert_ratio", "experts'\ncut")}
MERGED_BY = "router_logits"  # `grouping` of the published results with merged experts (M-SMoE)
SAME_CUT = 0.005  # maximum difference of `removed_expert_ratio` between equal settings


@dataclass(frozen=True)
class Setting:
    """A compression setting in the terms of a published row.

    Args:
        method: as in `Result`; None if neither paper has a result for such a compression.
        num_layers: layers that were condensed, dropped or merged.
        num_experts: routed experts retained in each condensed layer; the mean if layers differ.
        removed_expert_ratio: share of the routed experts' parameters that was removed.
        uneven: whether condensed layers retain different numbers of experts, as no published row does.
    """

    method: str | None
    num_layers: int | None = None
    num_experts: float | None = None
    removed_expert_ratio: float | None = None
    uneven: bool = False


def task_means(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean score over each paper's tasks, between 0 and 1. Papers with missing tasks are absent.

    Args:
        tasks: metrics of each task, as returned by `lm_eval.run_tasks`.
    """
    scores = _scores(tasks)
    means = {}
    for paper, names in PAPER_TASKS.items():
        known = [scores[name] for name in names if name in scores]
        if len(known) == len(names):
            means[paper] = sum(known) / len(known)
    return means


def _scores(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the score of each task, as the papers report it."""
    scores = {name: metrics.get("acc_norm", metrics.get("acc")) for name, metrics in tasks.items()}
    return {name: score for name, score in scores.items() if score is not None}


def recognise(model_type: str, hidden_size: int, num_layers: int, num_experts: int, compressed: bool) -> Model | None:
    """Find the published model that has a config's sizes, or had them before it was compressed; None if there is none.

    Args:
        model_type: the family's `model_type`.
        hidden_size: width of the hidden states.
        num_layers: decoder layers.
        num_experts: routed experts per layer.
        compressed: whether the folder has a plan. If so, a model with more layers or experts matches too.
    """
    exact = published_model(model_type, hidden_size, num_layers, num_experts)
    if exact is not None or not compressed:
        return exact
    for model in MODELS:
        same = (model_type, hidden_size) == (model.model_type, model.hidden_size)
        if same and num_layers <= model.num_layers and num_experts <= model.num_experts:
            return model
    return None


def setting_of(
    operations: Mapping[str, Mapping[str, float]], removed_expert_ratio: float, groupings: Collection[str] = ()
) -> Setting:
    """Return the setting of a plan in the terms of a published row.

    Args:
        operations: as returned by `operation_counts`.
        removed_expert_ratio: share of the routed experts' parameters that the plan removes; the experts of condensed
            layers count as retained.
        groupings: what the steps that merge experts group them by; empty if they have another way to make groups.
    """
    kinds = set(operations) - {"refit"}
    if "merge" in kinds and set(groupings) != {MERGED_BY}:
        return Setting(None)
    if not kinds:
        return Setting("original")
    if kinds == {"condense"}:
        counts = operations["condense"]
        retained = counts["retained"] / counts["layers"]
        return Setting("cdmoe", int(counts["layers"]), retained, uneven="fewest" in counts)
    if "prune" in kinds and kinds <= {"prune", "factorize"}:
        return Setting("moei2", removed_expert_ratio=removed_expert_ratio)
    if len(kinds) == 1 and (method := KINDS.get(kinds.pop())) is not None:
        [counts] = (counts for name, counts in operations.items() if name != "refit")
        return Setting(method, int(counts["layers"]))
    return Setting(None)


def nearest_rows(model: Model, paper: str, setting: Setting) -> list[Result]:
    """Return the original's row, and all rows of the setting that is nearest to the given one."""
    rows = list(find(model.name, paper=paper, method="original"))
    if setting.method in (None, "original"):
        return rows
    candidates = find(model.name, paper=paper, method=setting.method)
    nearest = min(candidates, key=lambda row: distance(row, setting), default=None)
    if nearest is None:
        return rows
    return rows + [row for row in candidates if distance(row, setting) == distance(nearest, setting)]


def is_same(row: Result, setting: Setting) -> bool:
    """Return whether a row has a setting; the removed shares of experts may differ by up to `SAME_CUT`."""
    if row.method == "original":
        return True
    experts, layers, cut = distance(row, setting)
    return not setting.uneven and experts == layers == 0 and cut <= SAME_CUT


def distance(row: Result, setting: Setting) -> tuple[float, float, float]:
    """Return the differences in retained experts, layers and removed share, to be compared in this order."""

    def difference(one: float | None, other: float | None) -> float:
        return 0.0 if one is None or other is None else abs(one - other)

    cuts = (row.removed_expert_ratio, *([row.exact_cut] if row.exact_cut is not None else []))
    return (
        difference(row.num_experts, setting.num_experts),
        difference(row.num_layers, setting.num_layers),
        min(difference(cut, setting.removed_expert_ratio) for cut in cuts),
    )


def papers_beside(model: Model | None, setting: Setting, measured: list[str]) -> list[str]:
    """Return the papers whose rows are shown: those with measured tasks, and those with results of the run's method.

    Args:
        model: the published model, if the run's model is one.
        setting: the run's setting.
        measured: papers whose task mean the run has measured.
    """
    compressed = model is not None and setting.method not in (None, "original")
    return [
        paper
        for paper in PAPER_TASKS
        if paper in measured or (compressed and model and find(model.name, paper=paper, method=setting.method))
    ]


def published_rows(model: Model | None, setting: Setting, papers: list[str], differs: list[str]) -> dict[str, Any]:
    """Return the entry `published` of `summary.json`, as JSON values. Its `rows` is empty for an unknown model.

    Args:
        model: the published model, if the run's model is one.
        setting: the run's setting.
        papers: papers whose rows are shown, from `papers_beside`.
        differs: evaluation settings that differ from the papers', as `name=value`.
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


Table = tuple[str, list[str], list[list[str]]]  # title, headings, rows of cells


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a run's figures beside the published rows: for each paper the means, then the single tasks.

    An unknown figure is a dash; a column without figures is omitted. The speed of the run is that of decoding.

    Args:
        summary: content of `summary.json`.
    """
    made = []
    for paper, title in PAPER_TITLES.items():
        published = [row for row in (summary.get("published") or {}).get("rows", ()) if row["paper"] == paper]
        stages = {
            name: stage for name, stage in summary.get("stages", {}).items() if paper in stage.get("task_mean", {})
        }
        if stages or any(row["method"] != "original" for row in published):
            heading = f"mean of the {len(PAPER_TASKS[paper])} tasks of {title}" if stages else f"published: {title}"
            made.append(_table_of_means(summary, paper, heading, stages, published))
        if stages and any("tasks" in row for row in published):
            made.append(_table_of_tasks(summary, paper, f"the tasks of {title}, %", stages, published))
    return made


def _table_of_means(
    summary: Mapping[str, Any],
    paper: str,
    title: str,
    stages: Mapping[str, Mapping[str, Any]],
    published: list[Mapping[str, Any]],
) -> Table:
    key, heading = RATIOS[paper]
    earlier = _is_compressed_again(summary)
    speed = summary.get("ratios", {}).get("decode_speedup") if any("speedup" in row for row in published) else None
    rows = []
    for name, stage in (stages or {"compressed": {}}).items():
        # The ratios of this run are relative to its input. If that was compressed earlier, they are not comparable.
        compared = not earlier and name not in ("original", "control")
        ratios = (_ratio_of(summary, key), speed) if compared else (None, None)
        mean = stage["task_mean"][paper] if stage else None
        figures = [_or_dash(value, form) for value, form in zip(ratios, ("{:z.4f}", "{:.2f}x"), strict=True)]
        rows.append([_label(name, earlier), _or_dash(mean and 100 * mean, "{:z.2f}"), *figures, ""])
    for row in published:
        figures = [_or_dash(row.get(key), "{:.4g}"), _or_dash(row.get("speedup"), "{:.2f}x")]
        known_from = f"{row['source']} ({row['known_from']})" if "known_from" in row else row["source"]
        source = "; ".join([known_from, *([row["note"]] if "note" in row else [])])
        rows.append([_words(row), f"{row['mean']:.2f}", *figures, source])
    headings = ["", "mean, %", heading, "speed", "source"]
    used = [index for index, cells in enumerate(zip(*rows, strict=True)) if not set(cells) <= {"-", ""}]
    shown = [[row[index] for index in used] for row in [headings, *rows]]
    return title, shown[0], shown[1:]


def _table_of_tasks(
    summary: Mapping[str, Any],
    paper: str,
    title: str,
    stages: Mapping[str, Mapping[str, Any]],
    published: list[Mapping[str, Any]],
) -> Table:
    """Return a table of the scores of single tasks, with the published rows that have any."""
    names = PAPER_TASKS[paper]
    rows = []
    for name, stage in stages.items():
        scores = _scores(stage["tasks"])
        cells = [_or_dash(100 * scores[task] if task in scores else None, "{:z.2f}") for task in names]
        rows.append([_label(name, _is_compressed_again(summary)), *cells])
    for row in published:
        if tasks := dict(row.get("tasks", {})):
            rows.append([_words(row), *(_or_dash(tasks.get(task), "{:z.1f}") for task in names)])
    return title, ["", *(task.replace("_", "\n") for task in names)], rows


def _is_compressed_again(summary: Mapping[str, Any]) -> bool:
    return bool((summary.get("published") or {}).get("earlier", False))


def _label(stage: str, earlier: bool) -> str:
    return f"this run: {'input' if earlier and stage == 'original' else stage}"


def _words(row: Mapping[str, Any]) -> str:
    return f"published: {row['setting']}{'' if row['same'] else ' (nearest)'}"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Return notes for the reader: that there are no published rows, or which settings differ from the papers'."""
    published = summary.get("published")
    if published is None:
        return []
    if not published["rows"]:
        return [f"published results: none for this model ({summary.get('model')})"]
    differs = ", ".join(published.get("differs", ()))
    return [f"published results: over all examples, zero-shot; this run has {differs}"] if differs else []


def _ratio_of(summary: Mapping[str, Any], key: str) -> float | None:
    """Return this run's value of the ratio that a paper's rows state (`RATIOS`)."""
    ratios: Mapping[str, float] = summary.get("ratios", {})
    if key == "memory_ratio":
        return ratios.get("memory")
    retained = ratios.get("routed_expert_parameters")
    return None if retained is None else 1 - retained


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
