"""Carve the feed-forward layers of a dense Llama model into a Qwen2-MoE whose experts share the neurons among them.

In every layer the neurons that contribute most become the shared expert. The others are clustered by co-activation
into routed experts of equal size. The router predicts the norm of each expert's output by ridge regression. No neuron
is lost or copied twice: with all experts selected and equal routing weights, the MoE computes what the source computes
(`check_carving`). CMoE (arXiv 2502.04416) and LLaMA-MoE (arXiv 2406.16554) carve in similar ways.

Qwen2-MoE multiplies each expert's output by its softmax weight, which is about 1/E, and the shared expert's by a
sigmoid gate, which is 1/2 at a weight of zero. So `down_proj` is multiplied by E in routed experts, and by 2 in the
shared one.

Legend: T tokens, D hidden size, F width of the dense layer, G width of the shared expert, E routed experts, W theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

ACTIVE_SHARE = 0.1  # of a token's neurons: those with the largest contributions count as active for the clustering
ITERATIONS = 8  # of the balanced clustering
RIDGE = 1e-3  # of the router's regression, relative to the mean diagonal
CLUSTER_TOKENS = 4096  # that the clustering sees


@dataclass(frozen=True)
class Carving:
    """The shape of the MoE.

    Args:
        num_experts: E, routed experts of a layer.
        top_k: how many of them a token selects.
        shared_width: G, neurons of the shared expert. The others are divided among the routed experts.
        logit_scale: standard deviation of the router's logits over a token's experts. Small values keep the routing
            weights near 1/E, so that a selected expert counts as much as in the source.
        seed: of the clustering's first centers.
    """

    num_experts: int = 16
    top_k: int = 4
    shared_width: int = 512
    logit_scale: float = 0.1
    seed: int = 0


@torch.no_grad()
def carve(source: LlamaForCausalLM, windows_NS: Tensor, shape: Carving) -> Qwen2MoeForCausalLM:
    """Return the MoE that is made of a dense model.

    Args:
        source: the dense model.
        windows_NS: token ids (N, S) on which contributions and co-activations are measured.
        shape: the shape of the MoE.
    """
    moe = _moe_of_shape(source, shape)
    layers: Any = source.model.layers
    inputs = _mlp_inputs(source, windows_NS)
    for index, x_TD in enumerate(inputs):
        mlp = layers[index].mlp
        inner_TF = mlp.act_fn(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
        weight_TF = inner_TF.abs() * mlp.down_proj.weight.norm(dim=0)
        shared, experts = _divide_neurons(weight_TF, shape)
        block: Any = moe.model.layers[index].mlp
        _fill_experts(block, mlp, shared, experts, shape)
        block.gate.weight.copy_(_router_rows(x_TD, inner_TF, mlp.down_proj.weight, experts, shape.logit_scale))
    return moe


@torch.no_grad()
def check_carving(source: LlamaForCausalLM, moe: Qwen2MoeForCausalLM, input_ids: Tensor) -> float:
    """Return the largest difference of logits with all experts selected equally, relative to the largest logit.

    Args:
        source: the dense model.
        moe: the MoE as `carve` returned it; it is not changed.
        input_ids: token ids (B, S).
    """
    gates = [layer.mlp.gate for layer in moe.model.layers]  # type: ignore[union-attr]
    routers: list[Any] = [(gate, gate.weight.clone(), gate.top_k) for gate in gates]  # type: ignore[union-attr]
    try:
        for gate, _, _ in routers:
            gate.weight.zero_()
            gate.top_k = gate.num_experts
        expected, logits = source(input_ids).logits, moe(input_ids).logits
    finally:
        for gate, weight, top_k in routers:
            gate.weight.copy_(weight)
            gate.top_k = top_k
    return float((logits - expected).abs().max() / expected.abs().max())


def _moe_of_shape(source: LlamaForCausalLM, shape: Carving) -> Qwen2MoeForCausalLM:
    """Return a Qwen2-MoE with the source's attention, norms and embeddings, and undefined MoE blocks."""
    config = source.config
    width, rest = config.intermediate_size, config.intermediate_size - shape.shared_width
    assert rest % shape.num_experts == 0, f"{rest} of {width} neurons do not divide among {shape.num_experts} experts"
    moe = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            qkv_bias=False,
            moe_intermediate_size=rest // shape.num_experts,
            shared_expert_intermediate_size=shape.shared_width,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=False,
            output_router_logits=False,
            sliding_window=None,
        )
    )
    missing, unexpected = moe.load_state_dict(source.state_dict(), strict=False)
    assert all(".mlp." in name for name in (*missing, *unexpected)), (missing, unexpected)
    return moe.eval()


