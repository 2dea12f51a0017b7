"""Experts with fewer channels: full width, stock and bundled exports, and down projections by least squares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_moe import EVEN, FOUR, PAIRS, UNEVEN
from support.tiny_models import EVERY, logits, qwen2_moe, recorded, windows
from transformers import AutoModelForCausalLM

from recondense.config.schema import ExportConfig
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models import families, moe_blocks
from recondense.models.low_rank import LowRankExperts
from recondense.models.narrowing import compensated_down
from recondense.models.parameters import sizes
from recondense.operations import Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

IDS = windows(3, 11)


def narrowed(family: str, channels: Any, compensate: bool = True) -> tuple[Any, Plan]:
    model = EVERY[family]()
    layers = families.facts(model.config).moe_layers
    plan = Plan("tiny", tuple(Narrow.from_channels(layer, channels, compensate) for layer in layers))
    execute.execute(model, plan, lambda: recorded(model))
    return model, plan


@pytest.mark.parametrize("family", EVERY)
def test_full_width_is_bit_identical(family: str) -> None:
    """With least squares too: there is nothing to compensate for."""
    original = EVERY[family]()
    for compensate in (False, True) if family in ("qwen2_moe", "gpt_oss") else (False,):
        model, _ = narrowed(family, (range(16),) * 6, compensate)
        assert torch.equal(logits(model, IDS), logits(original, IDS))
        assert sizes(model) == sizes(original)


@pytest.mark.parametrize("family", EVERY)
def test_one_width_is_a_stock_checkpoint(family: str, tmp_path: Path) -> None:
    """transformers' own class loads it, with the width in the config and shared experts of the same size."""
    model, plan = narrowed(family, EVEN)
    original = families.facts(model.config)
    settings = ExportConfig(format="stock", verify="shapes")
    assert write_folder(model, None, plan, tmp_path / "out", "", settings) == "stock"
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    model.set_attn_implementation("eager")
    assert type(loaded) is type(model) and not hasattr(loaded.config, "compressed_layers")
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    facts = families.facts(loaded.config)
    assert (facts.expert_width, facts.shared_width) == (4, original.shared_width)
    assert sizes(loaded) == sizes(model)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_widths_by_expert_are_a_bundle(family: str, tmp_path: Path) -> None:
    model, plan = narrowed(family, UNEVEN)
    layer = plan.layers[0]
    assert moe_blocks.sparse_blocks(model)[layer].widths == (4, 1, 16, 4, 12, 3)
    for form in ("auto", "dense"):
        settings: Any = ExportConfig(format=form, verify="logits")  # loads the folder and compares each layer
        assert write_folder(model, None, plan, tmp_path / form, "", settings) == "bundled"
    config = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert config["compressed_layers"][str(layer)]["expert_width"] == [4, 1, 16, 4, 12, 3]
    assert "ranks" not in config["compressed_layers"][str(layer)]
    with pytest.raises(UserError, match="its experts are 1 to 16 wide, but a config of"):
        write_folder(model, None, plan, tmp_path / "stock", "", ExportConfig(format="stock"))


def test_a_width_that_the_shared_experts_do_not_divide_by_is_a_bundle(tmp_path: Path) -> None:
    """The config says how many shared experts there are, each as wide as a routed one."""
    model, plan = narrowed("deepseek_v2", (range(12),) * 6)
    assert write_folder(model, None, plan, tmp_path / "out", "", ExportConfig(verify="logits")) == "bundled"
    with pytest.raises(UserError, match="12 wide, and its shared experts 32 together"):
        write_folder(model, None, plan, tmp_path / "stock", "", ExportConfig(format="stock"))


@pytest.mark.parametrize("rows", [3, 40])  # fewer tokens than channels, and more
def test_the_compensation_is_the_least_squares_solution(rows: int) -> None:
    """Against a general solver, with the penalty as additional rows."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    inner = torch.randn(rows, 9, generator=generator, dtype=torch.float64)
    retained, ridge = torch.tensor([0, 2, 3, 7]), 0.03
    penalty = (ridge * float(inner[:, retained].square().sum(dim=0).mean())) ** 0.5
    left = torch.cat((inner[:, retained], penalty * torch.eye(4, dtype=torch.float64)))
    right = torch.cat((inner @ down.T, penalty * down[:, retained].T))
    expected = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    actual = compensated_down(down.float(), retained, inner.T @ inner, ridge)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("channels", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_compensation_brings_each_experts_output_nearer(family: str, channels: Any) -> None:
    """On the tokens that select the expert; an expert without removed channels does not change."""
    original = EVERY[family]()
    layer = families.facts(original.config).moe_layers[0]
    [traces] = [recorded(original).trace(original, layer)]
    before = moe_blocks.sparse_blocks(original)[layer].experts
    errors = []
    for compensate in (False, True):
        model = EVERY[family]()
        operation = Narrow.from_channels(layer, channels, compensate)
        execute.execute(model, Plan("tiny", (operation,)), lambda model=model: recorded(model))  # type: ignore[misc]
        after, error = moe_blocks.sparse_blocks(model)[layer].experts, []
        for expert in range(6):
            parts = []
            for trace in traces:
                rows = (trace.top_k_index_TK == expert).any(dim=1)
                weight = (trace.top_k_weights_TK * (trace.top_k_index_TK == expert)).sum(dim=1)[rows, None]
                one = torch.full((int(rows.sum()), 1), expert)
                with torch.no_grad():
                    parts.append((before(trace.x_TD[rows], one, weight) - after(trace.x_TD[rows], one, weight)).norm())
            error.append(float(torch.stack(parts).norm()))
        errors.append(error)
    for plain, compensated, retained in zip(*errors, channels, strict=True):
        assert compensated < 1e-5 if len(retained) == 16 else compensated < plain


# ---------------------------------------------------------------------------------------------- refusals

EIGHT = (range(8),) * 6
REFUSED: dict[str, tuple[tuple[Operation, ...], str]] = {
    "too few experts": ((Narrow.from_channels(1, EIGHT[:4]),), "channels for 4 experts, but the layer has 6"),
    "no such channel": (
        (Narrow.from_channels(1, (range(8), (3, 16), *EIGHT[:4])),),
        "channel 16 of expert 1, which has 16",
    ),
    "after narrowing": (
        (Narrow.from_channels(1, EIGHT), Narrow.from_channels(1, (range(4, 12),) * 6)),
        "channel 11 of expert 0, which has 8",
    ),
    "no groupable width": ((Narrow.from_channels(1, (range(5),) * 6),), "rows of 5 numbers are 20 bytes"),
    "factorized": (
        (Factorize(1, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (4,) * 6)), Narrow.from_channels(1, EIGHT)),
        "already factorized",
    ),
    "uneven, then pruned": ((Narrow.from_channels(1, UNEVEN), Prune(1, FOUR)), "different widths"),
    "uneven, then merged": ((Narrow.from_channels(1, UNEVEN), Merge(1, *PAIRS)), "different widths"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_operations_that_do_not_fit_are_refused(name: str) -> None:
    operations, message = REFUSED[name]
    model = qwen2_moe()
    with pytest.raises(UserError, match=message):
        execute.execute(model, Plan("tiny", operations))
    assert torch.equal(logits(model, IDS), logits(qwen2_moe(), IDS))


def test_equal_widths_keep_the_familys_class() -> None:
    """And different ones do not."""
    for channels, kind in ((EVEN, False), (UNEVEN, True)):
        experts = moe_blocks.sparse_blocks(narrowed("qwen2_moe", channels)[0])[1].experts
        assert isinstance(experts, LowRankExperts) == kind
