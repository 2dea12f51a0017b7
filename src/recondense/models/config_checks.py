"""Check a model's config.json without weights: can transformers make the model of it, and can that model compute?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers import PreTrainedModel as Model

from recondense.config.checks import ADAPTER, HOLDS_ADAPTER
from recondense.config.problems import Problem
from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.models import families, model_classes
from recondense.models.compressed_classes import PREFIX
from recondense.models.differences import SAME_MODEL
from recondense.models.library_errors import library_calls, read_json, without_warnings
from recondense.models.low_rank import LowRankExperts
from recondense.models.model_files import model_file
from recondense.offline import hub_access

CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings"),
)
STEPS = ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval")  # every how many layers one is sparse
# Values that decide in what form a model returns its outputs. What reads them here expects transformers' defaults.
OUTPUT_FORM = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
MOST_LAYERS = 10_000  # building more takes minutes even without weights; the deepest published models have some hundred
TOKENS = 4  # of the text on which a model without weights is tried


class CheckedConfig(NamedTuple):
    """A config that transformers has read.

    Args:
        config: the config.
        problems: what is wrong with it, one sentence each.
    """

    config: PretrainedConfig
    problems: tuple[str, ...]


class Checkpoint(NamedTuple):
    """What the checks of a checkpoint have read, and found.

    Args:
        config: the config; None if it cannot be used.
        tokenizer: the tokenizer; None if it cannot be loaded, or was not asked for.
        problems: everything that is wrong; empty if the checkpoint can be used.
    """

    config: PretrainedConfig | None
    tokenizer: Any
    problems: tuple[Problem, ...]


def read_config(path: str | Path, settings: ModelConfig, *, any_family: bool = False) -> PretrainedConfig:
    """Return the config of a model's config.json as transformers reads it. A supported model_type needs no remote code.

    Values that only change the form of the model's outputs are ignored.

    Args:
        path: a folder, or a hub id whose config.json is in the cache or can be downloaded.
        settings: revision and trust_remote_code are used.
        any_family: whether the model may be of a family that is not supported, like a teacher.

    Raises:
        UserError: the file is damaged or missing, the model_type is unknown, or transformers refuses a value.
    """
    with nullcontext(True) if Path(path).is_dir() else hub_access() as online:
        file = model_file(path, CONFIG, settings.revision)
    if file is None and model_file(path, ADAPTER, settings.revision) is not None:
        raise UserError(HOLDS_ADAPTER)
    if file is None and not Path(path).is_dir():
        reason = "has no such model, or you have no access to it"
        if not online:
            reason = "cannot be reached, and its cache does not have the model"
        raise UserError(f"there is no such folder here, and the hub {reason}")
    values = read_json(Path(path) / CONFIG if file is None else file)
    if "model_type" not in values:
        raise UserError(f"{CONFIG} has no model_type, so nothing says which model it is; download it again")
    remote = not model_classes.is_known(values["model_type"]) and settings.trust_remote_code
    if not any_family and not remote:
        families.family_name(values["model_type"])
    if problems := [*_check_dtype(values), *size_problems(values), *_check_quantization(values)]:
        raise UserError(problems[0])
    with library_calls(f"transformers cannot read {CONFIG}"), without_warnings():
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(path), revision=settings.revision, trust_remote_code=remote, local_files_only=not online, **OUTPUT_FORM
        )
    return config


def _check_dtype(values: Mapping[str, Any]) -> Iterator[str]:
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
            yield f"{CONFIG} has {name}={dtype!r}, but weights are computed in {', '.join(DTYPES[:-1])}; correct it"


def size_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes in the values of a config that no model has."""
    for name in (*SIZES, *STEPS):
        size = values.get(name)
        if isinstance(size, int) and size < 1:
            yield f"{CONFIG} has {name}={size}, but it must be at least 1; {SAME_MODEL}"
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        yield f"{CONFIG} has num_hidden_layers={layers}, more than any model; {SAME_MODEL}"


def _check_quantization(values: Mapping[str, Any]) -> Iterator[str]:
    settings = values.get("quantization_config")
    if settings is not None and not isinstance(settings, Mapping):
        yield f"{CONFIG} has quantization_config={settings!r}, which is not an object; download it again"


def check_config(path: str | Path, settings: ModelConfig, *, any_family: bool = False) -> CheckedConfig:
    """Read a config.json, make its model without weights, and let it compute.

    Args:
        path, settings, any_family: as for `read_config`.

    Raises:
        UserError: as for `read_config`.
    """
    config = read_config(path, settings, any_family=any_family)
    problems = config_problems(config)
    problems += _check_generation(path, settings, config)
    return CheckedConfig(config, tuple(problems))


def config_problems(config: PretrainedConfig) -> list[str]:
    """Return what is wrong with the values of a config, one sentence each.

    The model is made without weights, and computes without numbers. A model of remote code is not made.
    """
    problems = list(special_id_problems(config))
    if not model_classes.is_known(config.model_type):
        return problems
    try:
        return problems + list(_value_problems(config, make_outline(config)))
    except UserError as error:
        return problems or [str(error)]  # a padding id beyond the vocabulary is a reason, too


def make_outline(config: PretrainedConfig) -> Model:
    """Make the model of a user's config on the meta device, without weights.

    Raises:
        UserError: the model's class refuses a value.
    """
    model_classes.register_model_type(config.model_type)
    cannot = f"no model can be created from {CONFIG}"
    try:
        with library_calls(cannot), torch.device("meta"), without_warnings():
            model: Model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except UserError as error:
        if isinstance(cause := error.__cause__, KeyError) and (name := _setting_with(config.to_dict(), cause.args[0])):
            raise UserError(f"{cannot}: transformers does not know {name}={cause.args[0]!r}; {SAME_MODEL}") from error
        raise
    return model.eval()