def _mlp_inputs(source: LlamaForCausalLM, windows_NS: Tensor) -> list[Tensor]:
    """Return the inputs (T, D) of each layer's MLP."""
    layers: Any = source.model.layers
    inputs: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1)))
        for layer, kept in zip(layers, inputs, strict=True)
    ]
    try:
        for window_S in windows_NS:
            source.model(window_S[None])
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(kept) for kept in inputs]


def _divide_neurons(weight_TF: Tensor, shape: Carving) -> tuple[Tensor, list[Tensor]]:
    """Return the neurons of the shared expert and of each routed expert.

    Args:
        weight_TF: the norm of each neuron's contribution to the output for each token.
        shape: the shape of the MoE.
    """
    order = weight_TF.mean(dim=0).argsort(descending=True)
    shared, others = order[: shape.shared_width].sort().values, order[shape.shared_width :].sort().values
    active = round(ACTIVE_SHARE * weight_TF.shape[1])
    some_TF = weight_TF[:: max(1, len(weight_TF) // CLUSTER_TOKENS)]
    marks_TF = torch.zeros_like(some_TF).scatter_(1, some_TF.topk(active, dim=1).indices, 1.0)
    clusters = balanced_clusters(marks_TF[:, others].T.numpy(), shape.num_experts, shape.seed)
    return shared, [others[torch.from_numpy(cluster)] for cluster in clusters]


def balanced_clusters(points: np.ndarray, num_clusters: int, seed: int) -> list[np.ndarray]:
    """Divide points into clusters of equal size: k-means in which each assignment is an optimal one with capacities.

    Args:
        points: (P, dimensions).
        num_clusters: it must divide P.
        seed: of the first centers.

    Returns:
        The indices of each cluster's points, ascending.
    """
    size, rest = divmod(len(points), num_clusters)
    assert rest == 0, f"{len(points)} points do not divide into {num_clusters} clusters"
    centers = points[np.random.default_rng(seed).choice(len(points), num_clusters, replace=False)]
    label = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        distance = (centers**2).sum(axis=1) - 2 * points @ centers.T
        before, (rows, slots) = label, linear_sum_assignment(np.repeat(distance, size, axis=1))
        label = np.empty(len(points), dtype=np.int64)
        label[rows] = slots // size
        if np.array_equal(label, before):
            break
        centers = np.stack([points[label == cluster].mean(axis=0) for cluster in range(num_clusters)])
    return [np.flatnonzero(label == cluster) for cluster in range(num_clusters)]


def _fill_experts(block: Any, mlp: Any, shared: Tensor, experts: Sequence[Tensor], shape: Carving) -> None:
    """Copy a dense layer's neurons into the experts of a MoE block."""
    for name in ("gate_proj", "up_proj"):
        getattr(block.shared_expert, name).weight.copy_(getattr(mlp, name).weight[shared])
    block.shared_expert.down_proj.weight.copy_(2 * mlp.down_proj.weight[:, shared])
    block.shared_expert_gate.weight.zero_()
    for expert, neurons in enumerate(experts):
        block.experts.gate_up_proj[expert].copy_(
            torch.cat([mlp.gate_proj.weight[neurons], mlp.up_proj.weight[neurons]])
        )
        block.experts.down_proj[expert].copy_(shape.num_experts * mlp.down_proj.weight[:, neurons])


def _router_rows(
    x_TD: Tensor, inner_TF: Tensor, down_DF: Tensor, experts: Sequence[Tensor], logit_scale: float
) -> Tensor:
    """Return a router (E, D) whose logits predict the norms of the experts' outputs, up to a scale and an offset."""
    norms_TE = torch.stack([(inner_TF[:, neurons] @ down_DF[:, neurons].T).norm(dim=1) for neurons in experts], dim=1)
    x, target = x_TD.double(), norms_TE.double()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
    rows_ED = torch.linalg.solve(gram, x.T @ target).T
    rows_ED -= rows_ED.mean(dim=0)  # the softmax does not see a common offset
    spread = float((x @ rows_ED.T).std(dim=1).mean())
    return (rows_ED * (logit_scale / max(spread, 1e-12))).float()
