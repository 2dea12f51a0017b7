"""Coefficients and mean gates from whole texts, against routers watched by plain hooks, and when no pass is needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import byte_tokenizer
from support.tiny_models import EVERY, FAMILIES, blocks, qwen2_moe, recorded, texts, unchanged

import recondense as rc
from recondense.calibration.tape import Tape
from recondense.data.calibration_set import CalibrationSet, make_calibration_set
from recondense.errors import UserError
from recondense.files import JsonFolder
from recondense.methods.cdmoe import CDMoE
from recondense.methods.combined import Combined
from recondense.methods.search import coefficients
from recondense.methods.search.budget import Budget
from recondense.methods.search.cdmoe_scoring import LayerScorer
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.operations import Condense

LENGTHS = (40, 3, 61, 12, 25, 8, 33)  # whole texts; the tape has 12 tokens of each
SHORT = 12


def make_set(lengths: Sequence[int] = LENGTHS, short: int = SHORT, seed: int = 0) -> CalibrationSet:
    whole = texts(seed, lengths)
    return CalibrationSet([ids[:short] for ids in whole], whole if max(lengths) > short else None)


def context_of(model: Any, calibration: CalibrationSet, cache: Any = None, tape: Any = None) -> SearchContext:
    record = tape or (lambda: recorded(model, calibration.ids))
    return SearchContext(model, record, {} if cache is None else cache, 1 << 30, calibration)


@torch.no_grad()
def by_hand(model: Any, ids: Sequence[Sequence[int]]) -> dict[int, tuple[list[int], list[float], float | None]]:
    """Text by text through the whole model: what transformers' own routers return, summed in fp64 by plain loops."""
    totals: dict[int, tuple[list[int], list[float], list[float]]] = {}
    handles = []
    for layer in families.facts(model.config).moe_layers:
        block = model.model.layers[layer].mlp
        experts = block.experts.num_experts
        totals[layer] = ([0] * experts, [0.0] * experts, [])

        def watch_router(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            selected, weights, _ = totals[layer]
            for token_weights, token_experts in zip(output[1].double().tolist(), output[2].tolist(), strict=True):
                for weight, expert in zip(token_weights, token_experts, strict=True):
                    selected[expert] += 1
                    weights[expert] += weight

        def watch_gate(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            totals[layer][2].extend(torch.sigmoid(output.double()).flatten().tolist())

        router = getattr(block, "gate", None) or block.router
        handles.append(router.register_forward_hook(watch_router))
        if hasattr(block, "shared_expert_gate"):
            handles.append(block.shared_expert_gate.register_forward_hook(watch_gate))
    for text in ids:
        model(input_ids=torch.tensor([text]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        layer: (selected, weights, sum(gates) / len(gates) if gates else None)
        for layer, (selected, weights, gates) in totals.items()
    }


def assert_same(record: dict[str, Any], expected: dict[int, tuple[list[int], list[float], float | None]]) -> None:
    """The statistics of every layer in a record of a search are the expected ones."""
    for layer, (selected, weights, gate) in expected.items():
        entry = record["expert_search"][str(layer)]
        assert entry["selected"] == selected
        expected_values = [weight / count if count else None for weight, count in zip(weights, selected, strict=True)]
        for value, reference in zip(entry["coefficients"], expected_values, strict=True):
            assert value == (None if reference is None else pytest.approx(reference, rel=1e-6))
        assert entry["shared_gate_mean"] == (None if gate is None else pytest.approx(gate, rel=1e-6))


@pytest.mark.parametrize("family", EVERY)
def test_whole_texts_give_what_hooks_on_the_routers_count(family: str) -> None:
    model, calibration = EVERY[family](), make_set()
    step = CDMoE(num_experts=2, num_layers=1)
    with unchanged(model):
        operations, record = step.search(context_of(model, calibration))
    expected = by_hand(model, calibration.whole or [])
    assert_same(record, expected)
    assert record["coefficient_texts"] == {"max_length": None, "tokens": sum(LENGTHS)}
    [operation] = operations
    _, _, gate = expected[operation.layer]
    selected, weights, _ = expected[operation.layer]
    assert operation.coefficients == pytest.approx([weights[i] / selected[i] for i in operation.experts], rel=1e-6)
    assert operation.shared_gate == (None if gate is None else pytest.approx(gate, rel=1e-6))


@pytest.mark.parametrize("length", [1, 5, 30, 61])
def test_another_length_gives_the_beginnings(length: int) -> None:
    model, calibration = qwen2_moe(), make_set()
    step = CDMoE(num_experts=1, num_layers="all", coefficient_max_length=length)
    _, record = step.search(context_of(model, calibration))
    assert_same(record, by_hand(model, [ids[:length] for ids in calibration.whole or []]))


@pytest.mark.parametrize("step", [CDMoE(num_experts=2, num_layers=2), CDMoE(num_experts=0, shared_gate="token")])
def test_the_searches_still_see_the_truncated_texts(step: CDMoE) -> None:
    """Only coefficients and gate differ: with those of the short texts, the scores would be the same."""
    model, calibration = qwen2_moe(), make_set()
    _, record = step.search(context_of(model, calibration))
    tape = recorded(model, calibration.ids)
    assert tape.num_tokens == sum(min(length, SHORT) for length in LENGTHS)
    for layer, block in moe_blocks.sparse_blocks(model).items():
        entry = record["expert_search"][str(layer)]
        routing = coefficients.LayerRouting(
            entry["selected"],
            [(value or 0.0) * count for value, count in zip(entry["coefficients"], entry["selected"], strict=True)],
            entry["shared_gate_mean"],
            sum(LENGTHS),
        )
        with torch.no_grad():
            scorer = LayerScorer.prepare(model, tape, block, step.shared_gate == "mean", 1 << 30, routing)
        assert scorer.js_shared_only == entry["js_shared_only"]


LIMITS: list[tuple[int | None, CalibrationSet, dict[str, Any]]] = [
    (SHORT, make_set(), {}),  # the tape's own length
    (None, make_set((12, 3, 7)), {}),  # no text is longer
    (99, make_set((12, 3, 7)), {}),
    (8, make_set((8, 3, 7)), {}),  # a length that cuts nothing
    (None, make_set(), {"max_position_embeddings": SHORT}),  # the model has no position beyond the tape
    (40, make_set(), {"max_position_embeddings": 6}),
]


@pytest.mark.parametrize(("length", "calibration", "settings"), LIMITS)
def test_the_texts_of_the_tape_need_no_other_pass(
    length: int | None, calibration: CalibrationSet, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan, its record and the names in the cache are those of a search that knows only the tape, bit for bit."""
    monkeypatch.setattr(coefficients, "_run", lambda *args: pytest.fail("another pass"))
    model = qwen2_moe(**settings)
    cache: dict[str, Any] = {}
    step = CDMoE(num_experts=2, num_layers=2, coefficient_max_length=length)
    operations, record = step.search(context_of(model, calibration, cache))
    before: dict[str, Any] = {}
    context = SearchContext(model, lambda: recorded(model, calibration.ids), before, 1 << 30)
    expected, expected_record = CDMoE(num_experts=2, num_layers=2).search(context)
    assert operations == expected and cache == before
    assert {**record, "seconds": 0} == {**expected_record, "seconds": 0}
    assert step.key() == CDMoE().key()


@pytest.mark.parametrize(("positions", "length", "cut"), [(30, None, 3), (30, 35, 3), (40, 35, 0), (61, None, 0)])
def test_texts_are_cut_at_the_models_positions(
    positions: int, length: int | None, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, calibration = qwen2_moe(max_position_embeddings=positions), make_set()
    step = CDMoE(num_experts=1, num_layers="all", coefficient_max_length=length)
    with caplog.at_level(logging.INFO, coefficients.__name__):
        _, record = step.search(context_of(model, calibration))
    limit = min(positions, length or positions)
    assert_same(record, by_hand(model, [ids[:limit] for ids in calibration.whole or []]))
    lines = [text for text in caplog.messages if "positions" in text]
    expected = f"coefficients: {cut} of {len(LENGTHS)} texts are cut at the {positions} positions of the model"
    assert lines == ([expected] if cut else [])


@pytest.mark.parametrize("most", [1, 40, 100, 2048])
def test_padding_never_counts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text alone, several sizes of batches, or all texts in one batch."""
    monkeypatch.setattr(coefficients, "TOKENS_PER_BATCH", most)
    model, calibration = FAMILIES["deepseek_v2"](), make_set()
    batches = coefficients.batches_by_length(calibration.whole or [])
    assert sum(int(batch.mask_BS.sum()) for batch in batches) == sum(LENGTHS)
    assert all(batch.mask_BS.numel() <= most or len(batch.mask_BS) == 1 for batch in batches)
    _, record = CDMoE(num_experts=0, num_layers="all").search(context_of(model, calibration))
    assert_same(record, by_hand(model, calibration.whole or []))


def test_a_second_search_reads_the_routing_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration, cache = qwen2_moe(), make_set(), JsonFolder(tmp_path)
    first, record = CDMoE(num_experts=2, num_layers=2).search(context_of(model, calibration, cache))
    suffix = CalibrationSet(calibration.whole or []).fingerprint()[:16]
    names = {"experts-000", "experts-001", "experts-002", "layers-002", "routing"}
    assert {path.stem for path in tmp_path.iterdir()} == {f"{name}-{suffix}" for name in names}
    monkeypatch.setattr(coefficients, "_run", lambda *args: pytest.fail("another pass"))
    must_not = partial(pytest.fail, "the tape was asked for")
    again, same = CDMoE(num_experts=2, num_layers=2).search(context_of(model, calibration, cache, must_not))
    assert again == first and same["reused"] and same["expert_search"] == record["expert_search"]
    more, _ = CDMoE(num_experts=3, num_layers=2).search(context_of(model, calibration, cache))
    fresh, _ = CDMoE(num_experts=2, num_layers=1, coefficient_max_length=SHORT).search(
        context_of(model, calibration, cache)
    )
    assert more[0].coefficients[:2] == next(op for op in first if op.layer == more[0].layer).coefficients
    assert {f"{name}-{suffix}" for name in names} < {path.stem for path in tmp_path.iterdir()}
    assert fresh[0].coefficients != first[0].coefficients


def test_other_ends_of_the_texts_are_other_entries_of_the_cache() -> None:
    model, calibration = qwen2_moe(), make_set()
    whole = [[*ids[:-1], (ids[-1] + 1) % 50] if len(ids) > SHORT else ids for ids in calibration.whole or []]
    changed = CalibrationSet(calibration.ids, whole)
    assert changed.fingerprint() == calibration.fingerprint()
    cache: dict[str, Any] = {}
    step = CDMoE(num_experts=2, num_layers=1)
    one, _ = step.search(context_of(model, calibration, cache))
    other, _ = step.search(context_of(model, changed, cache))
    assert other == step.search(context_of(model, changed))[0] != one


def test_routing_that_is_not_finite_is_refused() -> None:
    model, calibration = qwen2_moe(), make_set()
    calibration = replace(calibration, whole=[[*ids, 49] for ids in calibration.whole or []])
    calibration = replace(calibration, ids=[[i % 49 for i in ids] for ids in calibration.ids])
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = float("nan")
    with pytest.raises(UserError, match=r"decoder layer 0 is NaN or infinite on the whole texts.*coefficient_max_leng"):
        CDMoE(num_experts=1).search(context_of(model, calibration))


@pytest.mark.parametrize("length", [0, -3, 1.5, True, "256"])
def test_a_wrong_length_is_refused(length: Any) -> None:
    message = rf"method.coefficient_max_length={length} must be a whole number of at least 1, or null"
    with pytest.raises(UserError, match=message):
        CDMoE(coefficient_max_length=length)
    with pytest.raises(UserError, match=message):
        Combined(coefficient_max_length=length)


def test_both_papers_together_take_the_coefficients_from_whole_texts() -> None:
    model, calibration = qwen2_moe(), make_set()
    cache: dict[str, Any] = {}
    options: Any = {"num_experts": [2], "prune_ratios": [], "kept_ratios": [], "width_ratios": [], "measurements": 2}
    step = Combined(budget=Budget(memory_ratio=0.9), **options)
    operations, record = step.search(context_of(model, calibration, cache))
    expected = by_hand(model, calibration.whole or [])
    condensed = [operation for operation in operations if isinstance(operation, Condense)]
    assert condensed and record["coefficient_texts"]["tokens"] == sum(LENGTHS)
    for operation in condensed:
        selected, weights, _ = expected[operation.layer]
        assert operation.coefficients == pytest.approx([weights[i] / selected[i] for i in operation.experts], rel=1e-6)
    suffix = CalibrationSet(calibration.whole or []).fingerprint()[:16]
    assert all(name.endswith(suffix) for name in cache if name.startswith(("damage", "experts", "routing")))
    short = replace(step, coefficient_max_length=SHORT)
    others, record = short.search(context_of(model, calibration, cache))
    tape_alone = SearchContext(model, lambda: recorded(model, calibration.ids), {}, 1 << 30)
    assert others == step.search(tape_alone)[0] != operations and "coefficient_texts" not in record


def test_a_tape_carries_the_whole_texts() -> None:
    """In Python, `calibrate` keeps the tokens of the whole texts with the tape, for `search`."""
    tokenizer = byte_tokenizer()
    model = qwen2_moe(vocab_size=len(tokenizer))
    documents = ["ab" * 20, "c" * 5, "de fg" * 9]
    tape = rc.calibrate(model, tokenizer, documents, num_samples=3, max_length=8)
    assert tape.calibration_set == make_calibration_set(documents, tokenizer, 3, 8)
    whole = [tokenizer(text)["input_ids"] for text in documents]
    plan = rc.search(tape, rc.CDMoE(num_experts=1, num_layers="all"))
    assert_same(plan.search, by_hand(model, whole))
    short = rc.search(tape, rc.CDMoE(num_experts=1, num_layers="all", coefficient_max_length=8))
    only_tape = Tape.record(model, blocks([ids[:8] for ids in whole], 8))
    assert short == rc.search(only_tape, rc.CDMoE(num_experts=1, num_layers="all")) != plan
    two_steps = rc.search(tape, [rc.CDMoE(num_experts=1, num_layers=[0]), rc.CDMoE(num_experts=1, num_layers=[2])])
    assert two_steps.search["steps"][1]["coefficient_texts"]["tokens"] == sum(map(len, whole))