def _setting_with(values: Mapping[str, Any], value: object) -> str:
    """Return the dotted name of the first setting with a value; empty if none has it."""
    for name, entry in values.items():
        if isinstance(entry, Mapping) and (inner := _setting_with(entry, value)):
            return f"{name}.{inner}"
        if isinstance(entry, str) and entry == value:
            return name
    return ""


def _value_problems(config: PretrainedConfig, outline: Model) -> Iterator[str]:
    """Yield what is wrong with the values of a config from which a model could be made.

    Args:
        config: the config.
        outline: its model, without weights.
    """
    if str(config.model_type).removeprefix(PREFIX) not in families.FAMILIES:  # a teacher's class may need other inputs
        return
    problems = list(_check_routing(config))
    yield from problems
    yield from _check_rotary(outline)
    if not problems:
        try:
            run_without_weights(outline)
        except UserError as error:
            yield str(error)


def special_id_problems(config: PretrainedConfig) -> Iterator[str]:
    """Yield the special tokens of a config whose ids have no row in the embedding. -1 stands for no token."""
    rows = _rows(config)
    for name in SPECIAL_IDS:
        value = getattr(config, name, None)
        ids = value if isinstance(value, list | tuple) else [value]
        if wrong := [number for number in ids if isinstance(number, int) and rows and not -1 <= number < rows]:
            yield (
                f"{CONFIG} has {name}={wrong[0]}, but the embedding has {rows} rows (vocab_size), so ids end at "
                f"{rows - 1}; correct {name}, or set it to null"
            )


def _rows(config: PretrainedConfig) -> int:
    """Return the number of rows of the token embedding; 0 if the config does not say."""
    return getattr(config.get_text_config(), "vocab_size", None) or 0


def _check_routing(config: PretrainedConfig) -> Iterator[str]:
    """Yield a router that would select more experts, or groups of experts, than there are."""
    try:
        facts = families.original_facts(config)
    except UserError:  # reported if a method or a recovery needs what it says
        return
    if not facts.moe_layers:
        return
    if not 1 <= facts.top_k <= facts.num_experts:
        yield f"the config says that each token selects {facts.top_k} of the {facts.num_experts} experts of a layer"
    groups, top_groups = facts.num_groups, facts.top_groups
    if not isinstance(groups, int) or not isinstance(top_groups, int):  # the model cannot compute
        return
    if groups < 1 or facts.num_experts % groups or not 1 <= top_groups <= groups:
        yield (
            f"the config says that each token selects {top_groups} of {groups} groups of the {facts.num_experts} "
            "experts of a layer (topk_group and n_group); groups must be equal, and as many as are selected"
        )
    elif groups > 1 and facts.top_k > top_groups * (facts.num_experts // groups):
        yield (
            f"the config says that each token selects {facts.top_k} experts, but the {top_groups} groups that it may "
            f"select them from have {top_groups * (facts.num_experts // groups)} (num_experts_per_tok, topk_group)"
        )


def _check_rotary(outline: Model) -> Iterator[str]:
    """Yield rotary embeddings whose frequencies are not finite, computed from the config on the CPU."""
    kinds = {
        type(module)
        for module in outline.modules()
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    }
    for kind in kinds:
        with library_calls(f"no rotary embedding can be made from {CONFIG}"), without_warnings():
            rotary: nn.Module = kind(config=outline.config)
        if not all(bool(torch.isfinite(buffer).all()) for buffer in rotary.buffers()):
            settings = getattr(outline.config, "rope_parameters", None)
            yield f"{CONFIG} has rope_parameters={settings}, which give frequencies that are not finite; {SAME_MODEL}"


@torch.no_grad()
def run_without_weights(outline: Model) -> None:
    """Let a model on the meta device compute, to find settings that do not fit each other.

    Raises:
        UserError: the forward pass fails.
    """
    outline.set_experts_implementation("batched_mm")  # the others look at numbers, which the meta device has not
    ids_BS = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta", dtype=outline.dtype)  # transformers' own looks at numbers
    outline.config.output_router_logits = False  # the loss of the routers is not computed
    for module in outline.modules():
        if isinstance(module, LowRankExperts):  # they look at numbers, too
            module.__dict__["forward"] = lambda hidden_states, *_: hidden_states
    try:
        with library_calls(f"the model of {CONFIG} ({_sizes(outline.config)}) cannot compute; {SAME_MODEL}"):
            outline(input_ids=ids_BS, position_ids=ids_BS, attention_mask=mask, use_cache=False)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, NotImplementedError) and "meta" not in str(cause):  # a limit of the meta device
            raise


def _sizes(config: PretrainedConfig) -> str:
    values = {name: getattr(config, name, None) for name in SIZES}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _check_generation(path: str | Path, settings: ModelConfig, config: PretrainedConfig) -> Iterator[str]:
    """Yield what is wrong with generation_config.json, which an export writes again."""
    file = model_file(path, GENERATION, settings.revision)
    if file is None:
        return
    rows = _rows(config)
    try:
        values = read_json(file)
    except UserError as error:
        yield f"{error}, or delete the file"
        return
    try:
        with library_calls(f"transformers refuses {GENERATION}"), without_warnings():
            GenerationConfig.from_dict(values).validate()
    except UserError as error:
        yield f"{error}; correct it, or delete the file"
    for name in SPECIAL_IDS:
        ids = values.get(name)
        ids = ids if isinstance(ids, list) else [ids]
        if wrong := [number for number in ids if isinstance(number, int) and rows and number >= rows]:
            yield f"{GENERATION} has {name}={wrong[0]}, but the embedding has {rows} rows; correct it"
