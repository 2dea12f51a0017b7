"""Which parameters train, by parts, and that the original does not change with them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from support.losses import forward_kl
from support.recoveries import prepared, recovery
from support.tiny_models import EVERY, condense_plan, logits, qwen2_moe, same_bits, windows

from recondense.config.schema import LoraSettings, RecoveryConfig
from recondense.evaluation.perplexity import perplexity
from recondense.operations import Condense, Drop, Factorize, Merge, Prune
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.recovery.trainable import layer_parameters, trainable_parameters
from recondense.surgery.apply import apply

RANKS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (4,) * 6)
PLAN = Plan("tiny", (Prune(1, (0, 1, 3, 4)), Merge(2, ((0, 1), (2, 3), (4,), (5,)), ((0.5, 0.5),) * 2 + ((1.0,),) * 2)))
# The names of each part in any family, written from transformers' modules.
NAMES = {
    "experts": r"\.mlp\.(experts|shared_experts?)\.|layers\.0\.mlp\.(gate|up|down)_proj",
    "routers": r"\.mlp\.(gate|router)\.(router\.)?(weight|bias)$|shared_expert_gate",
    "norms": r"norm",
    "attention": r"self_attn\.(?!.*norm)",
}
ALL = ("experts", "routers", "norms", "attention")
SPECIAL = ("qwen2_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe")  # a shared gate, sigmoid, biases, a correction bias
OFTEN = [pytest.param(name, marks=() if name in SPECIAL else pytest.mark.slow) for name in EVERY]


def named(model: Any, *parts: str, layers: tuple[int, ...] = (1, 2)) -> set[str]:
    """The names of some parts by the patterns above: experts and routers in some layers, the others everywhere."""
    inside = {f".{layer}." for layer in layers}
    return {
        name
        for name, _ in model.named_parameters()
        for part in parts
        if re.search(NAMES[part], name) and (part in ("norms", "attention") or any(one in name for one in inside))
    }


@pytest.mark.parametrize("family", OFTEN)
@pytest.mark.parametrize("parts", [("routers",), ("norms", "attention"), ALL, ("all",)], ids=str)
def test_the_original_keeps_its_own_weights(family: str, parts: tuple[str, ...]) -> None:
    """Exactly the weights that train and were shared exist twice; all get gradients; they are those of two models."""
    model, ids = EVERY[family](), windows(2, 9)
    original, before = copy.deepcopy(model), logits(model, ids)
    student = apply(model, PLAN)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in original_parameters(student)}
    alone, footprint = copy.deepcopy(model), student.footprint()
    expected = named(model, *ALL, layers=(0, 1, 2)) if parts == ("all",) else named(model, *parts)
    if parts == ("all",):
        expected |= {name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}
    expected = {name for name in expected if "e_score_correction_bias" not in name}
    copied = sum(value.nbytes for name, value in model.named_parameters() if name in expected and id(value) in shared)
    module = prepared_student(student, trainable=parts)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == expected
    after = student.footprint()
    assert after.with_original - footprint.with_original == copied and after.student == footprint.student
    assert after.apart == footprint.apart
    module.losses(ids)["loss"].backward()
    values = dict(alone.named_parameters())
    for name, value in values.items():
        value.requires_grad_(name in expected)
    with torch.no_grad():
        teacher_logits = original(input_ids=ids, use_cache=False).logits
    forward_kl(alone(input_ids=ids, use_cache=False).logits, teacher_logits, 1.0).backward()
    for name, value in trained.items():
        assert value.grad is not None and value.grad.any(), name
        gradient = values[name].grad
        torch.testing.assert_close(value.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)
    torch.optim.AdamW(trained.values(), lr=0.1).step()
    with student.original():
        assert torch.equal(logits(model, ids), before)
    frozen = {name: value for name, value in model.named_parameters() if name not in trained}
    assert same_bits(frozen, {name: values[name] for name in frozen})


def original_parameters(student: Any) -> list[Any]:
    with student.original() as model:
        return list(model.parameters())


def prepared_student(student: Any, **changes: Any) -> RecoveryModule:
    module = RecoveryModule(student, recovery(**changes))
    module.prepare()
    module.train()
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_the_divergence_is_from_the_head_of_the_original(tied: bool) -> None:
    model, ids = qwen2_moe(tie_word_embeddings=tied), windows(3, 9)
    original = copy.deepcopy(model)
    module = prepared(model, PLAN, trainable="all")
    for value in module.model.parameters():
        value.data.mul_(1.1)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    expected = float(forward_kl(logits(model, ids)[:, :-1], logits(original, ids)[:, :-1], 1.0))
    assert perplexity(model, ids, 2, module.student.original)["kl_to_original"] == pytest.approx(expected, rel=1e-4)
    module.eval()
    expected = float(forward_kl(logits(model, ids), logits(original, ids), 1.0))
    assert float(module.losses(ids)["kl"]) == pytest.approx(expected, rel=1e-4)


def test_routers_of_which_layers() -> None:
    """Pruned, merged and factorized layers have one, condensed and removed ones do not; others only by setting."""
    model = qwen2_moe(num_hidden_layers=6)
    operations = (Prune(1, (0, 2, 3)), Factorize(2, RANKS), *condense_plan(model, [3], shared_gate=None).operations)
    plan = Plan("tiny", (*operations, Drop(4, "moe"), Drop(5, "layer")))
    apply(model, plan)
    for router_layers, layers in (("changed", (1, 2)), ("all", (0, 1, 2))):
        names = trainable_parameters(model, plan.layers, ["routers"], router_layers).keys()
        places = ("gate.weight", "shared_expert_gate.weight")
        assert names == {f"model.layers.{layer}.mlp.{name}" for layer in layers for name in places}
    assert layer_parameters(model, 5, ALL) == {} and len(layer_parameters(model, 4, ["experts", "routers"])) == 0
    experts = trainable_parameters(model, plan.layers, "experts").keys()
    assert {int(name.split(".")[2]) for name in experts} == {1, 2, 3} and not any("gate.weight" in n for n in experts)


@pytest.mark.parametrize(
    ("operations", "settings", "message"),
    [
        ((Condense(1, (1,), (0.3,), 0.4),), {}, r"has a router afterward; use recovery\.router_layers=all"),
        (tuple(Drop(layer, "moe") for layer in range(3)), {"router_layers": "all"}, "there are no routers to train"),
        (tuple(Drop(layer, "moe") for layer in range(3)), {"trainable": ("experts", "routers")}, "experts or routers"),
    ],
)
def test_without_routers_there_is_nothing_to_train(operations: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(qwen2_moe(), Plan("tiny", operations), **{"trainable": "routers", **settings})


def test_adapters_beside_weights() -> None:
    """Adapters merge into copies; the original keeps its weights, and routers and norms trained beside them too."""
    model, ids = qwen2_moe(), windows(2, 9)
    before = logits(model, ids)
    module = prepared(model, PLAN, trainable=("routers", "norms", "lora"))
    beside = named(model, "routers", "norms")
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert beside < names and all("lora" in name for name in names - beside)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # B is zero in the first step, so that A gets no gradient
        module.losses(ids)["loss"].backward()
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
        optimizer.step()
    with torch.no_grad():
        adapted = logits(model, ids)
        module.merge_adapters()
        torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(adapted, before, atol=0.1)
        with module.student.original():
            assert torch.equal(logits(model, ids), before)


def test_norms_and_biases_of_routers_are_not_decayed() -> None:
    module = prepared(EVERY["gpt_oss"](), PLAN, trainable=ALL, weight_decay=0.1)
    names = {id(value): re.sub(r".*layers\.\d\.", "", name) for name, value in module.named_parameters()}
    decayed, others = module.parameter_groups()
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    kinds = [{names[id(value)] for value in group["params"]} for group in (decayed, others)]
    assert {"mlp.router.weight", "self_attn.q_proj.weight", "mlp.experts.down_proj"} <= kinds[0]
    assert {"mlp.router.bias", "self_attn.q_proj.bias", "input_layernorm.weight", "self_attn.sinks"} <= kinds[1]
    assert not any("norm" in name or "bias" in name for name in kinds[0])


@pytest.mark.parametrize(
    ("before", "after"),
    [(["routers", "experts"], ("experts", "routers")), (["norms"], "norms"), ("all", "all"), (("lora",), "lora")],
)
def test_a_list_of_one_is_the_word(before: Any, after: Any) -> None:
    settings = RecoveryConfig(trainable=before, lora=LoraSettings(target="attention"))
    assert settings.trainable == after and settings.parts == ((after,) if isinstance(after, str) else after)
