"""The embedded model is trained once for its settings, with the same bytes every time, also after an interruption."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from support.corpus import documents
from support.tiny_models import qwen2_moe
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from recondense import files
from recondense.config.schema import ModelConfig, TrainerConfig
from recondense.data.corpus import Corpora
from recondense.data.stdlib import stdlib_corpora
from recondense.run import tiny

ROOT = Path(__file__).resolve().parents[2]
CORPORA = Corpora(*(documents()[start::3] for start in range(3)))
QUIET = TrainerConfig(progress_bar=False)
STEPS = 15


def published() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / "model" / "tiny_moe.yaml").read_text())["model"]["pretrain"]


def small(**changes: Any) -> dict[str, Any]:
    """The settings of conf/model/tiny_moe.yaml, shrunk, with changes by name."""
    settings = published()
    settings["config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    settings |= {"vocab_size": 300, "steps": STEPS, "sequence_length": 32, "warmup_steps": 2}
    for name, value in changes.items():
        (settings["config"] if name in settings["config"] else settings)[name] = value
    return settings


def ensure(cache: Path, callbacks: Sequence[Callback] = (), **changes: Any) -> Path:
    model = ModelConfig(name="tiny_moe", dtype="float32", device="cpu", pretrain=small(**changes))
    return tiny.ensure(model, cache, QUIET, callbacks)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a model except training.json, which has seconds in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "training.json"}


@pytest.fixture(autouse=True)
def few_texts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(tiny, "stdlib_corpora", lambda: CORPORA)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "stdlib_corpora", lambda: CORPORA)
        yield ensure(cache)


def test_the_folder_is_complete(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.model_type == "qwen2_moe" and model.config.num_experts == 6
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.eos_token_id == model.config.eos_token_id
    text = (CORPORA.validation or [])[0][:200]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    names = {path.name for path in trained.parent.iterdir()}
    assert names == {trained.name, f"{trained.name}.lock"}, "no training folder and no partial one"


def test_twice_gives_equal_bytes(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the caller's random state has no effect
    other = ensure(tmp_path / "other")
    assert other != trained and other.name == trained.name
    assert content(other) == content(trained)
    assert "model.safetensors" in content(trained)


def test_training_changed_the_weights(trained: Path, tmp_path: Path) -> None:
    """So that equal bytes say something about the training and not only about the initialization."""
    shorter = load_file(ensure(tmp_path, steps=3) / "model.safetensors")
    longer = load_file(trained / "model.safetensors")
    assert shorter.keys() == longer.keys()
    assert all(not torch.equal(shorter[name], longer[name]) for name in longer)


def test_the_second_call_does_not_train(trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(tiny, "fit", fail)
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert ensure(cache) == trained
    assert before == {path: path.stat().st_mtime_ns for path in trained.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "training.json"])
def test_a_damaged_model_is_trained_again(trained: Path, tmp_path: Path, name: str) -> None:
    """The cache may lose a file, or any part of one."""
    before, file = content(trained), (trained / name).read_bytes()
    copy = tmp_path / "cache" / "models" / trained.name
    for damage in (b"", b"{}", file[:-3], bytes(len(file)), None):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(trained, copy)
        (copy / name).unlink()
        if damage is not None:
            (copy / name).write_bytes(damage)
        assert not tiny._is_intact(copy) and not copy.exists()
    shutil.copytree(trained, copy)
    assert tiny._is_intact(copy)
    copy.joinpath(name).write_bytes(b"x")
    if name == "model.safetensors":
        again = ensure(tmp_path / "cache")
        assert again == copy and content(again) == before


@pytest.mark.parametrize(
    "changes",
    [{"steps": STEPS + 1}, {"hidden_size": 64}, {"seed": 1}, {"vocab_size": 301}, {"beta2": 0.9}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_setting_is_another_model(
    trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    trained_folders: list[Path] = []
    monkeypatch.setattr(tiny, "_train", lambda model, settings, corpora, folder, *rest: trained_folders.append(folder))
    other = ensure(cache, **changes)
    assert trained_folders == [other]
    assert other.parent == trained.parent and other.name != trained.name


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_text_or_version_is_another_model(
    trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    monkeypatch.setattr(tiny, "_train", lambda *args: None)
    changed = replace(CORPORA, **{split: [*getattr(CORPORA, split), "more"]})
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "stdlib_corpora", lambda: changed)
        assert ensure(cache) != trained
    monkeypatch.setattr(tiny, "VERSION", tiny.VERSION + 1)
    assert ensure(cache) != trained


class StopAt(Callback):
    """Notes the steps that ran, and fails after a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.started: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.started.append(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the power is gone")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # what resuming is
@pytest.mark.parametrize(("stop", "resumes_at"), [(8, 5), (3, 0)], ids=["after a checkpoint", "before the first"])
def test_an_interrupted_training_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, resumes_at: int
) -> None:
    settings_of = tiny._recovery
    monkeypatch.setattr(tiny, "_recovery", lambda settings: replace(settings_of(settings), checkpoint_every=5))
    with pytest.raises(RuntimeError, match="the power is gone"):
        ensure(tmp_path, [StopAt(stop)])
    assert not (tmp_path / "models" / trained.name).exists(), "half a model has no name"
    rest = StopAt(None)
    resumed = ensure(tmp_path, [rest])
    assert rest.started == list(range(resumes_at, STEPS))
    assert content(resumed) == content(trained)


