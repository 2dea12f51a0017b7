"""Means over the tasks of papers, and the published rows that are shown beside a run."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from support.published_models import model_named

from recondense.report.beside_published import (
    Setting,
    is_same,
    nearest_rows,
    notes,
    papers_beside,
    published_rows,
    recognise,
    setting_of,
    tables,
    task_means,
)
from recondense.report.published import (
    CDMOE,
    DEEPSEEK,
    MIXTRAL,
    MOEI2,
    PAPER_TASKS,
    QWEN,
    RESULTS,
    V2_LITE,
)
from recondense.report.tables import print_report
from recondense.report.tracking import flatten_summary


def results(paper: str, value: float = 0.5) -> dict[str, dict[str, float]]:
    return {task: {"acc": value, "acc_stderr": 0.01} for task in PAPER_TASKS[paper]}


def test_the_mean_takes_acc_norm_where_there_is_one() -> None:
    tasks = results(CDMOE)
    tasks["hellaswag"]["acc_norm"] = 0.9
    assert task_means(tasks) == {CDMOE: pytest.approx((7 * 0.5 + 0.9) / 8)}
    both = {**tasks, "arc_easy": {"acc": 0.1, "acc_norm": 0.2}}
    assert task_means(both) == {
        CDMOE: pytest.approx((7 * 0.5 + 0.9) / 8),
        MOEI2: pytest.approx((5 * 0.5 + 0.9 + 0.2) / 7),
    }


def test_published_scores_give_the_published_mean() -> None:
    [row] = [row for row in RESULTS if row.method == "original" and row.tasks]
    means = task_means({task: {"acc_norm": score / 100, "acc": 0.0} for task, score in row.tasks})
    assert round(100 * means[CDMOE], 1) == row.mean == 61.6


@pytest.mark.parametrize("task", PAPER_TASKS[CDMOE])
def test_without_one_of_its_tasks_a_paper_has_no_mean(task: str) -> None:
    tasks = results(CDMOE)
    tasks[task] = {"perplexity": 3.0}
    assert task_means(tasks) == {}
    del tasks[task]
    assert task_means(tasks) == {}


@pytest.mark.parametrize(
    ("operations", "setting"),
    [
        ({}, Setting("original")),
        ({"condense": {"layers": 9, "retained": 54, "of": 576}}, Setting("cdmoe", 9, 6)),
        ({"condense": {"layers": 9, "retained": 0, "of": 576}, "refit": {"layers": 9}}, Setting("cdmoe", 9, 0)),
        (
            {"condense": {"layers": 2, "retained": 5, "of": 128, "fewest": 2, "most": 3}},
            Setting("cdmoe", 2, 2.5, uneven=True),
        ),
        ({"prune": {"layers": 26}}, Setting("moei2", removed_expert_ratio=0.5)),
        ({"prune": {"layers": 26}, "factorize": {"layers": 26}}, Setting("moei2", removed_expert_ratio=0.5)),
        ({"factorize": {"layers": 26}}, Setting(None)),
        ({"condense": {"layers": 2, "retained": 4, "of": 9}, "prune": {"layers": 3}}, Setting(None)),
        ({"drop_moe": {"layers": 8}}, Setting("layer_drop", 8)),
        ({"drop_layer": {"layers": 8}}, Setting("block_drop", 8)),
        ({"merge": {"layers": 9, "groups": 90, "of": 576}, "refit": {"layers": 9}}, Setting("msmoe", 9)),
    ],
)
def test_a_plan_in_the_terms_of_the_papers(operations: dict[str, dict[str, float]], setting: Setting) -> None:
    assert setting_of(operations, 0.5, ["router_logits"]) == setting


@pytest.mark.parametrize("groupings", [[], ["expert_outputs"]])
def test_experts_that_are_merged_in_another_way_are_not_those_of_the_papers(groupings: list[str]) -> None:
    """`half_merge` and `hc_smoe`: M-SMoE groups by the router's outputs."""
    assert setting_of({"merge": {"layers": 9, "groups": 90, "of": 576}}, 0.5, groupings) == Setting(None)


