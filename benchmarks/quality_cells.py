"""The runs of the quality benchmark: recipes of the papers, every method at a tenth of their tokens, and an ablation.

A cell is a method at a budget with a recovery; a run of train.py for each seed. Tokens are counted in training windows.
CD-MoE's first stage has 1,250 steps of eight windows of 256 tokens: 2.56 million tokens for 16.4 billion parameters.
Subject B has less than a hundredth of the parameters, and gets a sixteenth of the tokens: 312 steps of two windows. A
tenth of them is 31 steps. MoE-I²'s recovery (LoRA) gets the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CONF = Path(__file__).resolve().parents[1] / "conf"
WINDOW, BATCH = 256, 2
FULL_STEPS, TENTH_STEPS = 312, 31
BUDGETS = {"30%": 0.30, "54%": 0.54}  # of the routed experts' parameters: nine of CD-MoE's 27 layers; MoE-I²'s 53.98%
CONTROL = "none"
# The recovery of the table of methods: what the ablation found best, so that methods are compared under it.
RATE = 3e-4
DISTILL = ("recovery=distill", f"recovery.learning_rate={RATE}", "recovery.warmup_steps=5")
BEST = (*DISTILL, "method.refit=true")
# Half of the steps each, so that the tokens are equal.
LOCAL_FIRST = (
    "recovery.stages=["
    f"{{name: local, objective: local, steps: {TENTH_STEPS // 2}}},"
    f"{{name: distill, objective: distill, steps: {TENTH_STEPS - TENTH_STEPS // 2}}}]"
)


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Args:
        name: the row's name.
        group: its table: "recipes", "methods" or "ablation".
        budget: the name of its budget; empty for the control.
        overrides: of train.py.
        steps: optimizer steps of the recovery.
        seeds: one run for each.
    """

    name: str
    group: str
    budget: str
    overrides: tuple[str, ...]
    steps: int = TENTH_STEPS
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def tokens(self) -> int:
        return self.steps * WINDOW * BATCH

    def command(self, seed: int) -> list[str]:
        """The overrides of the run of a seed, apart from those of the subject."""
        budget = [f"method.removed_expert_ratio={BUDGETS[self.budget]}"] if self.budget else []
        steps = [f"recovery.steps={self.steps}", f"recovery.batch_size={BATCH}", f"data.sequence_length={WINDOW}"]
        return [*self.overrides, *budget, *steps, f"seed={seed}"]


def recipes() -> list[Cell]:
    """The authors' recipes with all their tokens and with a tenth, and the control."""
    authors = ("recovery.weight_decay=0.01", "recovery.betas=[0.9,0.999]", "recovery.schedule=linear")
    cdmoe = ("method=cdmoe", "recovery=finetune", *authors)
    moei2 = ("method=moei2", "recovery=lora")
    further = ("method=none", "recovery=finetune", f"recovery.learning_rate={RATE}", *authors)
    cells = [
        Cell("original, trained further, a tenth", "recipes", "", further),
        Cell("original, trained further, all tokens", "recipes", "", further, FULL_STEPS),
    ]
    for budget, name, overrides in (("30%", "CD-MoE's recipe", cdmoe), ("54%", "MoE-I²'s recipe", moei2)):
        for steps, tokens in ((FULL_STEPS, "all tokens"), (TENTH_STEPS, "a tenth")):
            for rate in (1e-5, 1e-4, RATE) if name.startswith("CD") else (1e-4, 1e-3):
                title = f"{name}, {tokens}, rate {rate:g}"
                cells.append(Cell(title, "recipes", budget, (*overrides, f"recovery.learning_rate={rate}"), steps))
    return cells


def methods() -> list[Cell]:
    """Every method at a tenth of the tokens, with the same recovery."""
    return [
        Cell(name, "methods", budget, (f"method={name}", *BEST))
        for budget in BUDGETS
        for name in sorted(path.stem for path in (CONF / "method").glob("[a-z]*.yaml"))
        if name != CONTROL
    ]


def ablation(method: Sequence[str]) -> list[Cell]:
    """One method at a tenth of the tokens: each part of the recovery switched on alone, and all together.

    Args:
        method: its name, and overrides of its settings.
    """
    name_of_method, *settings = method
    finetune = ("recovery=finetune", f"recovery.learning_rate={RATE}", "recovery.warmup_steps=5")
    rows: dict[str, Sequence[str]] = {
        "next-token training": finetune,
        "distillation": DISTILL,
        "distillation, refit": BEST,
        "distillation, refit, rate 0.0001": at_rate(BEST, 1e-4),
        "distillation, refit, rate 0.001": at_rate(BEST, 1e-3),
        "distillation, constants folded": (*DISTILL, "recovery.fold_coefficients=true"),
        "distillation, cross-entropy 0.25": (*DISTILL, "recovery.cross_entropy_share=0.25"),
        "distillation, cross-entropy 0 to 0.5": (*DISTILL, "recovery.cross_entropy_share=[0.0,0.5]"),
        "distillation, hidden states 0.25": (*DISTILL, "recovery.hidden_share=0.25"),
        "distillation, hidden states 0.5 to 0": (*DISTILL, "recovery.hidden_share=[0.5,0.0]"),
        "distillation, reverse KL": (*DISTILL, "recovery.divergence=reverse_kl"),
        "distillation, experts and routers": (*DISTILL, "recovery.trainable=[experts,routers]"),
        "distillation, routers alone": (*DISTILL, "recovery.trainable=routers"),
        "local recovery, then distillation": (*DISTILL, LOCAL_FIRST),
        "refit, local recovery, then distillation": (*BEST, LOCAL_FIRST),
        "refit alone": ("recovery=none", "method.refit=true"),
    }
    return [
        Cell(f"{' '.join(method)}: {name}", "ablation", budget, (f"method={name_of_method}", *settings, *overrides))
        for budget in BUDGETS
        for name, overrides in rows.items()
    ]


def at_rate(overrides: Sequence[str], rate: float) -> tuple[str, ...]:
    """Return overrides with another learning rate."""
    name = "recovery.learning_rate="
    return tuple(f"{name}{rate}" if override.startswith(name) else override for override in overrides)


def cells(groups: Sequence[str], method: Sequence[str], seeds: int) -> list[Cell]:
    """Return the cells of some groups with a number of seeds."""
    every = {"recipes": recipes(), "methods": methods(), "ablation": ablation(method)}
    return [replace(cell, seeds=tuple(range(seeds))) for group in groups for cell in every[group]]
