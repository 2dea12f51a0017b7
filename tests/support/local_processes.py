"""Two processes that recover a model locally, as one does. A script: local_processes.py FOLDER INPUTS STREAMED."""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from recondense import processes
from recondense.config.schema import ModelConfig
from recondense.data.loader import RecoveryData
from recondense.models import loading
from recondense.models.layer_store import layer_store
from recondense.operations import Condense, Prune
from recondense.plan import Plan
from recondense.recovery.local import LocalRecovery
from recondense.recovery.local_tape import LocalTape
from recondense.surgery.apply import apply
from support.engine_runs import environment, on_processes
from support.recoveries import QUIET, recovery
from support.small import byte_tokenizer
from support.tiny_models import bits, qwen2_moe, same_bits, windows

FOLDER, INPUTS, STREAMED = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
PLAN = Plan("tiny", (Condense(0, (1, 4), (0.3, 0.4), 0.5), Prune(1, (0, 2, 3)), Prune(2, (0, 2, 3, 5))))


def recover(name: str, pages: Path) -> tuple[Any, Any]:
    """The weights of a new student after its recovery in a folder, and the errors."""
    model = loading.load(FOLDER / "model", ModelConfig(device="cpu"), pages if STREAMED else None)[0]
    student = apply(model, PLAN)
    settings = recovery(objective="local", name="local", local_inputs=INPUTS, batch_size=2)
    data = RecoveryData(windows(7, 8), None, 2, settings.steps, seed=3)
    storage = layer_store(model).tensor_storage()
    errors = LocalRecovery(student, settings, data, FOLDER / name, QUIET, storage).run()
    student.load_into_memory()
    return bits(model), errors


def run(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment(rank, port))
    faulthandler.dump_traceback_later(60, exit=True)
    processes.join_group("gloo", timedelta(minutes=1))
    expected, expected_errors = None, None
    if rank == 0:
        processes._mode = processes._Mode.ALONE
        expected, expected_errors = recover("one", FOLDER / "pages-one")
        processes._mode = processes._Mode.TOGETHER
    processes.barrier()
    recorded: list[int] = []
    record = LocalTape._block_outputs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        recorded.append(len(inputs))
        return record(self, model, inputs)

    LocalTape._block_outputs = counted  # type: ignore[method-assign]
    state, errors = recover("two", FOLDER / f"pages-{rank}")
    assert set(recorded) == {4 if rank == 0 else 3}, "the windows are shared"
    if rank == 0:
        assert same_bits(state, expected) and errors == expected_errors
    states = processes.gather(state)
    assert same_bits(*states)
    processes.leave_group()


if __name__ == "__main__":
    qwen2_moe().save_pretrained(FOLDER / "model")
    byte_tokenizer().save_pretrained(FOLDER / "model")
    sys.exit(on_processes(run))
