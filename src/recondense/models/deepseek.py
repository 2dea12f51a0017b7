"""DeepSeekMoE-16B (model_type `deepseek`), which transformers 5 does not have: its config and model.

The model is composed of parts of transformers: Llama's attention, norms and rotary embedding, Qwen2-MoE's fused experts
and router, and DeepSeek-V2's forward passes. Like DeepSeek-V2 and V3 in transformers, it does not have the
load-balancing loss of the published training code.

This file imports only torch and transformers, because it is bundled into exports. There it follows files that postpone
the evaluation of annotations.

Legend: B batch, S sequence, T = B·S tokens, D hidden size, F expert width, E routed experts, K top-k.

Reference: DeepSeekMoE, arXiv 2401.06066, section 3.
"""

# ruff: noqa: RUF012

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV2Config,
    GenerationMixin,
    LlamaConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV2MLP, DeepseekV2Model
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoePreTrainedModel,
    Qwen2MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder


class DeepseekConfig(LlamaConfig):
    """The config. Its defaults are those of deepseek-moe-16b-base.

    Args:
        intermediate_size: width of the dense layers.
        moe_intermediate_size: F.
        n_routed_experts: E; None for a model without sparse layers.
        n_shared_experts: number of shared experts, which are one MLP with this many times F rows; None or 0 for none.
        first_k_dense_replace: number of dense layers before the first sparse layer.
        moe_layer_freq: the other layers are sparse if their index is divisible by it, and dense otherwise.
        norm_topk_prob: divide the selected experts' weights by their sum.
        scoring_func: must be "softmax".
        aux_loss_alpha, seq_aux: settings of the published training code; not used here.

    Raises:
        ValueError: the scoring function is not softmax, or the hidden size is not divisible by the number of attention
            heads.
    """

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        **{name: plan for name, plan in DeepseekV2Config.base_model_tp_plan.items() if ".mlp." in name},
    }
    base_model_ep_plan = DeepseekV2Config.base_model_ep_plan

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    output_router_logits: bool = False
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]
        if self.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func={self.scoring_func!r}: model_type deepseek supports only softmax; set scoring_func to "
                "'softmax' if the model was trained with it, otherwise set model_type to that of its architecture "
                "(sigmoid: deepseek_v3)"
            )
        # The published code is for transformers 4, and exports do not include it.
        code = str((kwargs.get("auto_map") or {}).get("AutoConfig"))  # preceded by "owner/name--" if from the hub
        if code.rpartition("--")[2].startswith("configuration_deepseek."):
            del kwargs["auto_map"]
        super().__post_init__(**kwargs)
        self.validate_architecture()


class DeepseekTopkRouter(Qwen2MoeTopKRouter):
    """p = softmax(W x) over all E experts; selects the K largest.

    The weights are divided by their sum if `norm_topk_prob` is set and K > 1. Maps x (B, S, D) or (T, D) to logits
    (T, E), top_k_weights (T, K) and top_k_index (T, K). The softmax is computed in fp32.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = config.norm_topk_prob and self.top_k > 1


class DeepseekMoE(nn.Module):
    """y = Σ_{i in top-k} p_i E_i(x) + Shared(x), for x (B, S, D)."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopkRouter(config)
        self.experts = Qwen2MoeExperts(config)
        width = config.moe_intermediate_size * (config.n_shared_experts or 0)
        self.shared_experts = DeepseekV2MLP(config, intermediate_size=width) if width else None  # type: ignore[arg-type]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(x_TD)
        output = self.experts(x_TD, top_k_index, top_k_weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama's layer; its MLP is a `DeepseekMoE` in sparse layers."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Llama's constructor would first make a dense MLP
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        sparse = (
            config.n_routed_experts is not None
            and layer_idx >= config.first_k_dense_replace
            and layer_idx % config.moe_layer_freq == 0
        )
        self.mlp = DeepseekMoE(config) if sparse else DeepseekV2MLP(config)  # type: ignore[assignment,arg-type]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(Qwen2MoePreTrainedModel):
    """The features that transformers supports for the model. Weights are initialized like those of Qwen2-MoE."""

    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(DeepseekTopkRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers searches the source of this class for its decorator, which Qwen2MoeExperts has


class DeepseekModel(DeepseekPreTrainedModel):
    """The model without head: embedding, decoder layers and final norm."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    forward = DeepseekV2Model.forward


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """The causal LM."""

    _tied_weights_keys = DeepseekV2ForCausalLM._tied_weights_keys
    _tp_plan = DeepseekV2ForCausalLM._tp_plan
    _pp_plan = DeepseekV2ForCausalLM._pp_plan
    _fsdp_plan = DeepseekV2ForCausalLM._fsdp_plan

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = DeepseekV2ForCausalLM.forward


def register() -> None:
    """Register `deepseek` with the Auto classes and with the conversion of per-expert weights.

    If the name is already registered, by a loaded export or by a later transformers, it is not changed.
    """
    name = DeepseekConfig.model_type
    if get_checkpoint_conversion_mapping(name) is None:
        register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping("qwen2_moe"))
    if name not in CONFIG_MAPPING:
        AutoConfig.register(name, DeepseekConfig)
        AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
        AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
