"""The passes of a step: what student and teacher share, where backward stops, and layers that are recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from support.losses import cross_entropy, forward_kl
from support.recoveries import module_of, prepared, recovery
from support.tiny_models import EVERY, FAMILIES, condense_plan, qwen2_moe, unchanged, windows
from torch import Tensor, nn

from recondense.config.schema import LoraSettings
from recondense.data.labels import MASKED
from recondense.models import decoder, moe_blocks
from recondense.models.hooks import eval_mode
from recondense.operations import Drop, Factorize, Prune
from recondense.plan import Plan
from recondense.recovery import shared_passes
from recondense.recovery.module import RecoveryModule


def gradients(module: RecoveryModule) -> dict[str, Tensor]:
    values = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
    for parameter in module.parameters():
        parameter.grad = None
    return values


@contextmanager
def runs_of(model: Any) -> Iterator[list[int]]:
    """How often each decoder layer runs inside."""
    counts = [0] * len(decoder.decoder_layers(model))

    def hook(number: int) -> Any:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    layers = enumerate(decoder.decoder_layers(model))
    handles = [layer.register_forward_pre_hook(hook(number)) for number, layer in layers]
    yield counts
    for handle in handles:
        handle.remove()


def losses_of_separate_passes(
    module: RecoveryModule, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> dict[str, Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr("recondense.recovery.teachers.first_unshared_layer", lambda model, changed: 0)
        return module.losses(ids)


SPECIAL = ("qwen2_moe", "deepseek_v2", "gpt_oss", "ernie4_5_moe")  # in masks, routing, positions or tied heads


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SPECIAL else pytest.mark.slow) for name in EVERY]
)
def test_shared_layers_are_computed_once_and_nothing_else_changes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients are bit for bit those of two separate passes, also with packed examples."""
    model = EVERY[family]()
    module = prepared(model, condense_plan(model, [2]), hidden_share=0.25)
    module.train()
    ids = windows(2, 8)
    inputs: list[dict[str, Tensor]] = [{"input_ids": ids}]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    inputs.append({"input_ids": ids, "position_ids": positions, "labels": ids.clone()})
    inputs[1]["labels"][:, [0, 1, 3]] = MASKED
    for arguments in inputs:
        with unchanged(model), runs_of(model) as runs:
            shared = module.losses(**arguments)
        assert runs == [1, 1, 2]
        shared["loss"].backward()  # type: ignore[no-untyped-call]
        actual = gradients(module)
        with monkeypatch.context() as patched:
            patched.setattr("recondense.recovery.teachers.first_unshared_layer", lambda model, changed: 0)
            with runs_of(model) as runs:
                separate = module.losses(**arguments)
        assert runs == [2, 2, 2]
        separate["loss"].backward()  # type: ignore[no-untyped-call]
        expected = gradients(module)
        assert all(torch.equal(shared[name], separate[name]) for name in separate) and shared.keys() == separate.keys()
        assert (
            actual
            and all(torch.equal(actual[name], expected[name]) for name in expected)
            and actual.keys() == expected.keys()
        )


