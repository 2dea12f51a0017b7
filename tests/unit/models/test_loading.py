"""Loading folders: both layouts of the same weights, and compressed folders, to compress and train them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.condensed import condensed_layers
from support.plain_moe import FOUR, PAIRS, RANKS, Ranks
from support.small import byte_tokenizer
from support.tiny_models import EVERY, bits, logits, recorded, same_bits, tiny, windows

from recondense.config.schema import ExportConfig, ModelConfig, RecoveryConfig
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models import families, loading, moe_blocks, parameters
from recondense.models.parameters import count_parameters
from recondense.operations import Condense, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.recovery import trainable
from recondense.recovery.module import RecoveryModule
from recondense.recovery.trainable import trainable_parameters
from recondense.surgery import execute
from recondense.surgery.student import Student

IDS = windows(3, 11)
BUNDLED = ExportConfig(format="bundled")
FURTHER = ("qwen2_moe", "gpt_oss", "deepseek", "mixtral", "ernie4_5_moe")


def load(folder: Path, family: str, **settings: Any) -> Any:
    """Load a folder as a run does, without remote code; gpt_oss supports eager attention only."""
    attention: Any = "eager" if family == "gpt_oss" else "sdpa"
    model, _ = loading.load(folder, ModelConfig(attention=attention, device="cpu", **settings))
    return model


def write(model: Any, plan: Plan, folder: Path, settings: ExportConfig = BUNDLED) -> str:
    return write_folder(model, byte_tokenizer(), plan, folder, "", settings)


# ---------------------------------------------------------------------------------------------- layouts

# What a routed expert's gate is called on the hub; the other families have `mlp.experts.0.gate_proj.weight`.
ON_THE_HUB = {"mixtral": "block_sparse_moe.experts.0.w1.weight", "gpt_oss": "mlp.experts.gate_up_proj"}


@pytest.mark.parametrize("family", EVERY)
def test_both_layouts_of_the_same_weights_give_the_same_model(family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    for name in ("hub", "fused"):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_file(state, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    separate = load_file(tmp_path / "hub" / "model.safetensors")
    layer = families.facts(model.config).moe_layers[0]
    assert f"model.layers.{layer}.{ON_THE_HUB.get(family, 'mlp.experts.0.gate_proj.weight')}" in separate
    assert (separate.keys() == state.keys()) == (family == "gpt_oss")
    models = [load(tmp_path / name, family) for name in ("hub", "fused")]
    assert same_bits(bits(models[0]), bits(models[1])) and same_bits(bits(models[0]), bits(model))
    for other in models:
        torch.testing.assert_close(logits(other, IDS), logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_a_stock_export_can_be_loaded_and_pruned(family: str, tmp_path: Path) -> None:
    """Pruned uniformly, it is the family's class with fewer experts, and it can be pruned again."""
    model = EVERY[family]()
    plan = Plan("tiny", tuple(Prune(layer, FOUR) for layer in moe_blocks.sparse_blocks(model)))
    execute.execute(model, plan)
    assert write(model, plan, tmp_path / "out", ExportConfig()) == "stock"
    again = load(tmp_path / "out", family)
    assert type(again) is type(EVERY[family]()) and count_parameters(again) == count_parameters(model)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    assert families.facts(again.config).num_experts == 4
    further = Plan("tiny", tuple(Prune(layer, (0, 1, 3)) for layer in moe_blocks.sparse_blocks(again)))
    execute.execute(model, further)
    execute.execute(again, further)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_low_rank_experts_multiplied_out_are_those_of_the_family(family: str, tmp_path: Path) -> None:
    model = EVERY[family]()
    plan = Plan("tiny", tuple(Factorize(layer, RANKS) for layer in moe_blocks.sparse_blocks(model)))
    execute.execute(model, plan)
    assert write(model, plan, tmp_path / "out", ExportConfig(format="dense")) == "stock"
    again = load(tmp_path / "out", family)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    assert count_parameters(again) == count_parameters(EVERY[family]())


# ---------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("family", "expected"), [("gpt_oss", "eager"), ("qwen2_moe", "sdpa")])
def test_the_default_attention_is_one_that_the_family_has(
    family: str, expected: str, compressed: bool, tmp_path: Path
) -> None:
    model, operations = EVERY[family](), (Condense(1, (3, 0), (0.4, 0.2), None),) if compressed else ()
    plan = Plan("tiny", operations)
    execute.execute(model, plan)
    write(model, plan, tmp_path, BUNDLED if compressed else ExportConfig())
    for changes in ({}, {"dtype": "float32"}, {"trust_remote_code": True}):
        assert loading.load(tmp_path, **changes)[0].config._attn_implementation == expected
    assert loading.load(tmp_path, attention="eager")[0].config._attn_implementation == "eager"
    if expected == "eager":
        for settings in ({"attention": "sdpa"}, {"settings": ModelConfig(attention="sdpa")}):
            with pytest.raises(UserError, match=r"attention=sdpa: .*gpt_oss lacks it; use attention=eager"):
                loading.load(tmp_path, **settings)


