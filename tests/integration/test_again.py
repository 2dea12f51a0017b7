"""A folder that was compressed is a model like any other: compressed again, recovered further, exported, uploaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EVERY, logits

from integration.runs import arguments, model_folder, one_command, text_files
from recondense import families, hub, loading
from recondense.config import ModelConfig
from recondense.plan import Plan

Command = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    with one_command():
        yield


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_compressed_again_and_recovered_further(command: Command, tmp_path: Path, family: str) -> None:
    """Condensed, then factorized, then trained on as it is: each run starts from what the one before ended with."""
    folder, texts, out = (
        model_folder(tmp_path / "model", EVERY[family]),
        text_files(tmp_path / "texts"),
        tmp_path / "out",
    )
    eager = ("model.attention=eager",)
    ways = {
        "first": (folder, "method=cdmoe", "method.num_experts=2", "method.num_layers=1", "export.format=bundled"),
        "second": (out / "first" / "model", "method=svd_llm", "method.removed_expert_ratio=0.3"),
        "third": (out / "second" / "model", "method=none", "recovery=finetune"),
    }
    found: dict[str, Any] = {}
    for run, (path, *settings) in ways.items():
        code, err = command(*arguments(path, texts, out, run, *settings, *eager))
        assert code == 0, err
        found[run] = json.loads((out / run / "summary.json").read_text())
    for before, after in (("first", "second"), ("second", "third")):
        ended, started = found[before]["stages"]["recovered"], found[after]["stages"]["original"]
        assert started["perplexity"] == pytest.approx(ended["perplexity"], rel=1e-5)
        assert found[before]["parameters"]["total"]["compressed"] == found[after]["parameters"]["total"]["original"]
    assert found["second"]["artifacts"]["export_format"] == "bundled"
    whole = Plan.load(out / "third" / "model" / "plan.json")  # what was done to the model that nobody had compressed
    assert not whole.operations and {operation.kind for operation in whole.earlier} == {"condense", "factorize"}
    kinds = {layer: shape for layer, shape in _config(out / "third" / "model")["compressed_layers"].items()}
    assert sorted("ranks" if "ranks" in shape else shape["kind"] for shape in kinds.values())[0] == "condensed"
    assert any("ranks" in shape for shape in kinds.values())
    model, _ = loading.load(ModelConfig(attention="eager"), out / "third" / "model")
    assert families.facts(model.config).factorized == tuple(families.sparse_blocks(model))
    ids = torch.arange(1, 41).reshape(2, 20)
    assert torch.isfinite(logits(model, ids)).all()


def test_a_folder_goes_to_the_hub_on_request(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repository: str, **settings: Any) -> None:
            called.append((repository, settings))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            called.append((repo_id, {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("recondense.preflight.get_token", lambda: "some token")
    folder, texts = model_folder(tmp_path / "model"), text_files(tmp_path / "texts")
    settings = ("method=cdmoe", "method.num_experts=2", "recovery=none", "export.push_to_hub=me/mine")
    code, err = command(*arguments(folder, texts, tmp_path / "out", "run", *settings))
    assert code == 0, err
    (first, made), (second, files) = called
    assert first == second == "me/mine" and made == {"private": True, "exist_ok": True}
    written = {path.name for path in (tmp_path / "out" / "run" / "model").iterdir()}
    assert set(files) == written and {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= written


def test_what_the_hub_refuses_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create_repo(self, repository: str, **settings: Any) -> None:
            raise OSError("403 Forbidden: not for you.\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(ConnectionError, match=r"export.push_to_hub=me/mine: 403 Forbidden: not for you\. .*hf upload"):
        hub.push_folder(tmp_path, "me/mine", private=True)


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
