"""Write a model as a Hugging Face folder that loads without recondense.

The format `stock` uses the family's config and class, if they can express the compressed layers. A `bundled` folder has
one self-contained modeling file (trust_remote_code=True). `dense` multiplies out low-rank experts first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from recondense.config.schema import ExportConfig
from recondense.export import verify
from recondense.export.shard_writer import ShardWriter
from recondense.export.stock_or_bundled import Stock, choose_layout, skipped_layers
from recondense.files import replace_folder, write_aside
from recondense.models import (
    compressed_classes,
    constant_experts,
    decoder,
    deepseek,
    expert_products,
    expert_widths,
    families,
    low_rank,
    model_classes,
    moe_blocks,
    removed_blocks,
    replacement_blocks,
)
from recondense.models.layer_shapes import Shapes, layer_shapes
from recondense.models.layer_store import layer_store
from recondense.models.low_rank import LowRankExperts
from recondense.models.parameters import largest_layer_bytes, weights_bytes
from recondense.models.removed_blocks import Zeros
from recondense.models.replacement_blocks import (
    CondensedMoE,
)
from recondense.plan import History, Plan

MODELING_FILE = "modeling_recondense"
RECONDENSE_IMPORT = re.compile(r"^from recondense[^\n(]*(\([^)]*\))?\n", re.MULTILINE)
NOT_KEPT = ("compressed_layers", "auto_map", "quantization_config", "model_type", "transformers_version")


def write_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    folder: Path,
    card: str | Callable[[Path], str],
    settings: ExportConfig | None = None,
) -> str:
    """Write a model, its tokenizer, its plan and a README. The model itself does not change.

    Scales are folded into down_proj. Layers are written one after another, so that at most one shard and one layer are
    copied. The shards of a streamed model are smaller than a layer.

    Args:
        model: the compressed model.
        tokenizer: the tokenizer to save; None saves none.
        plan: the plan of this run, with the history of the model that the run started from.
        folder: the folder to write; an existing folder is replaced after all files are written.
        card: the beginning of README.md, or a function that makes it from the folder after the weights are written. The
            code that loads the folder is appended.
        settings: settings of the export; None for the defaults.

    Returns:
        "stock" or "bundled".

    Raises:
        NotStock: `settings.format` is "stock", and the family's class cannot express the model.
        UserError: transformers loads another tokenizer than the one that it has saved.
        WrongExport: the written folder is not the model; its files are removed.
    """
    settings = settings or ExportConfig()
    shapes = layer_shapes(model, multiplied=settings.format == "dense")
    stock = choose_layout(model, shapes, settings)
    skipped = skipped_layers(shapes) if stock is not None else []
    retained = [layer for layer in range(len(decoder.decoder_layers(model))) if layer not in skipped]
    history = plan.history.extend(plan.operations, retained)
    if history != History(plan.operations):  # otherwise the plan's operations are the complete history
        plan = replace(plan, history=history)
    with replace_folder(folder, weights_bytes(model)) as aside:
        _write_weights(model, shapes, stock, aside, settings)
        _write_config(model, shapes, stock, aside)
        verify.check_files(aside, folder)
        if model.can_generate():  # its `save_pretrained` refuses what is read, such as a pad token of -1
            model.generation_config.to_json_file(aside / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        plan.save(aside / "plan.json")
        verify.check_outputs(model, tokenizer, aside, folder, retained, settings.verify)
        write_aside(aside / "README.md", (card if isinstance(card, str) else card(aside)) + _loading_code(aside))
    return "bundled" if stock is None else "stock"


def _loading_code(folder: Path) -> str:
    """Return the end of a folder's README.md: the code that loads it."""
    code, tokenizer = (folder / f"{MODELING_FILE}.py").exists(), (folder / "tokenizer_config.json").exists()
    lines = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * tokenizer}\n",
        f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{", trust_remote_code=True" * code})',
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{', trust_remote_code=True' * code})",
    ]
    text = f"The model's class is in `{MODELING_FILE}.py`, which needs only torch and transformers."
    if tokenizer:
        text += (
            " The tokenizer needs no code: it also loads with `trust_remote_code=False`. But without the argument, "
            "transformers asks whether to run the code, and waits."
        )
    loading = "\n".join(lines if tokenizer else lines[:2])
    return f"\n## Load it\n\n```python\n{loading}\n```\n" + f"\n{text}\n" * code


