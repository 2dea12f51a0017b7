"""Checkpoints that do not fit their config are refused after reading headers alone, on loading and on export."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checks import run_messages
from support.hub_cache import in_hub_cache
from support.packed import fp8_folder, mxfp4_folder
from support.small import byte_tokenizer
from support.tiny_models import EVERY, tiny
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from recondense.config.schema import Config, ExportConfig, ModelConfig, RecoveryConfig
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models import headers, loading, model_classes, quantized
from recondense.operations import Condense, Factorize, Merge, Narrow, Prune
from recondense.plan import Plan
from recondense.run.model_checks import planned_config
from recondense.surgery import execute

State = dict[str, Tensor]
ONE = "model.layers.1.mlp.experts.3.up_proj.weight"


def save(folder: Path, model: Any | None = None, **settings: Any) -> Path:
    (EVERY["qwen2_moe"]() if model is None else model).save_pretrained(folder, **settings)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[State], State]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def remove_keys(*ends: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if not name.endswith(ends)}


def rename_prefix(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {
        new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in state.items()
    }


def difference(folder: Path) -> headers.Comparison:
    """How a folder differs from the model that its config describes."""
    values = json.loads((folder / "config.json").read_text())
    model_classes.register_model_type(values["model_type"])
    outline = model_classes.empty_model(AutoConfig.from_pretrained(folder))
    return headers.compare(outline, headers.list_files(folder), quantized.method_of(values))


def refusals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The messages of everything that reads a model, without the name of the setting; no weight may be read."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    messages = []
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", fail)
        patch.setattr("recondense.models.shard_reader.convert_and_load_state_dict_in_model", fail)
        for pages in (None, folder.parent / "pages"):
            with pytest.raises(UserError) as error:
                loading.load(folder, ModelConfig(device="cpu"), pages)
            messages.append(str(error.value).removesuffix("."))
        as_model = replace(Config(), model=ModelConfig(name="it", path=str(folder), device="cpu"))
        messages += [text.removesuffix(".") for text in run_messages(as_model, []) if text.startswith("model.path")]
        good = folder.parent / "good"
        if not good.exists():
            save(good)
        recovery = RecoveryConfig(objective="distill", teacher="model", teacher_path=str(folder))
        as_teacher = replace(Config(), model=ModelConfig(name="it", path=str(good)), recovery=recovery)
        setting = "recovery.teacher_path"
        messages += [text.removesuffix(".") for text in run_messages(as_teacher, []) if text.startswith(setting)]
    assert len(messages) == 4, messages
    return {text.partition("=")[2].removeprefix(f"{folder}: ") for text in messages}


# ---------------------------------------------------------------------------------------------- complete checkpoints


@pytest.mark.parametrize("family", EVERY)
def test_a_complete_checkpoint_does_not_differ(family: str, tmp_path: Path) -> None:
    """As on the hub, in one file or several; with fused experts; condensed, pruned, merged and factorized."""
    model = EVERY[family]()
    assert difference(save(tmp_path / "hub", model)) == headers.Comparison()
    assert difference(save(tmp_path / "shards", model, max_shard_size="30KB")) == headers.Comparison()
    fused = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert difference(edit(tmp_path / "hub", lambda _: fused)) == headers.Comparison()
    extra: Any = {"layer_types": ["full_attention"] * 6} if family == "gpt_oss" else {}
    deep = tiny(family, num_hidden_layers=6, **extra)
    ranks = {name: (3, None, 4, 5, 6, 2) for name in ("gate_proj", "up_proj", "down_proj")}
    merged = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))
    operations = Condense(2, (3, 0), (0.4, 0.2), None), Prune(3, (0, 2, 3, 5)), Merge(4, *merged), Factorize(5, ranks)
    operations += Narrow.from_channels(3, (range(8),) * 4), Narrow.from_channels(4, (range(8), range(4), (2,)))
    plan = Plan("tiny", operations)
    execute.execute(deep, plan)
    write_folder(deep, None, plan, tmp_path / "bundled", "", ExportConfig(format="bundled"))
    assert difference(tmp_path / "bundled") == headers.Comparison()


def assert_other_shapes_are_refused(folder: Path, family: str) -> None:
    """The shapes of a quantized checkpoint are compared with those of its config, before a weight is read."""
    text = (folder / "config.json").read_text()
    size = "intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"
    for values, ends in (({size: 96}, {"gate_up_proj", "down_proj"}), ({"vocab_size": 120}, {"weight"})):
        set_config(folder, **values)
        comparison = difference(folder)
        assert ends <= {name.rpartition(".")[2] for name, *_ in comparison.misshapen} and comparison.problems
        (folder / "config.json").write_text(text)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_quantised_weights_are_complete_with_their_scales(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    model = tiny(
        family, **sizes, intermediate_size=64, **({"moe_intermediate_size": 64} if family != "gpt_oss" else {})
    )
    pack, scales = (mxfp4_folder, "_scales") if family == "gpt_oss" else (fp8_folder, "_scale_inv")
    pack(tmp_path / "packed", model)
    assert not difference(tmp_path / "packed").problems
    assert_other_shapes_are_refused(tmp_path / "packed", family)
    lacking = next(name for name in load_file(tmp_path / "packed" / "model.safetensors") if name.endswith(scales))
    edit(tmp_path / "packed", remove_keys(lacking))
    assert difference(tmp_path / "packed").missing == (lacking,)
    with pytest.raises(UserError, match=f"lacks 1 weight .*{lacking}"):
        loading.load(tmp_path / "packed", ModelConfig(device="cpu", attention="eager"))


@pytest.mark.parametrize("tied", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("streamed", [False, True])
def test_one_of_two_tied_weights_is_enough(tied: str, streamed: bool, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tiny("qwen2_moe", tie_word_embeddings=True))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    both: State = {"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": embedding}
    edit(folder, lambda state: {**state, **both})
    edit(folder, remove_keys(tied))
    model, _ = loading.load(folder, ModelConfig(device="cpu"), tmp_path / "pages" if streamed else None)
    assert torch.equal(model.lm_head.weight, embedding) and torch.equal(model.model.embed_tokens.weight, embedding)
    edit(folder, remove_keys("lm_head.weight", "embed_tokens.weight"))
    assert set(difference(folder).missing) == set(both)


def test_tied_weights_with_different_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would not tie them, so that sizes and budgets computed from the config would be wrong."""
    folder = save(tmp_path / "model", tiny("qwen2_moe", tie_word_embeddings=True))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    last = embedding.clone()
    edit(folder, lambda state: {**state, "lm_head.weight": last})
    assert difference(folder) == headers.Comparison()
    last[-1, -1] += 1
    edit(folder, lambda state: {**state, "lm_head.weight": last})
    monkeypatch.setattr(headers, "ROWS", 40)
    [message] = refusals(folder, monkeypatch)
    assert message.startswith("config.json has tie_word_embeddings=true, but lm_head.weight and model.embed_tokens.w")
    last[-1, -1] = embedding[0, 0] = float("nan")
    both = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()}
    edit(folder, lambda state: {**state, **both})
    assert difference(folder) == headers.Comparison()
    edit(folder, lambda state: {**state, "lm_head.weight": last})
    set_config(folder, tie_word_embeddings=False)
    assert difference(folder) == headers.Comparison()


