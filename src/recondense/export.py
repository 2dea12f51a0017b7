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

from recondense import families, modules
from recondense.modules import CondensedMoE
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
    condensed = condensed_layers(model)
    stock = stock_config(model, condensed)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    with _config_updates(model, stock or {}):
        model.save_pretrained(aside, state_dict=folded_state_dict(model), max_shard_size=max_shard_size)
    if stock is None:
        _bundle(model, condensed, aside)
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


def stock_config(model: PreTrainedModel, condensed: Mapping[int, CondensedMoE]) -> dict[str, Any] | None:
    """Config updates under which the family's stock class computes what the model does; None if there are none."""
    if not condensed:
        return {}
    if any(layer.shared_expert_gate is not None for layer in condensed.values()):
        return None
    widths = {layer: block.down_proj.in_features for layer, block in condensed.items()}
    return families.family_of(model.config).dense_layers(model.config, widths)


def folded_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state dict in its own dtype, with scales folded into copies of the down_proj weights."""
    state = model.state_dict()
    dtype = model.dtype
    for layer, block in condensed_layers(model).items():
        name = families.block_name(layer)
        if block.scale is not None:
            down = block.down_proj.weight.detach()
            state[f"{name}.down_proj.weight"] = (down.float() * block.scale.float()).to(dtype)
            del state[f"{name}.scale"]
        for own in [key for key in state if key.startswith(f"{name}.")]:
            state[own] = state[own].to(dtype)
    return state


def _bundle(model: PreTrainedModel, condensed: Mapping[int, CondensedMoE], folder: Path) -> None:
    """Turn a saved folder into one that carries its own modeling file."""
    source = Path(modules.__file__).read_text(encoding="utf-8") + families.BUNDLE.format(
        config_class=type(model.config).__name__,
        model_class=type(model).__name__,
        model_type=model.config.model_type,
    )
    write_aside(folder / f"{MODELING_FILE}.py", source)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "model_type": f"recondense_{config['model_type']}",
        "architectures": ["CondensedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING_FILE}.CondensedConfig",
            "AutoModelForCausalLM": f"{MODELING_FILE}.CondensedForCausalLM",
        },
        "condensed_layers": {
            str(layer): {
                "shared_width": block.shared_width,
                "routed_width": block.down_proj.in_features - block.shared_width,
                "token_gate": block.shared_expert_gate is not None,
            }
            for layer, block in condensed.items()
        },
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
