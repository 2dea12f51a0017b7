"""LoRA after every operation: only adapters train, the teacher stays the original, merging changes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recoveries import prepared as prepare_module
from support.tiny_models import EVERY, bits, logits, recorded, same_bits, windows
from torch.nn.utils import parametrize

from recondense.config.schema import LoraSettings, RecoveryConfig
from recondense.export.write_folder import write_folder
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Operation, Prune
from recondense.plan import Plan
from recondense.recovery.checkpoints import trained_state
from recondense.recovery.lora import LoraUpdate
from recondense.recovery.module import RecoveryModule
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

IDS = windows(3, 11)
FAMILIES = {name: EVERY[name] for name in ("qwen2_moe", "deepseek_v2", "gpt_oss")}
FOUR = (0, 2, 3, 5)
RANKS = {name: (3, 5, None, 2) for name in ("gate_proj", "up_proj", "down_proj")}
PLANS: dict[str, tuple[Operation, ...]] = {
    "nothing": (),
    "condense": (Condense(1, (3, 0), (0.4, 0.2), 0.5),),
    "prune": (Prune(1, FOUR), Prune(2, FOUR)),
    "factorize": (Prune(1, FOUR), Factorize(1, RANKS)),
    "constant": (Constant(1, FOUR),),
    "merge": (Merge(1, ((0, 1, 2), (3,), (4, 5)), ((0.2, 0.3, 0.5), (1.0,), (0.5, 0.5))),),
    "drop moe": (Drop(1, "moe"),),
    "drop layer": (Drop(1, "layer"),),
}


def prepare(family: str, name: str, **changes: Any) -> RecoveryModule:
    model = FAMILIES[family]()
    settings: dict[str, Any] = {"objective": "distill", "trainable": "lora", "learning_rate": 1e-3, "steps": 3}
    recovery = RecoveryConfig(name="lora", **{**settings, **changes})
    return prepare_module(model, Plan("tiny", PLANS[name]), recovery)


def steps(module: RecoveryModule, number: int = 3) -> list[float]:
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(number):
        loss = module.losses(IDS)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("target", ["attention", "experts", "both"])
def test_adapters(name: str, family: str, target: Any) -> None:
    original = FAMILIES[family]()
    expected, before = logits(original, IDS), bits(original)
    objective: Any = "finetune" if name == "nothing" else "distill"
    module = prepare(family, name, lora=LoraSettings(target=target), objective=objective)
    start = logits(module.model, IDS)
    frozen = {n: p.detach().clone() for n, p in module.model.named_parameters() if not p.requires_grad}
    trained = [n for n, p in module.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in key for key in trained)
    assert any("self_attn" in key for key in trained) == (target != "experts")
    assert any(".mlp." in key for key in trained) == (target != "attention")
    losses = steps(module)
    assert min(losses[1:]) < losses[0]
    for key, value in module.model.named_parameters():
        assert key not in frozen or torch.equal(value, frozen[key]), key
    if module.student.has_original:
        with module.student.original() as teacher:
            assert torch.equal(logits(teacher, IDS), expected)
    live = logits(module.model, IDS)
    assert not torch.equal(live, start)
    names = {key for key, _ in _plain(name, family).named_parameters()}
    module.merge_adapters()
    module.merge_adapters()
    torch.testing.assert_close(logits(module.model, IDS), live, rtol=1e-4, atol=1e-4)
    assert {key for key, _ in module.model.named_parameters()} == names
    if module.student.has_original:
        with module.student.original() as teacher:
            assert torch.equal(logits(teacher, IDS), expected) and same_bits(bits(teacher), before)
        torch.testing.assert_close(logits(module.model, IDS), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["prune", "drop moe", "drop layer"])
@pytest.mark.parametrize("objective", ["finetune", "distill"])
def test_a_second_stage_keeps_the_original(objective: Any, name: str, family: str) -> None:
    """The adapters of both stages are on weights that student and original share; the original keeps its own."""
    expected = logits(FAMILIES[family](), IDS)
    first = prepare(family, name, objective=objective, lora=LoraSettings(target="both"))
    steps(first)
    first.merge_adapters()
    before = logits(first.model, IDS)
    second = RecoveryModule(first.student, first.settings)
    second.prepare()
    assert torch.equal(logits(second.model, IDS), before)
    steps(second)
    live = logits(second.model, IDS)
    assert not torch.equal(live, before)
    for _ in range(2):
        with second.student.original() as original:
            assert torch.equal(logits(original, IDS), expected)
        assert torch.equal(logits(second.model, IDS), live)
    second.merge_adapters()
    torch.testing.assert_close(logits(second.model, IDS), live, rtol=1e-4, atol=1e-4)
    with second.student.original() as original:
        assert torch.equal(logits(original, IDS), expected)


def _plain(name: str, family: str) -> Any:
    model = FAMILIES[family]()
    return apply(model, Plan("tiny", PLANS[name]), lambda: recorded(model)).model


def test_merged_adapters_are_exported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = prepare_module(
        FAMILIES["qwen2_moe"](),
        Plan("tiny", tuple(Prune(layer, FOUR) for layer in range(3))),
        RecoveryConfig(name="lora", objective="distill", trainable="lora", learning_rate=1e-2, steps=3),
    )
    steps(module)
    module.merge_adapters()
    assert write_folder(module.model, None, module.student.plan, tmp_path / "out", "") == "stock"
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, IDS), logits(module.model, IDS), rtol=0, atol=1e-4)


def test_two_preparations_start_equal() -> None:
    states = [trained_state(prepare("qwen2_moe", "prune"), "recovery") for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(bool(value.any()) for value in states[0].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_after_lora_does_not_train_the_student(family: str) -> None:
    """With adapters on attention only, shared experts are not copied unless a control follows."""
    module = prepare(family, "prune", lora=LoraSettings(target="attention"))
    module.student.give_own_copies([1, 2])  # as a run does for the control
    steps(module)
    module.merge_adapters()
    before = logits(module.model, IDS)
    with module.student.original() as model:
        recovery = RecoveryConfig(objective="finetune", learning_rate=1e-2)
        control = RecoveryModule(Student(model, Plan("tiny")), recovery, layers=(1, 2))
        control.prepare()
        start = logits(model, IDS)
        steps(control)
        assert not torch.equal(logits(model, IDS), start)
    assert torch.equal(logits(module.model, IDS), before)


@pytest.mark.parametrize(("rank", "actual"), [(2, 2), (64, 3)])
def test_the_scale_follows_the_actual_rank(rank: int, actual: int) -> None:
    """W + (alpha / r)·B A; r is at most the smaller side of W."""
    weight_nOI = torch.randn(2, 5, 3)
    update = LoraUpdate(weight_nOI, LoraSettings(rank=rank, alpha=6))
    assert update.lora_A.shape == (2, actual, 3)
    torch.nn.init.normal_(update.lora_B)
    expected = weight_nOI + 6 / actual * torch.einsum("nor,nri->noi", update.lora_B, update.lora_A)
    torch.testing.assert_close(update(weight_nOI), expected)


@pytest.mark.parametrize("name", ["prune", "drop moe"])
def test_updated_weights_are_computed_once_per_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager experts read their weights one by one. With "drop moe" the teacher has the same blocks, but no adapters."""
    calls: list[bool] = []
    forward = LoraUpdate.forward

    def record_call(update: LoraUpdate, weight: torch.Tensor) -> torch.Tensor:
        calls.append(update.active)
        return forward(update, weight)

    monkeypatch.setattr(LoraUpdate, "forward", record_call)
    results = {}
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(parametrize, "cached", nullcontext)
        module = prepare("qwen2_moe", name, hidden_share=0.25)
        module.model.set_experts_implementation("eager")
        steps(module)  # B is no longer 0
        assert module.adapters is not None and module.adapters.updates
        parameters = module.adapters.parameters()
        for parameter in parameters:
            parameter.grad = None
        calls.clear()
        losses = module.losses(IDS)
        losses["loss"].backward()
        number, once = sum(calls), len(module.adapters.updates)
        assert number == once if cached else number > once
        calls.clear()
        live = module(IDS).detach()
        assert sum(calls) == number
        with module.student.original():
            original = module(IDS)
        assert not torch.equal(live, original)
        # Eager experts add up in another order than grouped ones.
        torch.testing.assert_close(original, logits(FAMILIES["qwen2_moe"](), IDS), rtol=1e-5, atol=1e-5)
        assert torch.equal(module(IDS), live)
        results[cached] = {**losses, "live": live}, [parameter.grad for parameter in parameters]
    for one, other in zip(results[True][0].values(), results[False][0].values(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(results[True][1]) == len(results[False][1])
    for one, other in zip(results[True][1], results[False][1], strict=True):
        assert one is not None and other is not None and bool(other.any())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
