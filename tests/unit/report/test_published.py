"""The published results as data: complete, consistent, and selected by model and setting."""

from __future__ import annotations

import pytest
from support.published_models import model_named

from recondense.report.published import (
    CDMOE,
    DEEPSEEK,
    MIXTRAL,
    MODELS,
    MOEI2,
    PAGE,
    PAPER_TASKS,
    QWEN,
    RESULTS,
    SECOND_HAND,
    V2_LITE,
    Result,
    find,
    published_model,
)


def test_every_row_is_of_a_known_paper_and_model() -> None:
    for row in RESULTS:
        assert row.paper in PAPER_TASKS and row.source.startswith("arXiv 24"), row
        assert model_named(row.model), row
        assert 40 < row.mean < 70, row
        assert {name for name, _ in row.tasks} <= set(PAPER_TASKS[row.paper]), row
        assert row.known_from == (PAGE if row.paper == CDMOE else SECOND_HAND), row


def test_rows_that_stand_apart() -> None:
    """One row has a single score; the paper's best choice of experts is by how often they are selected."""
    [row] = [row for row in RESULTS if len(row.tasks) == 1]
    assert (row.model, row.num_experts, row.num_layers, row.mean, row.tasks) == (
        QWEN,
        0,
        6,
        62.6,
        (("arc_challenge", 41.1),),
    )
    [best] = [row for row in RESULTS if row.variant and row.mean == 55.7]
    assert best.variant == "experts by frequency of selection"
    counts = {
        (model, experts): [
            row.num_layers for row in find(model, num_experts=experts) if row.speedup and "number of" in row.source
        ]
        for model, experts in ((DEEPSEEK, 6), (DEEPSEEK, 0), (QWEN, 4), (QWEN, 0))
    }
    assert set(map(tuple, counts.values())) == {(3, 6, 9, 12, 15)}


def test_memory_ratios_and_removed_ratios_are_never_mixed() -> None:
    for row in RESULTS:
        if row.paper == CDMOE:
            assert row.removed_expert_ratio is None and row.memory_gb is None, row
        else:
            assert row.memory_ratio is None, row


def test_means_are_those_of_the_tasks() -> None:
    rows = [row for row in RESULTS if len(row.tasks) == len(PAPER_TASKS[row.paper])]
    assert [row.setting for row in rows] == ["original", "cdmoe: shared+6, 9 layers, fine-tuned"]
    for row in rows:
        # eight figures rounded to 0.1: their mean is off by less than 0.05, and the mean is rounded too
        assert row.mean == pytest.approx(sum(score for _, score in row.tasks) / len(row.tasks), abs=0.1), row


@pytest.mark.parametrize(
    ("model", "shared"), [(DEEPSEEK, 2816), (QWEN, 5632), (V2_LITE, 2816), (MIXTRAL, 0)], ids=lambda value: str(value)
)
def test_routed_parameters_follow_from_the_shapes(model: str, shared: int) -> None:
    facts = model_named(model)
    expert = 3 * facts.hidden_size * facts.expert_width
    assert facts.routed_expert_parameters == facts.num_moe_layers * facts.num_experts * expert
    rest = facts.total_parameters - facts.routed_expert_parameters
    assert rest > facts.num_moe_layers * facts.hidden_size * (facts.num_experts + 3 * shared)


@pytest.mark.parametrize("model", [DEEPSEEK, QWEN])
def test_published_memory_ratios_are_near_those_of_the_shapes(model: str) -> None:
    """A condensed layer loses the router and the experts that are not retained, and nothing else."""
    facts = model_named(model)
    gates = facts.num_experts + (model == QWEN)
    rows = [row for row in find(model, method="cdmoe") if row.memory_ratio is not None]
    assert len(rows) >= 10
    for row in rows:
        assert row.num_layers is not None and row.num_experts is not None
        lost = 3 * facts.hidden_size * facts.expert_width * (facts.num_experts - row.num_experts)
        derived = 1 - row.num_layers * (lost + gates * facts.hidden_size) / facts.total_parameters
        assert row.memory_ratio == pytest.approx(derived, abs=0.004), row


def test_the_published_cuts_follow_from_prune_and_rank() -> None:
    """Pruning keeps 75% of the experts, and factors of the mean rank a share of their parameters."""
    for name, rank, tolerance in ((V2_LITE, 512, 5e-5), (MIXTRAL, 2048, 0.02)):
        facts = model_named(name)
        width, hidden = facts.expert_width, facts.hidden_size
        cut = 1 - 0.75 * rank * (width + hidden) / (width * hidden)
        published = [row.removed_expert_ratio for row in find(name, method="moei2")]
        assert published[-1] == pytest.approx(cut, abs=tolerance)


def test_models_are_recognised_by_their_numbers() -> None:
    for model in MODELS:
        assert published_model(model.model_type, model.hidden_size, model.num_layers, model.num_experts) is model
    assert published_model("qwen2_moe", 2048, 24, 45) is None
    assert published_model("qwen2_moe", 64, 3, 8) is None
    assert published_model("olmoe", 2048, 16, 64) is None


def test_rows_are_selected_by_model_and_setting() -> None:
    means = lambda rows: [row.mean for row in rows]  # noqa: E731
    assert means(find(QWEN, method="original")) == [65.5]
    assert means(find(QWEN, num_experts=4, num_layers=9)) == [60.2]
    assert means(find(DEEPSEEK, method="cdmoe", num_experts=6, num_layers=9)) == [55.5, 60.4, 55.5]
    assert means(find(DEEPSEEK, num_experts=6, num_layers=9, fine_tuned=True)) == [60.4]
    assert len(find(DEEPSEEK, num_experts=6, num_layers=9, ablations=True)) == 3 + 7
    assert means(find(V2_LITE, removed_expert_ratio=0.54)) == [59.62]
    assert means(find(MIXTRAL, paper=MOEI2)) == [67.53, 67.65, 64.55]
    assert find(MIXTRAL, paper=CDMOE) == () and find("olmoe") == ()


def test_a_setting_in_words() -> None:
    words = [row.setting for row in RESULTS]
    assert "cdmoe: shared+6, 9 layers" in words
    assert "moei2: 53.98% of the experts' parameters cut, fine-tuned" in words
    assert Result(CDMOE, QWEN, "layer_drop", 1.0, "", 8).setting == "layer_drop: 8 layers"
