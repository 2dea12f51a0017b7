"""A byte tokenizer and a random Qwen2-MoE of two layers, both made in milliseconds."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end-of-text token (id 0)."""
    vocabulary = {token: index for index, token in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def beginning_with(*tokens: str, bos: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """A byte tokenizer that puts some new special tokens (ids from 257) before a text.

    Args:
        bos: the first of them is its BOS token.
        end: it also puts the end-of-text token behind a text.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": tokens[0]} if bos else {"additional_special_tokens": list(tokens)})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in [*tokens, END]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*tokens, "$A", *([END] if end else [])]), special_tokens=ids
    )
    return tokenizer


def small_model(seed: int = 0) -> Qwen2MoeForCausalLM:
    """A model whose random weights are so large that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=None,
        bos_token_id=None,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    return model
