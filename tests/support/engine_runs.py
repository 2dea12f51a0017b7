"""Recoveries of a tiny model by each engine on two processes; run as a script by a process that has imported all.

    engine_runs.py FOLDER TASKS ENGINE...

A process writes what it saw of each engine to FOLDER/<engine>-<rank>.json.
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
from recondense.config.schema import TrainerConfig
from recondense.data.labels import MASKED
from recondense.data.loader import RecoveryData
from recondense.models.low_rank import LowRankExperts
from recondense.operations import Condense, Factorize, Prune
from recondense.plan import Plan
from recondense.recovery.engines import deepspeed, full_tensors, twin
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery.student import apply
from support.recoveries import recovery
from support.settings_around import differences, settings_around
from support.small import byte_tokenizer
from support.tiny_models import qwen2_moe, windows

STEPS, KILLED_AT, SAVED = 10, 6, 4
TASKS = ("piqa",)
SECONDS = 100  # in which an engine is done, or all ends
PLAN = Plan(
    "tiny",
    (
        Condense(1, (1, 4), (0.3, 0.4), 0.4),
        # Six kinds of experts: few tokens leave some of them without any.
        Factorize(2, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (2, 4, 6, 8, 10, 12))),
    ),
)


def module_of() -> RecoveryModule:
    """A fresh one of the same weights each time; its router and shared gate are those of the original."""
    model = qwen2_moe(vocab_size=257, max_position_embeddings=256)
    settings = recovery(steps=STEPS, checkpoint_every=SAVED, validate_every=5)
    module = RecoveryModule(apply(model, PLAN), settings, tokenizer=byte_tokenizer())
    module.prepare()
    return module


def data() -> RecoveryData:
    return RecoveryData(windows(7, 8), windows(3, 8, seed=2), 2, STEPS, seed=3)


class Watching(L.Callback):
    """What a training does, step by step.

    Args:
        stop: the batch before which it is killed.
    """

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.losses: dict[int, float] = {}
        self.validation: dict[int, list[float]] = {}
        self.idle = 0
        self.frozen_gradients = 0
        self.state_elements = 0
        self.precisions: set[torch.dtype] = set()  # of buffers

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == self.stop:
            raise RuntimeError("killed")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        low_rank = [each for each in module.model.modules() if isinstance(each, LowRankExperts)]
        self.hooks = [experts.register_forward_pre_hook(self._count) for experts in low_rank]

    def on_train_end(self, trainer: Any, module: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, experts: Any, arguments: Any) -> None:
        self.idle += int(experts.num_experts - len(arguments[1].unique()))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.frozen_gradients += sum(p.grad is not None for p in module.parameters() if not p.requires_grad)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self.precisions |= {each.dtype for each in module.buffers()}
        self.losses[trainer.global_step] = float(trainer.callback_metrics["recovery/loss"])
        (optimizer,) = trainer.optimizers
        inner = optimizer.optimizer if isinstance(trainer.strategy, deepspeed.Zero) else optimizer
        parts = [getattr(value, "_local_tensor", value) for own in inner.state.values() for value in own.values()]
        self.state_elements = sum(part.numel() for part in parts if part.ndim)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        names = ("recovery/validation_loss", "recovery/validation_kl")
        self.validation[trainer.global_step] = [float(trainer.callback_metrics[name]) for name in names]


def train(
    strategy: str, folder: Path, stop: int | None = None, tasks: tuple[str, ...] = (), where: Path | None = None
) -> tuple[RecoveryModule, Watching]:
    """Train to the end, or until killed."""
    module, watching = module_of(), Watching(stop)
    evaluation = LmEval(tasks, every_n_steps=3, at_end=False, limit=6, include_path=where)
    settings = TrainerConfig(strategy=strategy, progress_bar=False)  # type: ignore[arg-type]
    try:
        fit(module, data(), folder, settings, seed=1, callbacks=[watching, evaluation])
    except RuntimeError as error:
        if "killed" not in str(error):
            raise
    return module, watching


def on_two(engine: str, folder: Path, tasks: tuple[str, ...], where: Path) -> dict[str, Any]:
    """Train with an engine, killed once; what this process saw."""
    _, before = train(engine, folder, KILLED_AT, tasks, where)
    module, after = train(engine, folder, tasks=tasks, where=where)
    hollow = twin.is_hollow(module)
    if not hollow:
        torch.save(module.model.state_dict(), folder / f"weights-{processes.rank()}.pt")
    return {
        "losses": {**before.losses, **after.losses},
        "again": [before.losses[step] - after.losses[step] for step in (SAVED + 1, SAVED + 2)],
        "validation": {**before.validation, **after.validation},
        "idle": before.idle + after.idle,
        "frozen_gradients": before.frozen_gradients + after.frozen_gradients,
        "state_elements": after.state_elements,
        "tasks": module.task_results,
        "hollow": hollow,
    }


def taken_up(engine: str, folder: Path, checkpoint: Path) -> dict[int, float]:
    """Go on with an engine where one process was stopped; the losses."""
    if processes.is_first():
        folder.mkdir()
        shutil.copy(checkpoint, folder)
    processes.barrier()
    module, watched = train(engine, folder)
    if processes.is_first():
        torch.save(module.model.state_dict(), folder / "weights.pt")
    return watched.losses


RANKS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (8,) * 6)
# Other plans, types and losses, four steps each: sparse blocks lowest, the shared router of a factorized layer, hidden
# states, labels in other numbers in each window.
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
    # Losses hardly know the size of a gradient, as AdamW divides by it: moments are compared too.
    "accumulated": {
        "plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "steps": 2, "accumulate_grad_batches": 2, "gradient_clip": 1e9,
    },
    "clipped": {"plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "steps": 2, "gradient_clip": 1e-4},
    "unequal": {
        "plan": Plan("tiny", (Prune(1, (0, 2, 3)),)), "steps": 2, "accumulate_grad_batches": 3, "gradient_clip": 1e9,
        "labels": True, "hidden_share": 0.25, "cross_entropy_share": 0.25,
    },
}  # fmt: skip
MOMENTS = ("accumulated", "clipped", "unequal")
OF_AN_IMPORT = ("process silent", "process handlers of DeepSpeed", "process variable DS_ACCELERATOR")  # DeepSpeed's
SHORT_ALONE = ("deepspeed_zero3_offload",)  # engines that are much like another


def moments(folder: Path) -> dict[str, list[float]]:
    """Norms of AdamW's moments of each parameter, after the second step."""
    (state,) = torch.load(folder / "step=2.ckpt", weights_only=True)["optimizer_states"]
    return {
        name: [float(own[name].norm()) for _, own in sorted(state["state"].items())] for name in full_tensors.MOMENTS
    }


