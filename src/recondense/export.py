"""A model out: a Hugging Face folder that loads without recondense.

`stock` where the family's own config can say what the layers have become, else `bundled`: the folder carries one
self-contained modeling file (trust_remote_code=True). `dense` multiplies low-rank experts out first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from recondense import bundle, deepseek, families, headers, low_rank, modules
from recondense.config import ExportConfig, parse_bytes
from recondense.errors import UserError
from recondense.files import replace_folder, write_aside
from recondense.low_rank import LowRankExperts
from recondense.modules import CondensedMoE, RemappedRouter, SkippedLayer, Zeros
from recondense.paging import is_streamed, page_bytes, resident
from recondense.plan import History, Plan
from recondense.shards import ShardWriter

MODELING_FILE = "modeling_recondense"
OWN_IMPORT = re.compile(r"^from recondense[^\n(]*(\([^)]*\))?\n", re.MULTILINE)
NOT_KEPT = ("compressed_layers", "auto_map", "quantization_config", "model_type", "transformers_version")
NARROWEST = 16  # of dense layers of zeros alone: kernels want rows of some bytes
Shapes = Mapping[int, Mapping[str, Any]]


class NotStock(UserError):
    """The family's own class cannot hold the model; the message says why."""


@dataclass(frozen=True)
class Stock:
    """How the family's own class holds a compressed model.

    Args:
        updates: of its config.
        width: of every dense layer; narrower ones are padded with zeros. None without dense layers.
        padding: parameters that padding adds.
    """

    updates: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    padding: int = 0


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
    gone = _gone(shapes) if stock is not None else []
    kept = [layer for layer in range(len(families.decoder_layers(model))) if layer not in gone]
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
    families.register_compressed(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    outline = families.empty_model(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
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


def layout(model: PreTrainedModel, shapes: Shapes, settings: ExportConfig) -> Stock | None:
    """How the family's own class would hold the model; None: the folder carries a modeling file.

    So does one that transformers' class could hold and vLLM's could not, where nobody asked for stock.

    Raises:
        NotStock: `settings.format` is stock, and it cannot.
    """
    if settings.format == "bundled":
        return None
    try:
        found = stock_layout(model, shapes, settings.max_padding)
        if settings.format == "stock" or not shapes or families.sparse_blocks(model):
            return found
        return None if families.family_of(model.config).needs_sparse else found
    except NotStock as error:
        if settings.format == "stock":
            raise NotStock(f"export.format=stock: {error}; use export.format=auto or bundled") from None
        return None


def stock_layout(model: PreTrainedModel, shapes: Shapes, max_padding: float) -> Stock:
    """How the family's own class holds a model with these layers.

    Args:
        max_padding: most that zeros may add, as a fraction of the model's parameters.

    Raises:
        NotStock: it cannot, or only with more padding.
    """
    if not shapes:
        return Stock()
    name = families.family_name(model.config.model_type)
    for layer, shape in shapes.items():
        odd = [word for word in ("token_gate", "merged", "ranks") if shape.get(word)]
        if odd:
            raise NotStock(f"layer {layer} has {ODD[odd[0]]}, which no config of {name} says")
    sparse = {layer: shape["num_experts"] for layer, shape in shapes.items() if shape["kind"] == "sparse"}
    counts = {block.num_experts for block in families.sparse_blocks(model).values()}
    if len(counts) > 1:
        raise NotStock(f"its layers have {min(counts)} to {max(counts)} experts; a config of {name} says one number")
    gone = _gone(shapes)
    widths = {layer: width for layer, shape in shapes.items() if (width := _width(shape)) is not None}
    own = {layer: width for layer, width in families.dense_widths(model.config).items() if layer not in gone}
    width = (max([*own.values(), *widths.values()]) or NARROWEST) if widths else None
    updates = families.stock_updates(model.config, widths, gone, counts.pop() if sparse else None, width)
    if updates is None:
        raise NotStock(f"its sparse and dense layers are mixed in a way that no config of {name} says")
    if width is None:
        return Stock(updates, max(own.values(), default=None))
    padding = sum(width - each for each in [*own.values(), *widths.values()]) * 3 * model.config.hidden_size
    total = sum(parameter.numel() for parameter in model.parameters())
    if padding > max_padding * total:
        raise NotStock(
            f"its dense layers are {min([*own.values(), *widths.values()])} to {width} wide and a config of {name} "
            f"says one width: zeros would add {padding / total:.1%} (export.max_padding={max_padding:g})"
        )
    return Stock(updates, width, padding)


ODD = {"token_gate": "a gate per token", "merged": "merged experts", "ranks": "low-rank experts"}


def _gone(shapes: Shapes) -> list[int]:
    """Decoder layers that are no more."""
    return [layer for layer, shape in shapes.items() if shape["kind"] == "skipped"]


def _width(shape: Mapping[str, Any]) -> int | None:
    """Of a layer that is dense now; None of others."""
    if shape["kind"] == "zeros":
        return 0
    return shape["shared_width"] + shape["routed_width"] if shape["kind"] == "condensed" else None


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMoE]:
    """The condensed layers of a model, by decoder-layer index."""
    blocks = {layer: families.get_block(model, layer) for layer in range(len(families.decoder_layers(model)))}
    return {layer: block for layer, block in blocks.items() if isinstance(block, CondensedMoE)}


def layer_shapes(model: PreTrainedModel, *, multiplied: bool = False) -> dict[int, dict[str, Any]]:
    """What became of each layer that is not as the family's config says: JSON values, arguments of `bundle.reshape`.

    Args:
        multiplied: low-rank experts count as whole ones.
    """
    found: dict[int, dict[str, Any]] = {}
    num_experts = families.original_facts(model.config).num_experts
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
                "routed_width": block.routed_width,
                "token_gate": block.shared_expert_gate is not None,
            }
        elif families.is_sparse(block):
            shape = _sparse_shape(families.sparse_view(model, layer, block))
            if multiplied:
                shape.pop("ranks", None)
            if shape != {"kind": "sparse", "num_experts": num_experts, "router_rows": num_experts}:
                found[layer] = shape
    return found


