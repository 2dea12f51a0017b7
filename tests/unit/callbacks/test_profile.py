"""Memory and speed of training, and of the model before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.small_trainer import Module, Recorder, fit
from torch import nn
from torch.utils.data import DataLoader

from recondense.callbacks.profile import ProfileMemoryAndSpeed
from recondense.evaluation import profiling
from recondense.models import moe_blocks, parameters
from recondense.plan import Plan
from recondense.surgery.student import Student


class TestProfile:
    SETTINGS: dict[str, Any] = {"prompt_length": 4, "new_tokens": 1, "repetitions": 1}  # noqa: RUF012

    def test_profiles_against_the_teacher(self, tmp_path: Path) -> None:
        module = Module()
        original = Module().model.model.layers[0].mlp.requires_grad_(False)
        block_bytes = parameters.weights_bytes(original)
        small = nn.Linear(16, 16, bias=False)
        moe_blocks.set_block(module.model, 0, small)
        module.student = Student(module.model, Plan("tiny"), {0: original})
        module.originals = nn.ModuleDict({"0": original})
        callback = ProfileMemoryAndSpeed(**self.SETTINGS, every_n_steps=2)
        _, recorder = fit(module, [callback], tmp_path)
        for moment, name in (("start", "compressed"), ("end", "recovered")):
            profiles = callback.profiles[moment]
            assert list(profiles) == ["original", name]
            assert profiles["original"].weights_bytes - profiles[name].weights_bytes == block_bytes - 16 * 16 * 4
        assert moe_blocks.get_block(module.model, 0) is small
        assert recorder.steps("profile/compressed/decode_tokens_per_second") == [0]
        assert recorder.steps("profile/recovered/peak_memory_bytes") == [6]
        assert recorder.steps("profile/train_tokens_per_second") == [2, 4, 6]
        metrics = {name: value for _, logged in recorder.metrics for name, value in logged.items()}
        # Student and teacher together: the student, and the one block that only the teacher has.
        rotary = 2 * module.model.model.rotary_emb.inv_freq.nbytes
        expected = callback.profiles["start"]["compressed"].weights_bytes + block_bytes
        assert expected <= metrics["profile/resident_bytes"] <= expected + rotary
        assert metrics["profile/train_peak_bytes"] > 0

    def test_tokens_are_counted_without_filler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With labels, up to the last target; with a mask, what it marks; otherwise all. Summed over processes."""
        ticks = iter(range(1000))
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))
        ids = torch.arange(16).view(2, 8)
        labels = torch.full((2, 8), -100)
        labels[0, 2], labels[0, 4], labels[1, 6] = 2, 4, 14
        mask = (torch.arange(8) < torch.tensor([[3], [8]])).long()
        for more, tokens in (({}, 16), ({"labels": labels}, 5 + 7), ({"labels": labels, "attention_mask": mask}, 11)):
            callback = ProfileMemoryAndSpeed(at_start=False, at_end=False, every_n_steps=2)
            module = Module()
            monkeypatch.setattr(L.pytorch.strategies.SingleDeviceStrategy, "reduce", lambda self, value, **_: 3 * value)
            recorder = Recorder()
            trainer = L.Trainer(
                accelerator="cpu", max_epochs=1, logger=recorder, default_root_dir=tmp_path, callbacks=[callback],
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                accumulate_grad_batches=2, log_every_n_steps=1,
            )  # fmt: skip
            trainer.fit(module, DataLoader([{"input_ids": ids, **more}] * 8, batch_size=None))  # type: ignore[arg-type]
            rates = [
                metrics["profile/train_tokens_per_second"]
                for _, metrics in recorder.metrics
                if "profile/train_tokens_per_second" in metrics
            ]
            # Two steps of two batches; this clock counts a second for each; three processes.
            assert rates == [3 * tokens] * 2

    def test_without_a_teacher_only_the_live_model_is_profiled(self, tmp_path: Path) -> None:
        callback = ProfileMemoryAndSpeed(**self.SETTINGS, at_start=False, every_n_steps=0)
        _, recorder = fit(Module(), [callback], tmp_path)
        assert list(callback.profiles) == ["end"] and list(callback.profiles["end"]) == ["recovered"]
        assert recorder.steps("profile/train_tokens_per_second") == []
