"""Progress of training without a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.small_trainer import Module, fit
from torch import Tensor

from recondense.callbacks.progress import TrainingProgress


class TestProgress:
    def test_without_a_terminal_lines_are_logged(self, tmp_path: Path, caplog: Any) -> None:
        with caplog.at_level("INFO"):
            fit(Module(), [TrainingProgress("recover", lines=3)], tmp_path, accumulate_grad_batches=2)
        lines = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
        assert lines[0] == "recover: started (3)" and lines[-1].startswith("recover: done in")
        assert [line.split(", loss")[0] for line in lines[1:-1]] == [f"recover: step {n} of 3" for n in (1, 2, 3)]

    def test_an_interrupted_recovery_stage_does_not_say_that_it_is_done(self, tmp_path: Path, caplog: Any) -> None:
        class Failing(Module):
            def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
                raise RuntimeError("boom")

        with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="boom"):
            fit(Failing(), [TrainingProgress("recover")], tmp_path)
        assert "recover: started" in caplog.text and "done" not in caplog.text
