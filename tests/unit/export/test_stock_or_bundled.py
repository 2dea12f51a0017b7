"""Exports meet the rules of vLLM's loaders: architecture, settings, keys and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import EVERY, condense_plan, recorded
from support.vllm_rules import PUBLISHED, RULES, backend_problems, problems
from torch import nn
from transformers import AutoConfig, AutoModel

from recondense.config.schema import ExportConfig
from recondense.export.write_folder import write_folder
from recondense.models import compressed_classes as compressed_module
from recondense.models import families, model_classes
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute


def export(folder: Path, model: Any, *operations: Operation) -> str:
    plan = Plan("tiny", operations)
    execute.execute(model, plan, lambda: recorded(model))
    return write_folder(model, None, plan, folder, "")


def prunes(model: Any, retained: tuple[int, ...] = (1, 2, 4)) -> tuple[Operation, ...]:
    return tuple(Prune(layer, retained) for layer in families.facts(model.config).moe_layers)


# What the config of a family can express; vLLM needs an MoE layer in two families.
ALL = ("first condensed", "condensed", "last dropped")
STOCK = {family: ALL for family in RULES}
STOCK |= dict.fromkeys(("mixtral", "olmoe", "gpt_oss"), ALL[2:]) | dict.fromkeys(("qwen3_moe", "glm4_moe"), ALL[::2])


@pytest.mark.parametrize("family", [family for family in EVERY if family in RULES])
def test_stock_exports_meet_the_rules_of_vllm(tmp_path: Path, family: str) -> None:
    """Unchanged, pruned or narrowed uniformly; condensed or with a dropped layer where stock configs can express it."""
    layers = families.facts(EVERY[family]().config).moe_layers
    variants = {
        "unchanged": (),
        "pruned": prunes(EVERY[family]()),
        "narrowed": tuple(Narrow.from_channels(layer, (range(8),) * 6) for layer in layers),
        "first condensed": condense_plan(EVERY[family](), layers[:1]).operations,
        "condensed": condense_plan(EVERY[family](), layers).operations,
        "last dropped": (Drop(layers[-1], "layer"),),
    }
    kinds = {
        name: export(tmp_path / name, EVERY[family](**PUBLISHED.get(family, {})), *operations)
        for name, operations in variants.items()
    }
    assert {name for name, kind in kinds.items() if kind == "stock"} == {
        "unchanged",
        "pruned",
        "narrowed",
        *STOCK[family],
    }
    for name, kind in kinds.items():
        assert kind == "bundled" or problems(tmp_path / name) == [], name


def test_vllm_needs_an_moe_layer_in_some_families(tmp_path: Path) -> None:
    """format=stock is obeyed all the same: transformers loads such a folder."""
    model = EVERY["qwen3_moe"]()
    plan = condense_plan(model, families.facts(model.config).moe_layers)
    execute.execute(model, plan)
    assert write_folder(model, None, plan, tmp_path / "out", "", ExportConfig(format="stock")) == "stock"
    assert "needs an MoE layer" in problems(tmp_path / "out")


def test_every_rule_has_a_family() -> None:
    assert RULES.keys() <= EVERY.keys()


@pytest.mark.parametrize("layers", [(1,), (2, 0), (0, 1, 2)])
def test_condensed_layers_as_dense_ones(tmp_path: Path, layers: tuple[int, ...]) -> None:
    """qwen2_moe lists them in mlp_only_layers, also beside pruned layers."""
    model = EVERY["qwen2_moe"]()
    rest = [operation for operation in prunes(model) if operation.layer not in layers]
    operations = condense_plan(model, layers).operations
    assert export(tmp_path / "out", model, *rest, *operations) == "stock"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_only_layers"] == sorted(layers)
    assert problems(tmp_path / "out") == []


def rename_key(state: dict[str, Any], config: dict[str, Any]) -> None:
    state["model.layers.1.mlp.experts.2.gate.weight"] = state.pop("model.layers.1.mlp.experts.2.gate_proj.weight")


def remove_key(state: dict[str, Any], config: dict[str, Any]) -> None:
    del state["model.layers.0.mlp.experts.5.down_proj.weight"]


def transpose_weight(state: dict[str, Any], config: dict[str, Any]) -> None:
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    state[name] = state[name].T.contiguous()


def miscount_experts(state: dict[str, Any], config: dict[str, Any]) -> None:
    config["num_experts"] = 5


def call_layer_dense(state: dict[str, Any], config: dict[str, Any]) -> None:
    config["mlp_only_layers"] = [1]


def misname_architecture(state: dict[str, Any], config: dict[str, Any]) -> None:
    config["architectures"] = ["Qwen2MoeModel"]


WRONG = {
    rename_key: "unknown key model.layers.1.mlp.experts.2.gate.weight",
    remove_key: "no key model.layers.0.mlp.experts.5.down_proj.weight",
    transpose_weight: "model.layers.2.mlp.experts.0.up_proj.weight: (32, 16) for (16, 32)",
    miscount_experts: "unknown key model.layers.0.mlp.experts.5.gate_proj.weight",
    call_layer_dense: "no key model.layers.1.mlp.gate_proj.weight",
    misname_architecture: "architecture ['Qwen2MoeModel'] of qwen2_moe",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_is_reported(tmp_path: Path, change: Callable[[Any, Any], None]) -> None:
    folder = tmp_path / "out"
    export(folder, EVERY["qwen2_moe"]())
    assert problems(folder) == []
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    assert WRONG[change] in problems(folder)


def test_settings_that_vllm_does_not_read_are_reported(tmp_path: Path) -> None:
    """vLLM would load these folders and compute something else."""
    export(tmp_path / "olmoe", EVERY["olmoe"](norm_topk_prob=True))
    assert problems(tmp_path / "olmoe") == ["needs weights that are not renormalised"]
    export(tmp_path / "gpt_oss", EVERY["gpt_oss"](layer_types=["full_attention", *["sliding_attention"] * 2]))
    assert problems(tmp_path / "gpt_oss") == ["needs layers that slide and see all by turns", "needs yarn"]
    export(tmp_path / "deepseek_v3", EVERY["deepseek_v3"]())
    assert "needs topk_method noaux_tc and scoring_func sigmoid" in problems(tmp_path / "deepseek_v3")


# ------------------------------------------------------------------------------------------ the transformers backend

RANKS = {name: (3, 5, None, 2) for name in ("gate_proj", "up_proj", "down_proj")}
FOUR = (0, 2, 3, 5)
BUNDLED: dict[str, tuple[Operation, ...]] = {
    "a gate per token": (Condense(1, (1, 4), (0.3, 0.4), None),),
    "low rank": (Prune(1, FOUR), Factorize(1, RANKS)),
    "pruned unlike": (Prune(1, FOUR),),
    "constants": (Constant(1, FOUR),),
    "narrowed": (Narrow.from_channels(1, (range(8),) * 6),),
    "narrowed unlike": (Narrow.from_channels(1, (range(8), *(range(4),) * 5)),),
    "merged": (Merge(1, ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))),),
}


def base_model(folder: Path) -> nn.Module:
    """The model that the folder's modeling file would build, without running that file."""
    config = json.loads((folder / "config.json").read_text())
    model_classes.register_model_type(config["model_type"])
    compressed = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(compressed)
    return model


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("qwen2_moe", "deepseek_v2", "deepseek", "mixtral")
        for name in BUNDLED
        if family == "qwen2_moe" or name != "a gate per token"  # the other families have no such gate
    ],
)
def test_bundled_exports_meet_the_rules_of_the_transformers_backend(tmp_path: Path, family: str, name: str) -> None:
    operations = BUNDLED[name]
    assert export(tmp_path / "out", EVERY[family](), *operations) == "bundled"
    assert backend_problems(tmp_path / "out", base_model(tmp_path / "out")) == []


def test_what_the_transformers_backend_cannot_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped layer that is still counted, low-rank experts as in the live model, and a missing base model."""
    folder = tmp_path / "out"
    export(folder, EVERY["qwen2_moe"](), Drop(1, "layer"), Prune(0, FOUR))
    assert backend_problems(folder, base_model(folder)) == ["layer 1 has no attention, so no key-value cache"]
    export(folder, EVERY["qwen2_moe"](), *BUNDLED["low rank"])
    monkeypatch.delattr(compressed_module._Kept, "parameters")
    assert backend_problems(folder, base_model(folder)) == ["layers.1.mlp.experts would be replaced by 6 whole experts"]
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))
    assert backend_problems(folder, base_model(folder))[0] == "auto_map names no AutoModel"
