"""Callbacks in a real Trainer: they see what they should, and training does not see them."""

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from support.forks import Forks
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.callbacks.lm_eval import LmEval
from recondense.callbacks.plan_logging import PlanLogging
from recondense.callbacks.profile import ProfileMemoryAndSpeed
from recondense.callbacks.progress import TrainingProgress
from recondense.evaluation import lm_eval, profiling
from recondense.models import parameters, views
from recondense.operations import Condense
from recondense.plan import Plan
from recondense.surgery.student import Student


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    name = "recorder"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def steps(self, name: str) -> list[int | None]:
        return [step for step, metrics in self.metrics if name in metrics]


class Module(L.LightningModule):
    """A small MoE with dropout, so that training draws random numbers."""

    def __init__(self, plan: Plan | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            attention_dropout=0.2,
        )
        self.model = Qwen2MoeForCausalLM(config)
        self.tokenizer = "tokenizer"
        self.plan = plan
        self.task_results: dict[int, Any] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("recovery/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: L.LightningModule, callbacks: Sequence[L.Callback], folder: Path, *, num_batches: int = 6, **settings: Any
) -> tuple[L.Trainer, Recorder]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(64, (2, 8), generator=generator)} for _ in range(num_batches)]
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=recorder,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **settings},
    )
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer, recorder


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for lm-eval: draws from every generator, changes modes, and notes how it was called."""
    found: list[dict[str, Any]] = []

    def run_tasks(model: nn.Module, tokenizer: Any, tasks: Sequence[str], **settings: Any) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        model.eval()
        found.append({"tokenizer": tokenizer, "tasks": tasks, **settings})
        return {task: {"acc": float(len(found)), "acc_stderr": 0.5} for task in tasks}

    monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
    return found


class TestLmEval:
    def test_evaluates_every_n_optimiser_steps_and_at_the_end(self, calls: list[Any], tmp_path: Path) -> None:
        module = Module()
        callback = LmEval(["a", "b"], every_n_steps=2, limit=3, num_fewshot=1, batch_size=4, include_path="folder")
        _, recorder = fit(module, [callback], tmp_path, num_batches=10, accumulate_grad_batches=2)
        assert recorder.steps("recovery/a/acc") == recorder.steps("recovery/b/acc_stderr") == [2, 4, 5]
        assert {step: found["a"]["acc"] for step, found in module.task_results.items()} == {2: 1, 4: 2, 5: 3}
        expected = {"limit": 3, "num_fewshot": 1, "batch_size": 4, "include_path": "folder"}
        assert calls[0] == {"tokenizer": "tokenizer", "tasks": ["a", "b"], **expected}

    def test_the_last_step_is_evaluated_once(self, calls: list[Any], tmp_path: Path) -> None:
        fit(Module(), [LmEval(["a"], every_n_steps=3)], tmp_path)
        assert len(calls) == 2

    def test_training_does_not_notice(self, calls: list[Any], tmp_path: Path) -> None:
        plain, evaluated = Module(), Module()
        fit(plain, [], tmp_path)
        fit(evaluated, [LmEval(["a"], every_n_steps=1), ProfileMemoryAndSpeed(prompt_length=4, new_tokens=1)], tmp_path)
        assert len(calls) == 6
        assert evaluated.model.training
        for name, value in plain.state_dict().items():
            assert torch.equal(value, evaluated.state_dict()[name]), name

    def test_runs_in_the_precision_of_the_trainer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def run_tasks(*_: Any, **__: Any) -> dict[str, Any]:
            seen.append(torch.is_autocast_enabled("cpu"))
            return {}

        monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
        fit(Module(), [LmEval(["a"])], tmp_path, precision="bf16-mixed")
        assert seen == [True]

    def test_without_tasks_nothing_runs(self, calls: list[Any], tmp_path: Path) -> None:
        for tasks in (None, ()):
            fit(Module(), [LmEval(tasks, every_n_steps=1)], tmp_path)
        assert calls == []
        with pytest.raises(ValueError, match="every_n_steps is -1"):
            LmEval(["a"], every_n_steps=-1)

    def test_a_restart_keeps_results_and_does_not_repeat_them(self, calls: list[Any], tmp_path: Path) -> None:
        before = LmEval(["a"], every_n_steps=2, at_end=False)
        fit(Module(), [before], tmp_path)
        after, module = LmEval(["a"], every_n_steps=2, at_end=False), Module()
        after.load_state_dict(before.state_dict())
        fit(module, [after], tmp_path)
        assert sorted(module.task_results) == [2, 4, 6] and len(calls) == 3


class TestProfile:
    SETTINGS: dict[str, Any] = {"prompt_length": 4, "new_tokens": 1, "repetitions": 1}  # noqa: RUF012

    def test_profiles_against_the_teacher(self, tmp_path: Path) -> None:
        module = Module()
        original = Module().model.model.layers[0].mlp.requires_grad_(False)
        block_bytes = parameters.weights_bytes(original)
        small = nn.Linear(16, 16, bias=False)
        views.set_block(module.model, 0, small)
        module.student = Student(module.model, Plan("tiny"), {0: original})
        module.originals = nn.ModuleDict({"0": original})
        callback = ProfileMemoryAndSpeed(**self.SETTINGS, every_n_steps=2)
        _, recorder = fit(module, [callback], tmp_path)
        for moment, name in (("start", "compressed"), ("end", "recovered")):
            found = callback.profiles[moment]
            assert list(found) == ["original", name]
            assert found["original"].weights_bytes - found[name].weights_bytes == block_bytes - 16 * 16 * 4
        assert views.get_block(module.model, 0) is small
        assert recorder.steps("profile/compressed/decode_tokens_per_second") == [0]
        assert recorder.steps("profile/recovered/peak_memory_bytes") == [6]
        assert recorder.steps("profile/train_tokens_per_second") == [2, 4, 6]
        metrics = {name: value for _, one in recorder.metrics for name, value in one.items()}
        # Student and teacher together: the student, and the one block that is the teacher's own.
        rotary = 2 * module.model.model.rotary_emb.inv_freq.nbytes
        expected = callback.profiles["start"]["compressed"].weights_bytes + block_bytes
        assert expected <= metrics["profile/resident_bytes"] <= expected + rotary
        assert metrics["profile/train_peak_bytes"] > 0

    def test_tokens_are_counted_without_filler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In windows with labels up to the last target, under a mask what it names, else all; of all processes."""
        ticks = iter(range(1000))
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))
        ids = torch.arange(16).view(2, 8)
        labels = torch.full((2, 8), -100)
        labels[0, 2], labels[0, 4], labels[1, 6] = 2, 4, 14
        mask = (torch.arange(8) < torch.tensor([[3], [8]])).long()
        for more, tokens in (({}, 16), ({"labels": labels}, 5 + 7), ({"labels": labels, "attention_mask": mask}, 11)):
            callback = ProfileMemoryAndSpeed(at_start=False, at_end=False, every_n_steps=2)
            module = Module()
            monkeypatch.setattr(L.pytorch.strategies.SingleDeviceStrategy, "reduce", lambda self, own, **_: 3 * own)
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
            # Two steps of two batches, a second each by this clock; three processes.
            assert rates == [3 * tokens] * 2

    def test_without_a_teacher_the_live_model_alone(self, tmp_path: Path) -> None:
        callback = ProfileMemoryAndSpeed(**self.SETTINGS, at_start=False, every_n_steps=0)
        _, recorder = fit(Module(), [callback], tmp_path)
        assert list(callback.profiles) == ["end"] and list(callback.profiles["end"]) == ["recovered"]
        assert recorder.steps("profile/train_tokens_per_second") == []


