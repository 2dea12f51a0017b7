"""DeepSeekMoE-16B against its published architecture, config and weights (tests/support/published_deepseek.py)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.published_deepseek import PUBLISHED, SMALL, Reference, fused, published_weights, written
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from recondense.export.write_folder import _concatenate
from recondense.models import deepseek, expert_products, low_rank, replacement_blocks

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "renormalised": {"norm_topk_prob": True},
    "one expert, not renormalised": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "grouped queries": {"num_key_value_heads": 2},
    "every second layer": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "all sparse": {"first_k_dense_replace": 0},
    "no shared experts": {"n_shared_experts": None},
    "all dense": {"n_routed_experts": None, "n_shared_experts": None},
    "tied": {"tie_word_embeddings": True},
    "scaled positions": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
}
IDS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(3))
LOADED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    for _ in range(2):
        deepseek.register()


def test_an_import_registers_nothing() -> None:
    """No module of models/ calls a function when it is imported: classes are registered where models are built."""
    for path in sorted(Path(str(deepseek.__file__)).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)), f"{path}:{node.lineno}"


def load(folder: Path, **options: Any) -> Any:
    """Load a folder without trust_remote_code; every key is used and none is missing."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert type(model) is deepseek.DeepseekForCausalLM and type(model.config) is deepseek.DeepseekConfig
    assert {name: list(info[name]) for name in LOADED if info.get(name)} == {}
    return model.eval()


def small(tmp_path: Path, **changes: Any) -> Any:
    config = {**SMALL, **changes}
    return load(written(tmp_path / "small", config, published_weights(config)))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_computes_the_published_architecture(name: str, tmp_path: Path) -> None:
    config = {**SMALL, **VARIANTS[name]}
    weights = published_weights(config)
    model = load(written(tmp_path / "hub", config, weights))
    assert model.dtype == torch.float32
    expected = torch.stack([Reference(config, weights).logits(ids) for ids in IDS])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert 1.0 < float(expected.abs().max()) < 10.0


def test_size_of_the_published_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepseek.DeepseekConfig(**PUBLISHED))
    assert type(model) is deepseek.DeepseekForCausalLM
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == 16_375_728_128
    assert sum(size for name, size in sizes.items() if ".mlp.experts." in name) == 14_948_499_456


def test_the_config() -> None:
    """Its defaults are those of the published model, and it understands transformers' other names."""
    config = deepseek.DeepseekConfig(**PUBLISHED)
    ignored = ("architectures", "dtype")
    published, defaults = (
        {name: value for name, value in source.to_dict().items() if name not in ignored}
        for source in (config, deepseek.DeepseekConfig())
    )
    assert published == defaults and not hasattr(config, "auto_map")
    assert config.num_experts == config.num_local_experts == 64
    assert deepseek.DeepseekConfig(num_experts=6).n_routed_experts == 6
    hub = {"AutoConfig": f"owner/name--{PUBLISHED['auto_map']['AutoConfig']}", "AutoTokenizer": [None, "a.B"]}
    assert not hasattr(deepseek.DeepseekConfig(auto_map=hub), "auto_map")
    auto_map = {"AutoConfig": "modeling_recondense.CompressedConfig"}
    assert deepseek.DeepseekConfig(auto_map=auto_map).auto_map == auto_map


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'.*softmax"), ({"num_attention_heads": 7}, "not a multiple")],
)
def test_refused_configs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "hub", {**SMALL, **changes}, {})
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", ["published", "every second layer", "no shared experts", "tied"])
def test_both_layouts_are_the_same_model(name: str, tmp_path: Path) -> None:
    """Experts are separate, as on the hub, or fused; saved weights have the published names and bits, in shards too."""
    config = {**SMALL, **VARIANTS[name]}
    weights = published_weights(config)
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    apart = load(written(tmp_path / "hub", config, weights))
    together = load(written(tmp_path / "fused", plain, fused(weights, config)), trust_remote_code=False)
    trusting = load(
        tmp_path / "hub", trust_remote_code=True
    )  # the class in recondense takes precedence over the published code
    state = apart.state_dict()
    for other in (together.state_dict(), trusting.state_dict()):
        assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    expected = fused(weights, config)
    assert state.keys() - expected.keys() == ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    apart.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    shards = [load_file(path) for path in sorted((tmp_path / "saved").glob("*.safetensors"))]
    stored = {key: value for shard in shards for key, value in shard.items()}
    assert len(shards) > 1 and stored.keys() == weights.keys()
    assert all(torch.equal(stored[key], weights[key]) for key in weights)
    again = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert again["model_type"] == "deepseek" and "auto_map" not in again
    assert torch.equal(logits(load(tmp_path / "saved")), logits(apart))