def test_an_interrupted_save_is_repeated(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is done but the folder was half written: it is written again without training."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "write_checked", fail)
        with pytest.raises(OSError, match="no space left"):
            ensure(tmp_path)
    assert not (tmp_path / "models" / trained.name).exists()
    (tmp_path / "models" / f".{trained.name}.partial").mkdir()
    (tmp_path / "models" / f".{trained.name}.partial" / "left.over").touch()
    rest = StopAt(None)
    assert content(ensure(tmp_path, [rest])) == content(trained)
    assert rest.started == []


def test_training_json(trained: Path) -> None:
    report = json.loads((trained / "training.json").read_text())
    assert report["settings"] == small()
    assert report["seconds"] > 0
    assert report["loss"] == pytest.approx(torch.tensor(report["perplexity"]).log().item(), rel=1e-5)
    assert 1 < report["perplexity"] < 300
    assert 1 < report["unigram_perplexity"] < 300
    loads = report["expert_loads"]
    assert {layer: len(load) for layer, load in loads.items()} == {"0": 6, "1": 6}
    for load in loads.values():
        assert sum(load) == pytest.approx(2), "every token selects two experts"
    assert report["least_expert_load"] == min(min(load) for load in loads.values()) >= 0


def test_unigram_perplexity_by_hand() -> None:
    train_NS = torch.tensor([[0, 0, 1]])  # with one added to each of three: 3, 2, 1 of 6
    validation_MS = torch.tensor([[2, 0, 1], [1, 0, 2]])  # predicted: 0 and 1, 0 and 2
    expected = (1 / (3 / 6 * 2 / 6 * 3 / 6 * 1 / 6)) ** (1 / 4)
    assert tiny.unigram_perplexity(train_NS, validation_MS, 3) == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_expert_loads_are_those_of_the_routers() -> None:
    torch.manual_seed(0)
    model = qwen2_moe(initializer_range=0.2).eval()
    windows_NS = torch.randint(model.config.vocab_size, (11, 9))  # two blocks, the second one short
    counts: dict[int, Counter[int]] = {}

    def count(layer: int) -> Any:
        def hook(router: Any, args: tuple[Tensor, ...], output: Any) -> None:
            scores_TE = args[0].reshape(-1, router.weight.shape[1]) @ router.weight.T
            index_TK = scores_TE.topk(model.config.num_experts_per_tok).indices
            counts[layer] = Counter(index_TK.flatten().tolist())

        return hook

    handles = [
        layer.mlp.gate.register_forward_hook(count(index))
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    model(input_ids=windows_NS)
    for handle in handles:
        handle.remove()
    expected = {
        layer: [count_of[expert] / windows_NS.numel() for expert in range(model.config.num_experts)]
        for layer, count_of in counts.items()
    }
    assert len(expected) > 1
    before = copy.deepcopy(model.state_dict())
    assert tiny.expert_loads(model, windows_NS) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_embedded_model_has_learned(tmp_path: Path) -> None:
    """The model in outputs/cache, if it has these settings and texts; otherwise it is trained here."""
    model = ModelConfig(name="tiny_moe", dtype="float32", pretrain=published())
    key = files.fingerprint(tiny.VERSION, published(), stdlib_corpora().sha256(), "cpu")
    folder = ROOT / "outputs" / "cache" / "models" / f"tiny_moe-{key}"
    if not folder.exists():
        folder = tiny.ensure(model, tmp_path, QUIET)
        assert folder.name == f"tiny_moe-{key}"
    report = json.loads((folder / "training.json").read_text())
    assert report["perplexity"] <= report["unigram_perplexity"] / 5
    assert report["least_expert_load"] > 0
    assert len(report["expert_loads"]) == published()["config"]["num_hidden_layers"]