@pytest.mark.parametrize(
    ("model", "paper", "setting", "means", "same"),
    [
        (QWEN, CDMOE, Setting("original"), [65.5], True),
        (QWEN, CDMOE, Setting("cdmoe", 9, 4), [65.5, 60.2], True),
        (QWEN, CDMOE, Setting("cdmoe", 8, 4), [65.5, 60.2], False),
        (QWEN, CDMOE, Setting("cdmoe", 24, 1), [65.5, 52.2], False),
        (QWEN, CDMOE, Setting("moei2", removed_expert_ratio=0.5), [65.5], True),
        (QWEN, CDMOE, Setting(None), [65.5], True),
        (DEEPSEEK, CDMOE, Setting("cdmoe", 9, 6), [61.6, 55.5, 60.4, 55.5], True),
        (DEEPSEEK, CDMOE, Setting("cdmoe", 8, 0), [61.6, 55.1, 59.1], True),
        # A budget's numbers of experts differ by layer; their mean may be that of a row.
        (DEEPSEEK, CDMOE, Setting("cdmoe", 9, 6, uneven=True), [61.6, 55.5, 60.4, 55.5], False),
        (DEEPSEEK, CDMOE, Setting("cdmoe", 9, 6.5, uneven=True), [61.6, 55.5, 60.4, 55.5], False),
        (DEEPSEEK, CDMOE, Setting("block_drop", 8), [61.6, 52.2], True),
        (DEEPSEEK, CDMOE, Setting("msmoe", 3), [61.6, 54.9], False),
        (V2_LITE, MOEI2, Setting("moei2", removed_expert_ratio=0.54), [61.49, 59.62], True),
        (MIXTRAL, MOEI2, Setting("moei2", removed_expert_ratio=0.28), [67.53, 67.65], False),
        (MIXTRAL, MOEI2, Setting("moei2", removed_expert_ratio=0.5179), [67.53, 64.55], True),  # the paper's rank
        (MIXTRAL, MOEI2, Setting("moei2", removed_expert_ratio=0.6), [67.53, 64.55], False),
        (QWEN, CDMOE, Setting("cdmoe", 6, 0), [65.5, 62.6], True),
        (QWEN, CDMOE, Setting("cdmoe", 7, 1), [65.5, 62.6], False),
        (MIXTRAL, CDMOE, Setting("cdmoe", 9, 2), [], True),
    ],
)
def test_rows_of_the_same_or_the_nearest_setting(
    model: str, paper: str, setting: Setting, means: list[float], same: bool
) -> None:
    rows = nearest_rows(model_named(model), paper, setting)
    assert [row.mean for row in rows] == means
    assert all(is_same(row, setting) == (same or row.method == "original") for row in rows)


def test_a_compressed_folder_is_still_recognised() -> None:
    qwen = model_named(QWEN)
    assert recognise("qwen2_moe", 2048, 24, 60, compressed=False) is qwen
    assert recognise("qwen2_moe", 2048, 24, 45, compressed=False) is None
    assert recognise("qwen2_moe", 2048, 22, 45, compressed=True) is qwen
    assert recognise("qwen2_moe", 2048, 24, 128, compressed=True) is None
    assert recognise("qwen2_moe", 64, 3, 6, compressed=True) is None


def summary(paper: str, model: str | None, setting: Setting, differs: list[str] | None = None) -> dict[str, Any]:
    known = None if model is None else model_named(model)
    return {
        "model": "mine",
        "stages": {
            "original": {"tasks": results(paper, 0.6), "task_mean": {paper: 0.6}},
            "compressed": {"tasks": results(paper, 0.55), "task_mean": {paper: 0.55}},
        },
        "ratios": {"memory": 0.7242, "routed_expert_parameters": 0.46, "decode_speedup": 1.318},
        "published": published_rows(known, setting, [paper], differs or []),
    }


def test_means_are_shown_beside_the_published_rows(capsys: pytest.CaptureFixture[str]) -> None:
    report = summary(CDMOE, DEEPSEEK, Setting("cdmoe", 9, 6))
    [(title, headings, rows), (tasks_title, tasks, scores)] = tables(report)
    assert "8 tasks of CD-MoE" in title and "the tasks of CD-MoE" in tasks_title
    assert [tasks[1], tasks[3], tasks[8]] == ["arc\nchallenge", "hellaswag", "winogrande"]
    assert [(row[0], row[1], row[8]) for row in scores] == [
        ("this run: original", "60.00", "60.00"),
        ("this run: compressed", "55.00", "55.00"),
        ("published: original", "48.3", "70.1"),
        ("published: cdmoe: shared+6, 9 layers, fine-tuned", "42.4", "73.9"),
    ]
    assert rows[3][-1].startswith("arXiv 2412.00069, main results on DeepSeekMoE-16B (page)")
    assert headings == ["", "mean, %", "memory\nratio", "speed", "source"]
    assert rows[:2] == [
        ["this run: original", "60.00", "-", "-", ""],
        ["this run: compressed", "55.00", "0.7242", "1.32x", ""],
    ]
    assert [row[:4] for row in rows[2:4]] == [
        ["published: original", "61.60", "1", "1.00x"],
        ["published: cdmoe: shared+6, 9 layers", "55.50", "0.725", "1.26x"],
    ]
    print_report(report, Console(width=160))
    shown = capsys.readouterr().out
    assert "published: cdmoe: shared+6, 9 layers, fine-tuned" in shown and "arXiv 2412.00069" in shown
    assert flatten_summary(report)["compressed/task_mean/cdmoe"] == 0.55


