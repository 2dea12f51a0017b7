"""A compressed folder is a model like any other: it can be compressed again, trained further, exported and uploaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from support.hub_cache import in_hub_cache
from support.runs import arguments, model_folder, text_files
from support.tiny_models import EVERY, logits

from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.export import push
from recondense.models import families, loading, moe_blocks
from recondense.operations import PROJECTIONS
from recondense.plan import Plan
from recondense.report.operation_counts import operation_counts

Command = Callable[..., tuple[int, str]]


pytestmark = pytest.mark.usefixtures("as_one_command")


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_compressed_again_and_recovered_further(command: Command, tmp_path: Path, family: str) -> None:
    """Condensed, then factorized, then trained further: each run starts with the result of the one before."""
    folder, texts, out = (
        model_folder(tmp_path / "model", EVERY[family]),
        text_files(tmp_path / "texts"),
        tmp_path / "out",
    )
    eager = ("model.attention=eager",)
    commands = {
        "first": (folder, "method=cdmoe", "method.num_experts=2", "method.num_layers=1", "export.format=bundled"),
        "second": (out / "first" / "model", "method=svd_llm", "method.removed_expert_ratio=0.3"),
        "third": (out / "second" / "model", "method=none", "recovery=finetune"),
    }
    summaries: dict[str, Any] = {}
    for run, (path, *settings) in commands.items():
        code, err = command(*arguments(path, texts, out, run, *settings, *eager))
        assert code == 0, err
        summaries[run] = json.loads((out / run / "summary.json").read_text())
    for before, after in (("first", "second"), ("second", "third")):
        recovered, original = summaries[before]["stages"]["recovered"], summaries[after]["stages"]["original"]
        assert original["perplexity"] == pytest.approx(recovered["perplexity"], rel=1e-5)
        assert (
            summaries[before]["parameters"]["total"]["compressed"]
            == summaries[after]["parameters"]["total"]["original"]
        )
    assert summaries["second"]["artifacts"]["export_format"] == "bundled"
    plan = Plan.load(out / "third" / "model" / "plan.json")
    assert not plan.operations
    assert {operation.kind for operation in plan.history.operations} == {"condense", "factorize"}
    kinds = {layer: shape for layer, shape in _config(out / "third" / "model")["compressed_layers"].items()}
    assert sorted("ranks" if "ranks" in shape else shape["kind"] for shape in kinds.values())[0] == "condensed"
    assert any("ranks" in shape for shape in kinds.values())
    model, _ = loading.load(out / "third" / "model", ModelConfig(attention="eager"))
    assert families.facts(model.config).factorized == tuple(moe_blocks.sparse_blocks(model))
    ids = torch.arange(1, 41).reshape(2, 20)
    assert torch.isfinite(logits(model, ids)).all()


@pytest.mark.parametrize(
    ("family", "form", "num_layers", "recovery"),
    [
        ("qwen2_moe", "stock", 2, "finetune"),
        pytest.param("qwen2_moe", "bundled", 2, "finetune", marks=pytest.mark.slow),
        ("qwen2_moe", "stock", 2, "lora"),
        ("qwen2_moe", "stock", 3, "finetune"),  # no MoE layer is left
        ("qwen2_moe", "bundled", 3, "lora"),
        pytest.param("ernie4_5_moe", "stock", "all", "finetune", marks=pytest.mark.slow),
    ],
)
def test_what_was_condensed_trains_further(
    command: Command, tmp_path: Path, family: str, form: str, num_layers: object, recovery: str
) -> None:
    """Exactly the condensed layers train, whether their class is the family's or ours."""
    folder, texts, out = (
        model_folder(tmp_path / "model", EVERY[family]),
        text_files(tmp_path / "texts"),
        tmp_path / "out",
    )
    first = ("method=cdmoe", "method.num_experts=2", f"method.num_layers={num_layers}", f"export.format={form}")
    adapters = ("recovery.lora.target=experts",) if recovery == "lora" else ()
    commands = {
        "first": (folder, *first, "recovery=none"),
        "second": (out / "first" / "model", "method=none", f"recovery={recovery}", *adapters),
    }
    for run, (path, *settings) in commands.items():
        code, err = command(*arguments(path, texts, out, run, *settings, "callbacks.profile.enabled=false"))
        assert code == 0, err
    before, after = (load_file(out / run / "model" / "model.safetensors") for run in commands)
    assert before.keys() == after.keys()
    condensed = Plan.load(out / "first" / "plan.json").layers
    assert len(condensed) == (num_layers if isinstance(num_layers, int) else len(condensed)) > 0
    parts = [f"model.layers.{layer}.mlp.{part}.weight" for layer in condensed for part in PROJECTIONS]
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(parts)
    assert Plan.load(out / "second" / "model" / "plan.json").history.changed_layers(3) == condensed


