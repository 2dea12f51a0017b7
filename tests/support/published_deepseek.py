"""DeepSeekMoE-16B as published: its config.json, the names of its weights, and its architecture in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# config.json of deepseek-ai/deepseek-moe-16b-base, without the version of transformers.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 4096, "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "vocab_size": 102400,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **PUBLISHED, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def is_sparse(config: dict[str, Any], layer: int) -> bool:
    freq, first = config["moe_layer_freq"], config["first_k_dense_replace"]
    return config["n_routed_experts"] is not None and layer >= first and layer % freq == 0


def published_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the published checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    D, F_ = config["hidden_size"], config["moe_intermediate_size"]
    kv = D * config["num_key_value_heads"] // config["num_attention_heads"]

    def add(name: str, *shape: int, mean: float = 0.0, std: float = 0.2) -> None:
        weights[f"{name}.weight"] = mean + std * torch.randn(shape, generator=generator)

    def add_mlp(name: str, width: int) -> None:
        for part, shape in (("gate_proj", (width, D)), ("up_proj", (width, D)), ("down_proj", (D, width))):
            add(f"{name}.{part}", *shape)

    add("model.embed_tokens", config["vocab_size"], D)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, shape in (("q", (D, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, D))):
            add(f"{name}.self_attn.{part}_proj", *shape)
        for part in ("input_layernorm", "post_attention_layernorm"):
            add(f"{name}.{part}", D, mean=1.0)
        if not is_sparse(config, layer):
            add_mlp(f"{name}.mlp", config["intermediate_size"])
            continue
        add(f"{name}.mlp.gate", config["n_routed_experts"], D)
        for expert in range(config["n_routed_experts"]):
            add_mlp(f"{name}.mlp.experts.{expert}", F_)
        if config["n_shared_experts"]:
            add_mlp(f"{name}.mlp.shared_experts", F_ * config["n_shared_experts"])
    add("model.norm", D, mean=1.0)
    if not config["tie_word_embeddings"]:
        add("lm_head", config["vocab_size"], D)
    return weights


def fused(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The same weights with each layer's experts in two tensors: (E, 2F, D), gate above up, and (E, D, F)."""
    tensors = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for layer in filter(lambda layer: is_sparse(config, layer), range(config["num_hidden_layers"])):
        name = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [weights[f"{name}.{expert}.{part}_proj.weight"] for expert in range(config["n_routed_experts"])]
            for part in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors |= {f"{name}.gate_up_proj": torch.stack(both), f"{name}.down_proj": torch.stack(parts["down"])}
    return tensors


def written(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Reference:
    """The published architecture: layer by layer, head by head, token by token, expert by expert."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / (mean_square + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]

    def rotated(self, x_Sd: Tensor) -> Tensor:
        """Rotate components i and i + d/2, as a point in the plane, by the angle position · theta^(-2i/d)."""
        half = x_Sd.shape[-1] // 2
        positions = torch.arange(len(x_Sd)) / (self.config["rope_scaling"] or {"factor": 1.0})["factor"]
        angles = positions[:, None] * self.config["rope_theta"] ** (-torch.arange(half) / half)
        first, second = x_Sd[:, :half], x_Sd[:, half:]
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
        )

    def attention(self, x_SD: Tensor, name: str) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (self.linear(x_SD, f"{name}.{part}_proj") for part in "qkv")
        width = q.shape[-1] // heads
        past = torch.tril(torch.ones(len(x_SD), len(x_SD))).bool()
        outputs = []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            kv_columns = slice(head * kv_heads // heads * width, (head * kv_heads // heads + 1) * width)
            scores = self.rotated(q[:, columns]) @ self.rotated(k[:, kv_columns]).T / width**0.5
            outputs.append(scores.masked_fill(~past, -torch.inf).softmax(-1) @ v[:, kv_columns])
        return self.linear(torch.cat(outputs, dim=-1), f"{name}.o_proj")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(gate * torch.sigmoid(gate) * up, f"{name}.down_proj")

    def moe(self, x_SD: Tensor, name: str) -> Tensor:
        outputs = []
        for x_D in x_SD:
            probabilities = self.linear(x_D, f"{name}.gate").softmax(-1)
            selected = probabilities.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
            total = sum(probabilities[expert] for expert in selected)
            scale = total if self.config["norm_topk_prob"] and len(selected) > 1 else 1.0
            y_D = torch.zeros_like(x_D)
            for expert in selected:
                y_D = y_D + probabilities[expert] / scale * self.mlp(x_D, f"{name}.experts.{expert}")
            outputs.append(y_D + (self.mlp(x_D, f"{name}.shared_experts") if self.config["n_shared_experts"] else 0.0))
        return torch.stack(outputs)

    def logits(self, ids_S: Tensor) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][ids_S]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
            block = self.moe if is_sparse(self.config, layer) else self.mlp
            x = x + block(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.linear(self.norm(x, "model.norm"), head)
