"""Values of config.json files, and whether two models have the same shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recondense.models import compressed_classes, config_json
from recondense.models.config_json import config_values, model_type, same_shape, same_sizes
from recondense.models.published_configs import recorded_ids, recorded_values

QWEN = "Qwen/Qwen1.5-MoE-A2.7B"


def test_the_prefix_is_that_of_exports() -> None:
    assert config_json.PREFIX == compressed_classes.PREFIX
    assert model_type({"model_type": "recondense_olmoe"}) == "olmoe" and model_type({}) == "None"


def test_values_of_a_folder_and_of_a_recorded_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    assert config_values(str(tmp_path)) == {"model_type": "olmoe"}
    assert config_values(QWEN, hub=False) == recorded_values(QWEN)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "\udcff", "[" * 100_000])
def test_a_damaged_config_has_no_values(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert config_values(str(tmp_path)) is None


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "nowhere/", "a b", ""])
def test_a_missing_folder_is_not_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_json, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    assert config_values(path) is None


@pytest.mark.parametrize("hub_id", recorded_ids())
def test_a_checkpoint_has_its_own_shape_and_no_other(hub_id: str) -> None:
    same = [other for other in recorded_ids() if same_shape(recorded_values(hub_id), recorded_values(other))]
    assert same == [hub_id]


@pytest.mark.parametrize(
    ("changes", "sizes", "shape"),
    [
        ({"vocab_size": 7, "num_experts_per_tok": 2, "torch_dtype": "float32"}, True, True),  # a chat variant
        ({"mlp_only_layers": [], "decoder_sparse_step": None}, True, True),
        ({"mlp_only_layers": [3]}, True, False),  # a stock export of condensed layers
        ({"decoder_sparse_step": 2}, True, False),
        ({"compressed_layers": {"3": {"kind": "dense"}}, "model_type": "recondense_qwen2_moe"}, True, False),
        ({"num_hidden_layers": 3}, False, False),
        ({"num_experts": 45}, False, False),
        ({"hidden_size": 64}, False, False),
        ({"moe_intermediate_size": 64}, False, False),
        ({"model_type": "qwen3_moe"}, False, False),
    ],
)
def test_a_changed_config(changes: dict[str, Any], sizes: bool, shape: bool) -> None:
    values = {**recorded_values(QWEN), **changes}
    assert (same_sizes(values, recorded_values(QWEN)), same_shape(values, recorded_values(QWEN))) == (sizes, shape)


def test_a_size_that_is_not_written_differs() -> None:
    values = recorded_values(QWEN)
    del values["num_experts"]
    assert not same_sizes(values, recorded_values(QWEN))
