"""Recovery: setup, what trains and what does not, the teacher on a shared backbone, and the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.losses import cross_entropy
from support.recoveries import QUIET, data, module_of, prepared, recovery
from support.tiny_models import EVERY, FAMILIES, condense_plan, logits, qwen2_moe, windows

from recondense.config.schema import LoraSettings
from recondense.config.stages import control_settings
from recondense.models import moe_blocks
from recondense.models.parameters import resident_bytes
from recondense.models.replacement_blocks import CondensedMoE
from recondense.operations import Drop, Factorize, Prune
from recondense.plan import Plan
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.recovery.trainable import trainable_parameters
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

# Lightning warns of this whenever a fit resumes.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


# ------------------------------------------------------------------------------------------------ setup


def test_setup_applies_once_however_often_it_is_called() -> None:
    model = qwen2_moe()
    module = RecoveryModule(lambda: apply(model, condense_plan(model, [1, 2])), recovery())
    for stage in ("fit", "validate", "fit", "test"):
        module.setup(stage)
        if stage == "fit":
            blocks, student = list(model.modules()), module.student
    assert list(model.modules()) == blocks and module.student is student
    assert sorted(moe_blocks.sparse_blocks(model)) == [0]


def test_setup_makes_the_student() -> None:
    model = qwen2_moe()
    searched = []

    def search() -> Student:
        searched.append(sorted(moe_blocks.sparse_blocks(model)))
        return apply(model, condense_plan(model, [1]))

    module = RecoveryModule(search, recovery())
    assert module.plan is None and not searched
    with pytest.raises(AssertionError, match="made in `setup`"):
        _ = module.student
    module.setup("fit")
    module.setup("fit")
    assert searched == [[0, 1, 2]] and module.plan == condense_plan(qwen2_moe(), [1])
    assert isinstance(moe_blocks.get_block(model, 1), CondensedMoE)


def test_adapters_belong_to_one_recovery_stage() -> None:
    module = module_of(trainable="lora")
    module.merge_adapters()
    module.merge_adapters()
    with pytest.raises(AssertionError, match="the stage is over"):
        module.prepare()


def test_works_in_anyones_trainer(tmp_path: Path) -> None:
    model = qwen2_moe()
    module = RecoveryModule(lambda: apply(model, condense_plan(model, [1, 2])), recovery())
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(module, windows(3, 8, seed=5)))
    metrics = trainer.validate(module, datamodule=data(module, windows(3, 8, seed=5)), verbose=False)
    assert metrics[0]["recovery/validation_loss"] > 0 and metrics[0]["recovery/validation_kl"] > 0
    assert sorted(moe_blocks.sparse_blocks(model)) == [0]


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
    prepared(model, condense_plan(model, [2], shared_gate=None))
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert "model.layers.2.mlp.shared_expert_gate.weight" in dict(model.named_parameters())
    assert names == {f"model.layers.2.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_control_trains_the_experts_of_the_same_layers(family: str) -> None:
    """method=none: the original's routed and shared experts, in the layers that the plan names."""
    model = FAMILIES[family]()
    settings = control_settings(recovery(control=True))
    assert (settings.objective, settings.trainable, settings.control) == ("finetune", "experts", False)
    control = RecoveryModule(Student(model, Plan("tiny")), settings, stage="control", layers=(2,))
    control.prepare()
    assert not control.teacher.answers_any_text
    prefix = "model.layers.2.mlp"
    expected = {f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"}
    expected |= {f"{prefix}.{SHARED[family]}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == expected
    control.losses(windows(2, 8))["loss"].backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == expected


def test_without_layers_experts_of_all_moe_layers_train() -> None:
    model = qwen2_moe()
    trainable = trainable_parameters(model, (), "experts")
    assert {name.split(".")[2] for name in trainable} == {"0", "1", "2"}
    assert not any("gate.weight" in name for name in trainable)
    assert set(trainable_parameters(model, (), "all")) == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("family", EVERY)
def test_a_gradient_reaches_all_that_trains(family: str) -> None:
    """Otherwise processes would wait for each other, and checkpoints would hold weights that do not train."""
    model: Any = EVERY[family]()
    module = prepared(model, Plan("tiny"), objective="finetune", trainable="all")
    module.losses(windows(4, 12))["loss"].backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert without == {name for name, value in model.named_parameters() if not value.requires_grad}
    assert all(name.endswith("e_score_correction_bias") for name in without)


class ManyNorms(torch.nn.LayerNorm):
    """A norm per head, as in some families."""


DECAYED = {
    "gpt_oss": {"gate_up_proj", "down_proj"},
    "gpt_oss low-rank": {"gate_up_right", "gate_left", "up_left", "down_left", "down_right"},
    "gpt_oss condensed": {"weight"},
    "qwen2_moe": {"gate_up_proj", "down_proj", "weight"},
}
RANKS = {name: (8, 8, None, 8, 6, 8) for name in PROJECTIONS}


@pytest.mark.parametrize("name", DECAYED)
def test_biases_and_norms_are_not_decayed_whatever_their_shape(name: str) -> None:
    family, _, change = name.partition(" ")
    model: Any = EVERY[family]()
    if change == "condensed":
        plan = condense_plan(model, [1, 2])
    else:
        operation = Factorize(1, RANKS) if change else Prune(1, (0, 1, 2, 4))
        plan = Plan("tiny", (operation,))
    module = prepared(model, plan, weight_decay=0.1)
    decayed = decayed_names(module, 0.1)
    assert {key.rpartition(".")[2] for key in decayed} == DECAYED[name]
    others = decayed_names(module, 0.0)
    assert all("bias" in key for key in others) and bool(others) == (family == "gpt_oss")
    assert len(decayed) + len(others) == sum(value.requires_grad for value in module.parameters())


def test_among_all_weights_only_matrices_are_decayed() -> None:
    model: Any = EVERY["gpt_oss"]()
    model.model.layers[0].self_attn.q_norm = ManyNorms((2, 16))
    module = prepared(model, Plan("tiny"), objective="finetune", trainable="all")
    others = decayed_names(module, 0.0)
    kinds = {key.rpartition(".")[2] for key in others}
    assert kinds == {"weight", "bias", "gate_up_proj_bias", "down_proj_bias", "sinks"}
    assert all("norm" in key for key in others if key.endswith(".weight"))
    assert any(key.endswith("q_norm.weight") for key in others)
    assert not any("norm" in key or "bias" in key for key in decayed_names(module, 0.1))


def decayed_names(module: RecoveryModule, weight_decay: float) -> list[str]:
    """The parameters with this weight decay."""
    groups = [group for group in module.parameter_groups() if group["weight_decay"] == weight_decay]
    inside = {id(parameter) for group in groups for parameter in group["params"]}
    return [name for name, value in module.named_parameters() if id(value) in inside]


def test_without_an_objective_there_is_no_module() -> None:
    with pytest.raises(AssertionError, match="nothing to train"):
        module_of(objective="none")


# ------------------------------------------------------------------------------------------------ teacher


def storages(*modules: torch.nn.Module) -> dict[int, int]:
    """The bytes of every storage, by address."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_student_and_teacher_share_exists_once(family: str) -> None:
    before = FAMILIES[family]()
    names, total = set(before.state_dict()), resident_bytes(before)
    module = module_of(family)
    student, originals = module.model, module.student.originals
    alone, original_blocks = storages(student), storages(*originals.values())
    assert not alone.keys() & original_blocks.keys()
    blocks = sum(tensor.nbytes for layer in (1, 2) for tensor in moe_blocks.get_block(before, layer).parameters())
    assert sum(original_blocks.values()) == blocks  # the original blocks of condensed layers, nothing else
    student_blocks = sum(
        tensor.nbytes for layer in (1, 2) for tensor in moe_blocks.get_block(student, layer).state_dict().values()
    )
    assert (
        resident_bytes(student, module.originals)
        == sum({**alone, **original_blocks}.values())
        == total + student_blocks
    )
    with module.student.original():
        outside = {name: value for name, value in student.state_dict().items() if ".mlp." not in name}
        assert set(student.state_dict()) == names
        assert {value.untyped_storage().data_ptr() for value in outside.values()} <= alone.keys()
    registered = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert len(registered) == len(set(registered)) == len(list(module.parameters()))
    assert len(storages(module)) == len({**alone, **original_blocks})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_the_original_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Before training, and after it."""
    original, ids = FAMILIES[family](), windows(3, 11)
    expected = logits(original, ids)
    module = module_of(family)
    for _ in range(2):
        with module.student.original() as model:
            assert torch.equal(logits(model, ids), expected)
        assert not torch.equal(logits(module.model, ids), expected)
        fit(module, data(module), tmp_path, QUIET, seed=0)


def test_the_student_is_restored_after_an_error() -> None:
    module = module_of()
    blocks = list(module.model.modules())
    with pytest.raises(KeyError), module.student.original():
        raise KeyError
    assert list(module.model.modules()) == blocks


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distilling_from_the_student_itself_gives_no_loss(temperature: float) -> None:
    """A student whose condensed layers are replaced by the originals."""
    module = module_of(temperature=temperature, hidden_share=0.5)
    with module.student.original():
        losses = module.losses(windows(2, 8))
    assert losses["kl"].item() == losses["hidden"].item() == losses["loss"].item() == 0.0


@pytest.mark.parametrize("dropped", [(1,), (2,), (1, 2)])
def test_hidden_states_are_compared_at_the_same_layers_where_some_were_removed(dropped: tuple[int, ...]) -> None:
    """A removed layer passes its input on; the teacher's states are those of transformers."""
    model = FAMILIES["qwen2_moe"]()
    plan = Plan("qwen2_moe", tuple(Drop(layer, "layer") for layer in dropped))
    module = prepared(model, plan, hidden_share=0.5)
    ids = windows(2, 8)
    with torch.no_grad():
        losses = module.losses(ids)
        teacher_states = qwen2_moe()(input_ids=ids, output_hidden_states=True).hidden_states
        original = qwen2_moe()
        x, student_states = original.model.embed_tokens(ids), []
        positions = torch.arange(8)[None]
        rotary = original.model.rotary_emb(x, positions)
        mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
        for layer, block in enumerate(original.model.layers):
            if layer not in dropped:
                x = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            student_states.append(x)
        student_states[-1] = original.model.norm(student_states[-1])
        errors = [
            (student_states[i] - teacher_states[i + 1]).square().mean() / teacher_states[i + 1].square().mean()
            for i in dropped
        ]
    torch.testing.assert_close(losses["hidden"], torch.stack(errors).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("changes", [{}, {"trainable": "lora", "lora": LoraSettings(target="experts")}])
def test_a_recovery_without_anything_to_train_is_refused(changes: dict[str, Any]) -> None:
    model = FAMILIES["qwen2_moe"]()
    plan = Plan("qwen2_moe", tuple(Drop(layer, "moe") for layer in range(3)))
    with pytest.raises(ValueError, match="there are no experts to train"):
        prepared(model, plan, **changes)


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
    expected = 0.625 * kl + 0.25 * losses["cross_entropy"] + 0.125 * hidden
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=0)
    assert set(module_of().losses(ids)) == {"kl", "loss"}
    assert set(module_of(objective="finetune").losses(ids)) == {"cross_entropy", "loss"}


def test_the_routers_auxiliary_loss_is_off() -> None:
    """Also where the config turns it on: its gradients would reach the experts."""
    model = qwen2_moe(output_router_logits=True)
    module = prepared(model, condense_plan(model, [2]), objective="finetune")
    ids = windows(2, 8)
    losses = module.losses(ids)
    assert torch.equal(losses["loss"], losses["cross_entropy"])
    torch.testing.assert_close(losses["loss"], cross_entropy(logits(model, ids), ids))
