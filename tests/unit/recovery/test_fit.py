"""A fit: its optimiser steps, resuming exactly, the content of checkpoints, and precision."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.recoveries import QUIET, data, module_of, prepared, recovery, trained
from support.tiny_models import EVERY, FAMILIES, bits, condense_plan, logits, qwen2_moe, same_bits, windows
from torch.overrides import TorchFunctionMode

from recondense.config.schema import RecoveryConfig, TrainerConfig
from recondense.errors import UserError
from recondense.operations import Condense, Drop, Factorize, Prune
from recondense.plan import Plan
from recondense.recovery import checkpoints
from recondense.recovery.checkpoints import FINAL, newest_checkpoint
from recondense.recovery.fit import fit
from recondense.recovery.lora import LoraUpdate
from recondense.recovery.module import RecoveryModule
from recondense.recovery.precision import keep_trained_weights, resolve_precision
from recondense.surgery.apply import apply

# Lightning warns of this whenever a fit resumes.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def test_steps_are_those_of_adamw() -> None:
    """fp32, accumulation, clipping and a schedule against torch's optimiser on a copy of the model."""
    settings: dict[str, Any] = {
        "steps": 3,
        "accumulate_grad_batches": 2,
        "warmup_steps": 0,
        "gradient_clip": 0.5,
        "schedule": "linear",
    }
    module = module_of(**settings)
    module_copy = copy.deepcopy(module)
    batches = list(data(module).train_dataloader())
    names = [name for name, value in module_copy.model.named_parameters() if value.requires_grad]
    parameters = [dict(module_copy.model.named_parameters())[name] for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (3 - step) / 3
        for batch in batches[2 * step : 2 * step + 2]:
            (module_copy.losses(batch["input_ids"])["loss"] / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(L, "seed_everything", lambda *args, **kwargs: 0)
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            fit(module, data(module), Path(folder), QUIET, seed=0)
    for name, parameter in zip(names, parameters, strict=True):
        torch.testing.assert_close(dict(module.model.named_parameters())[name], parameter, rtol=1e-5, atol=1e-7)


class StopAt(L.Callback):
    """Fails before the given batch, counted from 0."""

    def __init__(self, batch: int, error: type[BaseException] = RuntimeError) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == self.batch:
            raise self.error("killed")


@pytest.mark.parametrize(
    ("accumulate", "every", "stops"),
    [(1, 2, [5]), (1, 3, [1, 5, 8]), (1, 100, [4]), (2, 2, [9]), (2, 2, [5, 6, 10]), (2, 3, [7, 7, 13])],
)
def test_resumes_exactly(tmp_path: Path, accumulate: int, every: int, stops: list[int]) -> None:
    """The weights are those of an undisturbed run, bit for bit, wherever and however often it was killed."""
    settings: dict[str, Any] = {"steps": 9, "accumulate_grad_batches": accumulate, "checkpoint_every": every}
    undisturbed = module_of(**settings)
    fit(undisturbed, data(undisturbed), tmp_path / "undisturbed", QUIET, seed=1)
    assert not same_bits(trained(undisturbed), trained(module_of(**settings)))
    steps_done = 0
    for stop in stops:
        module = module_of(**settings)
        with pytest.raises(RuntimeError, match="killed"):
            fit(module, data(module), tmp_path / "killed", QUIET, seed=1, callbacks=[StopAt(stop)])
        newest = newest_checkpoint(tmp_path / "killed")
        steps_done = max(steps_done, stop // accumulate // every * every)
        assert (newest is None) == (steps_done == 0)
        assert newest is None or newest.name == f"step={steps_done}.ckpt"
    module = module_of(**settings)
    torch.rand(17)  # a resumed run starts with other states of the generators
    fit(module, data(module), tmp_path / "killed", QUIET, seed=1)
    assert same_bits(trained(module), trained(undisturbed))


LORA: dict[str, Any] = {"trainable": "lora", "steps": 6, "learning_rate": 1e-2}


@pytest.mark.parametrize("same_module", [True, False])
@pytest.mark.parametrize(("error", "raised"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)])
def test_an_interrupted_fit_leaves_no_adapters(
    tmp_path: Path, error: type[BaseException], raised: type[BaseException], same_module: bool
) -> None:
    """The student is as it was, to the bit, and the next fit resumes the adapters from the newest checkpoint."""
    model, ids = qwen2_moe(), windows(2, 8)
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3, 5)), Drop(2, "moe"))))
    before, state, parts = logits(model, ids), bits(model), [type(part) for part in model.modules()]
    module, on_interrupt = RecoveryModule(student, recovery(**LORA)), signal.getsignal(signal.SIGINT)
    for stop in (1, 5):
        with pytest.raises(raised):
            fit(module, data(module), tmp_path / "cut", QUIET, seed=1, callbacks=[StopAt(stop, error)])
        assert student.additions is None and module.adapters is None
        assert [type(part) for part in model.modules()] == parts and same_bits(bits(model), state)
        assert torch.equal(logits(model, ids), before) and not any(p.requires_grad for p in model.parameters())
        assert signal.getsignal(signal.SIGINT) is on_interrupt
        if not same_module:
            module = RecoveryModule(student, recovery(**LORA))
    newest = newest_checkpoint(tmp_path / "cut")
    assert newest is not None and newest.name == "step=4.ckpt"
    fit(module, data(module), tmp_path / "cut", QUIET, seed=1)
    again = qwen2_moe()
    whole = RecoveryModule(apply(again, student.plan), recovery(**LORA))
    fit(whole, data(whole), tmp_path / "whole", QUIET, seed=1)
    assert not torch.equal(logits(model, ids), before) and same_bits(trained(module), trained(whole))


