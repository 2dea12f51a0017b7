"""One set of tests over every method of conf/method and every family: what all methods guarantee."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.condensed import condensed_layers
from support.searched import BUDGETS, METHODS, SEARCHES, overrides_of, plan_of, steps_of
from support.super_expert import LAYER, with_super_expert
from support.tiny_models import EVERY, FAMILIES, bits, logits, recorded, same_bits, unchanged, windows
from transformers import AutoModelForCausalLM

from recondense.config.schema import RecoveryConfig
from recondense.export.write_folder import write_folder
from recondense.models import decoder, families, model_classes, moe_blocks, parameters
from recondense.models.layer_shapes import differs_from_config
from recondense.models.parameters import sizes, weights_bytes
from recondense.operations import Factorize
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.recovery.trainable import trainable_parameters
from recondense.run.sizes import compare
from recondense.surgery import execute
from recondense.surgery.apply import apply

FIRST = next(iter(FAMILIES))
IDS = windows(3, 11)

# Every method on one family, and every family with one method; the rest of the product is slow.
WITH = ("cdmoe", "svd_llm", "mc_smoe", "reap", "layer_drop", "hc_smoe", "expert_drop")
QUICK = {(method, FIRST) for method in METHODS} | set(zip(cycle(WITH), EVERY, strict=False))


def config(family: str) -> Any:
    return EVERY[family]().config


UNSHARED = [family for family in EVERY if not families.facts(config(family)).shared_width]
PRODUCT = [
    pytest.param(method, family, marks=() if (method, family) in QUICK else pytest.mark.slow)
    for method in METHODS
    for family in EVERY
    if method != "cdmoe_s" or family not in UNSHARED
]
CONDENSING = ("cdmoe", "cdmoe_s", "none")
FACTORIZING = ("moei2", "svd_llm")


@pytest.mark.parametrize("family", UNSHARED)
def test_cdmoe_s_is_refused_without_shared_experts(family: str) -> None:
    """From the config alone, before weights are loaded."""
    problems = [problem for step in steps_of("cdmoe_s")[0] for problem in step.check(families.facts(config(family)))]
    assert problems == ["method.num_experts=0 would leave the layers empty: this model has no shared experts"]


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_plan_round_trip(method: str, family: str, tmp_path: Path) -> None:
    plan = plan_of(EVERY[family](), method, tmp_path, *BUDGETS[method])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == Plan.from_json(plan.to_json())


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_search_leaves_the_model_unchanged(method: str, family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    before = logits(model, IDS)
    with unchanged(model):
        plan_of(model, method, tmp_path, *BUDGETS[method])
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("budget", ["small", "the YAML's"])
@pytest.mark.parametrize(("method", "family"), [case for case in PRODUCT if case.values[0] in CONDENSING])
def test_the_numbers_of_layers_and_experts_are_those_of_the_settings(
    method: str, family: str, budget: str, tmp_path: Path
) -> None:
    model = EVERY[family]()
    overrides = BUDGETS[method] if budget == "small" else []
    _, settings = steps_of(method, *overrides)
    facts = families.facts(model.config)
    before = sizes(model)
    plan = plan_of(model, method, tmp_path, *overrides)
    execute.execute(model, plan)
    num_layers = settings.get("num_layers", 0)
    layers = facts.moe_layers if num_layers == "all" else num_layers if isinstance(num_layers, list) else None
    assert plan.layers == tuple(layers) if layers is not None else len(plan.layers) == num_layers
    num_experts = settings.get("num_experts", facts.num_experts)
    assert all(len(cast(Any, operation).experts) == num_experts for operation in plan.operations)
    expert = parameters.parameter_counts(model.config).expert
    # The biases of gpt_oss's down_proj are summed into one.
    merged_biases = facts.hidden_size * (num_experts - 1) if family == "gpt_oss" else 0
    removed = len(plan.layers) * ((facts.num_experts - num_experts) * expert + merged_biases)
    assert before["routed_experts"] - sizes(model)["routed_experts"] == removed
    assert set(condensed_layers(model)) | set(moe_blocks.sparse_blocks(model)) == set(facts.moe_layers)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_the_outline_has_the_sizes_that_the_search_reaches(method: str, family: str, tmp_path: Path) -> None:
    """From shapes alone: no weights, no calibration set. Layer by layer, unless the step leaves the layers open."""
    steps, _ = steps_of(method, *BUDGETS[method])
    model = EVERY[family]()
    meta = model_classes.on_meta(model.config, torch.float32)
    execute.restructure(model, plan_of(model, method, tmp_path, *BUDGETS[method]))
    comparison = compare(meta, steps)
    reached, outlined = sizes(model), [size.bytes_after for size in comparison.layers.values()]
    searched = [weights_bytes(layer) - scale_bytes(layer) for layer in decoder.decoder_layers(model)]
    if not any(step.left_open for step in steps):
        assert sorted(outlined) == sorted(searched)
    # The search may round ranks elsewhere or mix other options than the outline, so sizes may differ a little.
    one_rank = 3 * (32 + 16)  # parameters of an expert of rank one in the tiny models
    tolerance = one_rank * 4 if method == "moei2" else max(searched) // 4 if method == "cdmoe_moei2" else 0
    assert abs(comparison.after.total - reached["total"]) <= tolerance
    assert abs(comparison.after.routed_experts - reached["routed_experts"]) <= tolerance
    assert sizes(meta) == {"total": comparison.before.total, "routed_experts": comparison.before.routed_experts}


def scale_bytes(layer: torch.nn.Module) -> int:
    """Bytes of the scales of a condensed layer; an export folds them into the weights."""
    return sum(buffer.nbytes for name, buffer in layer.named_buffers() if name.endswith("scale"))


def least_removal(steps: list[Any], plan: Plan, model: Any) -> int:
    """The fewest parameters that a method can remove at a time.

    Args:
        model: the original.
    """
    kinds = {operation.kind for operation in plan.operations}
    counts = parameters.parameter_counts(model.config)
    if any(step.removes_layers for step in steps):
        layers = decoder.decoder_layers(model)
        return max(parameters.count_parameters(layers[layer]) for layer in moe_blocks.sparse_blocks(model))
    combined = any(step.condenses for step in steps)
    if "narrow" in kinds and not combined:  # all experts get narrower together
        widths = sum(block.num_experts for block in moe_blocks.sparse_blocks(model).values())
        return 4 * widths * parameters.channel_size(next(iter(moe_blocks.sparse_blocks(model).values())))
    if "factorize" in kinds and not combined:
        return 3 * (32 + 16)  # a rank of one in one expert
    return counts.expert + (counts.router_row if "merge" not in kinds else 0)


@pytest.mark.parametrize(
    ("budget", "ratio"),
    [("memory_ratio", 0.78), ("memory_ratio", 0.96), ("removed_expert_ratio", 0.4), ("removed_expert_ratio", 0.1)],
)
@pytest.mark.parametrize(("method", "family"), [case for case in PRODUCT if case.values[0] != "none"])
def test_the_budget_is_met_as_closely_as_the_method_can(
    method: str, family: str, budget: str, ratio: float, tmp_path: Path
) -> None:
    model = EVERY[family]()
    before = sizes(model)
    expert = parameters.parameter_counts(model.config).expert
    quick = [setting for setting in BUDGETS[method] if "ratio=" not in setting and "num_layers" not in setting]
    other = {"memory_ratio": "removed_expert_ratio", "removed_expert_ratio": "memory_ratio"}[budget]
    overrides = [*quick, f"method.{budget}={ratio}", f"method.{other}=null"]
    if (method, family, ratio) == ("block_drop", "gpt_oss", 0.4):  # the first layer of each type of attention stays
        with pytest.raises(ValueError, match=r"all 1 layers that can be dropped reach removed_expert_ratio=0\.3333"):
            plan_of(model, method, tmp_path, *overrides)
        return
    plan = plan_of(model, method, tmp_path, *overrides)
    unit = least_removal(steps_of(method, *overrides)[0], plan, model)
    execute.execute(model, plan, lambda: recorded(model))
    after = sizes(model)
    if budget == "memory_ratio":
        limit, reached = int(ratio * before["total"]), after["total"]
    else:
        limit = before["routed_experts"] - round(ratio * before["routed_experts"])
        # Only whole experts can go: the nearest number of them.
        if {operation.kind for operation in plan.operations} <= {"prune", "merge"}:
            limit = before["routed_experts"] - round(ratio * before["routed_experts"] / expert) * expert
        reached = after["routed_experts"]
    assert reached <= limit < reached + unit


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_two_searches_decide_the_same(method: str, family: str, tmp_path: Path) -> None:
    """Two searches with caches of their own, and a third that reads the cache of the first."""
    plans = [plan_of(EVERY[family](), method, tmp_path / str(index), *BUDGETS[method]) for index in (0, 1, 0)]
    assert plans[0].operations == plans[1].operations == plans[2].operations
    assert plans[0].search == plans[1].search == plans[2].search


@pytest.fixture(scope="module")
def plans_of_two_processes(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with the plan of every method, searched by two processes that iterate over sets in different orders."""
    folder = tmp_path_factory.mktemp("together")

    def start(rank: int) -> subprocess.Popen[str]:
        paths = os.pathsep.join(map(str, (root / "src", root, root / "tests")))
        env = os.environ | {"PYTHONHASHSEED": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, "-m", "support.searched", str(folder), str(rank)]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    for process in [start(0), start(1)]:
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize(("method", "tape"), SEARCHES)
def test_two_processes_decide_what_one_decides(
    method: str, tape: str, plans_of_two_processes: Path, tmp_path: Path
) -> None:
    """The same bytes for every kind of tape. The test runs with one thread, as the two processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = plan_of(EVERY[FIRST](), method, tmp_path, *overrides_of(method, tape))
    finally:
        torch.set_num_threads(before)
    name = f"{method}-{tape}" if tape else method
    assert (plans_of_two_processes / f"{name}.json").read_text(encoding="utf-8") == plan.to_json() + "\n"


def test_two_processes_find_the_same_super_expert(plans_of_two_processes: Path) -> None:
    """Only one of them may have the text batch with its tokens."""
    _, expert = with_super_expert(FIRST)
    assert json.loads((plans_of_two_processes / "super_experts.json").read_text()) == [[LAYER, expert]]


# Two test processes with two threads each slow each other down, so the quick tests have only two methods.
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("cdmoe", "reap"))) for name in METHODS]
)
def test_two_threads_decide_what_one_decides(method: str, tmp_path: Path) -> None:
    """Two threads sum in another order than one, so numbers differ in their last digits."""
    before = torch.get_num_threads()
    plans = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plans.append(plan_of(EVERY[FIRST](), method, tmp_path / str(threads), *BUDGETS[method]))
    finally:
        torch.set_num_threads(before)
    single, threaded = plans

    def without_floats(plan: Plan) -> Any:
        return json.loads(plan.to_json(), parse_float=lambda text: None)["operations"]

    assert without_floats(threaded) == without_floats(single)
    values = [
        [value for operation in plan.operations for value in vars(operation).values()] for plan in (threaded, single)
    ]
    assert len(values[0]) == len(values[1])
    for actual, expected in zip(*values, strict=True):
        if isinstance(actual, float) or (isinstance(actual, tuple) and actual and isinstance(actual[0], float)):
            assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_logits_are_finite_and_change_only_if_the_plan_does_something(method: str, family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    before = logits(model, IDS)
    plan = plan_of(model, method, tmp_path, *BUDGETS[method])
    execute.execute(model, plan, lambda: recorded(model))
    after = logits(model, IDS)
    assert bool(after.isfinite().all())
    assert torch.equal(after, before) == (not plan.operations)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_export_then_load_gives_equal_logits(method: str, family: str, tmp_path: Path) -> None:
    """With recondense installed; tests/unit/export loads folders without it."""
    model = EVERY[family]()
    plan = plan_of(model, method, tmp_path / "cache", *BUDGETS[method])
    execute.execute(model, plan, lambda: recorded(model))
    assert differs_from_config(model) == bool(plan.operations)
    kind = write_folder(model, None, plan, tmp_path / "out", "")
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    model_type = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert model_type == (family if kind == "stock" else f"recondense_{family}")
    model_classes.register_model_type(model_type)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not differs_from_config(loaded)
    if kind == "bundled":  # the plan alone gives the same shapes
        shaped = EVERY[family](seed=5)
        execute.restructure(shaped, plan)
        for block in condensed_layers(shaped).values():
            block.fold()
        shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (loaded, shaped)]
        assert shapes[0] == shapes[1]
    torch.testing.assert_close(logits(loaded.eval(), IDS), logits(model, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_only_named_parameters_receive_gradients(method: str, family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    plan = plan_of(model, method, tmp_path, *BUDGETS[method])
    objective = cast(Any, "distill" if plan.operations else "finetune")
    recovery = RecoveryConfig(name="x", objective=objective, steps=1)
    student = apply(model, plan, lambda: recorded(model))
    module = RecoveryModule(student, recovery)
    module.prepare()
    before = bits(module.originals)
    named = set(trainable_parameters(model, plan.layers, "experts"))
    module.losses(IDS)["loss"].backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == named
    assert student.has_original == bool(plan.operations)
    assert all(parameter.grad is None for parameter in module.originals.parameters())
    layers = {name.split(".")[2] for name in named}
    dropped = {operation.layer for operation in plan.operations if operation.kind == "drop"}
    changed = [layer for layer in plan.layers if layer not in dropped]
    unchanged_layers = [layer for layer in families.facts(model.config).moe_layers if layer not in dropped]
    assert layers == {str(layer) for layer in changed or unchanged_layers}
    for name, parameter in model.named_parameters():  # the teacher shares no parameter that trains
        if name in named:
            parameter.data.zero_()
    assert same_bits(bits(module.originals), before)


@pytest.mark.parametrize("family", EVERY)
def test_an_empty_plan_is_bit_identical(family: str) -> None:
    model = EVERY[family]()
    before, expected = bits(model), logits(model, IDS)
    student = apply(model, Plan("tiny"))
    assert not student.has_original and same_bits(bits(model), before)
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("family", EVERY)
def test_full_rank_equals_the_original(family: str, whitening: bool) -> None:
    """Every projection of every expert in two factors of rank min(D, F) = 16, through a plan and surgery."""
    model = EVERY[family]()
    before = logits(model, IDS)
    full = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (16,) * 6)
    operations = tuple(Factorize(layer, full, whitening) for layer in moe_blocks.sparse_blocks(model))
    execute.execute(model, Plan("tiny", operations), lambda: recorded(model))
    assert not torch.equal(logits(model, IDS), before)  # so the factors were used
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "family"), [case for case in PRODUCT if case.values[0] in FACTORIZING])
def test_a_budget_of_everything_leaves_every_expert_dense(method: str, family: str, tmp_path: Path) -> None:
    """A rank above the break-even saves nothing, so a budget of all parameters factorizes no expert."""
    model = EVERY[family]()
    without = ("method.memory_ratio=null", "method.removed_expert_ratio=null")
    plan = plan_of(model, method, tmp_path, *without, "method.ratio=1")
    assert not [operation for operation in plan.operations if isinstance(operation, Factorize)]


@pytest.mark.parametrize("method", ["cdmoe", "cdmoe_s"])
@pytest.mark.parametrize("family", EVERY)
def test_condensing_to_all_experts_under_constant_routing_changes_nothing(
    method: str, family: str, tmp_path: Path
) -> None:
    """The only case in which condensing loses nothing: constant routing weights, every expert retained."""
    top_k = {"num_experts_per_tok": 6}
    model = EVERY[family](**top_k)
    with torch.no_grad():
        for block in moe_blocks.sparse_blocks(model).values():
            block.router.weight.zero_()  # type: ignore[operator]
    before = logits(model, IDS)
    overrides = ["method.num_experts=6", "method.shared_gate=token"]
    plan = plan_of(model, method, tmp_path, *overrides)
    execute.execute(model, plan)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
