"""One battery over every method of conf/method and every family: what any method promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.condensed import condensed_layers
from support.searched import BUDGETS, METHODS, TAPES, WITH_OTHER_TAPES, plan_of, steps_of
from support.tiny_models import EVERY, FAMILIES, bits, logits, recorded, same_bits, unchanged, windows
from transformers import AutoModelForCausalLM

from recondense.config.schema import RecoveryConfig
from recondense.export.write_folder import write_folder
from recondense.models import classes, decoder, families, parameters, views
from recondense.models.parameters import sizes, weights_bytes
from recondense.operations import Factorize
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.recovery.trainable import trainable_parameters
from recondense.run.sizes import compare
from recondense.surgery import apply
from recondense.surgery import student as student_module

FIRST = next(iter(FAMILIES))
IDS = windows(3, 11)

# Every method on one family, each family with some method; the rest of the product with the slow tests.
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
def test_without_shared_experts_nothing_is_left_by_cdmoe_s(family: str) -> None:
    """Said from the config, before weights are loaded."""
    problems = [problem for step in steps_of("cdmoe_s")[0] for problem in step.check(families.facts(config(family)))]
    assert problems == ["method.num_experts=0 leaves nothing of a layer: this model has no shared experts"]


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
@pytest.mark.parametrize(("method", "family"), [each for each in PRODUCT if each.values[0] in CONDENSING])
def test_as_many_layers_and_experts_as_asked_for(method: str, family: str, budget: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    overrides = BUDGETS[method] if budget == "small" else []
    _, settings = steps_of(method, *overrides)
    facts = families.facts(model.config)
    before = sizes(model)
    plan = plan_of(model, method, tmp_path, *overrides)
    apply.execute(model, plan)
    wanted = settings.get("num_layers", 0)
    layers = facts.moe_layers if wanted == "all" else wanted if isinstance(wanted, list) else None
    assert plan.layers == tuple(layers) if layers is not None else len(plan.layers) == wanted
    num_experts = settings.get("num_experts", facts.num_experts)
    assert all(len(cast(Any, operation).experts) == num_experts for operation in plan.operations)
    expert = parameters.parameter_counts(model.config).expert
    joined = facts.hidden_size * (num_experts - 1) if family == "gpt_oss" else 0  # biases of down_proj become one
    lost = len(plan.layers) * ((facts.num_experts - num_experts) * expert + joined)
    assert before["routed_experts"] - sizes(model)["routed_experts"] == lost
    assert set(condensed_layers(model)) | set(views.sparse_blocks(model)) == set(facts.moe_layers)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_the_outline_has_the_sizes_that_the_search_reaches(method: str, family: str, tmp_path: Path) -> None:
    """From shapes alone: no weights, no calibration set. Layer by layer, unless the step says what is left open."""
    steps, _ = steps_of(method, *BUDGETS[method])
    model = EVERY[family]()
    meta = classes.on_meta(model.config, torch.float32)
    apply.restructure(model, plan_of(model, method, tmp_path, *BUDGETS[method]))
    found = compare(meta, steps)
    reached, layers = sizes(model), [size.bytes_after for size in found.layers.values()]
    left = [weights_bytes(each) - scale_bytes(each) for each in decoder.decoder_layers(model)]
    if not any(step.left_open for step in steps):
        assert sorted(layers) == sorted(left)
    # Ranks that are rounded elsewhere, and another mix of options, reach the budget less exactly.
    rank = 3 * (32 + 16)  # what a rank of one takes in an expert of the tiny models
    step = rank * 4 if method == "moei2" else max(left) // 4 if method == "cdmoe_moei2" else 0
    assert abs(found.after.total - reached["total"]) <= step
    assert abs(found.after.routed_experts - reached["routed_experts"]) <= step
    assert sizes(meta) == {"total": found.before.total, "routed_experts": found.before.routed_experts}


def scale_bytes(layer: torch.nn.Module) -> int:
    """Of condensed layers: an export folds the scale into the weights."""
    return sum(buffer.nbytes for name, buffer in layer.named_buffers() if name.endswith("scale"))


def least_removal(steps: list[Any], plan: Plan, model: Any) -> int:
    """The fewest parameters that a method can remove at a time.

    Args:
        model: uncompressed.
    """
    kinds = {operation.kind for operation in plan.operations}
    counts = parameters.parameter_counts(model.config)
    if any(step.condenses or step.removes_layers for step in steps):
        layers = decoder.decoder_layers(model)
        return max(parameters.count_parameters(layers[layer]) for layer in views.sparse_blocks(model))
    if "factorize" in kinds:
        return 3 * (32 + 16)  # one rank of one expert
    return counts.expert + (counts.router_row if "merge" not in kinds else 0)


@pytest.mark.parametrize(
    ("budget", "ratio"),
    [("memory_ratio", 0.78), ("memory_ratio", 0.96), ("removed_expert_ratio", 0.4), ("removed_expert_ratio", 0.1)],
)
@pytest.mark.parametrize(("method", "family"), [each for each in PRODUCT if each.values[0] != "none"])
def test_the_budget_is_kept_as_closely_as_the_method_can(
    method: str, family: str, budget: str, ratio: float, tmp_path: Path
) -> None:
    model = EVERY[family]()
    before = sizes(model)
    expert = parameters.parameter_counts(model.config).expert
    quick = [each for each in BUDGETS[method] if "ratio=" not in each and "num_layers" not in each]
    other = {"memory_ratio": "removed_expert_ratio", "removed_expert_ratio": "memory_ratio"}[budget]
    overrides = [*quick, f"method.{budget}={ratio}", f"method.{other}=null"]
    if (method, family, ratio) == ("block_drop", "gpt_oss", 0.4):  # the first of each type of attention stays
        with pytest.raises(ValueError, match=r"all 1 that can go give removed_expert_ratio=0\.3333"):
            plan_of(model, method, tmp_path, *overrides)
        return
    plan = plan_of(model, method, tmp_path, *overrides)
    unit = least_removal(steps_of(method, *overrides)[0], plan, model)
    apply.execute(model, plan, lambda: recorded(model))
    after = sizes(model)
    if budget == "memory_ratio":
        limit, reached = int(ratio * before["total"]), after["total"]
    else:
        # Whole experts: as many as round to the ratio.
        limit = before["routed_experts"] - round(ratio * before["routed_experts"])
        if {operation.kind for operation in plan.operations} <= {"prune", "merge"}:
            limit = before["routed_experts"] - round(ratio * before["routed_experts"] / expert) * expert
        reached = after["routed_experts"]
    assert reached <= limit < reached + unit


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_two_searches_decide_the_same(method: str, family: str, tmp_path: Path) -> None:
    """Each with a cache of its own; then one that reads the other's."""
    plans = [plan_of(EVERY[family](), method, tmp_path / str(index), *BUDGETS[method]) for index in (0, 1, 0)]
    assert plans[0].operations == plans[1].operations == plans[2].operations
    assert plans[0].search == plans[1].search == plans[2].search


