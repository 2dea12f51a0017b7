"""Bytes and peaks in cases with a known answer, and the order in which variants are timed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.evaluation import profiling
from recondense.evaluation.profiling import peak_tensor_bytes, profile_variants
from recondense.models.parameters import count_parameters, resident_bytes, weights_bytes

SETTINGS: dict[str, Any] = {
    "batch_size": 1,
    "prompt_length": 6,
    "new_tokens": 2,
    "repetitions": 3,
    "vocab_size": 64,
    "seed": 0,
}


def small_model(**changes: Any) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        **changes,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings))


def test_tied_weights_count_once() -> None:
    tied, untied = small_model(tie_word_embeddings=True), small_model(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 64 * 16
    assert weights_bytes(untied) - weights_bytes(tied) == 64 * 16 * 4
    assert weights_bytes(tied) == 4 * count_parameters(tied)


def test_weights_are_parameters_and_persistent_buffers() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("scale", torch.zeros(2))
    module.register_buffer("cache", torch.zeros(100), persistent=False)
    assert weights_bytes(module) == 4 * (16 + 2)
    assert resident_bytes(module) == 4 * (16 + 2 + 100)


def test_a_slice_counts_as_the_storage_that_it_keeps_alive() -> None:
    module = nn.Module()
    module.part = nn.Parameter(torch.zeros(100)[:10])
    assert count_parameters(module) == 10
    assert weights_bytes(module) == 400


def test_meta_tensors_have_bytes_too() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert weights_bytes(module) == 2 * 4 * (16 + 4)


def test_resident_bytes_counts_shared_weights_once() -> None:
    shared, teacher_only = nn.Linear(8, 8), nn.Linear(8, 8)
    student, teacher = nn.Sequential(shared, nn.Linear(8, 8)), nn.Sequential(shared, teacher_only)
    layer_bytes = 4 * (64 + 8)
    assert resident_bytes(student, teacher) == 3 * layer_bytes
    assert resident_bytes(student) + resident_bytes(teacher) == 4 * layer_bytes


def test_peak_of_a_known_sequence_of_allocations() -> None:
    def work() -> None:
        first = torch.empty(1_000_000)  # 4 MB
        second = torch.empty(2_000_000)  # 12 MB at once: the peak
        del first
        third = torch.empty(500_000)  # 10 MB
        del second, third

    assert peak_tensor_bytes(work, "cpu") == 12_000_000


def test_peak_is_never_negative() -> None:
    held = [torch.empty(1_000_000)]
    assert peak_tensor_bytes(held.clear, "cpu") == 0


def test_the_profiler_leaves_stderr_clean(capfd: pytest.CaptureFixture[str]) -> None:
    peak_tensor_bytes(lambda: torch.empty(10), "cpu")
    assert capfd.readouterr().err == ""


def test_peak_grows_with_the_prompt() -> None:
    model = small_model()
    short, long = (
        profile_variants({"a": lambda: nullcontext(model)}, device="cpu", **{**SETTINGS, "prompt_length": length})["a"]
        for length in (8, 64)
    )
    assert short.weights_bytes == long.weights_bytes == weights_bytes(model)
    # The cache alone: keys and values of 2 layers, 16 wide, fp32, for the prompt and the new tokens.
    for profile, length in ((short, 8), (long, 64)):
        assert profile.peak_memory_bytes - profile.weights_bytes >= 2 * 2 * 16 * 4 * (length + 2)
    assert long.peak_memory_bytes > short.peak_memory_bytes


def test_variants_alternate_in_changing_order() -> None:
    visits: list[str] = []
    models = {"a": small_model(), "b": small_model()}

    def variant(name: str) -> Iterator[nn.Module]:
        visits.append(name)
        yield models[name]

    enter = contextmanager(variant)
    profiles = profile_variants({"a": lambda: enter("a"), "b": lambda: enter("b")}, device="cpu", **SETTINGS)
    assert visits == ["a", "b", "a", "b", "b", "a", "a", "b"]  # warm-up, then three repetitions
    assert list(profiles) == ["a", "b"]
    for profile in profiles.values():
        assert all(value > 0 for value in profile.to_dict().values())


def test_speeds_are_medians_over_repetitions_and_count_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(9.0, 9.0), (9.0, 9.0), (1.0, 4.0), (2.0, 1.0), (100.0, 2.0)])
    monkeypatch.setattr(profiling, "_generate", lambda *_: next(seconds))
    model = small_model()
    settings = {**SETTINGS, "batch_size": 3}
    profile = profile_variants({"a": lambda: nullcontext(model)}, device="cpu", **settings)["a"]
    assert profile.prefill_tokens_per_second == 3 * 6 / 2.0
    assert profile.decode_tokens_per_second == 3 * 2 / 2.0


def test_modes_and_random_states_do_not_change() -> None:
    model = small_model().train()
    model.model.layers[0].eval()
    before = torch.get_rng_state()
    profile_variants({"a": lambda: nullcontext(model)}, device="cpu", **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.model.layers[1].mlp.training and not model.model.layers[0].mlp.training


def test_wrong_counts_are_reported_together() -> None:
    with pytest.raises(ValueError, match="batch_size is 0, repetitions is 0; each must be at least 1"):
        profile_variants({}, device="cpu", **{**SETTINGS, "batch_size": 0, "repetitions": 0})
