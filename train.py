"""Condense a Mixture-of-Experts model, recover what was lost, measure and export it.

python train.py                                          the embedded default
python train.py model=qwen_moe method=cdmoe              every MoE layer, then distillation
python train.py -m method.num_layers=2,4,6 recovery=none a sweep: one search, three students
python train.py -m hydra/launcher=submitit seed=0,1,2    a sweep on SLURM, a job each; joblib: beside each other here
python train.py --help                                   all choices
"""

from pathlib import Path

from recondense.run import command_line


def main() -> None:
    """The command; a relative --config-path begins beside this file."""
    command_line.main(Path(__file__).parent)


if __name__ == "__main__":
    main()