class TestPlanLogging:
    def test_draws_the_plan_once(self, tmp_path: Path) -> None:
        plan = Plan(model="tiny", operations=(Condense(1, (3, 0), (0.1, 0.2), None),))
        callback = PlanLogging(tmp_path / "run", export_folder=tmp_path / "model")
        fit(Module(plan), [callback], tmp_path)
        picture = tmp_path / "run" / "plan.png"
        assert picture.exists()
        picture.unlink()
        fit(Module(plan), [callback], tmp_path)
        assert not picture.exists()

    def test_writes_nothing_without_a_plan(self, tmp_path: Path) -> None:
        for plan in (None, Plan(model="tiny")):
            fit(Module(plan), [PlanLogging(tmp_path / "run")], tmp_path)
        assert not (tmp_path / "run").exists()


class TestProgress:
    def test_lines_in_the_log_where_there_is_no_terminal(self, tmp_path: Path, caplog: Any) -> None:
        with caplog.at_level("INFO"):
            fit(Module(), [TrainingProgress("recover", lines=3)], tmp_path, accumulate_grad_batches=2)
        lines = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
        assert lines[0] == "recover: started (3)" and lines[-1].startswith("recover: done in")
        assert [line.split(", loss")[0] for line in lines[1:-1]] == [f"recover: step {n} of 3" for n in (1, 2, 3)]

    def test_an_interrupted_stage_does_not_say_that_it_is_done(self, tmp_path: Path, caplog: Any) -> None:
        class Failing(Module):
            def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
                raise RuntimeError("boom")

        with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="boom"):
            fit(Failing(), [TrainingProgress("recover")], tmp_path)
        assert "recover: started" in caplog.text and "done" not in caplog.text


SCRIPT = """
import os, signal, sys, warnings
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from recondense.callbacks.graceful_stop import GracefulStop

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:  # in the middle of the accumulation of step 2
            os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        if batch_idx > 20:
            sys.exit("was not stopped")
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

warnings.simplefilter("ignore")
folder = sys.argv[1]
checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=100, save_top_k=1)
trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[GracefulStop(), checkpoints],
    default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=4)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(40, 2), batch_size=1))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(forks: Forks, tmp_path: Path, name: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forks.run(tmp_path / "script.py", str(tmp_path / "run"), name, folder=tmp_path)
    assert done.returncode == 128 + signal.Signals[name], done.stderr
    # The signal came while the gradients of step 2 were being accumulated: that step was finished first.
    assert f"recondense: stopped by {name} after step 2" in done.stderr
    assert "Traceback" not in done.stderr
    (path,) = (tmp_path / "run").glob("*.ckpt")
    assert path.name == "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    (state,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    assert state["best_model_path"] == str(path)


def test_settings_that_a_plan_stand_in_needs() -> None:
    # PlanLogging asks a module for no more than `plan.operations` and `plan.to_dict()`.
    callback = PlanLogging()
    trainer: Any = SimpleNamespace(loggers=[], default_root_dir=".")
    callback.on_fit_start(trainer, SimpleNamespace(plan=SimpleNamespace(operations=())))  # type: ignore[arg-type]
    assert callback.state_dict() == {"logged": False}
