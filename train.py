"""Condense a Mixture-of-Experts model, recover what was lost, measure and export it.

python train.py                                          the embedded default
python train.py model=qwen_moe method=cdmoe              the published setting
python train.py -m method.num_layers=2,4,6 recovery=none a sweep: one search, three students
python train.py -m hydra/launcher=submitit seed=0,1,2    a sweep on SLURM, a job each; joblib: beside each other here
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from recondense.config.schema import from_dict
from recondense.processes import first_to_start
from recondense.run.command_line import again, exit_codes, validate
from recondense.run.steps import build_steps
from recondense.run.sweeping import beside_others

CONFIGS = Path(__file__).resolve().parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def job(settings: DictConfig) -> Any:
    """One run; what it returns is what a sweep compares."""
    with exit_codes(sweep=HydraConfig.get().mode is RunMode.MULTIRUN):
        import callbacks  # late: importing the stages takes seconds, refusing a command should not
        from recondense.run import pipeline

        config = from_dict(cast(dict[str, Any], OmegaConf.to_container(settings, resolve=True)))
        if beside_others(HydraConfig.get().launcher["_target_"]):  # the bars of several runs would fight for one line
            config = replace(config, trainer=replace(config.trainer, progress_bar=False))
        command = again(__file__, HydraConfig.get())
        return pipeline.run(config, build_steps(config.method), callbacks.of_run(config), command)


def main() -> None:
    """Check the whole command, then run it."""
    with exit_codes(silent=not first_to_start()):
        validate(job, CONFIGS, "train", sys.argv[1:])
        job()


if __name__ == "__main__":
    main()
