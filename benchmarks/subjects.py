"""Models (trained, upcycled, or random at real size), texts and output that benchmarks share."""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.utils import logging as transformers_logging

from recondense.config.schema import Config, ModelConfig, from_dict
from recondense.data.calibration_set import CalibrationSet, make_calibration_set
from recondense.data.stdlib import stdlib_corpora
from recondense.models import loading
from recondense.run import command_line, tiny

ROOT = Path(__file__).resolve().parents[1]
UPCYCLING_NOISE = 0.5  # standard deviations of the weights that are copied

# Qwen/Qwen1.5-MoE-A2.7B. Its parameters are counted before weights are made.
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "output_router_logits": False,
}
QWEN_PARAMETERS = 14_315_784_192
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_experts": 12}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32}
TINY |= {"shared_expert_intermediate_size": 128, "max_position_embeddings": 512}


def default_config() -> Config:
    """The config of `python train.py`."""
    assert command_line.command_hash()  # importing it registers the resolvers that conf/ uses
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return from_dict(cast(dict[str, Any], OmegaConf.to_container(compose("train"), resolve=True)))


def load(folder: Path | None, **settings: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model from a folder, or the embedded model, which is trained if the cache does not have it.

    Args:
        settings: Fields of ModelConfig (dtype, device, experts).
    """
    transformers_logging.disable_progress_bar()
    if folder is not None:
        return loading.load(folder, ModelConfig(path=str(folder), **settings))
    config = default_config()
    path = tiny.ensure(config.model, Path(config.cache_dir), config.trainer)
    return loading.load(path, ModelConfig(path=str(path), **settings))


def standard_library(tokenizer: PreTrainedTokenizerBase, num_texts: int, num_tokens: int) -> CalibrationSet:
    """Calibration texts of `data=stdlib`."""
    return make_calibration_set(stdlib_corpora().calibration or [], tokenizer, num_texts, num_tokens)


def random_texts(vocab_size: int, num_texts: int, num_tokens: int) -> CalibrationSet:
    """Texts of random tokens, all equally likely."""
    generator = torch.Generator().manual_seed(0)
    return CalibrationSet(torch.randint(vocab_size, (num_texts, num_tokens), generator=generator).tolist())


def random_qwen(scale: str, dtype: torch.dtype, device: str, experts: str) -> PreTrainedModel:
    """Qwen1.5-MoE-A2.7B with random weights, at its real size or tiny.

    Raises:
        ValueError: The config does not have the published number of parameters.
    """
    config = Qwen2MoeConfig(**cast(dict[str, Any], QWEN | (TINY if scale == "tiny" else {})))
    with torch.device("meta"):
        count = Qwen2MoeForCausalLM(config).num_parameters()
    if scale == "real" and count != QWEN_PARAMETERS:
        raise ValueError(f"the config has {count:,} parameters; Qwen1.5-MoE-A2.7B has {QWEN_PARAMETERS:,}")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = Qwen2MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.set_experts_implementation(experts)
    model.eval()
    return model


@torch.no_grad()
def upcycle(model: PreTrainedModel, num_experts: int) -> PreTrainedModel:
    """The model with more routed experts: expert e is a perturbed copy of expert e mod E, and so is its router row."""
    config = copy.deepcopy(model.config)
    config.num_experts = num_experts
    larger: PreTrainedModel = cast(Any, Qwen2MoeForCausalLM(cast(Qwen2MoeConfig, config))).to(model.dtype)
    generator = torch.Generator().manual_seed(0)
    source = model.state_dict()
    for name, tensor in larger.state_dict().items():
        if tensor.shape == source[name].shape:
            tensor.copy_(source[name])
            continue
        copies = source[name][torch.arange(num_experts) % len(source[name])].float()
        noise = torch.randn(copies.shape, generator=generator)
        tensor.copy_(copies + UPCYCLING_NOISE * copies.std(dim=tuple(range(1, copies.dim())), keepdim=True) * noise)
    larger.set_experts_implementation(str(config._experts_implementation))
    larger.eval()
    return larger


def timed(work: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[Any, float]:
    """The result of `work`, and the seconds that it took."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine on which the figures are measured."""
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def console() -> Console:
    """A terminal, or 120 columns where there is none."""
    return Console() if Console().is_terminal else Console(width=120)


def write_json(path: Path | None, settings: dict[str, Any], where: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write the figures of a benchmark, if a path is given."""
    if path is not None:
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        path.write_text(json.dumps({"settings": plain, "machine": where, **figures}, indent=1) + "\n", encoding="utf-8")


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and maximum of repeated timings."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "all": list(seconds),
    }
