"""Tables and pictures: what is shown, and that missing values are left out."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table

from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.report import comparison
from recondense.report.expert_outcomes import OUTCOMES, outcomes_of
from recondense.report.model_card import model_card
from recondense.report.operation_counts import operation_counts
from recondense.report.plan_picture import draw_plan, draw_searches
from recondense.report.sweep_picture import draw_sweep
from recondense.report.sweep_table import sweep_row, sweep_table
from recondense.report.tables import (
    format_number,
    plan_line,
    print_report,
    ratios_table,
    recovery_words,
    refit_line,
    rounds_table,
    stage_table,
    super_experts_line,
    task_table,
)
from recondense.report.tracking import flatten_summary


def profile(scale: float) -> dict[str, float]:
    return {
        "weights_bytes": int(12e6 * scale),
        "peak_memory_bytes": int(17e6 * scale),
        "prefill_tokens_per_second": 4000.0 / scale,
        "decode_tokens_per_second": 160.0 / scale,
    }


def summary() -> dict[str, Any]:
    def tasks(accuracy: float) -> dict[str, dict[str, float]]:
        return {"heldout_next_line": {"acc": accuracy, "acc_stderr": 0.03}}

    return {
        "schema": 1,
        "model": "tiny_moe",
        "method": "cdmoe",
        "recovery": "distill",
        "stages": {
            "original": {"perplexity": 90.0, "loss": 4.5, "tasks": tasks(0.6), "profile": profile(1.0)},
            "compressed": {"perplexity": 135.0, "kl_to_original": 0.4, "tasks": tasks(0.5), "profile": profile(0.5)},
            "recovered": {"perplexity": 99.0, "kl_to_original": 0.1, "tasks": tasks(0.55), "profile": profile(0.5)},
            "control": {"perplexity": 85.0},
        },
        "ratios": {"memory": 0.5, "routed_expert_parameters": 0.25, "decode_speedup": 2.0, "gap_closed": 0.9},
        "parameters": {"total": {"original": 3_000_000, "compressed": 1_500_000}},
        "seconds": {"calibrate": 1.5, "search": 2.5},
    }


def text(table: Table, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
        return console.export_text()


def test_stage_table_shows_figures_and_their_ratios() -> None:
    shown = text(stage_table(summary()))
    for expected in ("original", "compressed", "recovered", "control", "135.0", "1.50x", "6.00 MB", "0.50x", "2.00x"):
        assert expected in shown
    assert shown.count("-\n") or " - " in shown  # the control has no profile


def test_stage_table_leaves_out_what_no_stage_has() -> None:
    report = {"stages": {"original": {"loss": 1.0}, "compressed": {"profile": profile(0.5)}}}
    table = stage_table(report)
    headers = [str(column.header) for column in table.columns]
    assert "perplexity" not in headers and "weights" in headers
    assert text(table)


def test_a_model_that_was_only_measured_is_shown_alone() -> None:
    report = {
        "model": "/models/mine",
        "method": "none",
        "recovery": "none",
        "stages": {"original": {"perplexity": 2.0, "profile": profile(1.0)}},
        "parameters": {"total": {"original": 1_500_000}},
        "ratios": {},
        "seconds": {"search": 0.001, "evaluate": 2.0},
    }
    shown = text(stage_table(report)) + text(ratios_table(report))
    assert "/models/mine: unchanged" in shown and "1,500,000" in shown and "seconds: evaluate" in shown
    for absent in ("compressed", "1.00x", "none + none", " of ", "seconds: search"):
        assert absent not in shown, absent
    assert sweep_row(report)["total_parameters"] == 1_500_000


def test_an_empty_summary_still_prints() -> None:
    console = Console(width=80, record=True, file=StringIO())
    print_report({}, console)
    assert not any(character.isdigit() for character in console.export_text())
    print_report({"stages": {"original": {"perplexity": 2.0}}}, console)
    shown = console.export_text()
    assert "original" in shown and "2.00" in shown and "compressed" not in shown


@pytest.mark.parametrize("num_tasks", [1, 6])
def test_many_tasks_or_a_narrow_terminal_give_tasks_a_table_of_their_own(num_tasks: int, tmp_path: Path) -> None:
    report = summary()
    for stage in ("original", "compressed", "recovered"):
        tasks = {f"task{index}": {"acc_norm": 0.5, "acc": 0.4, "acc_stderr": 0.1} for index in range(num_tasks)}
        report["stages"][stage]["tasks"] = tasks
    for width in (80, 120):
        with (tmp_path / "out").open("w") as file:
            console = Console(width=width, record=True, file=file)
            print_report(report, console)
        shown = console.export_text()
        assert "…" not in shown
        assert "task0" in shown and "0.5000" in shown
        assert ("metric" in shown) == (num_tasks > 3 or width == 80)
    assert "±" not in text(task_table(report))  # the error belongs to acc, shown is acc_norm


def test_ratios_table_explains_its_ratios() -> None:
    shown = text(ratios_table(summary()))
    for expected in ("0.5000", "2.00x", "compressed / original", "1,500,000", "of 3,000,000", "seconds: search"):
        assert expected in shown


def test_what_rounds_to_zero_is_no_negative_zero() -> None:
    row = {"status": "done", "settings": {"method": "reap"}, "method": "reap", "memory_ratio": 0.75}
    row |= {
        "gap_closed": -0.001,
        "refit_gap_closed": -1e-6,
        "compressed_task": -1e-6,
        "compressed_task_mean": -1e-6,
        "task_mean": -1e-6,
    }
    shown = [
        comparison.comparison_markdown(comparison.by_seed([row])),
        text(sweep_table([row])),
        text(ratios_table({"ratios": {"gap_closed": -1e-6}})),
        format_number(-0.0),
    ]
    assert not [table for table in shown if re.search(r"-0(\.0*)?%?(?![.\d])", table)]


def test_numbers_for_people() -> None:
    assert [format_number(value) for value in (0.0, 1e-5, 0.61, 94.2, 131.9, 4225.1)] == [
        "0.0000",
        "1.0e-05",
        "0.6100",
        "94.20",
        "131.9",
        "4,225",
    ]


def test_sweep_row_has_the_values_that_exist() -> None:
    row = sweep_row(summary())
    assert row["weights_bytes"] == 6e6 and row["original_weights_bytes"] == 12e6
    assert row["compressed_perplexity"] == 135.0 and row["recovered_perplexity"] == 99.0
    assert row["seconds"] == 4.0 and row["routed_expert_ratio"] == 0.25
    assert row["original_heldout_next_line"] == 0.6 and row["original_heldout_next_line_error"] == 0.03
    assert sweep_row({"method": "none"}) == {"method": "none"}
    json.dumps(row)


def test_sweep_row_has_the_refitted_stage_and_seconds_without_evaluation() -> None:
    report = summary()
    report["stages"]["refitted"] = {"perplexity": 110.0, "tasks": {"heldout_next_line": {"acc": 0.52}}}
    report["seconds"] |= {
        "apply": 0.5,
        "refit": 7.0,
        "recover": 30.0,
        "evaluate": 100.0,
        "profile": 3.0,
        "control": 9.0,
    }
    row = sweep_row(report)
    assert row["refitted_heldout_next_line"] == 0.52
    assert (row["search_seconds"], row["refit_seconds"], row["recover_seconds"]) == (4.5, 7.0, 30.0)
    without = {**report, "stages": {"compressed": {}}}
    assert not {"refit_seconds", "recover_seconds"} & set(sweep_row(without)), "nothing was refitted or trained"


def test_the_control_has_the_memory_of_the_original() -> None:
    control = {"stages": {"original": {"profile": profile(1.0)}, "recovered": {"profile": profile(1.0)}}}
    assert sweep_row(control)["memory_ratio"] == 1.0


def test_a_refit_is_reported_in_one_line(tmp_path: Path) -> None:
    errors = {"0": {"error_before": 0.2, "error_after": 0.1}, "5": {"error_before": 0.4, "error_after": 0.15}}
    assert refit_line(errors).endswith(": 0.300 (0.200 to 0.400) -> 0.125 (0.100 to 0.150), mean and range of 2 layers")
    assert refit_line({"3": errors["0"]}).endswith(": 0.200 -> 0.100, 1 layer")
    with (tmp_path / "out").open("w") as file:
        console = Console(width=80, record=True, file=file)
        print_report({**summary(), "refit": errors}, console)
    assert f"refit: {refit_line(errors)}" in console.export_text()
    with (tmp_path / "rounds").open("w") as file:
        console = Console(width=80, record=True, file=file)
        print_report({**summary(), "refit": errors, "rounds": [{"parameters": 3}, {"parameters": 2}]}, console)
    assert f"refit (last round): {refit_line(errors)}" in console.export_text()
    with (tmp_path / "local").open("w") as file:
        console = Console(width=80, record=True, file=file)
        print_report({**summary(), "recovery_stages": [{"name": "first", "layers": errors}, {"name": "x"}]}, console)
    assert f"local recovery, stage first: {refit_line(errors)}" in console.export_text()
    assert flatten_summary({"recovery_stages": [{"name": "first", "layers": errors}]}) == {
        f"first/{layer}/{name}": value for layer, error in errors.items() for name, value in error.items()
    }
    assert "before any training" in text(ratios_table({"ratios": {"refit_gap_closed": 0.5}}))
    assert flatten_summary({"refit": errors})["refit/5/error_after"] == 0.15


def test_the_objective_is_shown_where_the_recovery_does_not_say_it() -> None:
    assert recovery_words(summary()) == recovery_words({**summary(), "objective": "distill"}) == "distill"
    control = {**summary(), "objective": "finetune"}
    assert "distill (objective: finetune)" in text(stage_table(control))
    assert "distill (objective: finetune)" in model_card(control)


def test_sweep_table_lists_failures_and_drops_empty_columns() -> None:
    rows = [
        {**sweep_row(summary()), "settings": {"method.num_layers": "2"}, "status": "done"},
        {"settings": {"method.num_layers": "4"}, "status": "failed: no summary"},
    ]
    shown = text(sweep_table(rows))
    assert "failed: no summary" in shown and "135.0" in shown and ".num_layers" in shown
    without = [{"settings": {"seed": "1"}, "status": "done", "memory_ratio": 0.5}]
    assert "perplexity" not in text(sweep_table(without))


def plan(
    num_layers: int, num_experts: int, num_selected: int, num_condensed: int, *, search: bool = True
) -> dict[str, Any]:
    random = np.random.default_rng(0)
    expert_search: dict[str, Any] = {}
    for layer in range(num_layers):
        weights = random.exponential(0.02, num_experts)
        order = np.argsort(-weights)[:num_selected].tolist()
        js = (1e-4 * random.uniform() * 0.7 ** np.arange(1, num_selected + 1)).tolist()
        expert_search[str(layer)] = {
            "order": order,
            "js": js,
            "js_shared_only": 2e-4,
            "mean_routing_weight": weights.tolist(),
        }
    condensed = random.permutation(num_layers)[:num_condensed].tolist()
    operations = [
        {
            "kind": "condense",
            "layer": layer,
            "experts": expert_search[str(layer)]["order"],
            "coefficients": [0.1] * num_selected,
        }
        for layer in condensed
    ]
    searched = {"method": "cdmoe", "expert_search": expert_search} if search else {}
    return {"model": "tiny_moe", "operations": operations, "search": searched}


@pytest.mark.parametrize(
    "decided",
    [
        plan(6, 16, 4, 6),
        plan(24, 60, 4, 9),
        plan(6, 16, 0, 3),
        plan(1, 4, 1, 1),
        plan(6, 16, 4, 3, search=False),
    ],
    ids=["all_layers", "qwen_size", "shared_only", "one_layer", "without_search"],
)
def test_plan_picture_is_drawn(decided: dict[str, Any], tmp_path: Path) -> None:
    path = draw_searches(decided, tmp_path / "folder" / "plan.png")
    pixels = imread(path)
    assert pixels.shape[0] > 250 and pixels.shape[1] > 600
    # Nothing touches the edge, so nothing is cut off.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])[:, :3]
    assert (border == 1).all()
    assert [file.name for file in path.parent.iterdir()] == ["plan.png"]


def test_a_plan_of_nothing_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="condenses no layer"):
        draw_searches({"operations": [], "search": {}}, tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


def test_sweep_picture_needs_a_size_and_a_perplexity(tmp_path: Path) -> None:
    row = {**sweep_row(summary()), "settings": {"method.num_layers": "2", "seed": "1"}}
    path = draw_sweep([row, {"settings": {}, "status": "failed"}], tmp_path / "with.png")
    assert path is not None and imread(path).shape[0] == 720
    no_profile = {key: value for key, value in row.items() if "bytes" not in key}
    assert draw_sweep([no_profile], tmp_path / "parameters.png") is not None
    no_perplexity = {key: value for key, value in row.items() if "perplexity" not in key}
    assert draw_sweep([no_perplexity], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_sweep_picture_writes_no_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(Axes, "annotate", lambda self, words, *args, **kwargs: written.append(words))
    row = sweep_row(summary())
    rows = [{**row, "settings": {"method.num_layers": "2", "seed": seed}} for seed in "01"]
    draw_sweep([*rows, {**row, "settings": {"seed": "2"}}], tmp_path / "sweep.png")
    assert written == ["2"] * 4, "beside the points of both panels; the legend names the setting"


def ranks(*values: int | None) -> dict[str, tuple[int | None, ...]]:
    return dict.fromkeys(("gate_proj", "up_proj", "down_proj"), values)


MIXED: tuple[Operation, ...] = (
    Prune(0, (1, 2, 4, 5)),
    Factorize(0, ranks(8, None, 20, 9)),
    Merge(1, ((0, 3), (1, 2), (4, 5)), ((0.5, 0.5),) * 3),
    Factorize(1, ranks(7, 5, None)),
    Prune(2, (0, 2, 4)),
    Condense(2, (2, 0), (0.1, 0.2)),
    Drop(3, "moe"),
    Drop(4, "layer"),
    Refit(0, "down_proj", 0.01),
    Constant(5, (1, 4)),
    Prune(6, (0, 1, 3, 5)),
    Narrow.from_channels(6, (range(8), range(4), (0, 3), range(8))),
)


def test_operations_are_counted_in_order() -> None:
    """Condensing after pruning counts the experts that pruning retained."""
    counts = operation_counts(Plan("tiny", MIXED), 6)
    assert counts["prune"] == {"layers": 3, "retained": 11, "of": 18}
    assert counts["condense"] == {"layers": 1, "retained": 2, "of": 3}
    assert counts["merge"] == {"layers": 1, "groups": 3, "of": 6}
    assert counts["constant"] == {"layers": 1, "retained": 2, "of": 6}
    assert counts["factorize"] == {"layers": 2, "lowest": 5, "highest": 20, "mean": pytest.approx(49 / 5)}
    assert counts["narrow"] == {"layers": 1, "narrowest": 2, "widest": 8, "mean_width": 5.5}
    assert counts["drop_moe"] == counts["drop_layer"] == counts["refit"] == {"layers": 1}
    assert operation_counts(Plan("tiny"), 6) == {}
    json.dumps(counts)


def test_what_several_rounds_do_to_a_layer_is_counted_once() -> None:
    """The experts that stay are those after the last round, of those before the first."""
    narrow = [Narrow.from_channels(2, (range(size),) * 3, True) for size in (8, 4)]
    plan = Plan("tiny", (Prune(1, (0, 1, 3, 4)), Prune(2, (0, 1, 2)), narrow[0], Prune(1, (0, 3)), narrow[1]))
    counts = operation_counts(plan, 6)
    assert counts["prune"] == {"layers": 2, "retained": 5, "of": 12}
    assert counts["narrow"] == {"layers": 1, "narrowest": 4, "widest": 4, "mean_width": 4.0}


def test_rounds_are_a_table_of_what_was_measured() -> None:
    rounds = [{"parameters": 900, "perplexity": 12.5}, {"parameters": 700, "perplexity": 13.25}]
    shown = text(rounds_table({"rounds": rounds}))
    assert all(word in shown for word in ("after each round", "900", "12.50", "13.25")) and "KL" not in shown
    assert flatten_summary({"rounds": rounds})["round-2/perplexity"] == 13.25


def test_numbers_of_experts_that_differ_by_layer_are_said() -> None:
    counts = operation_counts(Plan("tiny", (Condense(2, (2, 0), (0.1, 0.2)), Condense(1, (3,), (0.3,)))), 6)
    assert counts == {"condense": {"layers": 2, "retained": 3, "of": 12, "fewest": 1, "most": 2}}
    assert plan_line(counts) == "2 layers condensed (3 of 12 experts stay, 1 to 2 in a layer, always active)"


def test_the_report_and_the_model_card_describe_the_plan(tmp_path: Path) -> None:
    counts = operation_counts(Plan("tiny", MIXED), 6)
    line = plan_line(counts)
    for words in (
        "3 layers pruned (11 of 18 experts stay)", "1 layer condensed (2 of 3 experts", "6 experts into 3",
        "2 layers factorized (ranks 5-20, mean 9.8)", "1 layer removed", "1 layer refitted",
        "1 layer with constants (2 of 6 experts stay",
        "1 layer narrowed (experts 2-8 wide, mean 5.5)",
    ):  # fmt: skip
        assert words in line
    with (tmp_path / "out").open("w") as file:
        console = Console(width=80, record=True, file=file)
        print_report({**summary(), "operations": counts}, console)
    assert f"plan: {line}" in console.export_text()
    assert line in model_card({**summary(), "operations": counts})


def test_the_outcome_of_every_expert_is_drawn() -> None:
    operations = Plan("tiny", MIXED).to_dict()["operations"]
    dropped = ("dropped", None)
    assert outcomes_of(0, operations, 6) == [
        dropped, ("factorized", 8), ("dense", None), dropped, ("factorized", 20), ("factorized", 9)
    ]  # fmt: skip
    first, second, third = ("factorized", 7), ("factorized", 5), ("merged", 2)
    assert outcomes_of(1, operations, 6) == [first, second, second, first, third, third]
    assert outcomes_of(2, operations, 6) == [("condensed", 2), dropped, dropped, dropped, ("condensed", 1), dropped]
    assert set(outcomes_of(3, operations, 6)) == {("removed", None)} and set(outcomes_of(4, operations, 6)) == {
        ("skipped", None)
    }
    kept, constant = ("kept", None), ("constant", None)
    assert outcomes_of(5, operations, 6) == [constant, kept, constant, constant, kept, constant]
    assert outcomes_of(6, operations, 6) == [
        ("narrowed", 8), ("narrowed", 4), dropped, ("narrowed", 2), dropped, ("narrowed", 8)
    ]  # fmt: skip
    assert set(outcomes_of(7, operations, 6)) == {("kept", None)}
    words = {kind: text for kind, (_, text) in OUTCOMES.items()}
    assert "number: order of selection" in words["condensed"] and "dense in a factorized layer" in words["dense"]


@pytest.mark.parametrize(
    "operations", [MIXED, MIXED[:1], MIXED[2:3], MIXED[6:7]], ids=["mixed", "prune", "merge", "drop"]
)
def test_a_picture_of_any_plan(operations: tuple[Operation, ...], tmp_path: Path) -> None:
    path = draw_plan(Plan("tiny", operations).to_dict(), 6, range(6), tmp_path / "plan.png")
    pixels = imread(path)
    assert pixels.shape[0] > 250 and pixels.shape[1] > 300
    marked = {**Plan("tiny", operations).to_dict(), "search": {"super_experts": {"largest_outputs": {"2": {"4": 1e4}}}}}
    black = [
        (imread(draw_plan(data, 6, range(6), tmp_path / "x.png"))[..., :3] == 0).all(axis=-1).sum()
        for data in (Plan("tiny", operations).to_dict(), marked)
    ]
    assert black[1] > black[0] + 50, "the frame of the super expert"
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])[:, :3]
    assert (border == 1).all()


def test_super_experts_that_remain_but_change_are_named_by_layer() -> None:
    record = {"largest_outputs": {"1": {"4": 900.0}}, "lost": {}, "changed": []}
    assert super_experts_line(record) == "layer 1: 4, all kept"
    changed = "layer 1: 4, all kept; kept but with other weights or without a router: layer 1"
    assert super_experts_line({**record, "changed": [1]}) == changed
