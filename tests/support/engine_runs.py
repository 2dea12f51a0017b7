"""Recoveries of a tiny model by each engine on two processes. `Forks` runs this file as a script.

    engine_runs.py FOLDER TASKS ENGINE...

Each process writes its results with an engine to FOLDER/<engine>-<rank>.json.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from recondense import processes
from recondense.callbacks.lm_eval import LmEval
from recondense.callbacks.training_metrics import TrainingMetrics
from recondense.config.schema import TrainerConfig
from recondense.data.labels import MASKED
from recondense.data.loader import RecoveryData
from recondense.models.low_rank import LowRankExperts
from recondense.operations import Condense, Drop, Factorize, Merge, Prune
from recondense.plan import Plan
from recondense.recovery.engines import deepspeed, full_tensors, training_copy
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery.apply import apply
from support.recoveries import recovery
from support.settings_around import differences, settings_around
from support.small import byte_tokenizer
from support.small_trainer import Recorder
from support.tiny_models import qwen2_moe, windows

STEPS, KILLED_AT, CHECKPOINT_EVERY = 10, 6, 4
TASKS = ("piqa",)
METRICS = ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_bytes")
SECONDS = 100  # after which a process that is not done with an engine ends
PLAN = Plan(
    "tiny",
    (
        Condense(1, (1, 4), (0.3, 0.4), 0.4),
        # Every expert has ranks of its own: with few tokens, some experts have none.
        Factorize(2, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (2, 4, 6, 8, 10, 12))),
    ),
)


def module_of() -> RecoveryModule:
    """A new module with the same weights every time. The original has routers, gates and norms of its own."""
    model = qwen2_moe(vocab_size=257, max_position_embeddings=256)
    parts = ("experts", "routers", "norms")  # in two groups of parameters, because norms are not decayed
    settings = recovery(steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, validate_every=5, trainable=parts)
    module = RecoveryModule(apply(model, PLAN), settings, tokenizer=byte_tokenizer())
    module.prepare()
    return module


def data() -> RecoveryData:
    return RecoveryData(windows(7, 8), windows(3, 8, seed=2), 2, STEPS, seed=3)


class Watcher(L.Callback):
    """Notes what a training does, step by step.

    Args:
        stop: the batch before which the training fails.
    """

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.losses: dict[int, float] = {}
        self.validation: dict[int, list[float]] = {}
        self.idle = 0
        self.frozen_gradients = 0
        self.state_elements = 0
        self.precisions: set[torch.dtype] = set()  # of buffers
        self.metrics: dict[str, float] = {}  # of TrainingMetrics

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == self.stop:
            raise RuntimeError("killed")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        low_rank = [part for part in module.model.modules() if isinstance(part, LowRankExperts)]
        self.hooks = [experts.register_forward_pre_hook(self._count) for experts in low_rank]

    def on_train_end(self, trainer: Any, module: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, experts: Any, arguments: Any) -> None:
        self.idle += int(experts.num_experts - len(arguments[1].unique()))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.frozen_gradients += sum(p.grad is not None for p in module.parameters() if not p.requires_grad)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self.precisions |= {buffer.dtype for buffer in module.buffers()}
        self.losses[trainer.global_step] = float(trainer.callback_metrics["recovery/loss"])
        for name in METRICS:
            if (value := trainer.callback_metrics.get(f"recovery/{name}")) is not None:
                self.metrics[name] = float(value)
        (optimizer,) = trainer.optimizers
        inner = optimizer.optimizer if isinstance(trainer.strategy, deepspeed.Zero) else optimizer
        parts = [getattr(value, "_local_tensor", value) for state in inner.state.values() for value in state.values()]
        self.state_elements = sum(part.numel() for part in parts if part.ndim)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        names = ("recovery/validation_loss", "recovery/validation_kl")
        self.validation[trainer.global_step] = [float(trainer.callback_metrics[name]) for name in names]


def train(
    strategy: str, folder: Path, stop: int | None = None, tasks: tuple[str, ...] = (), task_folder: Path | None = None
) -> tuple[RecoveryModule, Watcher]:
    """Train to the end, or until the training is killed."""
    module, watcher = module_of(), Watcher(stop)
    evaluation = LmEval(tasks, every_n_steps=3, at_end=False, limit=6, include_path=task_folder)
    settings = TrainerConfig(strategy=strategy, progress_bar=False)  # type: ignore[arg-type]
    try:
        callbacks = [TrainingMetrics(), watcher, evaluation]
        fit(module, data(), folder, settings, seed=1, callbacks=callbacks, loggers=[Recorder()])
    except RuntimeError as error:
        if "killed" not in str(error):
            raise
    return module, watcher


def train_on_two(engine: str, folder: Path, tasks: tuple[str, ...], task_folder: Path) -> dict[str, Any]:
    """Train with an engine, killed once and resumed; return the results of this process."""
    _, before = train(engine, folder, KILLED_AT, tasks, task_folder)
    module, after = train(engine, folder, tasks=tasks, task_folder=task_folder)
    empty = training_copy.is_empty(module)
    if not empty:
        torch.save(module.model.state_dict(), folder / f"weights-{processes.rank()}.pt")
    return {
        "losses": {**before.losses, **after.losses},
        "repeated_differences": [
            before.losses[step] - after.losses[step] for step in (CHECKPOINT_EVERY + 1, CHECKPOINT_EVERY + 2)
        ],
        "validation": {**before.validation, **after.validation},
        "idle": before.idle + after.idle,
        "frozen_gradients": before.frozen_gradients + after.frozen_gradients,
        "state_elements": after.state_elements,
        "tasks": module.task_results,
        "metrics": after.metrics,
        "empty": empty,
    }


def resume_from_one(engine: str, folder: Path, checkpoint: Path) -> dict[int, float]:
    """Resume with an engine from the checkpoint of a single process; return the losses."""
    if processes.is_first():
        folder.mkdir()
        shutil.copy(checkpoint, folder)
    processes.barrier()
    module, watcher = train(engine, folder)
    if processes.is_first():
        torch.save(module.model.state_dict(), folder / "weights.pt")
    return watcher.losses


GROUPS = ((0, 1), (2, 3), (4, 5))
RANKS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (8,) * 6)
# Other plans, types and losses, four steps each: a sparse block in the lowest layer, the shared router of a factorized
# layer, hidden states, and windows with different numbers of labels.
SHORT: dict[str, dict[str, Any]] = {
    "pruned": {"plan": Plan("tiny", (Prune(0, (0, 2, 3)), Factorize(1, RANKS))), "hidden_share": 0.5},
    "bf16": {
        "plan": Plan("tiny", (Prune(0, (0, 2, 3)), Condense(1, (1, 4), (0.3, 0.4), 0.4))),
        "dtype": torch.bfloat16,
    },
    "bf16-true": {
        "plan": Plan("tiny", (Prune(0, (0, 2, 3)), Condense(1, (1, 4), (0.3, 0.4), 0.4))),
        "dtype": torch.bfloat16, "precision": "bf16-true", "steps": 2,
    },
    "fine-tuned": {"plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "objective": "finetune", "labels": True},
    # AdamW divides by the size of a gradient, so losses hardly show it: moments are compared too.
    "accumulated": {
        "plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "steps": 2, "accumulate_grad_batches": 2, "gradient_clip": 1e9,
    },
    "clipped": {"plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "steps": 2, "gradient_clip": 1e-4},
    "unequal": {
        "plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "steps": 2, "accumulate_grad_batches": 3, "gradient_clip": 1e9,
        "labels": True, "hidden_share": 0.25, "cross_entropy_share": 0.25,
    },
    # A layer of each kind, and one whose router is trained although nothing else of it is.
    "routers": {
        "plan": Plan("tiny", (Prune(0, (0, 2, 3)), Merge(1, GROUPS, ((0.5, 0.5),) * 3))), "trainable": "routers",
        "router_layers": "all", "steps": 2, "gradient_clip": 1e9,
    },
    "all": {
        "plan": Plan("tiny", (Prune(0, (0, 2, 3)), Drop(1, "moe"))), "trainable": "all", "steps": 2,
        "gradient_clip": 1e9, "model": {"tie_word_embeddings": True},
    },
    "parts in bf16": {
        "plan": Plan("tiny", (Prune(0, (0, 2, 3)), Factorize(1, RANKS))), "dtype": torch.bfloat16,
        "trainable": ("routers", "norms", "attention"),
    },
}  # fmt: skip
MOMENTS = ("accumulated", "clipped", "unequal", "routers", "all")
# Importing DeepSpeed changes these.
CHANGED_BY_IMPORT = ("process silent", "process handlers of DeepSpeed", "process variable DS_ACCELERATOR")
SHORT_ALONE = ("deepspeed_zero3_offload",)  # engines so similar to another that they run only the short cases


def moments(folder: Path) -> dict[str, list[float]]:
    """Norms of AdamW's moments of all parameters after the second step."""
    (state,) = torch.load(folder / "step=2.ckpt", weights_only=True)["optimizer_states"]
    return {
        name: [float(parameter_state[name].norm()) for _, parameter_state in sorted(state["state"].items())]
        for name in full_tensors.MOMENTS
    }


