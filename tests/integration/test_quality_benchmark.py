"""benchmarks/quality.py: its rows, which runs it repeats, what it divides by what, and which texts it trains on."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.runs import ROOT

ORIGINAL = {"perplexity": 20.0, "kl_to_original": 0.0}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def value_of(command: Sequence[str], name: str) -> str:
    """The value of a setting in a command."""
    return next(text.partition("=")[2] for text in command if text.startswith(f"{name}="))


def train(command: Sequence[str], perplexities: dict[str, float]) -> None:
    """Write what train.py leaves, with chosen figures."""
    folder, overrides = Path(value_of(command, "run_dir")), list(command)
    stages: dict[str, Any] = {"original": dict(ORIGINAL)}
    if "method=none" in overrides:
        path = Path(value_of(overrides, "model.path"))
        compressed = path.name == "model" and path.parent.name != "subject"
        accuracy = {"acc": 0.594 if compressed else 0.6}
        stages["original"] = {"perplexity": 33.0 if compressed else 30.0, "tasks": {"piqa_local": accuracy}}
    else:
        stages["recovered"] = {"perplexity": perplexities[value_of(overrides, "seed")], "kl_to_original": 0.1}
    summary = {"ratios": {"memory": 0.8, "routed_expert_parameters": 0.7}, "stages": stages, "seconds": {}}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_every_method_is_a_row_at_both_budgets(load: Callable[[str], Any]) -> None:
    cells = load("quality_cells")
    every = cells.cells(["recipes", "methods", "ablation"], ["narrow"], 3)
    assert len({(cell.group, cell.budget, cell.name) for cell in every}) == len(every)
    methods = {path.stem for path in (ROOT / "conf" / "method").glob("[a-z]*.yaml")} - {"none"}
    for budget, share in (("30%", "0.3"), ("54%", "0.54")):
        rows = [cell for cell in every if cell.group == "methods" and cell.budget == budget]
        assert {cell.name for cell in rows} == methods
        assert {value_of(cell.command(0), "method.removed_expert_ratio") for cell in rows} == {share}
    full, tenth = sorted({cell.tokens for cell in every}, reverse=True)
    assert 0.9 * full < 10 * tenth <= full, "a tenth is not more"
    assert all("seed=2" in cell.command(2) and cell.seeds == (0, 1, 2) for cell in every)


def test_figures_are_means_over_seeds_and_the_test_split_sees_finished_models(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = load("quality")
    started: list[list[str]] = []
    perplexities = {"0": 22.0, "1": 21.0}

    def start(command: Sequence[str], **settings: Any) -> Any:
        started.append(list(command))
        failed = "seed=2" in command
        if not failed:
            train(command, perplexities)
        return quality.subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(quality.subprocess, "run", start)
    subject = quality.Subject(("model.path=subject/model", "model.dtype=bfloat16"), ("data=texts",), ("test=true",))
    (cell,) = (
        cell
        for cell in quality.cells(["ablation"], ["narrow"], 3)
        if cell.name == "narrow: distillation" and "3" in cell.budget
    )
    row = quality.measure(cell, subject, True, tmp_path)
    assert row["failed"] == 1
    assert row["recovered_perplexity"] == 21.5 and row["perplexity_ratio"] == pytest.approx(21.5 / 20)
    assert row["perplexity_ratio_deviation"] == pytest.approx(statistics.stdev([1.1, 1.05]))
    assert row["test_perplexity_ratio"] == pytest.approx(1.1) and row["test_piqa_kept"] == pytest.approx(0.99)
    assert len(started) == 3 + 2 + 1, "three seeds, two models on the test split, the original once"

    tests = [command for command in started if "test=true" in command]
    assert all("recovery=none" in command and not any("seed=" in part for part in command) for command in tests)
    assert quality.measure(cell, subject, True, tmp_path) == row
    assert len(started) == 7, "only the failed seed runs again"

    printed = quality.Console(width=150, record=True)
    printed.print(quality.table("ablation", [row]))
    assert "1.0750 ± 0.0354" in printed.export_text()
    assert quality.draw([row], "test_perplexity_ratio", tmp_path / "picture.svg").stat().st_size > 1000


def test_nothing_is_trained_or_chosen_on_the_test_texts(load: Callable[[str], Any], tmp_path: Path) -> None:
    texts = load("quality_texts")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("valid", "test"):
        articles = [f" = {name} {number} = \n\n text of {name} {number} \n" for number in range(8)]
        (data / f"wikitext2_{name}.txt").write_text("\n".join(articles))
    (data / "c4_calibration.jsonl").write_text(json.dumps({"text": "from the web"}) + "\n")
    question = {"goal": "open it", "sol1": "pull", "sol2": "push"}
    (data / "piqa_valid.jsonl").write_text((json.dumps(question) + "\n") * 1838)
    (data / "piqa_valid_labels.lst").write_text("1\n" * 1838)
    files = texts.write_texts(data, tmp_path / "texts")
    trained, chosen = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (files.train, files.validation)
    )
    assert sum("text of valid" in text for text in trained) == 6 and len(chosen) == 2
    assert not set(trained) & set(chosen)
    assert not any(word in text for text in (*trained, *chosen) for word in ("text of test", "open it"))
    assert not any(str(path) in override for override in files.overrides() for path in (files.test, files.tasks))
    first = json.loads((files.tasks / "piqa.jsonl").read_text().splitlines()[0])
    assert first == {**question, "label": 1}