def pieces(model: PreTrainedModel, shapes: Shapes, stock: Stock | None) -> Iterator[dict[str, Tensor]]:
    """Yield the exported weights by their names on disk: each decoder layer in several parts, then all other weights.

    Args:
        model: the compressed model.
        shapes: the changed layers, made by `layer_shapes`. Low-rank experts are multiplied out if their layer has no
            ranks in it.
        stock: how the family's class expresses the model; None for a bundle.
    """
    skipped = skipped_layers(shapes) if stock is not None else []
    for layer, module in enumerate(decoder.decoder_layers(model)):
        if layer in skipped:
            continue
        with layer_store(model).resident(layer):
            state = module.state_dict(prefix=decoder.layer_prefix(layer))
            state = _fold_and_multiply(model, layer, state, shapes)
            if stock is not None and stock.width is not None:
                state = _pad_dense(model, layer, state, stock.width)
            exported_index = layer - sum(other < layer for other in skipped)
            old, new = decoder.layer_prefix(layer), decoder.layer_prefix(exported_index)
            renamed = {new + name.removeprefix(old): tensor for name, tensor in state.items()}
            del state
            experts = [name for name in renamed if ".experts." in name]  # most of a layer, so each is a separate piece
            yield revert_weight_conversion(model, {n: tensor for n, tensor in renamed.items() if n not in experts})
            for name in experts:
                yield revert_weight_conversion(model, {name: renamed.pop(name)})
    inside = decoder.layers_prefix()
    tied = set(model.all_tied_weights_keys)
    state = model.state_dict()
    names = [name for name in state if not name.startswith(inside) and name not in tied]
    yield revert_weight_conversion(model, {name: state[name] for name in names})


def _fold_and_multiply(
    model: PreTrainedModel, layer: int, state: dict[str, Tensor], shapes: Shapes
) -> dict[str, Tensor]:
    """Return a layer's state dict with the scale folded into a copy of down_proj.

    Low-rank experts are multiplied out, unless `shapes` has ranks for the layer. Experts of different widths stay.
    """
    block, name = moe_blocks.get_block(model, layer), moe_blocks.block_name(layer)
    if isinstance(block, CondensedMoE) and block.scale is not None:
        down = block.down_proj.weight
        folded = (down.float() * block.scale.float()).to(down.dtype)
        state = {**state, f"{name}.down_proj.weight": folded}
        del state[f"{name}.scale"]
    if moe_blocks.is_sparse(block):
        experts = moe_blocks.sparse_view(model, layer, block).experts
        keeps = shapes.get(layer, {}).get("ranks")
        if isinstance(experts, LowRankExperts) and experts.factorized and not keeps:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.experts.")}
            full = moe_blocks.multiply_factors(experts, transposed=compressed_classes.returns_pair(block))
            state |= {f"{name}.experts.{key}": tensor for key, tensor in full.items()}
    return state


