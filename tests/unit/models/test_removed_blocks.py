"""Removed blocks and layers: what they compute, and what training and transformers expect of every layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import EVERY, windows
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recondense.config.schema import ExportConfig
from recondense.export.write_folder import write_folder
from recondense.models import families, moe_blocks, reload
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.operations import Drop, Factorize, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

RANKS = {name: (3, 5, None, 2) for name in ("gate_proj", "up_proj", "down_proj")}


def removed(family: str) -> tuple[Operation, ...]:
    """One block and one layer; a layer that counts cached tokens stays."""
    layers = families.facts(EVERY[family]().config).moe_layers
    return (Drop(layers[0], "moe"), Drop(1 if family == "gpt_oss" else layers[-1], "layer"))


def student(family: str, *operations: Operation) -> Any:
    model = EVERY[family]()
    execute.execute(model, Plan("tiny", operations))
    return model


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_are_zeros_whatever_enters(value: float, dtype: torch.dtype) -> None:
    hidden = torch.full((2, 3, 4), value, dtype=dtype, requires_grad=True)
    output = Zeros()(hidden)
    assert isinstance(output, torch.Tensor) and torch.equal(output, torch.zeros_like(hidden))
    output.sum().backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros_like(hidden))
    pair = Zeros(pair=True)(hidden)
    assert isinstance(pair, tuple) and pair[1] is None


@pytest.fixture
def group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["removed", "low rank"])
def test_an_export_trains_with_ddp(family: str, kind: str, tmp_path: Path, group: Any) -> None:
    """Every trained parameter gets a gradient: the second step fails if the first one has left some out."""
    last = families.facts(EVERY[family]().config).moe_layers[-1]
    low_rank = (Prune(last, (0, 2, 3, 5)), Factorize(last, RANKS))
    model = student(family, *(removed(family) if kind == "removed" else low_rank))
    write_folder(model, None, Plan("tiny"), tmp_path / "out", "")
    with reload.only_the_folders_code(tmp_path / "out"):
        trained, _ = reload.load_like(tmp_path / "out", model)
        parallel = DistributedDataParallel(trained.train())
        optimizer = torch.optim.AdamW(parallel.parameters())
        for _ in range(2):
            ids = windows(1, 5)
            parallel(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("family", EVERY)
def test_a_skipped_layer_gives_its_hidden_state(family: str, exported: bool, tmp_path: Path) -> None:
    """One state before the first layer and one after each layer, also after the skipped one."""
    skipped = removed(family)[1]
    model = student(family, skipped)
    ids = windows(2, 7)
    if exported:
        write_folder(model, None, Plan("tiny"), tmp_path / "out", "", ExportConfig(format="bundled"))
        with reload.only_the_folders_code(tmp_path / "out"):
            model, _ = reload.load_like(tmp_path / "out", model)
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
    else:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    if skipped.layer + 1 < model.config.num_hidden_layers:  # the last state is taken after the final norm
        assert torch.equal(states[skipped.layer], states[skipped.layer + 1])


def test_a_skipped_layer_takes_the_place_of_any_layer() -> None:
    """It belongs to the class of the layer, has nothing of it, and can be copied and replaced like others."""
    layer = EVERY["qwen2_moe"]().model.layers[1]
    skipped = SkippedLayer.instead_of(layer)
    assert isinstance(skipped, type(layer)) and isinstance(skipped, SkippedLayer)
    assert list(skipped.children()) == [] and skipped.state_dict() == {}
    assert type(SkippedLayer.instead_of(layer)) is type(skipped) is type(SkippedLayer.instead_of(skipped))
    assert isinstance(SkippedLayer.instead_of(nn.Linear(2, 2)), nn.Linear)
    hidden = torch.ones(1, 2, 3)
    assert copy.deepcopy(skipped)(hidden, attention_mask=None) is hidden
    assert type(skipped).__name__ == "SkippedLayer"  # by which the store of a streamed model knows it


def test_compressing_on_replaces_a_skipped_layer() -> None:
    model = student("qwen2_moe", Drop(1, "layer"))
    assert isinstance(moe_blocks.get_block(model, 1), SkippedLayer)
    assert moe_blocks.sparse_blocks(model).keys() == {0, 2}