def test_without_the_head(tmp_path: Path) -> None:
    model = small(tmp_path)
    base = AutoModel.from_pretrained(tmp_path / "small")
    assert type(base) is deepseek.DeepseekModel
    with torch.no_grad():
        assert torch.equal(model.lm_head(base(input_ids=IDS).last_hidden_state), logits(model))


def test_generates_the_same_with_a_key_value_cache(tmp_path: Path) -> None:
    """Also with padding on the left."""
    model = small(tmp_path, num_key_value_heads=2)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = [
        model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=cached, **options)
        for cached in (False, True)
    ]
    greedy = IDS
    for _ in range(8):
        greedy = torch.cat([greedy, logits(model, greedy)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated[0], greedy) and torch.equal(generated[1], greedy)
    padded, mask = F.pad(IDS, (3, 0)), F.pad(torch.ones_like(IDS), (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], greedy)


def test_implementations_agree(tmp_path: Path) -> None:
    model = small(tmp_path)
    results = []
    for experts, attention in (("eager", "eager"), ("grouped_mm", "sdpa"), ("batched_mm", "sdpa")):
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        block = model.model.layers[1]
        assert block.mlp.experts.config._experts_implementation == experts
        assert block.self_attn.config._attn_implementation == attention
        results.append(logits(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-5)


def test_outputs_that_are_requested(tmp_path: Path) -> None:
    """Router logits of every sparse layer, and no loss of the router."""
    model = small(tmp_path)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(
            IDS, labels=IDS, output_router_logits=True, output_hidden_states=True, output_attentions=True
        )  # fmt: skip
        plain = model(IDS, labels=IDS)
    assert [tuple(router_logits.shape) for router_logits in output.router_logits] == [(IDS.numel(), 8)] * 2
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert plain.router_logits is None and torch.equal(output.loss, plain.loss)
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(plain.loss, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_step(tied: bool, tmp_path: Path) -> None:
    """Every parameter gets a gradient, the same with gradient checkpointing; the loss falls."""
    model = small(tmp_path, tie_word_embeddings=tied).train()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert model(IDS, labels=IDS).loss < loss
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_new_weights_have_the_standard_deviation_of_the_config() -> None:
    config = {**SMALL, "initializer_range": 0.3, "hidden_size": 64}
    torch.manual_seed(0)
    model = deepseek.DeepseekForCausalLM(deepseek.DeepseekConfig(**config))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.3, rel=0.1), name


# As in an export: the source follows others in one file, and recondense cannot be imported.
TAIL = """

class ExportedConfig(DeepseekConfig):
    model_type = "exported_deepseek"


class ExportedForCausalLM(DeepseekForCausalLM):
    config_class = ExportedConfig


register()
register_checkpoint_conversion_mapping(
    "exported_deepseek", get_checkpoint_conversion_mapping("deepseek"), overwrite=True
)
"""
ELSEWHERE = """
import json, sys
sys.modules["recondense"] = None
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True, output_loading_info=True)
model.set_experts_implementation("grouped_mm")
ids = torch.tensor(json.loads(sys.argv[1]))
with torch.no_grad():
    result = {
        "class": type(model).__name__,
        "loading": {name: sorted(map(str, value)) for name, value in info.items() if value},
        "logits": model.eval()(input_ids=ids).logits.tolist(),
        "generated": model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                                    pad_token_id=0).tolist(),
    }
print(json.dumps(result))
"""


def test_works_after_other_sources_in_one_file(tmp_path: Path) -> None:
    source = _concatenate(replacement_blocks, expert_products, low_rank, deepseek)
    code = {"AutoConfig": "modeling_exported.ExportedConfig"}
    code["AutoModelForCausalLM"] = "modeling_exported.ExportedForCausalLM"
    config = {**SMALL, "model_type": "exported_deepseek", "auto_map": code}
    folder = written(tmp_path / "folder", config, published_weights(config))
    (folder / "modeling_exported.py").write_text(source + TAIL)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(IDS.tolist())],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    model = small(tmp_path)
    assert result["class"] == "ExportedForCausalLM" and result["loading"] == {}
    torch.testing.assert_close(torch.tensor(result["logits"]), logits(model), rtol=0, atol=1e-5)
    live = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert result["generated"] == live.tolist()