def test_adapters_that_cannot_all_be_made_leave_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = qwen2_moe()
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3, 5)),)))
    state, made = bits(model), LoraUpdate.__init__

    def fails(update: LoraUpdate, weight: torch.Tensor, settings: Any) -> None:
        if weight.shape[1] == model.config.hidden_size:  # down_proj, the second one
            raise torch.OutOfMemoryError
        made(update, weight, settings)

    monkeypatch.setattr(LoraUpdate, "__init__", fails)
    module = RecoveryModule(student, recovery(**LORA))
    with pytest.raises(torch.OutOfMemoryError):
        fit(module, data(module), tmp_path, QUIET, seed=1)
    assert student.additions is None and same_bits(bits(model), state)


def test_random_states_are_part_of_a_resume(tmp_path: Path) -> None:
    """A model with dropout draws random numbers during training."""

    def module_with_dropout() -> RecoveryModule:
        model = qwen2_moe(attention_dropout=0.3)
        return prepared(model, condense_plan(model, [1, 2]), steps=6)

    uninterrupted = module_with_dropout()
    fit(uninterrupted, data(uninterrupted), tmp_path / "uninterrupted", QUIET, seed=1)
    interrupted = module_with_dropout()
    with pytest.raises(RuntimeError, match="killed"):
        fit(interrupted, data(interrupted), tmp_path / "interrupted", QUIET, seed=1, callbacks=[StopAt(5)])
    resumed = module_with_dropout()
    fit(resumed, data(resumed), tmp_path / "interrupted", QUIET, seed=1)
    assert same_bits(trained(resumed), trained(uninterrupted))


def test_a_finished_fit_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    module = module_of()
    final = fit(module, data(module), tmp_path, QUIET, seed=1)
    assert final == tmp_path / FINAL and not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    again = module_of()
    fit(again, data(again), tmp_path, QUIET, seed=1, callbacks=[StopAt(0)])
    assert same_bits(trained(again), trained(module))


def test_a_checkpoint_holds_what_trains_and_no_pickles(tmp_path: Path) -> None:
    module = module_of(steps=5)
    names = {f"model.{name}" for name, value in module.model.named_parameters() if value.requires_grad}
    fit(module, data(module), tmp_path, QUIET, seed=1)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step=4.ckpt"
    for path in (newest, tmp_path / FINAL):
        checkpoint = torch.load(path, weights_only=True)
        assert set(checkpoint["state_dict"]) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == [FINAL, "step=4.ckpt"]


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    module = module_of()
    with pytest.raises(RuntimeError, match="killed"):
        fit(module, data(module), tmp_path, QUIET, seed=1, callbacks=[StopAt(3)])
    other = module_of(layers=(0, 1))
    with pytest.raises(ValueError, match="another plan"):
        fit(other, data(other), tmp_path, QUIET, seed=1)