def _pad_dense(model: PreTrainedModel, layer: int, state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return the state dict of a dense layer, padded with zeros to `width`; other layers are unchanged."""
    block, name = moe_blocks.get_block(model, layer), moe_blocks.block_name(layer)
    hidden_size = model.config.hidden_size
    if isinstance(block, Zeros):
        kind: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        empty = {"gate_proj": (0, hidden_size), "up_proj": (0, hidden_size), "down_proj": (hidden_size, 0)}
        state = {**state, **{f"{name}.{key}.weight": torch.zeros(*size, **kind) for key, size in empty.items()}}
    elif moe_blocks.is_sparse(block):
        return state
    padded = dict(state)
    for key in ("gate_proj", "up_proj"):
        weight = state[f"{name}.{key}.weight"]
        padded[f"{name}.{key}.weight"] = pad(weight, (0, 0, 0, width - weight.shape[0]))
    weight = state[f"{name}.down_proj.weight"]
    padded[f"{name}.down_proj.weight"] = pad(weight, (0, width - weight.shape[1]))
    return padded


def _write_weights(
    model: PreTrainedModel, shapes: Shapes, stock: Stock | None, folder: Path, settings: ExportConfig
) -> None:
    shard_bytes = settings.max_shard_size
    if layer_store(model).streamed:
        shard_bytes = min(shard_bytes, largest_layer_bytes(model) // 2)
    writer = ShardWriter(folder, shard_bytes)
    with torch.no_grad():
        for piece in pieces(model, shapes, stock):
            writer.add(piece)
            piece.clear()  # otherwise its tensors would stay in memory until the next piece is made
    writer.finish()


def _write_config(model: PreTrainedModel, shapes: Shapes, stock: Stock | None, folder: Path) -> None:
    """Write config.json, and the modeling file if one is needed."""
    config_class, model_class = model_classes.family_classes(model.config)
    family = families.family_of(model.config)
    stock_config = _family_config(model.config, config_class)
    for name, value in (stock.updates if stock is not None else {}).items():
        setattr(stock_config, name, value)
    stock_config.architectures = [model_class.__name__]
    stock_config.dtype = str(model.dtype).removeprefix("torch.")
    stock_config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # The published name of this setting; transformers may write it only under another name.
    config[family.num_experts] = getattr(stock_config, family.num_experts)
    if stock is not None and not family.carried:
        write_aside(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    names = config_class.__name__, model_class.__name__, model_classes.base_class_of(config_class).__name__
    if stock is None:
        config["model_type"] = compressed_classes.PREFIX + config["model_type"]
        config["architectures"] = ["CompressedForCausalLM"]
        config["compressed_layers"] = {str(layer): dict(shape) for layer, shape in shapes.items()}
        write_aside(folder / f"{MODELING_FILE}.py", _bundle_source(*names, family))
        names = "CompressedConfig", "CompressedForCausalLM", "CompressedModel"
    else:
        write_aside(folder / f"{MODELING_FILE}.py", _concatenate(deepseek) + "\n\nregister()\n")
    config["auto_map"] = {
        "AutoConfig": f"{MODELING_FILE}.{names[0]}",
        "AutoModelForCausalLM": f"{MODELING_FILE}.{names[1]}",
        "AutoModel": f"{MODELING_FILE}.{names[2]}",  # vLLM's transformers backend adds its head to this class
    }
    write_aside(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _bundle_source(config_class: str, model_class: str, base_class: str, family: families.Family) -> str:
    """Return the source of a bundle's modeling file."""
    source = _concatenate(
        *(replacement_blocks, removed_blocks, constant_experts, expert_products, low_rank, expert_widths),
        *([deepseek] if family.carried else []),
        compressed_classes,
    )
    family_classes = ", ".join((config_class, model_class, base_class))
    imports = "register()" if family.carried else f"from transformers import {family_classes}  # noqa: E402"
    entries = f"router_entries={family.router_entries!r}, expert_entries={family.expert_entries!r}"
    names = "CompressedConfig, CompressedForCausalLM, CompressedModel"
    return f"{source}\n\n{imports}\n\n{names} = compressed_classes({family_classes}, {entries})\n"


def _family_config(config: PretrainedConfig, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """Return a copy as the family's class, without entries of exported folders and without the quantization."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_KEPT}
    return config_class.from_dict(values)


def _concatenate(*parts: Any) -> str:
    """Return the sources of modules joined into one file, without the imports of recondense."""
    texts = [Path(part.__file__).read_text(encoding="utf-8") for part in parts]
    first, *others = (RECONDENSE_IMPORT.sub("", text) for text in texts)
    future = "from __future__ import annotations\n"
    return "\n\n".join([first, *(text.replace(future, "", 1) for text in others)])