def test_a_cut_of_the_experts_is_no_memory_ratio() -> None:
    [(_, headings, rows)] = tables(summary(MOEI2, V2_LITE, Setting("moei2", removed_expert_ratio=0.54)))
    assert headings == ["", "mean, %", "experts'\ncut", "source"]
    assert rows[1][:3] == ["this run: compressed", "55.00", "0.5400"]
    assert rows[-1][1:3] == ["59.62", "0.5398"]
    assert "mean rank of 512" in rows[-1][-1]


def test_the_nearest_setting_is_marked() -> None:
    [(_, _, rows)] = tables(summary(CDMOE, QWEN, Setting("cdmoe", 8, 4)))
    assert rows[-1][0] == "published: cdmoe: shared+4, 9 layers (nearest)"


def test_what_cannot_be_compared_is_noted_in_a_line() -> None:
    unknown = summary(CDMOE, None, Setting(None))
    [(_, headings, rows)] = tables(unknown)
    assert headings == ["", "mean, %", "memory\nratio"] and len(rows) == 2
    assert notes(unknown) == ["published results: none for this model (mine)"]
    assert notes(summary(MOEI2, QWEN, Setting("original"))) == notes(unknown), "MoE-I²'s rows here have no Qwen"
    limited = summary(CDMOE, QWEN, Setting("original"), ["evaluation.limit=10"])
    assert notes(limited) == ["published results: over all examples, zero-shot; this run has evaluation.limit=10"]
    assert notes(summary(CDMOE, QWEN, Setting("original"))) == []
    assert notes({}) == [] and tables({}) == []


@pytest.mark.parametrize(
    ("model", "setting", "papers"),
    [
        (QWEN, Setting("cdmoe", 9, 4), [CDMOE]),
        (DEEPSEEK, Setting("block_drop", 8), [CDMOE]),
        (MIXTRAL, Setting("moei2", removed_expert_ratio=0.5), [MOEI2]),
        (MIXTRAL, Setting("cdmoe", 9, 4), []),
        (QWEN, Setting("original"), []),
        (QWEN, Setting(None), []),
        (None, Setting("cdmoe", 9, 4), []),
    ],
)
def test_rows_are_shown_without_measured_tasks(model: str | None, setting: Setting, papers: list[str]) -> None:
    known = None if model is None else model_named(model)
    assert papers_beside(known, setting, []) == papers
    assert papers_beside(known, setting, [CDMOE, MOEI2]) == [CDMOE, MOEI2]


def test_the_published_memory_is_shown_beside_that_of_a_run_without_tasks() -> None:
    setting = Setting("cdmoe", 8, 4)
    report = {
        "stages": {"original": {}, "compressed": {}},
        "ratios": {"memory": 0.7292},
        "published": published_rows(model_named(QWEN), setting, papers_beside(model_named(QWEN), setting, []), []),
    }
    [(title, headings, rows)] = tables(report)
    assert title == "published: CD-MoE, arXiv 2412.00069"
    assert headings == ["", "mean, %", "memory\nratio", "speed", "source"]
    assert rows[0] == ["this run: compressed", "-", "0.7292", "-", ""]
    assert rows[-1][:4] == ["published: cdmoe: shared+4, 9 layers (nearest)", "60.20", "0.697", "1.30x"]


def test_a_single_published_score_stands_beside_the_runs() -> None:
    report = summary(CDMOE, QWEN, Setting("cdmoe", 6, 0))
    _, (_, _, scores) = tables(report)
    assert scores[-1] == ["published: cdmoe: shared+0, 6 layers", "41.1", *["-"] * 7]
