"""Every method meets a budget to within its unit: an expert, a step of its rank, a layer, or a step of all widths."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.searched import CONF, METHODS, plan_of, steps_of
from support.tiny_models import EVERY
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.errors import UserError
from recondense.methods.search import widths
from recondense.methods.search.ranks import resolve_multiple
from recondense.models import decoder, families, model_classes, moe_blocks, parameters
from recondense.models.parameters import count_parameters, sizes
from recondense.models.published_configs import recorded_config
from recondense.run.build_steps import build_steps
from recondense.run.sizes import outlined
from recondense.surgery import execute

RATIOS = (0.9, 0.8, 0.725, 0.6, 0.5)
LIMITED = [method for method in METHODS if method != "none"]
KINDS = (  # a method per class
    *("cdmoe", "cdmoe_s", "cdmoe_moei2", "moei2", "svd_llm", "reap", "hc_smoe", "block_drop"),
    "half_merge",
)
EMBEDDED, GROUPS = "the embedded model", "groups of experts"
# Shared experts without a gate, none, and biases.
PUBLISHED = ("deepseek-ai/deepseek-moe-16b-base", "mistralai/Mixtral-8x7B-v0.1", "openai/gpt-oss-20b")
MODELS = [
    *((method, EMBEDDED) for method in LIMITED),
    *((kind, name) for name in (GROUPS, *PUBLISHED) for kind in KINDS),
]


@functools.cache
def embedded_config() -> PretrainedConfig:
    pretrain = yaml.safe_load((CONF / "model" / "tiny_moe.yaml").read_text(encoding="utf-8"))["model"]["pretrain"]
    return Qwen2MoeConfig(vocab_size=pretrain["vocab_size"], **pretrain["config"])


@functools.cache
def without_weights(name: str) -> Any:
    if name == GROUPS:
        config = EVERY["deepseek_v3"](n_routed_experts=12, n_group=2, topk_group=1).config
    else:
        config = embedded_config() if name == EMBEDDED else recorded_config(name)
    return model_classes.on_meta(config, torch.float32)


def steps_for(method: str, ratio: float) -> list[Any]:
    _, settings = steps_of(method, "method.memory_ratio=0.5")
    return build_steps({**settings, "memory_ratio": ratio})


def unit_of(steps: list[Any], model: Any) -> int:
    """The fewest parameters that a method can remove at a time.

    Args:
        model: the original.
    """
    step, layers = steps[-1], moe_blocks.sparse_blocks(model)
    counts, facts = parameters.parameter_counts(model.config), families.facts(model.config)
    if step.removes_layers:
        return max(count_parameters(decoder.decoder_layers(model)[layer]) for layer in layers)
    if getattr(step, "allocation", "") == "uniform" and hasattr(step, "width_multiple"):  # one width for all experts
        multiple = widths.resolve_multiple(step.width_multiple, facts.expert_width)
        return sum(multiple * block.num_experts * parameters.channel_size(block) for block in layers.values())
    if hasattr(step, "whitening"):
        shape = facts.hidden_size, facts.expert_width
        return 3 * sum(shape) * resolve_multiple(step.rank_multiple, *shape, math.inf)
    by_group = step.condenses or hasattr(step, "grouping")
    return (counts.expert + counts.router_row) * (1 if by_group else facts.num_groups)


def assert_met(ratio: float, total: int, after: int, unit: int) -> None:
    limit = math.floor(ratio * total)
    assert limit - unit < after <= limit, f"{after / total:.4f} for {ratio}, but a unit is {unit / total:.4f}"


@pytest.mark.parametrize(("method", "name"), MODELS)
def test_the_sizes_of_a_budget(method: str, name: str) -> None:
    """From shapes alone. What a method cannot reach is refused, and it meets the ratio that the message names."""
    model = without_weights(name)
    total, facts, met = sizes(model)["total"], families.facts(model.config), 0
    for asked in RATIOS:
        ratios = [asked]
        for ratio in ratios:
            steps = steps_for(method, ratio)
            if any(step.check(facts) for step in steps):
                continue
            unit = unit_of(steps, model)
            try:
                with outlined(model, steps):
                    after = sizes(model)["total"]
            except UserError as error:
                assert ratios == [asked] and (name != EMBEDDED or asked < 0.6), error
                ratios += [float(value) for value in re.findall(r"memory_ratio=(0\.\d+)", str(error))]
                assert len(ratios) == 2, error
                continue
            assert_met(ratio, total, after, unit)
            met += 1
    assert met or (method, name) in REFUSED


def test_experts_of_different_widths_meet_a_budget_to_within_an_expert() -> None:
    model = without_weights(EMBEDDED)
    total = sizes(model)["total"]
    for ratio in RATIOS:
        steps, _ = steps_of("narrow", f"method.memory_ratio={ratio}", "method.allocation=global")
        with outlined(model, steps):
            assert_met(ratio, total, sizes(model)["total"], parameters.parameter_counts(model.config).expert)


REFUSED = {
    *(("cdmoe_s", name) for name in PUBLISHED[1:]),  # no shared experts
    *((method, GROUPS) for method in ("moei2", "cdmoe_moei2")),
}


@pytest.fixture(scope="module")
def embedded() -> Any:
    """The embedded model with random weights."""
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(embedded_config()).eval()


LIKE_REAP = ("frequency", "routing_weight", "expert_drop")  # the same class
FEW_OPTIONS = {
    "cdmoe_moei2": ["method.prune_ratios=[0.25]", "method.kept_ratios=[0.5]", "method.measurements=1"],
    "naee": [],
    "moei2": [],
}


@pytest.mark.parametrize("method", [method for method in LIMITED if method not in LIKE_REAP])
def test_the_search_meets_a_budget_as_its_outline_does(method: str, embedded: Any, tmp_path: Path) -> None:
    """Total sizes are equal to those of the outline, unless the search may combine other options or round elsewhere."""
    total = sizes(embedded)["total"]
    small = method in FEW_OPTIONS
    quick = ["method.population=6", "method.parents=3", "method.iterations=2"] if small else []
    for ratio in RATIOS[1::2] if small else RATIOS[::2]:
        overrides = [f"method.memory_ratio={ratio}", *quick, *FEW_OPTIONS.get(method, ())]
        steps, _ = steps_of(method, *overrides)
        unit = unit_of(steps, embedded)
        shaped, outline = (model_classes.on_meta(embedded.config, torch.float32) for _ in range(2))
        if ratio == 0.5 and steps[0].__class__.__name__ in ("SaliencyPruning", "NAEE"):
            with pytest.raises(
                UserError, match=r"must retain 4\. The strictest possible budget is memory_ratio=0\.5089"
            ):
                plan_of(embedded, method, tmp_path, *overrides)
            continue
        # The steps of a method share no cache: what a later one finds depends on the earlier ones.
        plan = plan_of(embedded, method, tmp_path / f"{ratio if len(steps) > 1 else 0}", *overrides)
        execute.restructure(shaped, plan)
        after = sizes(shaped)["total"]
        assert_met(ratio, total, after, unit)
        with outlined(outline, steps):
            assert abs(after - sizes(outline)["total"]) <= (unit if method in ("moei2", "cdmoe_moei2") else 0)
