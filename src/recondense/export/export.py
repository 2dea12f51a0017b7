"""A model out: a Hugging Face folder that loads without recondense.

`stock` where the family's own config can say what the layers have become, else `bundled`: the folder carries one
self-contained modeling file (trust_remote_code=True). `dense` multiplies low-rank experts out first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from recondense.config.schema import ExportConfig, parse_bytes
from recondense.export.layout import Shapes, Stock, layer_shapes, layout, rows_gone
from recondense.export.shard_writer import ShardWriter
from recondense.files import replace_folder, write_aside
from recondense.models import (
    blocks,
    classes,
    compressed,
    decoder,
    deepseek,
    expert_products,
    families,
    headers,
    low_rank,
    views,
)
from recondense.models.blocks import CondensedMoE, Zeros
from recondense.models.layer_store import layer_store
from recondense.models.low_rank import LowRankExperts
from recondense.models.parameters import largest_layer_bytes
from recondense.plan import History, Plan

MODELING_FILE = "modeling_recondense"
OWN_IMPORT = re.compile(r"^from recondense[^\n(]*(\([^)]*\))?\n", re.MULTILINE)
NOT_KEPT = ("compressed_layers", "auto_map", "quantization_config", "model_type", "transformers_version")


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    folder: Path,
    card: str,
    settings: ExportConfig | None = None,
) -> str:
    """Write the model as it is now; scales are folded into down_proj, the model itself is not changed.

    Layer after layer goes to disk, so that never more than a shard and a layer is copied; of a model larger than
    memory, shards are smaller than a layer.

    Args:
        model: the student, its plan applied.
        plan: of this run, with the history of the model that it found.
        folder: replaced if it exists; written aside, then renamed.
        card: the text of README.md; how the folder loads follows.

    Returns:
        "stock" or "bundled".

    Raises:
        NotStock: `settings.format` is stock, and the family's own class cannot hold the model.
        AssertionError: what was written is not the model that its config describes; nothing is left of it.
    """
    settings = settings or ExportConfig()
    shapes = layer_shapes(model, multiplied=settings.format == "dense")
    stock = layout(model, shapes, settings)
    gone = rows_gone(shapes) if stock is not None else []
    kept = [layer for layer in range(len(decoder.decoder_layers(model))) if layer not in gone]
    history = plan.history.then(plan.operations, kept)
    said = history == History(plan.operations)  # by the plan alone
    with replace_folder(folder) as aside:
        _write_weights(model, shapes, stock, aside, settings)
        _write_config(model, shapes, stock, aside)
        _verify(aside)
        if model.can_generate():
            model.generation_config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        (plan if said else replace(plan, history=history)).save(aside / "plan.json")
        write_aside(aside / "README.md", card + how_to_load(aside))
    return "bundled" if stock is None else "stock"


def _verify(folder: Path) -> None:
    """Hold the names and shapes that were written against those of the class that will load them."""
    classes.register_compressed(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    outline = classes.empty_model(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
    difference = str(headers.compare(outline, headers.files_of(folder)))
    if difference:
        raise AssertionError(f"the export is not what {type(outline).__name__} loads: {difference}")


def how_to_load(folder: Path) -> str:
    """The end of an exported folder's README.md: the call that loads it."""
    code = (folder / f"{MODELING_FILE}.py").exists()
    return (
        "\n## Load it\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{", trust_remote_code=True" * code})\n```\n'
        + f"\nThe model's class is in `{MODELING_FILE}.py`, which needs torch and transformers alone.\n"
        * code
    )


def pieces(model: PreTrainedModel, shapes: Shapes, stock: Stock | None) -> Iterator[dict[str, Tensor]]:
    """The exported weights under their names on disk: each decoder layer in several parts, then all else.

    Args:
        shapes: as `layer_shapes`; a layer without ranks there is multiplied out.
        stock: None: for the bundle.
    """
    gone = rows_gone(shapes) if stock is not None else []
    for layer, module in enumerate(decoder.decoder_layers(model)):
        if layer in gone:
            continue
        with layer_store(model).resident(layer):
            state = module.state_dict(prefix=decoder.layer_prefix(layer))
            state = _finished(model, layer, state, shapes)
            if stock is not None and stock.width is not None:
                state = _padded(model, layer, state, stock.width)
            moved = layer - sum(each < layer for each in gone)
            old, new = decoder.layer_prefix(layer), decoder.layer_prefix(moved)
            renamed = {new + name.removeprefix(old): each for name, each in state.items()}
            del state
            experts = [name for name in renamed if ".experts." in name]  # taken apart one by one: most of a layer
            yield revert_weight_conversion(model, {n: each for n, each in renamed.items() if n not in experts})
            for name in experts:
                yield revert_weight_conversion(model, {name: renamed.pop(name)})
    inside = decoder.layers_prefix()
    tied = set(model.all_tied_weights_keys)
    rest = {name: each for name, each in model.state_dict().items() if not name.startswith(inside) and name not in tied}
    yield revert_weight_conversion(model, rest)