def short(name: str, strategy: str, folder: Path) -> list[float]:
    """The losses of a few steps."""
    own = {"steps": 4, "checkpoint_every": 2 if name in MOMENTS else 10, **SHORT[name]}
    plan, dtype, labels = own.pop("plan"), own.pop("dtype", torch.float32), own.pop("labels", False)
    precision = own.pop("precision", "auto")
    model = qwen2_moe(vocab_size=257, max_position_embeddings=256)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers are fp32, as loading has them
    module = RecoveryModule(apply(model, plan), recovery(**own), tokenizer=byte_tokenizer())
    module.prepare()
    ids = windows(7, 8)
    table: Any = ids
    if labels:
        counted = torch.arange(8) < torch.tensor([8, 3, 5, 2, 6, 4, 7])[:, None]
        table = {"input_ids": ids, "labels": torch.where(counted, ids, torch.full_like(ids, MASKED))}
    watching = Watching()
    batches = module.settings.steps * module.settings.accumulate_grad_batches
    settings = TrainerConfig(strategy=strategy, precision=precision, progress_bar=False)  # type: ignore[arg-type]
    module.stop_training()
    before = settings_around(module)
    fit(module, RecoveryData(table, None, 2, batches, seed=3), folder, settings, seed=1, callbacks=[watching])
    changed = {
        key: pair
        for key, pair in differences(before, settings_around(module)).items()
        if key not in OF_AN_IMPORT and "device(type='meta'" not in str(pair[1])  # the first process has the weights
    }
    assert not changed, changed
    assert watching.precisions | {each.dtype for each in module.buffers()} <= {torch.float32, torch.int64}
    return list(watching.losses.values())


def process(rank: int, port: int, folder: Path, names: Sequence[str], where: Path) -> None:
    """One of the two."""
    os.environ.update(environment(rank, port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    for name in names:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found = {} if name in SHORT_ALONE else on_two(name, folder / name, TASKS, where)
        found["taken up"] = taken_up(name, folder / f"{name}-on", folder / "one" / f"step={2 * SAVED}.ckpt")
        cases = MOMENTS if name in SHORT_ALONE else SHORT
        found["short"] = {each: short(each, name, folder / name / each) for each in cases}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
    faulthandler.cancel_dump_traceback_later()


def on_processes(run: Callable[[int, int], None]) -> int:
    """Fork two processes, each of which is given its rank and a port; the worse of their exit codes."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
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
    """As torchrun sets it."""
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), **both}


def main() -> None:
    warnings.simplefilter("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    folder, where, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.exit(on_processes(lambda rank, port: process(rank, port, folder, names, where)))


if __name__ == "__main__":
    main()
