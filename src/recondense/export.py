"""A model out: a Hugging Face folder that loads without recondense.

`stock` where the family's own config can say what the layers have become, else `bundled`: the folder carries one
self-contained modeling file (trust_remote_code=True).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import families, low_rank, modules
from recondense.low_rank import LowRankExperts
from recondense.modules import CondensedMoE, RemappedRouter, SkippedLayer, Zeros
from recondense.plan import Plan, write_aside

MODELING_FILE = "modeling_recondense"


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    folder: Path,
    card: str,
    max_shard_size: str | int = "5GB",
) -> str:
    """Write the model as it is now; scales are folded into down_proj, the model itself is not changed.

    Args:
        model: the student, its plan applied.
        folder: replaced if it exists; written aside, then renamed.
        card: the text of README.md.

    Returns:
        "stock" or "bundled".
    """
    shapes = layer_shapes(model)
    stock = stock_config(model, shapes)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    state = exported_state(model)
    if stock is not None:
        state = _renumbered(state, [layer for layer, shape in shapes.items() if shape["kind"] == "skipped"])
    with _config_updates(model, stock or {}):
        model.save_pretrained(aside, state_dict=state, max_shard_size=max_shard_size)
    if stock is None:
        _bundle(model, shapes, aside)
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    plan.save(aside / "plan.json")
    write_aside(aside / "README.md", card)
    readable = 0o666 & ~_umask()
    for path in aside.iterdir():
        path.chmod(readable)  # safetensors writes for the owner alone
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)  # a kill while it is removed must not leave half of it under the final name
    os.replace(aside, folder)
    shutil.rmtree(before, ignore_errors=True)
    return "bundled" if stock is None else "stock"


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMoE]:
    """The condensed layers of a model, by decoder-layer index."""
    blocks = {layer: families.get_block(model, layer) for layer in range(len(families.decoder_layers(model)))}
    return {layer: block for layer, block in blocks.items() if isinstance(block, CondensedMoE)}


def layer_shapes(model: PreTrainedModel) -> dict[int, dict[str, Any]]:
    """What became of each layer that is not as the config says: JSON values, arguments of the bundle's `reshape`."""
    found: dict[int, dict[str, Any]] = {}
    num_experts = families.facts(model.config).num_experts
    for layer in range(len(families.decoder_layers(model))):
        block = families.get_block(model, layer)
        if isinstance(block, SkippedLayer):
            found[layer] = {"kind": "skipped"}
        elif isinstance(block, Zeros):
            found[layer] = {"kind": "zeros"}
        elif isinstance(block, CondensedMoE):
            found[layer] = {
                "kind": "condensed",
                "shared_width": block.shared_width,
                "routed_width": block.down_proj.in_features - block.shared_width,
                "token_gate": block.shared_expert_gate is not None,
            }
        elif families.is_sparse(block):
            shape = _sparse_shape(families.sparse_view(model, layer, block))
            if shape != {"kind": "sparse", "num_experts": num_experts, "router_rows": num_experts}:
                found[layer] = shape
    return found


def _sparse_shape(block: families.SparseBlock) -> dict[str, Any]:
    router = block.router
    merged = isinstance(router, RemappedRouter)
    shape: dict[str, Any] = {
        "kind": "sparse",
        "num_experts": block.num_experts,
        "router_rows": len(router.table) if isinstance(router, RemappedRouter) else block.num_experts,
    }
    if merged:
        shape["merged"] = True
    if isinstance(block.experts, LowRankExperts):
        shape["ranks"] = {name: list(ranks) for name, ranks in block.experts.ranks.items()}
    return shape


def stock_config(model: PreTrainedModel, shapes: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Config updates under which the family's stock class computes what the model does; None if there are none."""
    if not shapes:
        return {}
    kinds = {layer: shape["kind"] for layer, shape in shapes.items()}
    odd = any(shape.get("token_gate") or shape.get("merged") or shape.get("ranks") for shape in shapes.values())
    counts = {block.num_experts for block in families.sparse_blocks(model).values()}
    if odd or "zeros" in kinds.values() or len(counts) > 1:
        return None
    widths = {
        layer: shape["shared_width"] + shape["routed_width"]
        for layer, shape in shapes.items()
        if shape["kind"] == "condensed"
    }
    skipped = [layer for layer, kind in kinds.items() if kind == "skipped"]
    pruned = counts.pop() if "sparse" in kinds.values() else None
    return families.stock_updates(model.config, widths, skipped, pruned)


def exported_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state dict in its own dtype, with scales folded into copies of the down_proj weights."""
    state = model.state_dict()
    dtype = model.dtype
    for layer, block in condensed_layers(model).items():
        name = families.block_name(layer)
        if block.scale is not None:
            down = block.down_proj.weight.detach()
            state[f"{name}.down_proj.weight"] = (down.float() * block.scale.float()).to(dtype)
            del state[f"{name}.scale"]
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def _renumbered(state: dict[str, Tensor], skipped: list[int]) -> dict[str, Tensor]:
    """Names of the layers that are left, counted without those that are gone."""
    found = {}
    for name, value in state.items():
        number, _, end = name.partition(".layers.")[2].partition(".")
        if number.isdigit() and name.startswith(families.layer_prefix(int(number))):
            moved = int(number) - sum(layer < int(number) for layer in skipped)
            name = f"{families.layer_prefix(moved)}{end}"
        found[name] = value
    return found


def _bundle(model: PreTrainedModel, shapes: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    """Turn a saved folder into one that carries its own modeling file."""
    first, second = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (modules, low_rank))
    source = (
        first
        + second.replace("from __future__ import annotations\n", "", 1)
        + families.BUNDLE.format(
            config_class=type(model.config).__name__,
            model_class=type(model).__name__,
            model_type=model.config.model_type,
        )
    )
    write_aside(folder / f"{MODELING_FILE}.py", source)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "model_type": f"recondense_{config['model_type']}",
        "architectures": ["CompressedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING_FILE}.CompressedConfig",
            "AutoModelForCausalLM": f"{MODELING_FILE}.CompressedForCausalLM",
        },
        "compressed_layers": {str(layer): dict(shape) for layer, shape in shapes.items()},
    }
    write_aside(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextmanager
def _config_updates(model: PreTrainedModel, updates: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(model.config, name) for name in updates}
    for name, value in updates.items():
        setattr(model.config, name, value)
    try:
        with torch.no_grad():
            yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
