"""The shapes of layers: what a config must say of them, and what it says already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import EVERY, qwen2_moe, recorded
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from recondense.calibration.calibrate import calibrate
from recondense.config.schema import ExportConfig
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models.layer_shapes import differs_from_config, layer_shapes
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute
from recondense.surgery.apply import apply

RANKS = {name: (3, 3, None, 3, 3, 3) for name in ("gate_proj", "up_proj", "down_proj")}
OPERATIONS: list[Operation] = [
    Condense(1, (0, 2), (0.5, 0.5)),
    Drop(1, "moe"),
    Drop(1, "layer"),
    Prune(1, (0, 2, 3, 5)),
    Factorize(1, RANKS),
    Merge(1, ((0, 1), (2, 3), (4,), (5,)), ((0.5, 0.5), (0.5, 0.5), (1.0,), (1.0,))),
    Constant(1, (0, 2, 3, 5)),
    Narrow.from_channels(1, (range(8),) * 6),
    Narrow.from_channels(1, (range(8), *(range(4),) * 5)),
]
SHAPES: list[dict[str, Any]] = [
    {"kind": "condensed", "shared_width": 24, "routed_width": 2 * 16, "token_gate": True},
    {"kind": "zeros"},
    {"kind": "skipped"},
    {"kind": "sparse", "num_experts": 4, "router_rows": 4},
    {"kind": "sparse", "num_experts": 6, "router_rows": 6, "ranks": {name: list(RANKS[name]) for name in RANKS}},
    {"kind": "sparse", "num_experts": 4, "router_rows": 6, "merged": True},
    {"kind": "sparse", "num_experts": 4, "router_rows": 6, "merged": True, "constants": 2},
    {"kind": "sparse", "num_experts": 6, "router_rows": 6, "expert_width": 8},
    {"kind": "sparse", "num_experts": 6, "router_rows": 6, "expert_width": [8, 4, 4, 4, 4, 4]},
]


@pytest.mark.parametrize(("operation", "shape"), [*zip(OPERATIONS, SHAPES, strict=True)])
def test_each_operation_has_a_shape(operation: Operation, shape: dict[str, Any]) -> None:
    model = qwen2_moe()
    assert layer_shapes(model) == {}
    execute.execute(model, Plan("tiny", (operation,)), lambda: recorded(model))
    assert layer_shapes(model) == {1: shape}


@pytest.mark.parametrize("family", EVERY)
def test_a_loaded_model_has_the_shapes_of_its_config(family: str) -> None:
    assert not differs_from_config(EVERY[family]())


@pytest.mark.parametrize(
    "operation", [OPERATIONS[0], OPERATIONS[4], OPERATIONS[7]], ids=["condense", "factorize", "narrow"]
)
def test_the_classes_of_a_bundled_export_are_refused(operation: Operation, tmp_path: Path) -> None:
    """transformers loads them with the folder's own classes: to compress on, the folder is loaded with `load`."""
    model, plan = qwen2_moe(), Plan("tiny", (operation,))
    execute.execute(model, plan)
    write_folder(model, None, plan, tmp_path, "", ExportConfig(format="bundled"))
    kind: Any = get_class_from_dynamic_module("modeling_recondense.CompressedForCausalLM", tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    for refused in (lambda: calibrate(loaded, None, ["some text"]), lambda: apply(loaded, plan)):
        with pytest.raises(UserError, match=r"modeling file of its folder\. Load it with recondense\.load"):
            refused()


def test_a_stock_export_may_have_its_own_modeling_file(tmp_path: Path) -> None:
    """Its blocks are those of the family."""
    model = EVERY["deepseek"]()
    assert write_folder(model, None, Plan("tiny"), tmp_path, "") == "stock"
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    kind: Any = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert apply(loaded, Plan("tiny", (OPERATIONS[3],))).plan.layers == (1,)
