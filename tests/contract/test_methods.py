"""One battery over every method of conf/method and every family: what any method promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_models import FAMILIES, bits, logits, recorded, same_bits, unchanged, windows
from transformers import AutoConfig, AutoModelForCausalLM

from recondense import families, surgery
from recondense.cache import JsonFolder
from recondense.command_line import build_steps
from recondense.config import RecoveryConfig, read
from recondense.export import condensed_layers, export
from recondense.plan import Plan
from recondense.recovery import RecoveryModule, trainable_parameters
from recondense.summary import sizes

CONF = Path(__file__).resolve().parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
FIRST = next(iter(FAMILIES))
IDS = windows(3, 11)

# Every method on one family, each family with some method; the rest of the product with the slow tests.
QUICK = {(method, FIRST) for method in METHODS} | {("cdmoe", family) for family in FAMILIES}
PRODUCT = [
    pytest.param(method, family, marks=() if (method, family) in QUICK else pytest.mark.slow)
    for method in METHODS
    for family in FAMILIES
]
CONDENSING = ("cdmoe", "cdmoe_s", "none")
# A budget below "everything", as a user would write it.
BUDGETS: dict[str, list[str]] = {
    "cdmoe": ["method.num_experts=2", "method.num_layers=1"],
    "cdmoe_s": ["method.num_layers=[2]"],
    "none": [],
    **{
        name: ["method.removed_expert_ratio=0.4"]
        for name in (
            *("random", "frequency", "routing_weight", "reap", "naee", "expert_drop", "mc_smoe", "hc_smoe"),
            "layer_drop",
        )
    },
    "block_drop": ["method.memory_ratio=0.8"],
    "svd_llm": ["method.memory_ratio=0.8"],
    "cdmoe_moei2": [
        *("method.memory_ratio=0.85", "method.num_experts=[2]", "method.prune_ratios=[0.34]"),
        *("method.kept_ratios=[0.5]", "method.population=20"),
    ],
    "moei2": ["method.prune_ratio=0.34", "method.memory_ratio=0.7", "method.population=10", "method.parents=4"],
}


def steps_of(method: str, *overrides: str) -> tuple[list[Any], dict[str, Any]]:
    """The steps that a command would run, and the method's settings."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        values = OmegaConf.to_container(compose("train", [f"method={method}", *overrides]), resolve=True)
    config, problems = read(cast(dict[str, Any], values))
    assert problems == []
    return build_steps(config.method), dict(config.method)


def plan_of(model: Any, method: str, folder: Path, *overrides: str) -> Plan:
    """Searched step by step, each step on the model that the previous one left; the model is left as it was."""
    steps, _ = steps_of(method, *overrides)
    facts = families.facts(model.config)
    assert [problem for step in steps for problem in step.check(facts)] == []
    operations: list[Any] = []
    records: list[dict[str, Any]] = []
    originals: dict[int, Any] = {}
    for index, step in enumerate(steps):
        chosen, record = step.search(model, lambda: recorded(model), JsonFolder(folder / str(index)), 1 << 30)
        operations += chosen
        records.append(record)
        if step is not steps[-1]:
            originals = {**surgery.apply(model, Plan("tiny", tuple(chosen)), lambda: recorded(model)), **originals}
    for layer, block in originals.items():
        families.set_block(model, layer, block)
    return Plan("tiny", tuple(operations), search={"steps": records})


