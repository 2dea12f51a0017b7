"""The typed values of a comparison: numbers in columns that have only numbers, deviations beside their means."""

from __future__ import annotations

from typing import Any

from recondense.report.comparison import by_seed
from recondense.report.comparison_columns import columns, comparison_values, redundant_means


def row(method: str, seed: int, **more: Any) -> dict[str, Any]:
    settings = {"method": method, "method.num_layers": "2" if method == "cdmoe" else "all", "seed": str(seed)}
    figures = {"weights_bytes": 100, "recovered_perplexity": 3.0 + seed, "decode_tokens_per_second": 50.0 + seed}
    return {
        "settings": settings,
        "status": "done",
        "run_folder": f"{method}{seed}",
        "method": method,
        **figures,
        **more,
    }


def table(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    header, body = comparison_values(by_seed(rows))
    return {name: [line[index] for line in body] for index, name in enumerate(header)}


def test_numbers_are_numbers() -> None:
    values = table([row("cdmoe", 0), row("cdmoe", 1), row("reap", 0, memory_ratio=0.5)])
    assert values["method"] == ["reap", "cdmoe"] or values["method"] == ["cdmoe", "reap"]
    order = values["method"].index("cdmoe")
    assert values["recovered_perplexity"][order] == 3.5 and values["recovered_perplexity_std"][order] == 0.5**0.5
    assert values["recovered_perplexity_std"][1 - order] is None, "one run"
    assert values["decode_tokens_per_second"][order] == 50.5
    assert values["memory_ratio"][order] is None and "memory_ratio_std" not in values
    assert values["runs"][order] == 2 and values["status"] == ["done", "done"]
    assert values["method.num_layers"][order] == "2", "the other one is a word"
    assert table([row("cdmoe", 0)])["method.num_layers"] == [2]
    assert table([row("cdmoe", 0), row("none", 0, settings={"method": "none"})])["method.num_layers"] in (
        [2, None],
        [None, 2],
    )


def test_settings_keep_what_is_no_number() -> None:
    for text in ("true", "[1, 2]", "a: b", "1e-3x", "'", "inf", ""):
        assert table([row("cdmoe", 0, settings={"x": text})])["x"] == [text]
    for text, number in {"1e-05": 1e-5, "1.0e-5": 1e-5, "-3": -3, "0.50": 0.5}.items():
        assert table([row("cdmoe", 0, settings={"x": text})])["x"] == [number]


def test_a_mean_over_one_task_is_not_shown() -> None:
    scores = {"recovered_a": 0.5, "recovered_task_mean": 0.5}
    [entry] = by_seed([row("cdmoe", 0, **scores)])
    assert set(redundant_means([entry])) >= {"recovered_task_mean"} and "recovered_task_mean" in columns([entry])
    [entry] = by_seed([row("cdmoe", 0, recovered_a=0.5, recovered_b=0.7, recovered_task_mean=0.6)])
    assert redundant_means([entry]) == []
