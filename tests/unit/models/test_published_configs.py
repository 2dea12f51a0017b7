"""The recorded configurations are those of published checkpoints: they give the published numbers of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from recondense.models import families
from recondense.models.published_configs import FOLDER, recorded_config, recorded_ids, recorded_values

MODELS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    for path in sorted((Path(__file__).resolve().parents[3] / "conf" / "model").glob("[!_]*.yaml"))
}
# Parameters, with a tolerance: exact numbers are from papers and the hub's safetensors, others from model cards.
PUBLISHED: dict[str, tuple[float, float]] = {
    "qwen_moe": (14_315_784_192, 0),
    "deepseek_v2_lite": (15_706_484_224, 0),
    "mixtral": (46_702_792_704, 0),
    "deepseek_moe": (16_375_728_128, 0),
    "qwen3_moe": (30.5e9, 0.05e9),
    "deepseek_v2": (236e9, 0.5e9),
    "deepseek_v3": (671e9, 0.5e9),
    "olmoe": (6.92e9, 0.005e9),
    "gpt_oss": (20.9e9, 0.05e9),
    "glm4_moe": (106e9, 1e9),
    "ernie4_5_moe": (21.8e9, 0.05e9),
}


def test_every_published_model_is_recorded_and_checked() -> None:
    ids = {settings["path"] for settings in MODELS.values() if settings["path"]}
    assert ids == set(recorded_ids())
    assert set(PUBLISHED) == {name for name, settings in MODELS.items() if settings["path"]}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "deepseek_moe"])
def test_parameters_are_the_published_ones(name: str) -> None:
    config = recorded_config(MODELS[name]["path"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    published, tolerance = PUBLISHED[name]
    assert abs(sum(parameter.numel() for parameter in model.parameters()) - published) <= tolerance


def test_parameters_of_the_first_deepseek() -> None:
    """By hand, as transformers has no class for it: attention, a dense layer, experts, router, norms, vocabulary."""
    config: dict[str, Any] = recorded_values(MODELS["deepseek_moe"]["path"])
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    dense = config["first_k_dense_replace"]
    experts = config["n_routed_experts"] + config["n_shared_experts"]
    sparse = 3 * hidden * config["moe_intermediate_size"] * experts + hidden * config["n_routed_experts"]
    blocks = dense * 3 * hidden * config["intermediate_size"] + (layers - dense) * sparse
    total = layers * (4 * hidden**2 + 2 * hidden) + blocks + 2 * hidden * config["vocab_size"] + hidden
    assert total == PUBLISHED["deepseek_moe"][0]


def test_recorded_files_are_short_and_name_no_code() -> None:
    for hub_id in recorded_ids():
        values = recorded_values(hub_id)
        assert not {"auto_map", "transformers_version", "_name_or_path"} & values.keys()
        assert values["torch_dtype"] == "bfloat16"
        assert (FOLDER / f"{hub_id}.json").stat().st_size < 4096


def test_a_family_that_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.FAMILIES, "qwen2_moe")
    with pytest.raises(ValueError, match="'qwen2_moe' is not supported"):
        recorded_config("Qwen/Qwen1.5-MoE-A2.7B")


def test_an_unknown_id_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no config of Qwen/Qwen9.*openai/gpt-oss-20b"):
        recorded_config("Qwen/Qwen9")