def short(name: str, strategy: str, folder: Path) -> list[float]:
    """The losses of a few steps."""
    case = {"steps": 4, "checkpoint_every": 2 if name in MOMENTS else 10, **SHORT[name]}
    plan, dtype, labels = case.pop("plan"), case.pop("dtype", torch.float32), case.pop("labels", False)
    precision = case.pop("precision", "auto")
    model = qwen2_moe(vocab_size=257, max_position_embeddings=256, **case.pop("model", {}))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers are fp32, as loading has them
    module = RecoveryModule(apply(model, plan), recovery(**case), tokenizer=byte_tokenizer())
    module.prepare()
    ids = windows(7, 8)
    texts: Any = ids
    if labels:
        is_label = torch.arange(8) < torch.tensor([8, 3, 5, 2, 6, 4, 7])[:, None]
        texts = {"input_ids": ids, "labels": torch.where(is_label, ids, torch.full_like(ids, MASKED))}
    watcher = Watcher()
    batches = module.settings.steps * module.settings.accumulate_grad_batches
    settings = TrainerConfig(strategy=strategy, precision=precision, progress_bar=False)  # type: ignore[arg-type]
    module.stop_training()
    before = settings_around(module)
    fit(module, RecoveryData(texts, None, 2, batches, seed=3), folder, settings, seed=1, callbacks=[watcher])
    changed = {
        key: pair
        for key, pair in differences(before, settings_around(module)).items()
        # Only the first process has the weights.
        if key not in CHANGED_BY_IMPORT and "device(type='meta'" not in str(pair[1])
    }
    assert not changed, changed
    assert watcher.precisions | {buffer.dtype for buffer in module.buffers()} <= {torch.float32, torch.int64}
    return list(watcher.losses.values())


def process(rank: int, port: int, folder: Path, names: Sequence[str], task_folder: Path) -> None:
    """What one of the two processes does."""
    os.environ.update(environment(rank, port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    for name in names:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        results = {} if name in SHORT_ALONE else train_on_two(name, folder / name, TASKS, task_folder)
        checkpoint = folder / "one" / f"step={2 * CHECKPOINT_EVERY}.ckpt"
        results["resumed"] = resume_from_one(name, folder / f"{name}-resumed", checkpoint)
        cases = MOMENTS if name in SHORT_ALONE else SHORT
        results["short"] = {case: short(case, name, folder / name / case) for case in cases}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(results))
    faulthandler.cancel_dump_traceback_later()


def on_processes(run: Callable[[int, int], None]) -> int:
    """Run a function with a rank and a port in two forks of this process; return the worse exit code."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    started = []
    for rank in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                run(rank, port)
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in started)


def environment(rank: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), **common}


def main() -> None:
    warnings.simplefilter("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    folder, task_folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.exit(on_processes(lambda rank, port: process(rank, port, folder, names, task_folder)))


if __name__ == "__main__":
    main()
