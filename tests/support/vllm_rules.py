"""What vLLM requires of a folder, as data, and the problems that it would have with one.

The rules restate those of vLLM 0.32.0; the files are in vllm/model_executor/models. benchmarks/vllm_tokens.py checks
that vLLM really loads the folders, in an environment of its own.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from recondense.models import families

Config = Mapping[str, Any]
Keys = dict[str, tuple[int, ...]]


def every_layer(config: Config, layer: int) -> bool:
    return True


def listed(config: Config, layer: int) -> bool:
    """qwen2_moe.py, qwen3_moe.py: every decoder_sparse_step-th layer that mlp_only_layers does not name."""
    dense = layer in (config.get("mlp_only_layers") or [])
    return not dense and config["num_experts"] > 0 and (layer + 1) % config["decoder_sparse_step"] == 0


def after_first(config: Config, layer: int) -> bool:
    """deepseek_v2.py: from first_k_dense_replace on, every moe_layer_freq-th; glm4_moe.py knows no frequency."""
    return layer >= config["first_k_dense_replace"] and layer % config.get("moe_layer_freq", 1) == 0


def from_to(config: Config, layer: int) -> bool:
    """ernie45_moe.py"""
    last = config.get("moe_layer_end_index", config["num_hidden_layers"] - 1)
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    regular = (layer + 1) % config.get("moe_layer_interval", 1) == 0
    return regular and config.get("moe_layer_start_index", 0) <= layer <= last


def alternating(config: Config) -> bool:
    """gpt_oss.py ignores `layer_types`: layers of even index have a sliding window."""
    kinds = ("sliding_attention", "full_attention")
    return config["layer_types"] == [kinds[layer % 2] for layer in range(config["num_hidden_layers"])]


def yarn(config: Config) -> bool:
    """gpt_oss.py reads these without a default."""
    names = {"rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    return names <= set(config["rope_parameters"])


def grouped(config: Config) -> bool:
    """deepseek_v2.py always selects by groups, so their number must not be null."""
    return all(config.get(name, 1) is not None for name in ("n_group", "topk_group"))


def corrected(config: Config) -> bool:
    """deepseek_v2.py has a correction bias and sigmoid scores only if the config says so."""
    return config.get("topk_method") == "noaux_tc" and config.get("scoring_func") == "sigmoid"


def some_sparse(config: Config) -> bool:
    """qwen3_moe.py and glm4_moe.py need at least one MoE layer."""
    sparse = listed if "mlp_only_layers" in config else after_first
    return any(sparse(config, layer) for layer in range(config["num_hidden_layers"]))


@dataclass(frozen=True)
class Rule:
    """How one of vLLM's models reads a folder.

    Args:
        file: the module that defines it.
        architecture: the name in registry.py.
        num_experts, expert_width: the names of these settings in the config.
        sparse: which layers have experts.
        block, router, experts: names in the keys; those of the experts are gate, up and down.
        shared: the shared experts' name, and the setting for their width or their number.
        attention: "grouped", or "latent" for DeepSeek's.
        biases: the projections of the attention that have one, or the setting that says whether q, k and v have one.
        norms: of queries and keys: "head" by head, "all" heads at once, or the setting that says whether by head.
        needs: conditions on the config without which vLLM stops or computes something else.
    """

    file: str
    architecture: str
    num_experts: str
    expert_width: str
    sparse: Callable[[Config, int], bool] = every_layer
    block: str = "mlp"
    router: str = "gate"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: tuple[str, str] = ("", "")
    gated: bool = False
    attention: str = "grouped"
    biases: tuple[str, ...] | str = ()
    norms: str = ""
    correction: str = ""
    fused: bool = False
    needs: Mapping[str, Callable[[Config], bool]] = field(default_factory=dict)


QKV = ("q_proj", "k_proj", "v_proj")
RULES: dict[str, Rule] = {
    "qwen2_moe": Rule(
        "qwen2_moe.py", "Qwen2MoeForCausalLM", "num_experts", "moe_intermediate_size", listed, gated=True,
        shared=("shared_expert", "shared_expert_intermediate_size"), biases=QKV,
    ),
    "qwen3_moe": Rule(
        "qwen3_moe.py", "Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size", listed, norms="head",
        biases="attention_bias", needs={"an MoE layer": some_sparse},
    ),
    "mixtral": Rule(
        "mixtral.py", "MixtralForCausalLM", "num_local_experts", "intermediate_size", block="block_sparse_moe",
        experts=("w1", "w3", "w2"),
    ),
    "olmoe": Rule(
        "olmoe.py", "OlmoeForCausalLM", "num_experts", "intermediate_size", norms="all",
        needs={
            "weights that are not renormalised": lambda config: not config["norm_topk_prob"],
            "rms_norm_eps 1e-5": lambda config: config["rms_norm_eps"] == 1e-5,
            "no clip_qkv": lambda config: config.get("clip_qkv") is None,
        },
    ),
    "deepseek": Rule(
        "deepseek_v2.py", "DeepseekForCausalLM", "n_routed_experts", "moe_intermediate_size", after_first,
        shared=("shared_experts", "n_shared_experts"), needs={"groups": grouped},
    ),
    "deepseek_v2": Rule(
        "deepseek_v2.py", "DeepseekV2ForCausalLM", "n_routed_experts", "moe_intermediate_size", after_first,
        shared=("shared_experts", "n_shared_experts"), attention="latent", needs={"groups": grouped},
    ),
    "deepseek_v3": Rule(
        "deepseek_v2.py", "DeepseekV3ForCausalLM", "n_routed_experts", "moe_intermediate_size", after_first,
        shared=("shared_experts", "n_shared_experts"), attention="latent", correction="gate",
        needs={"groups": grouped, "topk_method noaux_tc and scoring_func sigmoid": corrected},
    ),
    "gpt_oss": Rule(
        "gpt_oss.py", "GptOssForCausalLM", "num_local_experts", "intermediate_size", router="router", fused=True,
        biases=(*QKV, "o_proj"),
        needs={"layers that slide and see all by turns": alternating, "yarn": yarn},
    ),
    "glm4_moe": Rule(
        "glm4_moe.py", "Glm4MoeForCausalLM", "n_routed_experts", "moe_intermediate_size", after_first,
        shared=("shared_experts", "n_shared_experts"), biases="attention_bias", norms="use_qk_norm", correction="gate",
        needs={"groups": grouped, "an MoE layer": some_sparse, "silu": lambda config: config["hidden_act"] == "silu"},
    ),
    "ernie4_5_moe": Rule(
        "ernie45_moe.py", "Ernie4_5_MoeForCausalLM", "moe_num_experts", "moe_intermediate_size", from_to,
        shared=("shared_experts", "moe_num_shared_experts"), correction="moe_statics",
        needs={"no biases": lambda config: not config.get("use_bias")},
    ),
}  # fmt: skip
# Settings of the published configs that the tiny ones do not have.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False,
        },
    },
}  # fmt: skip


def expected(config: Config, rule: Rule) -> Keys:
    """Every key that the folder must have, with its shape."""
    hidden = config["hidden_size"]
    keys: Keys = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        keys["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        parts: Keys = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        parts |= {f"self_attn.{name}": size for name, size in attention(config, rule).items()}
        if rule.sparse(config, layer):
            parts |= {f"{rule.block}.{name}": size for name, size in sparse_block(config, rule).items()}
        else:
            parts |= {f"mlp.{name}": size for name, size in dense(hidden, config["intermediate_size"]).items()}
        keys |= {f"model.layers.{layer}.{name}": size for name, size in parts.items()}
    return keys


def attention(config: Config, rule: Rule) -> Keys:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if rule.attention == "latent":
        nope, rope, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
        rank, q_rank = config["kv_lora_rank"], config.get("q_lora_rank")
        keys: Keys = {
            "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
            "kv_a_layernorm.weight": (rank,),
            "kv_b_proj.weight": (heads * (nope + value), rank),
            "o_proj.weight": (hidden, heads * value),
        }
        if q_rank is None:
            return {**keys, "q_proj.weight": (heads * (nope + rope), hidden)}
        return {
            **keys,
            "q_a_proj.weight": (q_rank, hidden),
            "q_a_layernorm.weight": (q_rank,),
            "q_b_proj.weight": (heads * (nope + rope), q_rank),
        }
    size = config.get("head_dim") or hidden // heads
    wide, narrow = heads * size, config["num_key_value_heads"] * size
    rows = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": hidden}
    keys = {f"{name}.weight": (num_rows, wide if name == "o_proj" else hidden) for name, num_rows in rows.items()}
    biases = (QKV if config.get(rule.biases) else ()) if isinstance(rule.biases, str) else rule.biases
    keys |= {f"{name}.bias": (rows[name],) for name in biases}
    if rule.norms == "all":
        keys |= {"q_norm.weight": (wide,), "k_norm.weight": (narrow,)}
    elif rule.norms == "head" or (rule.norms and config.get(rule.norms)):
        keys |= {"q_norm.weight": (size,), "k_norm.weight": (size,)}
    return {**keys, "sinks": (heads,)} if rule.fused else keys


def sparse_block(config: Config, rule: Rule) -> Keys:
    hidden, num, width = config["hidden_size"], config[rule.num_experts], config[rule.expert_width]
    keys: Keys = {f"{rule.router}.weight": (num, hidden)}
    if rule.fused:  # gpt_oss.py: one tensor for all experts, input rows first, biases
        sizes = {"gate_up_proj": (hidden, 2 * width), "down_proj": (width, hidden)}
        keys |= {f"experts.{name}": (num, *size) for name, size in sizes.items()}
        keys |= {f"experts.{name}_bias": (num, size[1]) for name, size in sizes.items()}
        return {**keys, f"{rule.router}.bias": (num,)}
    for expert in range(num):
        keys |= {f"experts.{expert}.{name}": size for name, size in dense(hidden, width, rule.experts).items()}
    if rule.correction:  # ernie45_moe.py squeezes a leading dimension of 1
        leading = (1,) if rule.correction == "moe_statics" else ()
        keys[f"{rule.correction}.e_score_correction_bias"] = (*leading, num)
    name, attribute = rule.shared
    if name and config.get(attribute):
        total = config[attribute] * (1 if attribute.endswith("size") else width)
        keys |= {f"{name}.{key}": size for key, size in dense(hidden, total).items()}
    return {**keys, "shared_expert_gate.weight": (1, hidden)} if rule.gated else keys


def dense(hidden: int, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Keys:
    gate, up, down = names
    return {f"{gate}.weight": (width, hidden), f"{up}.weight": (width, hidden), f"{down}.weight": (hidden, width)}


def problems(folder: Path) -> list[str]:
    """The problems that vLLM's model of the folder's family would have with the folder."""
    config = settings(folder)
    rule = RULES.get(config["model_type"])
    if rule is None or config["architectures"] != [rule.architecture]:
        return [f"architecture {config['architectures']} of {config['model_type']}"]
    messages = [f"needs {what}" for what, holds in rule.needs.items() if not holds(config)]
    present: Keys = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            present |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    required = expected(config, rule)
    messages += [f"no key {key}" for key in sorted(required.keys() - present.keys())]
    messages += [f"unknown key {key}" for key in sorted(present.keys() - required.keys())]
    messages += [
        f"{key}: {present[key]} for {size}" for key, size in required.items() if present.get(key, size) != size
    ]
    return messages


def settings(folder: Path) -> dict[str, Any]:
    """The config as vLLM reads it: an object of transformers' class, in which some settings have a second name."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return {
        **config.to_dict(),
        **{name: getattr(config, attribute) for name, attribute in config.attribute_map.items()},
    }


