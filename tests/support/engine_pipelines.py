"""Complete runs by engines on two processes. `Forks` runs this file as a script.

    engine_pipelines.py FOLDER MODEL ENGINE...

Each run distils from predictions on disk and has the folder FOLDER/<engine>. A run of FSDP2 with a control follows, in
which each process writes the devices of its fits to FOLDER/devices-<rank>.json.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from recondense.recovery.module import RecoveryModule
from recondense.run import pipeline, recover
from support.engine_runs import SECONDS, environment, on_processes
from support.runs import config, step, text_files


def run(strategy: Any, folder: Path, model: Path, **recovery: Any) -> dict[str, str]:
    """Run the pipeline; return the device of each fit, by its stage."""
    settings = config(model, text_files(folder / "texts"), folder, **{"steps": 3, "teacher_top_k": 16, **recovery})
    trainer = replace(settings.trainer, strategy=strategy, devices="auto", progress_bar=False)
    name = f"{strategy}-control" if recovery.get("control") else strategy
    devices: dict[str, str] = {}
    fit = recover.fit

    def noting_fit(module: RecoveryModule, *rest: Any) -> Path:
        devices[module.stage] = str(module.training_device)
        return fit(module, *rest)

    recover.fit = noting_fit
    try:
        pipeline.run(replace(settings, trainer=trainer, run_dir=str(folder / name)), [step()])
    finally:
        recover.fit = fit
    return devices


def process(rank: int, port: int, name: str, folder: Path, model: Path) -> None:
    """What one of the two processes does."""
    os.environ.update(environment(rank, port))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    if name != "control":
        run(name, folder, model, teacher="cached", validate_every=3)
        return
    devices = run("fsdp2", folder, model, control=True, trainable=("experts", "routers", "norms"))
    (folder / f"devices-{rank}.json").write_text(json.dumps(devices))


def main() -> None:
    warnings.simplefilter("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    folder, model, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for name in (*names, "control"):
        code = on_processes(lambda rank, port, name=name: process(rank, port, name, folder, model))  # type: ignore[misc]
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