DAMAGES: dict[str, Any] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "another": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    "changed at its end": lambda content: content.replace(b"PK\x01\x02", b"PK\x01\x03", 1),
    "bytes before it": lambda content: b"\xff\xfe" + content,
    "zeros in its tensors": lambda content: (
        content[: len(content) // 2] + bytes(99) + content[len(content) // 2 + 99 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [FINAL, "step=4.ckpt"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    """Once the file is deleted, the fit resumes."""
    module = module_of(steps=6)
    fit(module, data(module), tmp_path, QUIET, seed=1)
    expected = trained(module)
    if name != FINAL:
        (tmp_path / FINAL).unlink()
        (tmp_path / "step=6.ckpt").rename(tmp_path / name)
    path = tmp_path / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    again = module_of(steps=6)
    with pytest.raises(UserError, match=rf"{name} is damaged.*Delete this file"):
        fit(again, data(again), tmp_path, QUIET, seed=1)
    path.unlink()
    fit(again, data(again), tmp_path, QUIET, seed=1)
    assert same_bits(trained(again), expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fit_goes_back_to_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[tuple[Any, ...]] = []
    monkeypatch.setattr(checkpoints.log, "warning", lambda *parts: warnings.append(parts))
    module = module_of(steps=6)
    fit(module, data(module), tmp_path, QUIET, seed=1)
    (tmp_path / FINAL).unlink()
    later = tmp_path / "step=7.ckpt"
    later.write_bytes(DAMAGES[damage]((tmp_path / "step=6.ckpt").read_bytes()))
    again = module_of(steps=6)
    fit(again, data(again), tmp_path, QUIET, seed=1)
    assert same_bits(trained(again), trained(module)) and not later.exists()
    [(text, path, _, intact)] = warnings
    assert "training goes on from" in text and (path, intact) == (later, tmp_path / "step=6.ckpt")


@pytest.mark.parametrize("content", [[], {}, {"state_dict": {}}, torch.zeros(1)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / FINAL)
    module = module_of()
    with pytest.raises(UserError, match=r"final.ckpt is damaged: it is no checkpoint of recondense"):
        fit(module, data(module), tmp_path, QUIET, seed=1)


def test_a_folder_in_place_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / FINAL).mkdir()
    module = module_of()
    with pytest.raises(UserError, match=r"final.ckpt is damaged: it cannot be read"):
        fit(module, data(module), tmp_path, QUIET, seed=1)


def test_another_error_while_reading_a_checkpoint_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of()
    fit(module, data(module), tmp_path, QUIET, seed=1)

    def load(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="not enough memory"):
        fit(module, data(module), tmp_path, QUIET, seed=1)


@pytest.mark.parametrize("name", [FINAL, "step=2.ckpt"])
def test_a_checkpoint_that_lacks_a_trained_weight_is_rejected(tmp_path: Path, name: str) -> None:
    module = module_of(steps=4)
    with pytest.raises(RuntimeError, match="killed"):
        fit(module, data(module), tmp_path, QUIET, seed=1, callbacks=[StopAt(3)])
    if name == FINAL:
        fit(module, data(module), tmp_path, QUIET, seed=1)
    stored = torch.load(tmp_path / name, weights_only=True)
    dropped = sorted(stored["state_dict"])[1]
    del stored["state_dict"][dropped]
    torch.save(stored, tmp_path / name)
    again = module_of(steps=4)
    with pytest.raises(AssertionError, match=dropped):
        fit(again, data(again), tmp_path, QUIET, seed=1)


@pytest.mark.parametrize("precision", ["auto", "bf16-true", "32-true"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_precisions(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    """Whatever the precision of training, the model keeps its dtype, and scales stay in fp32, bit for bit."""
    model: Any = qwen2_moe()
    model.to(dtype)
    plan = condense_plan(model, [1, 2], shared_gate=0.123456789)
    module = prepared(model, plan, learning_rate=0.02)
    before, ids = trained(module), windows(2, 8)
    settings = TrainerConfig(progress_bar=False, precision=precision)  # type: ignore[arg-type]
    if dtype == torch.float32 and precision == "bf16-true":  # it would round the frozen weights, the teacher's too
        with pytest.raises(UserError, match=r"trainer\.precision=bf16-true"):
            fit(module, data(module), tmp_path, settings, seed=0)
        return
    fit(module, data(module), tmp_path, settings, seed=0)
    after = trained(module)
    for name, value in after.items():
        assert value.dtype == (torch.float32 if name.endswith(".scale") else dtype), name
        if name.endswith(".scale") or not any(part in name for part in ("layers.1.mlp", "layers.2.mlp")):
            assert torch.equal(value, before[name]), f"{name} changed"
        else:
            assert not torch.equal(value, before[name]), f"{name} did not train"
    assert bool(logits(model, ids).isfinite().all())
    with module.student.original():
        assert bool(logits(model, ids).isfinite().all())


def test_buffers_keep_their_precision(tmp_path: Path) -> None:
    """bf16-true converts modules; rotary frequencies and a router's correction stay as they were loaded."""
    model: Any = EVERY["glm4_moe"]()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    plan = Plan("tiny", (Condense(1, (1, 4), (0.3, 0.4)), Prune(2, (0, 1, 2, 4))))
    module = prepared(model, plan, steps=1)
    before = {name: value.clone() for name, value in module.named_buffers()}
    kinds = {name.rpartition(".")[2] for name in before if name.startswith("originals.") or "rotary" in name}
    assert kinds >= {"inv_freq", "e_score_correction_bias"}
    assert {value.dtype for value in before.values() if value.is_floating_point()} == {torch.float32}
    seen: dict[str, torch.Tensor] = {}

    class RecordBuffers(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
            seen.update({name: value.clone() for name, value in module.named_buffers()})

    settings = TrainerConfig(progress_bar=False, precision="bf16-true")
    fit(module, data(module), tmp_path, settings, seed=0, callbacks=[RecordBuffers()])
    for buffers in (seen, dict(module.named_buffers())):
        assert buffers.keys() == before.keys()
        for name, value in before.items():
            assert buffers[name].dtype == value.dtype and torch.equal(buffers[name], value), name


def test_precision_auto() -> None:
    assert resolve_precision(QUIET, torch.float32) == "32-true"
    assert resolve_precision(QUIET, torch.bfloat16) == resolve_precision(QUIET, torch.float16) == "bf16-mixed"


def test_distillation_lowers_the_divergence(tmp_path: Path) -> None:
    module, ids = module_of(steps=30, learning_rate=1e-2), windows(7, 8)
    with torch.no_grad():
        before = module.losses(ids)["loss"].item()
    fit(module, data(module), tmp_path, QUIET, seed=0)
    with torch.no_grad():
        assert module.losses(ids)["loss"].item() < 0.7 * before


def test_a_fit_does_not_change_frozen_weights(tmp_path: Path) -> None:
    module = module_of()
    before = bits(module)
    fit(module, data(module), tmp_path, QUIET, seed=0)
    changed = {name for name, value in bits(module).items() if not torch.equal(value, before[name])}
    assert changed == {
        f"model.model.layers.{layer}.mlp.{name}.weight"
        for layer in (1, 2)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_a_fit_leaves_the_model_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning moves every module to the CPU at the end; `fit` must move it back to where it was."""
    moves: list[str] = []
    cpu, to = RecoveryModule.cpu, RecoveryModule.to

    def spied_cpu(self: RecoveryModule) -> RecoveryModule:
        moves.append("cpu")
        return cpu(self)

    def spied_to(self: RecoveryModule, *args: Any, **kwargs: Any) -> RecoveryModule:
        moves.append(f"to {args[0]}")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryModule, "cpu", spied_cpu)
    monkeypatch.setattr(RecoveryModule, "to", spied_to)
    module = module_of()
    fit(module, data(module), tmp_path, TrainerConfig(), seed=0)
    assert "cpu" in moves, "Lightning no longer does this: the move back can be removed"
    assert moves[-1] == "to cpu", moves


@pytest.mark.parametrize("kind", ["prune", "factorize", "lora"])
def test_mixed_precision_computes_experts_in_half_precision(kind: str) -> None:
    """Trained weights are kept in fp32, but products run in bf16: autocast does not cover grouped products."""
    model = FAMILIES["qwen2_moe"]().bfloat16()
    operations: dict[str, Any] = {
        "prune": [Prune(layer, (0, 1, 2, 4)) for layer in range(3)],
        "factorize": [Factorize(layer, dict.fromkeys(PROJECTIONS, (8,) * 6)) for layer in range(3)],
    }
    settings = RecoveryConfig(objective="finetune", trainable="lora" if kind == "lora" else "experts")
    plan = Plan("tiny", tuple(operations["prune" if kind == "lora" else kind]))
    module = prepared(model, plan, settings)
    seen: list[torch.dtype] = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func in (torch.nn.functional.linear, getattr(torch.nn.functional, "grouped_mm", None)):
                seen.append(output.dtype)
            return output

    with keep_trained_weights(model, "bf16-mixed"), torch.autocast("cpu", torch.bfloat16), Products():
        module.losses(windows(2, 8))["loss"]
        assert model.config._experts_implementation == ("grouped_mm_autocast" if kind == "prune" else "grouped_mm")
    assert len(seen) > 20 and set(seen) == {torch.bfloat16}
    assert model.config._experts_implementation == "grouped_mm"
