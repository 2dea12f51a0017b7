"""Memory and speed of the model before and after a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.small_trainer import Module, fit
from torch import nn

from recondense.callbacks.profile import ProfileMemoryAndSpeed
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
        callback = ProfileMemoryAndSpeed(**self.SETTINGS)
        _, recorder = fit(module, [callback], tmp_path)
        for moment, name in (("start", "compressed"), ("end", "recovered")):
            profiles = callback.profiles[moment]
            assert list(profiles) == ["original", name]
            assert profiles["original"].weights_bytes - profiles[name].weights_bytes == block_bytes - 16 * 16 * 4
        assert moe_blocks.get_block(module.model, 0) is small
        assert recorder.steps("profile/compressed/decode_tokens_per_second") == [0]
        assert recorder.steps("profile/recovered/peak_memory_bytes") == [6]
        metrics = {name: value for _, logged in recorder.metrics for name, value in logged.items()}
        # Student and teacher together: the student, and the one block that only the teacher has.
        rotary = 2 * module.model.model.rotary_emb.inv_freq.nbytes
        expected = callback.profiles["start"]["compressed"].weights_bytes + block_bytes
        assert expected <= metrics["profile/resident_bytes"] <= expected + rotary

    def test_without_a_teacher_only_the_live_model_is_profiled(self, tmp_path: Path) -> None:
        callback = ProfileMemoryAndSpeed(**self.SETTINGS, at_start=False)
        fit(Module(), [callback], tmp_path)
        assert list(callback.profiles) == ["end"] and list(callback.profiles["end"]) == ["recovered"]