def test_weights_that_the_model_does_not_have_are_ignored(tmp_path: Path) -> None:
    """Layers for multi-token prediction; buffers of old checkpoints."""
    folder = save(tmp_path / "model", EVERY["deepseek_v3"]())
    more = {
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(16, 32),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    edit(folder, lambda state: {**state, **more})
    assert not difference(folder).problems
    loading.load(folder, ModelConfig(device="cpu"))


@pytest.mark.parametrize("streamed", [False, True])
def test_layers_for_multi_token_prediction_with_a_prefix_of_their_own_are_ignored(
    streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, layer = save(tmp_path / "model"), "model.layers.1."

    def add_layer(state: State) -> State:
        copied = [name for name in state if name.startswith(layer)]
        copies = {"mtp.layers.0." + name.removeprefix(layer): state[name].clone() for name in copied}
        return state | copies | {"mtp.fc.weight": torch.zeros(32, 64), "mtp.norm.weight": torch.zeros(32)}

    edit(folder, add_layer)
    loading.load(folder, ModelConfig(device="cpu"), tmp_path / "pages" if streamed else None)
    assert "weights that the model does not have: mtp." in caplog.text


# ---------------------------------------------------------------------------------------------- incomplete checkpoints

SHORT = "lm_head.weight"
BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "a prefix too much": (
        rename_prefix("", "module."),
        r"lacks 51 weights .*\(model\.embed_tokens\.weight, .*, \.\.\.\); its names .* additional prefix 'module\.'",
    ),
    "another prefix": (
        rename_prefix("model.", "transformer."),
        r"lacks 50 weights .*; its names begin with 'transformer\.' instead of 'model\.'",
    ),
    "the head": (remove_keys(SHORT), r"lacks 1 weight .*\(lm_head\.weight\); download"),
    "the embedding": (remove_keys("embed_tokens.weight"), r"lacks 1 weight .*\(model\.embed_tokens\.weight\)"),
    "the last norm": (remove_keys("model.norm.weight"), r"lacks 1 weight .*\(model\.norm\.weight\)"),
    "a bias": (
        remove_keys("1.self_attn.q_proj.bias"),
        r"lacks 1 weight .*\(model\.layers\.1\.self_attn\.q_proj\.bias\)",
    ),
    "a router": (remove_keys("2.mlp.gate.weight"), r"lacks 1 weight .*\(model\.layers\.2\.mlp\.gate\.weight\)"),
    "a projection of an expert": (remove_keys(ONE), rf"lacks 1 weight .*\({ONE}\)"),
    "an expert": (
        remove_keys(*(f"1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up", "down"))),
        r"lacks 3 weights .*experts\.2\.gate_proj\.weight, .*experts\.2\.up_proj\.weight, ",
    ),
    "a projection of all experts": (
        remove_keys("up_proj.weight"),
        r"lacks 21 weights .*layers\.0\.mlp\.experts\.0\.up_proj\.weight, ",
    ),
    "rows of the head": (
        lambda state: {**state, SHORT: state[SHORT][:90].contiguous()},
        r"lm_head\.weight has the shape \(90, 32\) in the checkpoint and \(97, 32\) by its config;",
    ),
    "columns of an expert": (
        lambda state: {**state, ONE: state[ONE][:, :20].contiguous()},
        r"experts\.gate_up_proj has the shape \(6, 16, 20\) in the checkpoint and \(6, 32, 32\) by its config",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_incomplete_checkpoint_is_refused_before_a_weight_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, pattern = BAD[kind]
    messages = refusals(edit(save(tmp_path / "model"), change), monkeypatch)
    assert len(messages) == 1
    [text] = messages
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, r"lacks \d+ weights .*\(model\.layers\.3\."),
        ({"num_experts": 8}, r"lacks 18 weights .*model\.layers\.0\.mlp\.experts\.6\.gate_proj\.weight"),
        ({"num_experts": 5}, r"gate\.weight has the shape \(6, 32\).*\(5, 32\).*, and \d+ weights more differ"),
        (
            {"vocab_size": 120},
            r"has the shape \(97, 32\) in the checkpoint and \(120, 32\) by its config, and 1 weight more differs",
        ),
    ],
)
def test_a_config_of_another_model(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model")
    set_config(folder, **values)
    with pytest.raises(UserError, match=rf"^model\.path={folder}: .*{message}"):
        loading.load(folder, ModelConfig(device="cpu"))
    problems = run_messages(replace(Config(), model=ModelConfig(name="it", path=str(folder))), [])
    assert any(re.search(message, problem) for problem in problems), problems


def test_a_teacher_of_another_family_is_checked_too(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    teacher = save(tmp_path / "teacher", Qwen2ForCausalLM(config))
    recovery = RecoveryConfig(objective="distill", teacher="model", teacher_path=str(teacher))
    run = replace(Config(), model=ModelConfig(name="it", path=str(save(tmp_path / "model"))), recovery=recovery)
    assert run_messages(run, []) == []
    edit(teacher, remove_keys("0.mlp.up_proj.weight"))
    [problem] = run_messages(run, [])
    assert problem.startswith(f"recovery.teacher_path={teacher}: the checkpoint lacks 1 weight")


def test_what_only_loading_shows_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of transformers is checked as well."""
    monkeypatch.setattr(headers, "compare", lambda *_: headers.Comparison())
    folder = edit(save(tmp_path / "model"), remove_keys("lm_head.weight", "1.self_attn.q_proj.bias"))
    for pages in (None, tmp_path / "pages"):
        with pytest.raises(
            UserError, match=r"lacks 2 weights .*\(lm_head\.weight, model\.layers\.1\.self_attn\.q_proj"
        ):
            loading.load(folder, ModelConfig(device="cpu"), pages)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", max_shard_size="30KB")
    first, second, *_ = headers.list_files(folder)
    original = first.read_bytes()
    for content, message in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a Git LFS pointer, not the file itself; run",
        ),
        (original[: len(original) // 2], r"cannot be read \(.*\); download or copy it again"),
        (b"", "is empty; download or copy it again"),
    ):
        first.write_bytes(content)
        [problem] = run_messages(replace(Config(), model=ModelConfig(name="it", path=str(folder))), [])
        assert problem.startswith(f"model.path={folder}: {first.name} ")
        with pytest.raises(UserError, match=message):
            loading.load(folder, ModelConfig(device="cpu"))
    first.write_bytes(original)
    second.unlink()
    [problem] = run_messages(replace(Config(), model=ModelConfig(name="it", path=str(folder))), [])
    assert f"index.json names 1 files that do not exist ({second.name})" in problem


def test_a_config_that_describes_no_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    set_config(folder, pad_token_id=97)
    [problem] = run_messages(replace(Config(), model=ModelConfig(name="it", path=str(folder))), [])
    assert problem.startswith(f"model.path={folder}: config.json has pad_token_id=97, but the embedding has 97 rows")


# ---------------------------------------------------------------------------------------------- adapters


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    [message] = refusals(folder, monkeypatch)
    assert "holds a PEFT adapter (adapter_config.json)" in message and "`merge_and_unload()`" in message
    (folder / "config.json").unlink()  # only an adapter
    [problem] = run_messages(replace(Config(), model=ModelConfig(name="it", path=str(folder))), [])
    assert "holds a PEFT adapter" in problem


def test_models_of_the_hub_are_checked_when_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    in_hub_cache(tmp_path / "hub", edit(save(tmp_path / "model"), remove_keys(ONE)), "me/model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    in_hub_cache(tmp_path / "hub", tmp_path / "adapter", "me/adapter")
    for pages in (None, tmp_path / "pages"):
        with pytest.raises(UserError, match=rf"^model\.path=me/model: the checkpoint lacks 1 weight .*{ONE}"):
            loading.load("me/model", ModelConfig(device="cpu"), pages)
    with pytest.raises(UserError, match=r"^model\.path=me/adapter: it holds a PEFT adapter"):
        loading.load("me/adapter", ModelConfig(device="cpu"))
    with pytest.raises(UserError, match=r"^model\.path=me/adapter: it holds a PEFT adapter"):
        planned_config(ModelConfig(path="me/adapter"))


def test_the_function_that_loading_replaces_is_restored(tmp_path: Path) -> None:
    """It is a private function of transformers that knows the files before any weight is read."""
    before = PreTrainedModel._load_pretrained_model
    parameters = list(inspect.signature(before).parameters)
    assert parameters[:4] == ["model", "state_dict", "checkpoint_files", "load_config"]
    loading.load(save(tmp_path / "model"), ModelConfig(device="cpu"))
    assert PreTrainedModel._load_pretrained_model is before