def test_a_package_that_an_attention_lacks_is_named(tmp_path: Path) -> None:
    write(EVERY["qwen2_moe"](), Plan("tiny"), tmp_path, ExportConfig())
    with pytest.raises(UserError, match=r"FlashAttention2 .* package .* installed"):
        loading.load(tmp_path, attention="flash_attention_2")


# ---------------------------------------------------------------------------------------------- compressed folders

TO_FOUR: Ranks = {name: (4, 4, 3, 5, 7, 8) for name in RANKS}


@pytest.mark.parametrize("family", EVERY)
def test_a_compressed_folder_is_loaded(family: str, tmp_path: Path) -> None:
    """A deeper model with every operation, so with every shape that a layer of a family can have."""
    extra: dict[str, Any] = {"num_hidden_layers": 7}
    if family == "gpt_oss":
        extra["layer_types"] = ["full_attention", "full_attention", "sliding_attention"] + ["full_attention"] * 4
    model = tiny(family, **extra)
    operations: tuple[Operation, ...] = (
        *(Prune(1, FOUR), Factorize(1, {name: (3, None, 4, 5) for name in RANKS}), Merge(2, *PAIRS)),
        Narrow.from_channels(2, ((0, 3, 5, 7), (2,), range(8))),
        Narrow.from_channels(6, (range(12),) * 6),
        *(Condense(3, (3, 0), (0.4, 0.2), None), Drop(4, "moe"), Drop(5, "layer"), Factorize(6, RANKS)),
    )
    plan = Plan("tiny", operations)
    execute.execute(model, plan)
    assert write(model, plan, tmp_path / "out") == "bundled"
    again = load(tmp_path / "out", family)
    assert type(again).__name__ == "CompressedForCausalLM" and count_parameters(again) == count_parameters(model)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    facts = families.facts(again.config)
    assert set(facts.moe_layers) - {0} == {1, 2, 6} and facts.factorized == (1, 6)
    assert tuple(moe_blocks.sparse_blocks(again)) == facts.moe_layers
    assert facts.num_experts == 3 and families.family_of(again.config) is families.family_of(model.config)


@pytest.mark.parametrize("family", FURTHER)
def test_a_compressed_folder_is_compressed_again(family: str, tmp_path: Path) -> None:
    """Condensed, written, loaded, factorized, written, loaded."""
    model = EVERY[family]()
    first = Plan("tiny", (Condense(1, (3, 0), (0.4, 0.2), None),))
    execute.execute(model, first)
    assert write(model, first, tmp_path / "first") == "bundled"
    again = load(tmp_path / "first", family)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    sparse_layers = tuple(moe_blocks.sparse_blocks(model))
    facts = families.facts(again.config)
    assert facts.moe_layers == sparse_layers == tuple(moe_blocks.sparse_blocks(again)) and 1 not in sparse_layers
    assert (facts.num_experts, facts.factorized) == (6, ())
    with pytest.raises(ValueError, match="condense, layer 1: the sparse MoE layers are"):
        execute.execute(again, first)

    second = Plan("tiny", tuple(Factorize(layer, TO_FOUR, whitening=True) for layer in sparse_layers))
    for compressed in (model, again):
        execute.execute(compressed, second, lambda compressed=compressed: recorded(compressed))  # type: ignore[misc]
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    assert write(again, second, tmp_path / "second", ExportConfig()) == "bundled"
    last = load(tmp_path / "second", family)
    torch.testing.assert_close(logits(last, IDS), logits(again, IDS), rtol=0, atol=1e-5)
    facts = families.facts(last.config)
    assert facts.moe_layers == sparse_layers == facts.factorized
    assert parameters.parameter_counts(last.config).total == count_parameters(again)
    assert parameters.parameter_counts(last.config).routed_experts == parameters.routed_parameters(again)


@pytest.mark.parametrize("family", FURTHER)
def test_a_compressed_folder_is_trained(family: str, tmp_path: Path) -> None:
    """method=none, recovery=finetune: the experts of condensed layers train with those of sparse layers."""
    model = EVERY[family]()
    plan = Plan("tiny", (Condense(1, (3, 0), (0.4, 0.2), None),))
    execute.execute(model, plan)
    write(model, plan, tmp_path / "first")
    again = load(tmp_path / "first", family)
    layers = sorted({1, *moe_blocks.sparse_blocks(again)})
    assert trainable.trainable_layers(again, ()) == layers
    recovery = RecoveryConfig(name="finetune", objective="finetune", learning_rate=1e-3, steps=3)
    module = RecoveryModule(Student(again, Plan("tiny")), recovery)
    module.prepare()
    before, named = bits(again), trainable_parameters(again, (), "experts")
    parts = ("gate_proj", "up_proj", "down_proj")
    assert {f"model.layers.1.mlp.{part}.weight" for part in parts} <= set(named)
    optimizer, losses = module.configure_optimizers()["optimizer"], []
    for _ in range(3):
        loss = module.losses(IDS)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    changed = {name for name, value in again.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(named)
    write(again.eval(), Plan("tiny"), tmp_path / "second")
    last = load(tmp_path / "second", family)
    torch.testing.assert_close(logits(last, IDS), logits(again, IDS), rtol=0, atol=1e-5)
    assert set(condensed_layers(last)) == {1}