def test_a_compressed_model_of_the_hub_has_its_history(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The condensed layers train further, and the exported plan has the complete history."""
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    first = ("method=cdmoe", "method.num_experts=2", "method.num_layers=1", "recovery=none")
    code, err = command(*arguments(folder, texts, out, "first", *first, "callbacks.profile.enabled=false"))
    assert code == 0, err
    in_hub_cache(tmp_path / "hub", out / "first" / "model", "me/mine", "condensed")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    further = ("method=none", "recovery=finetune", "model.revision=condensed", "callbacks.profile.enabled=false")
    code, err = command(*arguments(Path("me/mine"), texts, out, "second", *further))
    assert code == 0, err
    before, after = (load_file(out / run / "model" / "model.safetensors") for run in ("first", "second"))
    [layer] = Plan.load(out / "first" / "plan.json").layers
    parts = {f"model.layers.{layer}.mlp.{part}.weight" for part in PROJECTIONS}
    assert {name for name in before if not torch.equal(before[name], after[name])} == parts
    assert Plan.load(out / "second" / "model" / "plan.json").history.changed_layers(3) == (layer,)


def test_layers_dropped_twice_are_two(command: Command, tmp_path: Path) -> None:
    """A stock folder numbers its layers again; the history has the layers of the published model."""
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    for run in ("first", "second"):
        settings = ("method=block_drop", "method.removed_expert_ratio=0.3", "recovery=none")
        code, err = command(*arguments(folder, texts, out, run, *settings, "callbacks.profile.enabled=false"))
        assert code == 0, err
        folder = out / run / "model"
    history = Plan.load(folder / "plan.json").history
    assert len({operation.layer for operation in history.operations}) == 3 - _config(folder)["num_hidden_layers"] == 2
    assert operation_counts(Plan("", history.operations), 6) == {"drop_layer": {"layers": 2}}
    [remaining] = {0, 1, 2} - {operation.layer for operation in history.operations}
    assert history.layers == ((remaining,) if remaining else ())


def test_a_model_without_experts_is_refused_before_it_is_loaded(command: Command, tmp_path: Path) -> None:
    """Its layers are dense, but not condensed; the message suggests to train all of it."""
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"mlp_only_layers": [0, 1, 2]}))
    code, err = command(*arguments(folder, texts, out, "run", "method=none", "recovery=finetune"))
    assert code == 2 and "recovery: the model (qwen2_moe) has no experts to train. Use recovery.trainable=all" in err


def test_a_folder_goes_to_the_hub_on_request(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repository: str, **settings: Any) -> None:
            calls.append((repository, settings))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "some token")
    folder, texts = model_folder(tmp_path / "model"), text_files(tmp_path / "texts")
    settings = ("method=cdmoe", "method.num_experts=2", "recovery=none", "export.push_to_hub=me/mine")
    code, err = command(*arguments(folder, texts, tmp_path / "out", "run", *settings))
    assert code == 0, err
    (first, created), (second, files) = calls
    assert first == second == "me/mine" and created == {"private": True, "exist_ok": True}
    written = {path.name for path in (tmp_path / "out" / "run" / "model").iterdir()}
    assert set(files) == written and {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= written


def test_a_refusal_of_the_hub_is_reported_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create_repo(self, repository: str, **settings: Any) -> None:
            raise OSError("403 Forbidden: not for you.\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(UserError, match=r"export.push_to_hub=me/mine: 403 Forbidden: not for you\. .*hf upload"):
        push.push_folder(tmp_path, "me/mine", private=True)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
