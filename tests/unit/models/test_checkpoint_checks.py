"""A damaged checkpoint is refused with all its problems together, before a weight is read, however it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    INDEX,
    POINTER,
    WEIGHTS,
    Change,
    checkpoint,
    config,
    content,
    cut,
    json_values,
    remote_code_in,
    remove,
    shard,
    weights,
)
from support.checks import run_messages
from support.hub_cache import in_hub_cache
from support.tiny_models import EVERY
from transformers import AutoTokenizer

from recondense.config.problems import render
from recondense.config.schema import Config, ModelConfig, RecoveryConfig
from recondense.errors import ConfigError, UserError
from recondense.models import loading, model_files
from recondense.models.checkpoint_checks import check_checkpoint
from recondense.models.tokenizers import load_tokenizer

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE = (remove(TOKENIZER, SETTINGS), content("tokenizer.model", b"\n\x0e\n\x05<unk>"))

# The tokens in tokenizer_config.json stand for the file, which transformers then does not read.
UNREAD = (json_values(SETTINGS, added_tokens_decoder={}), content("added_tokens.json", "[]"))


def messages(folder: Path, **settings: object) -> list[str]:
    """The problems of a folder, without the name of the setting."""
    model = replace(ModelConfig(device="cpu"), **settings)  # type: ignore[arg-type]
    return [text.removeprefix(f"model.path={folder}: ") for text in render(check_checkpoint(folder, model).problems)]


def add_tokens(number: int, eos: str | None = None) -> Change:
    """Add tokens to the tokenizer, which has 257."""

    def change(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<extra_{index}>" for index in range(number)])
        if eos is not None:
            tokenizer.add_special_tokens({"eos_token": eos})
        tokenizer.save_pretrained(folder)

    return change


# ---------------------------------------------------------------------------------------------- good checkpoints


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("shards", [False, True])
def test_a_good_checkpoint_has_no_problems(family: str, shards: bool, tmp_path: Path) -> None:
    checked = check_checkpoint(checkpoint(tmp_path / "model", family, shards=shards), ModelConfig(device="cpu"))
    assert checked.problems == () and checked.config is not None
    assert checked.config.model_type == family and len(checked.tokenizer) == 257


@pytest.mark.parametrize(
    "change",
    [
        add_tokens(200),  # longer than the embedding
        weights(lambda state: {name: value.double() for name, value in state.items()}),
        weights(lambda state: {**state, "visual.a.weight": torch.zeros(2)}),
        json_values(SETTINGS, tokenizer_class="SomeTokenizer"),
        json_values(SETTINGS, tokenizer_class="GPT2Tokenizer"),
        json_values(SETTINGS, auto_map={"AutoTokenizer": ["absent.Tokenizer", None]}),
        lambda folder: [change(folder) for change in UNREAD],
        content("vocab.json", POINTER),
        content("merges.txt", ""),
        content("chat_template.jinja", ""),
        content("pytorch_model.bin", b"a pickle beside the weights"),
    ],
)
def test_what_does_no_harm_is_accepted(change: Change, tmp_path: Path) -> None:
    assert messages(checkpoint(tmp_path / "model", "qwen2_moe", change)) == []


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (content(WEIGHTS, POINTER), "model.safetensors is a Git LFS pointer"),
        (content(WEIGHTS, b""), "model.safetensors is empty"),
        (cut(WEIGHTS), "model.safetensors cannot be read ("),
        (content(WEIGHTS, b"<html>404</html>"), "model.safetensors cannot be read ("),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.safetensors"),
            "has neither model.safetensors nor model.safetensors.index.json, so nothing says how to read consolidated",
        ),
        (
            lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("../blobs/absent")],
            "model.safetensors is a link to a file that does not exist; download or copy the model again",
        ),
        (weights(lambda state: {"a": torch.zeros(1)}), "lacks 51 weights"),
        (
            weights(lambda state: {**state, "lm_head.weight": state["lm_head.weight"].to(torch.int8)}),
            "lm_head.weight is stored as I8, but config.json has no quantization_config",
        ),
        (
            weights(
                lambda state: {
                    name: value.to(torch.float8_e4m3fn) if "experts." in name else value
                    for name, value in state.items()
                }
            ),
            "is stored as F8_E4M3, and 53 weights more are",
        ),
        (
            weights(lambda state: {**state, "model.layers.1.self_attn.q_norm.weight": torch.zeros(16)}),
            "1 weight that the model of its config lacks (model.layers.1.self_attn.q_norm.weight)",
        ),
        (config(num_hidden_layers=2, layer_types=["full_attention"] * 2), "16 weights that the model of its config"),
        (config(moe_intermediate_size=20), "experts.gate_up_proj has the shape (6, 32, 32) in the checkpoint and"),
        (
            config(quantization_config={"quant_method": "fp8", "weight_block_size": [1]}),
            "fp8 with weight_block_size=[1]",
        ),
    ],
)
def test_weights_that_are_not_the_model(change: Change, message: str, tmp_path: Path) -> None:
    [problem] = messages(checkpoint(tmp_path / "model", "qwen2_moe", change))
    assert message in problem, problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shard(1, POINTER), r"^model-00002-of-\d+\.safetensors is a Git LFS pointer, .*`git lfs pull`\.$"),
        (shard(1, b""), r"^model-00002-of-\d+\.safetensors is empty"),
        (shard(0, b"\0" * 100), r"^model-00001-of-\d+\.safetensors cannot be read"),
        (
            lambda folder: [file.write_bytes(POINTER) for file in folder.glob("model-*")],
            r"^model-00001-of-\d+\.safetensors is a Git LFS pointer, .* \(the same for \d+ more of its \d+ files\)",
        ),
        (content(INDEX, POINTER), r"^model\.safetensors\.index\.json is a Git LFS pointer"),
        (content(INDEX, "{"), r"index\.json is not valid JSON"),
        (content(INDEX, '{"weight_map": {}}'), r"index\.json is not an index of safetensors files"),
        (content(INDEX, '{"weight_map": ["a"]}'), r"index\.json is not an index of safetensors files"),
        (content(INDEX, '{"weight_map": {"a": "pytorch_model.bin"}}'), r"names pytorch_model\.bin, but only"),
        (content(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'), r"names \.\./x\.safetensors, but only"),
        (content(INDEX, '{"weight_map": {"a": "x.safetensors"}}'), r"names 1 files that do not exist \(x\.safe"),
        (json_values(INDEX, metadata=None), r'^model\.safetensors\.index\.json has no object "metadata"; add'),
        (json_values(INDEX, metadata=[]), r'^model\.safetensors\.index\.json has no object "metadata"; add'),
        (remove(INDEX), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    ],
)
def test_several_files_of_weights(change: Change, message: str, tmp_path: Path) -> None:
    [problem] = messages(checkpoint(tmp_path / "model", "qwen2_moe", change, shards=True))
    assert re.search(message, problem), problem


def test_odd_files_that_can_be_read_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoint(tmp_path / "model", "qwen2_moe", shards=True)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["absent"] = index["weight_map"]["lm_head.weight"]
    content(INDEX, json.dumps(index))(folder)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    save_file(load_file(second) | load_file(first), second, metadata={"format": "pt"})
    loading.load(folder, ModelConfig(device="cpu"))
    assert "1 tensors are in several files, of which one is read (lm_head.weight)" in caplog.text
    assert "index.json names 1 tensors that are in none of its files (absent)" in caplog.text
    checkpoint(tmp_path / "one")
    (tmp_path / "one" / WEIGHTS).rename(folder / WEIGHTS)
    weights(lambda state: {**state, "visual.a.weight": torch.zeros(2)})(folder)
    loading.load(folder, ModelConfig(device="cpu"), tmp_path / "pages")
    assert "holds both model.safetensors, which is read, and model.safetensors.index.json" in caplog.text
    assert "ignores 1 weights that the model does not have: visual.a.weight" in caplog.text


# ---------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([content(TOKENIZER, POINTER)], "tokenizer.json is a Git LFS pointer"),
        ([content(TOKENIZER, "")], "tokenizer.json is empty"),
        (
            [remove(TOKENIZER, SETTINGS), lambda folder: (folder / TOKENIZER).symlink_to("../blobs/absent")],
            "tokenizer.json is a link to a file that does not exist",
        ),
        ([cut(TOKENIZER)], "tokenizer.json is not valid JSON"),
        ([content(TOKENIZER, "[]")], "tokenizer.json holds a list"),
        ([content(TOKENIZER, "{}")], "transformers cannot read the tokenizer: KeyError"),
        ([content(SETTINGS, "{")], "tokenizer_config.json is not valid JSON"),
        ([content(SETTINGS, POINTER)], "tokenizer_config.json is a Git LFS pointer"),
        ([content("added_tokens.json", "[]")], "added_tokens.json holds a list"),
        ([content("special_tokens_map.json", "{")], "special_tokens_map.json is not valid JSON"),
        ([content("chat_template.jinja", POINTER)], "chat_template.jinja is a Git LFS pointer"),
        ([json_values(SETTINGS, eos_token=5)], "transformers cannot read the tokenizer: TypeError"),
        ([json_values(SETTINGS, tokenizer_class="BertTokenizer")], "BertTokenizer, which is a WordPiece tokenizer"),
        ([remove(TOKENIZER, SETTINGS)], "has no tokenizer; set model.tokenizer"),
        (
            SENTENCEPIECE,
            "in tokenizer.model, which takes the package sentencepiece; `pip install sentencepiece`",
        ),
        ([*SENTENCEPIECE, content("tokenizer.model", POINTER)], "tokenizer.model is a Git LFS pointer"),
        ([add_tokens(100, "<end>")], "its eos_token '<end>' has the id 357, but the model's embedding has 300 rows"),
    ],
)
def test_a_damaged_tokenizer(
    changes: Sequence[Change], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [problem] = messages(checkpoint(tmp_path / "model", "qwen2_moe", *changes))
    assert message in problem, problem


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "qwen2_moe", cut(TOKENIZER))
    other = checkpoint(tmp_path / "other")
    assert messages(folder, tokenizer=str(other)) == []
    content(TOKENIZER, POINTER)(other)
    [problem] = messages(folder, tokenizer=str(other))
    assert problem.startswith(f"model.tokenizer={other}: tokenizer.json is a Git LFS pointer")
    for absent in (str(tmp_path / "absent"), "nobody/no-such-tokenizer"):
        [problem] = messages(folder, tokenizer=absent)
        assert problem.startswith(f"model.tokenizer={absent}: there is no such folder, the model is not in the cache")


def test_remote_code_of_a_tokenizer_that_fails(tmp_path: Path) -> None:
    mapped = json_values(SETTINGS, auto_map={"AutoTokenizer": ["mine.Tokenizer", None]})
    folder = checkpoint(tmp_path / "model", "qwen2_moe", mapped, content("mine.py", "raise KeyError('x')"))
    with remote_code_in(tmp_path / "modules"):
        [problem] = messages(folder, trust_remote_code=True)
    assert problem == "transformers cannot read the tokenizer: KeyError: 'x'."


# ---------------------------------------------------------------------------------------------- all together

EVERYTHING = (
    config(eos_token_id=999, num_experts_per_tok=9),
    content(WEIGHTS, POINTER),
    content(TOKENIZER, POINTER),
)
PARTS = ("eos_token_id=999", "selects 9 of the 6 experts", "model.safetensors is a Git LFS", "tokenizer.json is a Git")


def assert_all(problems: Sequence[str], where: str) -> None:
    assert len(problems) == len(PARTS), problems
    for problem, part in zip(problems, PARTS, strict=True):
        assert problem.startswith(f"{where}: ") and part in problem


def test_everything_is_reported_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model of a command or of Python, streamed or not, and as the teacher of every stage."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a weight was read"))
    folder = checkpoint(tmp_path / "model", "qwen2_moe", *EVERYTHING)
    where = f"model.path={folder}"
    for pages in (None, tmp_path / "pages"):
        with pytest.raises(ConfigError) as raised:
            loading.load(folder, ModelConfig(device="cpu"), pages)
        assert_all(raised.value.messages, where)
    for streaming in (False, True):
        model = ModelConfig(name="it", path=str(folder), streaming=streaming, device="cpu")
        assert_all(run_messages(replace(Config(), model=model)), where)
    stages = (
        {"name": "one", "steps": 3},
        {"name": "two", "objective": "distill", "teacher": "model", "teacher_path": str(folder)},
    )
    recovery = RecoveryConfig(objective="finetune", stages=stages)
    good = ModelConfig(name="it", path=str(checkpoint(tmp_path / "good")), device="cpu")
    assert_all(
        run_messages(replace(Config(), model=good, recovery=recovery)), f"recovery.stages[1].teacher_path={folder}"
    )


def test_a_model_of_the_hub_is_checked_as_far_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    in_hub_cache(tmp_path / "hub", checkpoint(tmp_path / "a", "qwen2_moe", *EVERYTHING), "me/all")
    small = checkpoint(tmp_path / "b", "qwen2_moe", config(num_experts_per_tok=9), remove(WEIGHTS))
    in_hub_cache(tmp_path / "hub", small, "me/small")
    for name, number in (("me/all", 4), ("me/small", 1)):
        checked = check_checkpoint(name, ModelConfig(path=name))
        texts = render(checked.problems)
        assert len(texts) == number and all(text.startswith(f"model.path={name}: ") for text in texts)
    with pytest.raises(UserError, match=r"^model\.path=me/none: there is no such folder"):
        loading.load("me/none", ModelConfig(device="cpu"))


def test_a_defect_of_recondense_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")
    for name in ("compare", "Names", "list_files"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(f"recondense.models.headers.{name}", lambda *_: 1 / 0)
            loading.load_model(folder, ModelConfig(device="cpu")) if name == "compare" else loading.load(folder)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loading, "Streamed", lambda *_: 1 / 0)
        loading.load_model(folder, ModelConfig(device="cpu"), tmp_path / "pages")


def test_too_little_memory_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    message = r"not enough memory; use model\.streaming=true"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", fail)
        loading.load_model(folder, ModelConfig(device="cpu"))
    with pytest.raises(UserError, match=message):
        monkeypatch.setattr("torch.nn.Module._apply", fail)
        loading.load_model(folder, ModelConfig(device="cpu"))


def test_generation_settings_that_contradict_each_other_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers reads them, but would refuse to write them when the model is exported."""
    odd = content("generation_config.json", '{"do_sample": false, "temperature": 0.5}')
    model, _ = loading.load(checkpoint(tmp_path / "model", "qwen2_moe", odd), ModelConfig(device="cpu"))
    model.generation_config.save_pretrained(tmp_path / "out")
    assert "generation_config.json is replaced by the defaults" in caplog.text


def test_a_tokenizer_alone_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "qwen2_moe", content(WEIGHTS, b""))
    assert len(load_tokenizer(folder, ModelConfig())) == 257
    assert model_files.cached_model_file("neither/a/folder", "config.json") is None