def _finished(model: PreTrainedModel, layer: int, state: dict[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """A layer's state with scales folded into a copy of down_proj, and low-rank experts multiplied out if asked."""
    block, name = views.get_block(model, layer), views.block_name(layer)
    if isinstance(block, CondensedMoE) and block.scale is not None:
        down = block.down_proj.weight
        folded = (down.float() * block.scale.float()).to(down.dtype)
        state = {**state, f"{name}.down_proj.weight": folded}
        del state[f"{name}.scale"]
    if views.is_sparse(block):
        experts = views.sparse_view(model, layer, block).experts
        if isinstance(experts, LowRankExperts) and not shapes.get(layer, {}).get("ranks"):
            state = {key: each for key, each in state.items() if not key.startswith(f"{name}.experts.")}
            whole = views.multiplied_out(experts, transposed=compressed.gives_pair(block))
            state |= {f"{name}.experts.{key}": each for key, each in whole.items()}
    return state


def _padded(model: PreTrainedModel, layer: int, state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A dense layer's state with rows and columns of zeros up to a width; any other as it is."""
    block, name = views.get_block(model, layer), views.block_name(layer)
    hidden_size = model.config.hidden_size
    if isinstance(block, Zeros):
        kind: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        empty = {"gate_proj": (0, hidden_size), "up_proj": (0, hidden_size), "down_proj": (hidden_size, 0)}
        state = {**state, **{f"{name}.{key}.weight": torch.zeros(*size, **kind) for key, size in empty.items()}}
    elif views.is_sparse(block):
        return state
    found = dict(state)
    for key in ("gate_proj", "up_proj"):
        weight = state[f"{name}.{key}.weight"]
        found[f"{name}.{key}.weight"] = pad(weight, (0, 0, 0, width - weight.shape[0]))
    weight = state[f"{name}.down_proj.weight"]
    found[f"{name}.down_proj.weight"] = pad(weight, (0, width - weight.shape[1]))
    return found


def _write_weights(
    model: PreTrainedModel, shapes: Shapes, stock: Stock | None, folder: Path, settings: ExportConfig
) -> None:
    most = parse_bytes(settings.max_shard_size)
    writer = ShardWriter(folder, min(most, largest_layer_bytes(model) // 2) if layer_store(model).streamed else most)
    with torch.no_grad():
        for piece in pieces(model, shapes, stock):
            writer.add(piece)
            piece.clear()  # or it would be there until the next one is
    writer.finish()


def _write_config(model: PreTrainedModel, shapes: Shapes, stock: Stock | None, folder: Path) -> None:
    """config.json, and the modeling file where one is needed."""
    config_class, model_class = classes.own_classes(model.config)
    family = families.family_of(model.config)
    own = _own_config(model.config, config_class)
    for name, value in (stock.updates if stock is not None else {}).items():
        setattr(own, name, value)
    own.architectures = [model_class.__name__]
    own.dtype = str(model.dtype).removeprefix("torch.")
    own.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # Under its published name, where transformers writes another alone.
    config[family.num_experts] = getattr(own, family.num_experts)
    if stock is not None and not family.carried:
        write_aside(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    names = config_class.__name__, model_class.__name__, classes.base_class_of(config_class).__name__
    if stock is None:
        config["model_type"] = compressed.PREFIX + config["model_type"]
        config["architectures"] = ["CompressedForCausalLM"]
        config["compressed_layers"] = {str(layer): dict(shape) for layer, shape in shapes.items()}
        write_aside(folder / f"{MODELING_FILE}.py", _bundled(*names, family))
        names = "CompressedConfig", "CompressedForCausalLM", "CompressedModel"
    else:
        write_aside(folder / f"{MODELING_FILE}.py", _concatenated(deepseek) + "\n\nregister()\n")
    config["auto_map"] = {
        "AutoConfig": f"{MODELING_FILE}.{names[0]}",
        "AutoModelForCausalLM": f"{MODELING_FILE}.{names[1]}",
        "AutoModel": f"{MODELING_FILE}.{names[2]}",  # vLLM's transformers backend puts a head of its own on it
    }
    write_aside(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _bundled(config_class: str, model_class: str, base_class: str, family: families.Family) -> str:
    """The modeling file of a compressed folder."""
    source = _concatenated(blocks, expert_products, low_rank, *([deepseek] if family.carried else []), compressed)
    own = ", ".join((config_class, model_class, base_class))
    imported = "register()" if family.carried else f"from transformers import {own}  # noqa: E402"
    entries = f"router_entries={family.router_entries!r}, expert_entries={family.expert_entries!r}"
    classes = "CompressedConfig, CompressedForCausalLM, CompressedModel"
    return f"{source}\n\n{imported}\n\n{classes} = compressed_classes({own}, {entries})\n"


def _own_config(config: PretrainedConfig, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A copy in the family's own class, without what a folder of ours adds and what the weights are no longer."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_KEPT}
    return config_class.from_dict(values)


def _concatenated(*parts: Any) -> str:
    """Sources of modules as one file, which needs none of them."""
    texts = [Path(part.__file__).read_text(encoding="utf-8") for part in parts]
    first, *others = (OWN_IMPORT.sub("", text) for text in texts)
    future = "from __future__ import annotations\n"
    return "\n\n".join([first, *(text.replace(future, "", 1) for text in others)])