@pytest.fixture(scope="module")
def decided_together(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with the plan of every method, by two processes that share the work, sets in other orders."""
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


@pytest.mark.parametrize(("method", "tape"), [*((method, "") for method in METHODS), *product(WITH_OTHER_TAPES, TAPES)])
def test_two_processes_decide_what_one_decides(method: str, tape: str, decided_together: Path, tmp_path: Path) -> None:
    """To the byte, wherever their tape lies. The tests run with one thread, as do the two processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mine = plan_of(EVERY[FIRST](), method, tmp_path, *BUDGETS[method])
    finally:
        torch.set_num_threads(before)
    name = f"{method}-{tape}" if tape else method
    assert (decided_together / f"{name}.json").read_text(encoding="utf-8") == mine.to_json() + "\n"


# Two threads of each of two processes of tests wait for each other: few methods, those that sum the most.
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("cdmoe", "reap"))) for name in METHODS]
)
def test_two_threads_decide_what_one_decides(method: str, tmp_path: Path) -> None:
    """Threads sum in another order, so that with two of them numbers differ in their last digits."""
    before = torch.get_num_threads()
    here = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            here.append(plan_of(EVERY[FIRST](), method, tmp_path / str(threads), *BUDGETS[method]))
    finally:
        torch.set_num_threads(before)
    mine, threaded = here

    def but_for_floats(plan: Plan) -> Any:
        return json.loads(plan.to_json(), parse_float=lambda text: None)["operations"]

    assert but_for_floats(threaded) == but_for_floats(mine)
    own = [[value for each in plan.operations for value in vars(each).values()] for plan in (threaded, mine)]
    assert len(own[0]) == len(own[1])
    for left, right in zip(*own, strict=True):
        if isinstance(left, float) or (isinstance(left, tuple) and left and isinstance(left[0], float)):
            assert left == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_logits_are_finite_and_change_only_if_something_did(method: str, family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    before = logits(model, IDS)
    plan = plan_of(model, method, tmp_path, *BUDGETS[method])
    apply.execute(model, plan, lambda: recorded(model))
    after = logits(model, IDS)
    assert bool(after.isfinite().all())
    assert torch.equal(after, before) == (not plan.operations)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_export_then_load_gives_equal_logits(method: str, family: str, tmp_path: Path) -> None:
    """Here with the live classes; tests/unit/test_export.py loads where recondense does not exist."""
    model = EVERY[family]()
    plan = plan_of(model, method, tmp_path / "cache", *BUDGETS[method])
    apply.execute(model, plan, lambda: recorded(model))
    kind = write_folder(model, None, plan, tmp_path / "out", "")
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    said = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert said == (family if kind == "stock" else f"recondense_{family}")
    classes.register_model_type(said)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if kind == "bundled":  # the shapes that the plan alone makes
        shaped = EVERY[family](seed=5)
        apply.restructure(shaped, plan)
        for block in condensed_layers(shaped).values():
            block.fold()
        sizes_of = [{name: value.shape for name, value in each.state_dict().items()} for each in (again, shaped)]
        assert sizes_of[0] == sizes_of[1]
    torch.testing.assert_close(logits(again.eval(), IDS), logits(model, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_only_named_parameters_receive_gradients(method: str, family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    plan = plan_of(model, method, tmp_path, *BUDGETS[method])
    objective = cast(Any, "distill" if plan.operations else "finetune")
    recovery = RecoveryConfig(name="x", objective=objective, steps=1)
    student = student_module.apply(model, plan, lambda: recorded(model))
    module = RecoveryModule(student, recovery)
    module.prepare()
    before = bits(module.originals)
    named = set(trainable_parameters(model, plan.layers, "experts"))
    module.losses(IDS)["loss"].backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == named
    assert student.has_original == bool(plan.operations)
    assert all(parameter.grad is None for parameter in module.originals.parameters())
    layers = {name.split(".")[2] for name in named}
    gone = {operation.layer for operation in plan.operations if operation.kind == "drop"}
    changed = [layer for layer in plan.layers if layer not in gone]
    left = [layer for layer in families.facts(model.config).moe_layers if layer not in gone]
    assert layers == {str(layer) for layer in changed or left}
    for name, parameter in model.named_parameters():  # the teacher shares nothing that trains
        if name in named:
            parameter.data.zero_()
    assert same_bits(bits(module.originals), before)


@pytest.mark.parametrize("family", EVERY)
def test_an_empty_plan_is_bit_identical(family: str) -> None:
    model = EVERY[family]()
    before, expected = bits(model), logits(model, IDS)
    student = student_module.apply(model, Plan("tiny"))
    assert not student.has_original and same_bits(bits(model), before)
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("family", EVERY)
def test_full_rank_equals_the_original(family: str, whitening: bool) -> None:
    """Every projection of every expert in two factors of min(D, F) = 16, through a plan and surgery."""
    model = EVERY[family]()
    before = logits(model, IDS)
    full = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (16,) * 6)
    operations = tuple(Factorize(layer, full, whitening) for layer in views.sparse_blocks(model))
    apply.execute(model, Plan("tiny", operations), lambda: recorded(model))
    assert not torch.equal(logits(model, IDS), before)  # it did go through the factors
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "family"), [each for each in PRODUCT if each.values[0] in FACTORIZING])
def test_a_budget_of_everything_leaves_every_expert_dense(method: str, family: str, tmp_path: Path) -> None:
    """A rank above the break-even saves nothing, so that keeping all of the parameters changes nothing."""
    model = EVERY[family]()
    without = ("method.memory_ratio=null", "method.removed_expert_ratio=null")
    plan = plan_of(model, method, tmp_path, *without, "method.ratio=1")
    assert not [operation for operation in plan.operations if isinstance(operation, Factorize)]


@pytest.mark.parametrize("method", ["cdmoe", "cdmoe_s"])
@pytest.mark.parametrize("family", EVERY)
def test_all_experts_of_a_layer_that_weighs_them_alike_are_the_layer(method: str, family: str, tmp_path: Path) -> None:
    """The one case in which condensing loses nothing: constant routing weights, every expert kept."""
    top_k = {"num_experts_per_tok": 6}
    model = EVERY[family](**top_k)
    with torch.no_grad():
        for block in views.sparse_blocks(model).values():
            block.router.weight.zero_()  # type: ignore[operator]
    before = logits(model, IDS)
    overrides = ["method.num_experts=6", "method.shared_gate=token"]
    plan = plan_of(model, method, tmp_path, *overrides)
    apply.execute(model, plan)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
