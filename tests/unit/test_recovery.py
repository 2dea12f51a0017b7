"""Recovery: setup once, what trains and what does not, the teacher on a shared backbone, and an exact resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import FAMILIES, bits, condense_plan, logits, qwen2_moe, same_bits, windows
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from recondense import families
from recondense.config import LoraSettings, RecoveryConfig, TrainerConfig
from recondense.data import RecoveryData
from recondense.fitting import FINAL, fit, newest_checkpoint, precision_of
from recondense.losses import cross_entropy
from recondense.modules import CondensedMoE
from recondense.plan import Drop, Factorize, Plan, Prune
from recondense.profiling import resident_bytes
from recondense.recovery import RecoveryModule, trainable_parameters
from recondense.summary import control_settings

# Lightning says so of every fit that goes on.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
QUIET = TrainerConfig(progress_bar=False)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def recovery(**changes: Any) -> RecoveryConfig:
    settings: dict[str, Any] = {
        "name": "distill", "objective": "distill", "steps": 4, "batch_size": 2, "learning_rate": 3e-3,
        "checkpoint_every": 2, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1,
    }  # fmt: skip
    return RecoveryConfig(**{**settings, **changes})


def module_of(family: str = "qwen2_moe", layers: tuple[int, ...] = (1, 2), **changes: Any) -> RecoveryModule:
    """Prepared; a fresh model of the same seed each time."""
    model = FAMILIES[family]()
    module = RecoveryModule(model, recovery(**changes), plan=condense_plan(model, layers))
    module.prepare()
    return module


def data(module: RecoveryModule, validation: Tensor | None = None) -> RecoveryData:
    settings = module.recovery
    batches = settings.steps * settings.accumulate_grad_batches
    return RecoveryData(windows(7, 8), validation, settings.batch_size, batches, seed=3)


def trained(module: RecoveryModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.model.state_dict().items()}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("ERROR", logger="lightning.pytorch")
    yield


# ------------------------------------------------------------------------------------------------ setup


def test_setup_applies_once_however_often_it_is_called() -> None:
    model = qwen2_moe()
    module = RecoveryModule(model, recovery(), plan=condense_plan(model, [1, 2]))
    for stage in ("fit", "validate", "fit", "test"):
        module.setup(stage)
        if stage == "fit" and module.teacher is not None:
            blocks, teacher = list(model.modules()), module.teacher
    assert list(model.modules()) == blocks and module.teacher is teacher
    assert sorted(families.sparse_blocks(model)) == [0]


def test_searches_when_it_is_handed_no_plan() -> None:
    model = qwen2_moe()
    asked = []

    def search(given: PreTrainedModel) -> Plan:
        asked.append(sorted(families.sparse_blocks(given)))
        return condense_plan(given, [1])

    module = RecoveryModule(model, recovery(), search=search)
    assert module.plan is None
    module.setup("fit")
    module.setup("fit")
    assert asked == [[0, 1, 2]] and module.plan == condense_plan(qwen2_moe(), [1])
    assert isinstance(families.get_block(model, 1), CondensedMoE)
    with pytest.raises(ValueError, match="needs a plan"):
        RecoveryModule(model, recovery())


def test_works_in_anyones_trainer(tmp_path: Path) -> None:
    model = qwen2_moe()
    module = RecoveryModule(model, recovery(), search=lambda given: condense_plan(given, [1, 2]))
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(module, windows(3, 8, seed=5)))
    found = trainer.validate(module, datamodule=data(module, windows(3, 8, seed=5)), verbose=False)
    assert found[0]["recovery/validation_loss"] > 0 and found[0]["recovery/validation_kl"] > 0
    assert sorted(families.sparse_blocks(model)) == [0]


# ------------------------------------------------------------------------------------------------ what trains

SHARED = {"qwen2_moe": "shared_expert", "deepseek_v2": "shared_experts"}


@pytest.mark.parametrize("objective", ["distill", "finetune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_experts_of_condensed_layers_train(family: str, objective: str) -> None:
    module = module_of(family, objective=objective)
    expected = {
        f"model.layers.{layer}.mlp.{name}.weight" for layer in (1, 2) for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert {name for name, value in module.model.named_parameters() if value.requires_grad} == expected
    module.losses(windows(2, 8))["loss"].backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == (name.removeprefix("model.") in expected), name
        assert parameter.grad is None or float(parameter.grad.abs().max()) > 0
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert len(group["params"]) == len(expected)


def test_the_token_gate_does_not_train() -> None:
    model = qwen2_moe()
    module = RecoveryModule(model, recovery(), plan=condense_plan(model, [2], shared_gate=None))
    module.prepare()
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert "model.layers.2.mlp.shared_expert_gate.weight" in dict(model.named_parameters())
    assert names == {f"model.layers.2.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_control_trains_the_experts_of_the_same_layers(family: str) -> None:
    """method=none: the original's routed and shared experts, in the layers that the plan names."""
    model = FAMILIES[family]()
    settings = control_settings(recovery(control=True))
    assert (settings.objective, settings.trainable, settings.control) == ("finetune", "experts", False)
    control = RecoveryModule(model, settings, plan=Plan("tiny"), stage="control", trained_layers=(2,))
    control.prepare()
    assert control.teacher is None
    prefix = "model.layers.2.mlp"
    expected = {f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"}
    expected |= {f"{prefix}.{SHARED[family]}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == expected
    control.losses(windows(2, 8))["loss"].backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == expected


def test_without_layers_experts_of_all_moe_layers_train() -> None:
    model = qwen2_moe()
    found = trainable_parameters(model, (), "experts")
    assert {name.split(".")[2] for name in found} == {"0", "1", "2"}
    assert not any("gate.weight" in name for name in found)
    assert set(trainable_parameters(model, (), "all")) == dict(model.named_parameters()).keys()


def test_objective_none_trains_nothing() -> None:
    module = module_of(objective="none")
    assert not any(parameter.requires_grad for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ teacher


def storages(*modules: torch.nn.Module) -> dict[int, int]:
    """Address -> bytes of every storage."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_student_and_teacher_share_exists_twice(family: str) -> None:
    before = FAMILIES[family]()
    names, whole = set(before.state_dict()), resident_bytes(before)
    module = module_of(family)
    student, teacher = module.model, module.teacher
    assert teacher is not None
    alone, kept = storages(student), storages(teacher.blocks)
    assert not alone.keys() & kept.keys()
    blocks = sum(tensor.nbytes for layer in (1, 2) for tensor in families.get_block(before, layer).parameters())
    assert sum(kept.values()) == blocks  # the original blocks of condensed layers, nothing else
    own = sum(tensor.nbytes for layer in (1, 2) for tensor in families.get_block(student, layer).state_dict().values())
    assert resident_bytes(student, teacher) == sum({**alone, **kept}.values()) == whole + own
    with module.original():
        outside = {name: value for name, value in student.state_dict().items() if ".mlp." not in name}
        assert set(student.state_dict()) == names
        assert {value.untyped_storage().data_ptr() for value in outside.values()} <= alone.keys()
    registered = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert len(registered) == len(set(registered)) == len(list(module.parameters()))
    assert len(storages(module)) == len({**alone, **kept})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_the_original_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Before training, and after it."""
    original, ids = FAMILIES[family](), windows(3, 11)
    expected = logits(original, ids)
    module = module_of(family)
    for _ in range(2):
        with module.original() as model:
            assert torch.equal(logits(model, ids), expected)
        assert not torch.equal(logits(module.model, ids), expected)
        fit(module, data(module), tmp_path, QUIET, seed=0)


def test_the_teacher_comes_back_after_an_error() -> None:
    module = module_of()
    blocks = list(module.model.modules())
    with pytest.raises(KeyError), module.original():
        raise KeyError
    assert list(module.model.modules()) == blocks


@pytest.mark.parametrize("objective", ["distill", "finetune"])
def test_training_all_weights_leaves_the_original_as_it_was(tmp_path: Path, objective: str) -> None:
    """A shared backbone that trains would carry the original with it: it must be refused, or kept aside."""
    expected = logits(qwen2_moe(), windows(3, 11))
    try:
        module = module_of(trainable="all", objective=objective)
    except ValueError as refused:
        assert "trainable" in str(refused)
        return
    fit(module, data(module), tmp_path, QUIET, seed=0)
    with module.original() as model:
        torch.testing.assert_close(logits(model, windows(3, 11)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distilling_from_oneself_costs_nothing(temperature: float) -> None:
    """A student whose condensed layers are put back to the originals."""
    module = module_of(temperature=temperature, hidden_share=0.5)
    with module.original():
        losses = module.losses(windows(2, 8))
    assert losses["kl"].item() == losses["hidden"].item() == losses["loss"].item() == 0.0


@pytest.mark.parametrize("dropped", [(1,), (2,), (1, 2)])
def test_hidden_states_are_compared_at_the_same_layers_where_some_were_removed(dropped: tuple[int, ...]) -> None:
    """A removed layer passes on what it is given; the teacher's own states are transformers'."""
    model = FAMILIES["qwen2_moe"]()
    plan = Plan("qwen2_moe", tuple(Drop(layer, "block") for layer in dropped))
    module = RecoveryModule(model, recovery(hidden_share=0.5), plan=plan)
    module.prepare()
    ids = windows(2, 8)
    with torch.no_grad():
        losses = module.losses(ids)
        theirs = qwen2_moe()(input_ids=ids, output_hidden_states=True).hidden_states
        original = qwen2_moe()
        x, mine = original.model.embed_tokens(ids), []
        positions = torch.arange(8)[None]
        rotary = original.model.rotary_emb(x, positions)
        mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
        for layer, block in enumerate(original.model.layers):
            if layer not in dropped:
                x = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            mine.append(x)
        mine[-1] = original.model.norm(mine[-1])
        each = [(mine[i] - theirs[i + 1]).square().mean() / theirs[i + 1].square().mean() for i in dropped]
    torch.testing.assert_close(losses["hidden"], torch.stack(each).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("changes", [{}, {"trainable": "lora", "lora": LoraSettings(target="experts")}])
def test_a_recovery_without_anything_to_train_is_refused(changes: dict[str, Any]) -> None:
    model = FAMILIES["qwen2_moe"]()
    plan = Plan("qwen2_moe", tuple(Drop(layer, "moe") for layer in range(3)))
    with pytest.raises(ValueError, match="no experts are left to train"):
        RecoveryModule(model, recovery(**changes), plan=plan).prepare()
    RecoveryModule(FAMILIES["qwen2_moe"](), recovery(objective="none"), plan=plan).prepare()


def test_losses_by_hand() -> None:
    module = module_of(temperature=2.0, cross_entropy_share=0.25, hidden_share=0.125)
    ids = windows(2, 8)
    with torch.no_grad():
        losses = module.losses(ids)
        student = module.model(input_ids=ids, output_hidden_states=True)
        teacher = qwen2_moe()(input_ids=ids, output_hidden_states=True)
        p, q = (torch.distributions.Categorical(logits=output.logits / 2.0) for output in (teacher, student))
        kl = 4 * torch.distributions.kl_divergence(p, q).mean()
        hidden = torch.stack(
            [
                (student.hidden_states[i] - teacher.hidden_states[i]).square().mean()
                / teacher.hidden_states[i].square().mean()
                for i in (2, 3)
            ]
        ).mean()
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["hidden"], hidden, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["cross_entropy"], cross_entropy(student.logits, ids), rtol=1e-6, atol=0)
    whole = 0.625 * kl + 0.25 * losses["cross_entropy"] + 0.125 * hidden
    torch.testing.assert_close(losses["loss"], whole, rtol=1e-5, atol=0)
    assert set(module_of().losses(ids)) == {"kl", "loss"}
    assert set(module_of(objective="finetune").losses(ids)) == {"cross_entropy", "loss"}


def test_the_routers_auxiliary_loss_is_off() -> None:
    """Also where the config asks for it: it would reach the experts."""
    model = qwen2_moe(output_router_logits=True)
    module = RecoveryModule(model, recovery(objective="finetune"), plan=condense_plan(model, [2]))
    module.prepare()
    ids = windows(2, 8)
    losses = module.losses(ids)
    assert torch.equal(losses["loss"], losses["cross_entropy"])
    torch.testing.assert_close(losses["loss"], cross_entropy(logits(model, ids), ids))


# ------------------------------------------------------------------------------------------------ fit


def test_one_step_is_adamws() -> None:
    """fp32, accumulation, clipping and warm-up against torch's own optimiser on a copy of the model."""
    settings: dict[str, Any] = {
        "steps": 3,
        "accumulate_grad_batches": 2,
        "warmup_steps": 0,
        "gradient_clip": 0.5,
        "schedule": "linear",
    }
    module = module_of(**settings)
    twin = copy.deepcopy(module)
    batches = list(data(module).train_dataloader())
    names = [name for name, value in twin.model.named_parameters() if value.requires_grad]
    parameters = [dict(twin.model.named_parameters())[name] for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (3 - step) / 3
        for batch in batches[2 * step : 2 * step + 2]:
            (twin.losses(batch["input_ids"])["loss"] / 2).backward()
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
    """A kill before the given batch (counted from 0) is worked on."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == self.batch:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("accumulate", "every", "stops"),
    [(1, 2, [5]), (1, 3, [1, 5, 8]), (1, 100, [4]), (2, 2, [9]), (2, 2, [5, 6, 10]), (2, 3, [7, 7, 13])],
)
def test_resumes_exactly(tmp_path: Path, accumulate: int, every: int, stops: list[int]) -> None:
    """Bit by bit the weights of an undisturbed run, wherever and however often it was killed; also within a step."""
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
    torch.rand(17)  # the state of the generators when a run goes on is another
    fit(module, data(module), tmp_path / "killed", QUIET, seed=1)
    assert same_bits(trained(module), trained(undisturbed))


def test_random_states_are_part_of_a_resume(tmp_path: Path) -> None:
    """A model with dropout draws numbers while it trains."""

    def dropping() -> RecoveryModule:
        model = qwen2_moe(attention_dropout=0.3)
        module = RecoveryModule(model, recovery(steps=6), plan=condense_plan(model, [1, 2]))
        module.prepare()
        return module

    whole = dropping()
    fit(whole, data(whole), tmp_path / "whole", QUIET, seed=1)
    cut = dropping()
    with pytest.raises(RuntimeError, match="killed"):
        fit(cut, data(cut), tmp_path / "cut", QUIET, seed=1, callbacks=[StopAt(5)])
    again = dropping()
    fit(again, data(again), tmp_path / "cut", QUIET, seed=1)
    assert same_bits(trained(again), trained(whole))


def test_a_finished_fit_is_read_not_repeated(tmp_path: Path) -> None:
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
        found = torch.load(path, weights_only=True)
        assert set(found["state_dict"]) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == [FINAL, "step=4.ckpt"]


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    module = module_of()
    with pytest.raises(RuntimeError, match="killed"):
        fit(module, data(module), tmp_path, QUIET, seed=1, callbacks=[StopAt(3)])
    other = module_of(layers=(0, 1))
    with pytest.raises(ValueError, match="another plan"):
        fit(other, data(other), tmp_path, QUIET, seed=1)


@pytest.mark.parametrize("precision", ["auto", "bf16-true", "32-true"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_precisions(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    """Whatever the training computes in, afterwards the model has its own type, and scales are fp32 to the bit."""
    model: Any = qwen2_moe()
    model.to(dtype)
    plan = condense_plan(model, [1, 2], shared_gate=0.123456789)
    module = RecoveryModule(model, recovery(learning_rate=0.02), plan=plan)
    module.prepare()
    before, ids = trained(module), windows(2, 8)
    settings = TrainerConfig(progress_bar=False, precision=precision)  # type: ignore[arg-type]
    try:
        fit(module, data(module), tmp_path, settings, seed=0)
    except ValueError as refused:  # it would round the frozen weights, the teacher's too
        assert "trainer.precision=bf16-true" in str(refused) and dtype == torch.float32
        return
    after = trained(module)
    for name, value in after.items():
        assert value.dtype == (torch.float32 if name.endswith(".scale") else dtype), name
        if name.endswith(".scale") or not any(part in name for part in ("layers.1.mlp", "layers.2.mlp")):
            assert torch.equal(value, before[name]), f"{name} changed"
        else:
            assert not torch.equal(value, before[name]), f"{name} did not train"
    assert bool(logits(model, ids).isfinite().all())
    with module.original():
        assert bool(logits(model, ids).isfinite().all())


def test_precision_auto() -> None:
    assert precision_of(QUIET, torch.float32) == "32-true"
    assert precision_of(QUIET, torch.bfloat16) == precision_of(QUIET, torch.float16) == "bf16-mixed"


def test_distillation_lowers_the_divergence(tmp_path: Path) -> None:
    module, ids = module_of(steps=30, learning_rate=1e-2), windows(7, 8)
    with torch.no_grad():
        before = module.losses(ids)["loss"].item()
    fit(module, data(module), tmp_path, QUIET, seed=0)
    with torch.no_grad():
        assert module.losses(ids)["loss"].item() < 0.7 * before


def test_a_fit_leaves_frozen_weights_alone(tmp_path: Path) -> None:
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
    assert "cpu" in moves, "Lightning no longer does this: the move back can go"
    assert moves[-1] == "to cpu", moves


@pytest.mark.parametrize("kind", ["prune", "factorize", "lora"])
def test_mixed_precision_computes_experts_in_half_precision(kind: str) -> None:
    """Trained weights are kept in fp32, and yet the products run in bf16: autocast does not cover grouped ones."""
    model = FAMILIES["qwen2_moe"]().bfloat16()
    operations: dict[str, Any] = {
        "prune": [Prune(layer, (0, 1, 2, 4)) for layer in range(3)],
        "factorize": [Factorize(layer, dict.fromkeys(PROJECTIONS, (8,) * 6)) for layer in range(3)],
    }
    recovery = RecoveryConfig(objective="finetune", trainable="lora" if kind == "lora" else "experts")
    plan = Plan("tiny", tuple(operations["prune" if kind == "lora" else kind]))
    module = RecoveryModule(model, recovery, plan=plan)
    module.prepare()
    module.keep_trained_in_fp32("bf16-mixed")
    seen: list[torch.dtype] = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func in (torch.nn.functional.linear, getattr(torch.nn.functional, "grouped_mm", None)):
                seen.append(found.dtype)
            return found

    with torch.autocast("cpu", torch.bfloat16), Products():
        module.losses(windows(2, 8))["loss"]
    assert len(seen) > 20 and set(seen) == {torch.bfloat16}
    assert model.config._experts_implementation == ("eager" if kind == "prune" else "grouped_mm")