def test_every_method_has_a_budget_here() -> None:
    """Who adds a method says what a small budget of it is."""
    assert set(BUDGETS) == set(METHODS)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_plan_round_trip(method: str, family: str, tmp_path: Path) -> None:
    plan = plan_of(FAMILIES[family](), method, tmp_path, *BUDGETS[method])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == Plan.from_json(plan.to_json())


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_search_leaves_the_model_unchanged(method: str, family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before = logits(model, IDS)
    with unchanged(model):
        plan_of(model, method, tmp_path, *BUDGETS[method])
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("budget", ["small", "the YAML's"])
@pytest.mark.parametrize(("method", "family"), [each for each in PRODUCT if each.values[0] in CONDENSING])
def test_as_many_layers_and_experts_as_asked_for(method: str, family: str, budget: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    overrides = BUDGETS[method] if budget == "small" else []
    _, settings = steps_of(method, *overrides)
    facts = families.facts(model.config)
    before = sizes(model)
    plan = plan_of(model, method, tmp_path, *overrides)
    surgery.apply(model, plan)
    wanted = settings.get("num_layers", 0)
    layers = facts.moe_layers if wanted == "all" else wanted if isinstance(wanted, list) else None
    assert plan.layers == tuple(layers) if layers is not None else len(plan.layers) == wanted
    num_experts = settings.get("num_experts", facts.num_experts)
    assert all(len(cast(Any, operation).experts) == num_experts for operation in plan.operations)
    expert = 3 * facts.hidden_size * facts.expert_width
    lost = len(plan.layers) * (facts.num_experts - num_experts) * expert
    assert before["routed_experts"] - sizes(model)["routed_experts"] == lost
    assert set(condensed_layers(model)) | set(families.sparse_blocks(model)) == set(facts.moe_layers)


EXPERT, RANK = 3 * 32 * 16, 3 * (32 + 16)  # parameters of the tiny models
# The least that a method can remove at a time: an expert (with its router row), a rank of one, or a layer (None).
UNITS: dict[str, int | None] = {
    **dict.fromkeys(("random", "frequency", "routing_weight", "reap", "naee", "expert_drop"), EXPERT + 32),
    **dict.fromkeys(("mc_smoe", "hc_smoe"), EXPERT),
    **dict.fromkeys(("svd_llm", "moei2"), RANK),
    **dict.fromkeys(("cdmoe", "cdmoe_s", "layer_drop", "block_drop", "cdmoe_moei2"), None),
}


@pytest.mark.parametrize("budget", ["memory_ratio", "removed_expert_ratio"])
@pytest.mark.parametrize(("method", "family"), [each for each in PRODUCT if each.values[0] != "none"])
def test_the_budget_is_kept_as_closely_as_the_method_can(method: str, family: str, budget: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before = sizes(model)
    layer = max(
        sum(parameter.numel() for parameter in families.decoder_layers(model)[layer].parameters())
        for layer in families.sparse_blocks(model)
    )
    quick = [each for each in BUDGETS[method] if "ratio=" not in each and "num_layers" not in each]
    other = {"memory_ratio": "removed_expert_ratio", "removed_expert_ratio": "memory_ratio"}[budget]
    ratio = 0.78 if budget == "memory_ratio" else 0.4
    plan = plan_of(model, method, tmp_path, *quick, f"method.{budget}={ratio}", f"method.{other}=null")
    surgery.apply(model, plan, lambda: recorded(model))
    after = sizes(model)
    if budget == "memory_ratio":
        limit, reached = int(ratio * before["total"]), after["total"]
    else:
        # Whole experts: as many as round to the ratio.
        limit = before["routed_experts"] - round(ratio * before["routed_experts"])
        if UNITS[method] in (EXPERT, EXPERT + 32):
            limit = before["routed_experts"] - round(ratio * before["routed_experts"] / EXPERT) * EXPERT
        reached = after["routed_experts"]
    assert reached <= limit < reached + (UNITS[method] or layer)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_two_searches_decide_the_same(method: str, family: str, tmp_path: Path) -> None:
    """Each with a cache of its own; then one that reads the other's."""
    plans = [plan_of(FAMILIES[family](), method, tmp_path / str(index), *BUDGETS[method]) for index in (0, 1, 0)]
    assert plans[0].operations == plans[1].operations == plans[2].operations
    apart = ("seconds", "reused")
    found = [[{k: v for k, v in step.items() if k not in apart} for step in plan.search["steps"]] for plan in plans]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_logits_are_finite_and_change_only_if_something_did(method: str, family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before = logits(model, IDS)
    plan = plan_of(model, method, tmp_path, *BUDGETS[method])
    surgery.apply(model, plan, lambda: recorded(model))
    after = logits(model, IDS)
    assert bool(after.isfinite().all())
    assert torch.equal(after, before) == (not plan.operations)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_export_then_load_gives_equal_logits(method: str, family: str, tmp_path: Path) -> None:
    """Here with the live classes; tests/unit/test_export.py loads where recondense does not exist."""
    model = FAMILIES[family]()
    plan = plan_of(model, method, tmp_path / "cache", *BUDGETS[method])
    surgery.apply(model, plan, lambda: recorded(model))
    kind = export(model, None, plan, tmp_path / "out", "")
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    if kind == "stock":
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:  # restructured from the plan alone, then filled with the folder's weights
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)
        again = FAMILIES[family](seed=5)
        surgery.restructure(again, Plan.load(tmp_path / "out" / "plan.json"))
        for block in condensed_layers(again).values():
            block.fold()
        load_weights(again, tmp_path / "out")
    torch.testing.assert_close(logits(again.eval(), IDS), logits(model, IDS), rtol=0, atol=1e-4)


def load_weights(model: Any, folder: Path) -> None:
    """Fill a model from a folder's safetensors; on disk the experts are separate."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name in state:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            prefix, _, kind = name.rpartition(".")
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            each = [
                torch.cat([stored.pop(f"{prefix}.{expert}.{part}.weight") for part in parts])
                for expert in range(state[name].shape[0])
            ]
            stored[name] = torch.stack(each)
    model.load_state_dict(stored)


@pytest.mark.parametrize(("method", "family"), PRODUCT)
def test_only_named_parameters_receive_gradients(method: str, family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    plan = plan_of(model, method, tmp_path, *BUDGETS[method])
    objective = cast(Any, "distill" if plan.operations else "finetune")
    recovery = RecoveryConfig(name="x", objective=objective, steps=1)
    module = RecoveryModule(model, recovery, plan=plan, record=lambda: recorded(model))
    module.prepare()
    before = bits(module.teacher) if module.teacher else {}
    named = set(trainable_parameters(model, plan.layers, "experts"))
    module.losses(IDS)["loss"].backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == named
    assert all(parameter.grad is None for parameter in module.teacher.parameters()) if module.teacher else True
    layers = {name.split(".")[2] for name in named}
    gone = {operation.layer for operation in plan.operations if operation.kind == "drop"}
    changed = [layer for layer in plan.layers if layer not in gone]
    left = [layer for layer in families.facts(model.config).moe_layers if layer not in gone]
    assert layers == {str(layer) for layer in changed or left}
    for name, parameter in model.named_parameters():  # the teacher shares nothing that trains
        if name in named:
            parameter.data.zero_()
    assert module.teacher is None or same_bits(bits(module.teacher), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_plan_is_bit_identical(family: str) -> None:
    model = FAMILIES[family]()
    before, expected = bits(model), logits(model, IDS)
    module = RecoveryModule(model, RecoveryConfig(), plan=Plan("tiny"))
    module.prepare()
    assert module.teacher is None and same_bits(bits(model), before)
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("method", ["cdmoe", "cdmoe_s"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_of_a_layer_that_weighs_them_alike_are_the_layer(method: str, family: str, tmp_path: Path) -> None:
    """The one case in which condensing loses nothing: constant routing weights, every expert kept."""
    top_k = {"num_experts_per_tok": 6}
    model = FAMILIES[family](**top_k)
    with torch.no_grad():
        for block in families.sparse_blocks(model).values():
            block.router.weight.zero_()  # type: ignore[operator]
    before = logits(model, IDS)
    overrides = ["method.num_experts=6", "method.shared_gate=token"]
    plan = plan_of(model, method, tmp_path, *overrides)
    surgery.apply(model, plan)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