def _sparse_shape(block: families.SparseBlock) -> dict[str, Any]:
    router = block.router
    shape: dict[str, Any] = {
        "kind": "sparse",
        "num_experts": block.num_experts,
        "router_rows": len(router.table) if isinstance(router, RemappedRouter) else block.num_experts,
    }
    if isinstance(router, RemappedRouter):
        shape["merged"] = True
    if isinstance(block.experts, LowRankExperts):
        shape["ranks"] = {name: list(ranks) for name, ranks in block.experts.ranks.items()}
    return shape


def pieces(model: PreTrainedModel, shapes: Shapes, stock: Stock | None) -> Iterator[dict[str, Tensor]]:
    """The exported weights under their names on disk: each decoder layer in several parts, then all else.

    Args:
        shapes: as `layer_shapes`; a layer without ranks there is multiplied out.
        stock: None: for the bundle.
    """
    gone = _gone(shapes) if stock is not None else []
    for layer, module in enumerate(families.decoder_layers(model)):
        if layer in gone:
            continue
        with resident(model, layer):
            state = module.state_dict(prefix=families.layer_prefix(layer))
            state = _finished(model, layer, state, shapes)
            if stock is not None and stock.width is not None:
                state = _padded(model, layer, state, stock.width)
            moved = layer - sum(each < layer for each in gone)
            old, new = families.layer_prefix(layer), families.layer_prefix(moved)
            renamed = {new + name.removeprefix(old): each for name, each in state.items()}
            del state
            experts = [name for name in renamed if ".experts." in name]  # taken apart one by one: most of a layer
            yield revert_weight_conversion(model, {n: each for n, each in renamed.items() if n not in experts})
            for name in experts:
                yield revert_weight_conversion(model, {name: renamed.pop(name)})
    inside = families.layers_prefix()
    tied = set(model.all_tied_weights_keys)
    rest = {name: each for name, each in model.state_dict().items() if not name.startswith(inside) and name not in tied}
    yield revert_weight_conversion(model, rest)


def _finished(model: PreTrainedModel, layer: int, state: dict[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """A layer's state with scales folded into a copy of down_proj, and low-rank experts multiplied out if asked."""
    block, name = families.get_block(model, layer), families.block_name(layer)
    if isinstance(block, CondensedMoE) and block.scale is not None:
        down = block.down_proj.weight
        folded = (down.float() * block.scale.float()).to(down.dtype)
        state = {**state, f"{name}.down_proj.weight": folded}
        del state[f"{name}.scale"]
    if families.is_sparse(block):
        experts = families.sparse_view(model, layer, block).experts
        if isinstance(experts, LowRankExperts) and not shapes.get(layer, {}).get("ranks"):
            state = {key: each for key, each in state.items() if not key.startswith(f"{name}.experts.")}
            whole = families.multiplied_out(experts, turned=families.gives_pair(block))
            state |= {f"{name}.experts.{key}": each for key, each in whole.items()}
    return state


def _padded(model: PreTrainedModel, layer: int, state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A dense layer's state with rows and columns of zeros up to a width; any other as it is."""
    block, name = families.get_block(model, layer), families.block_name(layer)
    hidden_size = model.config.hidden_size
    if isinstance(block, Zeros):
        kind: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        empty = {"gate_proj": (0, hidden_size), "up_proj": (0, hidden_size), "down_proj": (hidden_size, 0)}
        state = {**state, **{f"{name}.{key}.weight": torch.zeros(*size, **kind) for key, size in empty.items()}}
    elif families.is_sparse(block):
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
    writer = ShardWriter(folder, min(most, page_bytes(model) // 2) if is_streamed(model) else most)
    with torch.no_grad():
        for piece in pieces(model, shapes, stock):
            writer.add(piece)
            piece.clear()  # or it would be there until the next one is
    writer.finish()


def _write_config(model: PreTrainedModel, shapes: Shapes, stock: Stock | None, folder: Path) -> None:
    """config.json, and the modeling file where one is needed."""
    config_class, model_class = families.own_classes(model.config)
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
    names = config_class.__name__, model_class.__name__, families.base_class_of(config_class).__name__
    if stock is None:
        config["model_type"] = bundle.PREFIX + config["model_type"]
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
    source = _concatenated(modules, low_rank, *([deepseek] if family.carried else []), bundle)
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