def backend_problems(folder: Path, base: Any) -> list[str]:
    """The problems of vLLM's transformers backend (registry.py, transformers/base.py, moe.py) with a folder.

    Args:
        base: the model without a head that `AutoModel` makes from the folder, on the meta device.
    """
    config = json.loads((folder / "config.json").read_text())
    source = (folder / "modeling_recondense.py").read_text()
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    messages = []
    for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):  # the config first; AutoModel is what it builds
        file, _, name = config.get("auto_map", {}).get(auto, "").partition(".")
        if file != "modeling_recondense" or name not in names:
            messages.append(f"auto_map names no {auto}")
    if not (base.is_backend_compatible() or base._can_set_attn_implementation()):
        messages.append("its attention cannot be replaced")
    for layer, module in enumerate(base.layers):
        if not any("attn" in name for name, _ in module.named_children()):
            messages.append(f"layer {layer} has no attention, so no key-value cache")
    facts = families.original_facts(base.config)
    num_experts = facts.num_experts
    for name, module in base.named_modules():  # it replaces these by its own experts, as many as the config says
        parameters = list(module.parameters())
        if name.endswith(".experts") and parameters and all(parameter.ndim == 3 for parameter in parameters):
            tensors = dict(module.named_parameters())
            sizes = tensors["down_proj"].shape if set(tensors) == {"gate_up_proj", "down_proj"} else None
            if sizes is None or sizes[0] > num_experts or facts.expert_width not in sizes[1:]:
                messages.append(f"{name} would be replaced by {num_experts} whole experts")
    return messages