PRUNED = Plan("tiny", (Prune(2, (0, 1, 4)),))
PLANS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "whole layers are gone": (
        Plan("tiny", (Drop(1, "layer"), *condense_plan(qwen2_moe(), [2]).operations)), {}, 1
    ),
    "a layer is gone, all others train": (Plan("tiny", (Drop(1, "layer"),)), {}, 0),
    "adapters of experts": (
        condense_plan(qwen2_moe(), [1, 2]), {"trainable": "lora", "lora": LoraSettings(target="experts")}, 1
    ),
    "adapters of attention": (condense_plan(qwen2_moe(), [2]), {"trainable": "lora"}, 0),
    "the first layer changed": (condense_plan(qwen2_moe(), [0]), {}, 0),
    "routers of changed layers": (PRUNED, {"trainable": "routers"}, 2),
    "routers of all layers": (PRUNED, {"trainable": "routers", "router_layers": "all"}, 0),
    "norms": (PRUNED, {"trainable": "norms"}, 0),
    "all": (PRUNED, {"trainable": "all"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_the_first_layer_that_is_not_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, settings, layer = PLANS[name]
    module = prepared(qwen2_moe(), plan, **settings)
    assert shared_passes.first_unshared_layer(module.model, module.student.changed_layers()) == layer
    ids = windows(2, 8)
    assert torch.equal(module.losses(ids)["loss"], losses_of_separate_passes(module, monkeypatch, ids)["loss"])


def test_layers_with_merged_adapters_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    module = prepared(qwen2_moe(), condense_plan(qwen2_moe(), [2]), trainable="lora")
    assert module.adapters is not None
    for layer in module.adapters.linears.values():
        nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[arg-type]
    module.merge_adapters()
    module = RecoveryModule(module.student, recovery(), stage="two")
    module.prepare()
    assert module.student.changed_layers() == {0, 1, 2}
    ids = windows(2, 8)
    assert torch.equal(module.losses(ids)["loss"], losses_of_separate_passes(module, monkeypatch, ids)["loss"])


@pytest.mark.parametrize(("family", "noise"), [("qwen2_moe", "attention_dropout"), ("mixtral", "router_jitter_noise")])
def test_what_is_random_in_training_is_not_shared(family: str, noise: str) -> None:
    model = EVERY[family](**{noise: 0.1})
    assert decoder.is_random_in_training(model.config) and not decoder.is_random_in_training(EVERY[family]().config)
    assert shared_passes.first_unshared_layer(model.requires_grad_(False), {2}) == 0


def test_the_losses_are_those_of_plain_logits() -> None:
    """Those of two separate models."""
    module = module_of(temperature=1.5, cross_entropy_share=0.25, layers=(2,))
    student, teacher, ids = module.model, qwen2_moe(), windows(2, 8)
    losses = module.losses(ids)
    student_logits = student(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids, use_cache=False).logits
    expected = 0.75 * forward_kl(student_logits, teacher_logits, 1.5) + 0.25 * cross_entropy(student_logits, ids)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-6, atol=0)
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    actual = gradients(module)
    expected.backward()
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_other_divergences_have_their_own_names(divergence: Any) -> None:
    module = module_of(divergence=divergence)
    losses = module.losses(windows(2, 8))
    assert set(losses) == {divergence, "loss"} and losses["loss"].item() > 0
    with module.student.original():
        assert module.losses(windows(2, 8))["loss"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", ["finetune", "distill"])
def test_backward_stops_at_the_lowest_layer_that_trains(objective: str) -> None:
    """No activation below it is part of the graph, and no frozen parameter gets a gradient."""
    module = module_of(objective=objective, layers=(1, 2))
    module.train()
    graphs: dict[int, bool] = {}

    def note(number: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            graphs[number] = moe_blocks.block_output(output).requires_grad

        return hook

    layers = enumerate(decoder.decoder_layers(module.model))
    handles = [layer.register_forward_hook(note(number)) for number, layer in layers]
    module.losses(windows(2, 8))["loss"].backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    assert graphs == {0: False, 1: True, 2: True}
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert gradients(module).keys() == trained and all(".layers.0." not in name for name in trained)


FACTORS = Plan("tiny", (Factorize(1, {name: (4,) * 6 for name in ("gate_proj", "up_proj", "down_proj")}),))
AGAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "distill": (condense_plan(qwen2_moe(), [1, 2]), {"hidden_share": 0.25}),
    "finetune": (condense_plan(qwen2_moe(), [1, 2]), {"objective": "finetune"}),
    "lora": (FACTORS, {"trainable": "lora"}),
}


def module_and_windows(name: str) -> tuple[RecoveryModule, Tensor]:
    plan, settings = AGAIN[name]
    model = qwen2_moe()
    module = prepared(model, plan, **settings)
    module.train()
    return module, windows(2, 8)


def loss_and_gradients(module: RecoveryModule, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = module.losses(ids)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, gradients(module)


@pytest.mark.parametrize("name", AGAIN)
def test_activation_checkpointing_changes_no_bit(name: str) -> None:
    """Adapters on factors are computed once per pass, and again with their layer in backward."""
    module, ids = module_and_windows(name)
    plain, expected = loss_and_gradients(module, ids)
    with decoder.checkpoint_layers(module.model):
        with runs_of(module.model), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            again = module.losses(ids)["loss"]
        again.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(plain, again)
    actual = gradients(module)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.decoder_layers(module.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_saves_memory(family: str) -> None:
    module = module_of(family, objective="finetune", layers=(0, 1, 2) if family == "qwen2_moe" else (1, 2))
    module.train()
    ids = windows(4, 16)

    def saved() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {value.untyped_storage().data_ptr() for value in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.losses(ids)["loss"]
        del loss
        return sum(size for where, size in sizes.items() if where not in weights)

    plain = saved()
    with decoder.checkpoint_layers(module.model):
        assert saved() < plain / 2


@pytest.mark.filterwarnings("ignore")  # warnings of a compiler about its own code
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", AGAIN)
def test_compiled_layers_give_the_same(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of student and teacher, with and without gradients; inductor first compiles C++."""
    module, ids = module_and_windows(name)
    plain, expected = loss_and_gradients(module, ids)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    counters = torch._dynamo.utils.counters
    counters.clear()
    with decoder.compile_layers(module.model):
        again, actual = loss_and_gradients(module, ids)
    assert counters["frames"]["ok"] > 0 and not counters["unimplemented"]
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-6)
    assert not any(layer._compiled_call_impl for layer in decoder.decoder_layers(module.model))
    torch.compiler.reset()


def test_the_head_is_bypassed_and_restored() -> None:
    model, ids = qwen2_moe(), windows(2, 8)
    with unchanged(model), torch.no_grad(), eval_mode(model):
        with decoder.bypass_head(model):
            hidden = model(input_ids=ids).logits
        with decoder.lm_head(model) as head:
            assert torch.equal(head.logits(hidden), model(input_ids=ids).logits)
        with pytest.raises(KeyError), decoder.bypass_head(model):
            raise KeyError
