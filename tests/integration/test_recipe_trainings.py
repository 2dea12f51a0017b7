"""What the recovery stages of the papers' recipes train on, and how, seen on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import SMALL, SMALL_OF, composed, without_the_hub
from support.runs import model_folder, paper_sets
from support.small import beginning_with
from support.tiny_models import EVERY

from recondense.data.labels import MASKED
from recondense.data.texts import Texts, Tokenizing
from recondense.recovery.module import RecoveryModule

pytestmark = pytest.mark.usefixtures("as_one_command")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    paper_sets(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("second", ["commonsense", "mmlu"])
def test_the_stages_train_as_published(
    second: str, command: Callable[..., tuple[int, str]], base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Windows of one text or question each, with BOS; torch's AdamW; and losses that cover prompts, but no padding."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", base / "cache")
    tokenizer = beginning_with("<s>", bos=True)
    model = model_folder(tmp_path / "model", EVERY["qwen2_moe"], tokenizer)
    texts = [f"{'short' if n % 2 else 'a text that is longer than its window'} {n}" for n in range(24)]
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [
        word.replace(f"{base}/c4.jsonl", f"{tmp_path}/c4.jsonl")
        for word in without_the_hub("cdmoe_qwen_e4", base, model)
        if second == "commonsense" or not word.startswith("recovery.stages.1")
    ]
    if second == "mmlu":
        inputs += ["recovery=two_stage_mmlu", f"recovery.stages.1.data.dataset={base}/hub/mmlu"]
    small = [word for word in SMALL_OF["cdmoe"] if "batch_size" not in word]
    fewer = ("evaluation.tasks=[]", "export.enabled=false", "callbacks.profile.enabled=false", "method.num_experts=3")
    with watched_training() as (batches, optimizers):
        arguments = (*inputs, *SMALL, *small, *fewer, f"output_dir={tmp_path}")
        code, err = command("experiment=paper/cdmoe_qwen_e4", *arguments)
    assert code == 0, err

    for optimizer, rate in zip(optimizers, (1e-5, 5e-5), strict=True):
        assert type(optimizer) is torch.optim.AdamW
        for group in optimizer.param_groups:
            assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.01, (0.9, 0.999), 1e-8)
            assert group["initial_lr"] == rate
    first, questions = batches[:2], batches[2:]
    size, number = {"commonsense": (16, 10), "mmlu": (2, 9)}[second]
    assert [len(batch["input_ids"]) for batch in first] == [8, 8]
    assert [len(batch["input_ids"]) for batch in questions] == [size] * math.ceil(number / size)
    beginnings = {tuple(tokenizer(text)["input_ids"][:32]) for text in texts[8:]}  # eight calibrate
    for batch in first:
        lengths = [assert_all_predicted(*row, int(tokenizer.bos_token_id or 0)) for row in rows(batch)]
        assert {tuple(ids[:length]) for (ids, _), length in zip(rows(batch), lengths, strict=True)} <= beginnings
        assert min(lengths) < max(lengths) == 32
    for batch in questions:
        for ids, labels in rows(batch):
            assert_all_predicted(ids, labels, int(tokenizer.bos_token_id or 0), end=True)
            text = tokenizer.decode([token for token in labels if token != MASKED])
            answer = "the correct answer is answer2" if second == "mmlu" else "true"
            assert text.startswith("Below is an instruction") and text.endswith(f"{answer}<|endoftext|>")


@contextmanager
def watched_training() -> Iterator[tuple[list[dict[str, torch.Tensor]], list[torch.optim.Optimizer]]]:
    """The batches and the optimizers of the trainings inside the context."""
    batches: list[dict[str, torch.Tensor]] = []
    optimizers: list[torch.optim.Optimizer] = []
    step, configure = RecoveryModule.training_step, RecoveryModule.configure_optimizers

    def watch_step(self: Any, batch: Any, index: int) -> Any:
        batches.append({name: column.clone() for name, column in batch.items()})
        return step(self, batch, index)

    def watch_optimizer(self: Any) -> Any:
        configured: Any = configure(self)
        optimizers.append(configured["optimizer"])
        return configured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecoveryModule, "training_step", watch_step)
        patch.setattr(RecoveryModule, "configure_optimizers", watch_optimizer)
        yield batches, optimizers


def rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    assert set(batch) == {"input_ids", "labels"}
    return list(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))


def assert_all_predicted(ids: list[int], labels: list[int], bos: int, end: bool = False) -> int:
    """A window begins with BOS, and its loss covers every token but the first and the padding, which is token 0.

    Args:
        end: the text ends with the end-of-text token, which is token 0 too.

    Returns:
        The number of tokens of the text.
    """
    length = (ids.index(0) if 0 in ids else len(ids)) + end
    assert ids[0] == bos and labels == [MASKED, *ids[1:length], *[MASKED] * (len(ids) - length)]
    return length


def test_the_windows_of_the_perplexity_begin_with_bos(base: Path, tmp_path: Path) -> None:
    tokenizer = beginning_with("<s>", bos=True)
    for name in ("cdmoe_qwen_e4", "moei2_mixtral"):
        config = composed(name, *without_the_hub(name, base, tmp_path), *SMALL, "data.sequence_length=32")
        tokens = Tokenizing(Texts.read(config, (), calibrates=True), tokenizer).tokens(config, ())
        assert tokens.validation is not None and (tokens.validation[:, 0] == tokenizer.bos_token_id).all()
        assert (tokens.validation[:, 1:] != tokenizer.bos_token_id).all()
        assert tokens.calibration is not None
        assert all(ids[0] == tokenizer.bos_token_id for ids in tokens.calibration.ids)
