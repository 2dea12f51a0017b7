"""Run lm-eval tasks on the model while it trains: before the first step, every N optimizer steps, and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from recondense import processes
from recondense.errors import UserError
from recondense.models.hooks import eval_mode

Results = dict[str, dict[str, float]]
# With every_n_steps="auto": a training has at most this many intervals, and each has at least so many steps.
INTERVALS, SHORTEST = 4, 25


class LmEval(L.Callback):
    """Evaluate `pl_module.model` with `pl_module.tokenizer`, and log `<stage>/<task>/<metric>`.

    The results are also kept in `pl_module.task_results`, by optimizer step. Training is not affected: the random
    states and the mode of every submodule are restored. A sharded model is evaluated by all processes, an unsharded one
    only by the first, which also logs. The results are saved in checkpoints, so a resumed run does not evaluate a step
    again.

    Args:
        tasks: names of lm-eval tasks; None or an empty list disables the callback.
        every_n_steps: optimizer steps (not batches) between evaluations; "auto" divides the training into at most four
            intervals of at least 25 steps; 0 evaluates only at the start and the end.
        at_start: also evaluate before the first step. A resumed training does not evaluate at its start.
        at_end: also evaluate when training ends, unless its last step was just evaluated.
        limit: examples per task, as in lm-eval: of each task in a group; None for all.
        total_limit: examples per name in `tasks`, shared by the tasks of a group or tag; None for all.
        num_fewshot: examples in the prompt; None for the task's default.
        batch_size: sequences per forward pass.
        include_path: a folder with your own task files, or several.
        timed: returns a context in which the model is evaluated, for example one that counts seconds.

    Raises:
        UserError: `every_n_steps` is negative.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None,
        every_n_steps: int | Literal["auto"] = 0,
        at_start: bool = True,
        at_end: bool = True,
        limit: int | None = None,
        total_limit: int | None = None,
        num_fewshot: int | None = 0,
        batch_size: int = 8,
        include_path: str | Path | Sequence[str | Path] | None = None,
        timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if every_n_steps != "auto" and every_n_steps < 0:
            raise UserError(
                f"LmEval: every_n_steps is {every_n_steps}; use 0 to evaluate at the start and the end only"
            )
        self.tasks = tuple(tasks or ())
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self._timed = timed
        self._interval = 0  # optimizer steps between evaluations of the running training; 0 for none
        self._settings: dict[str, Any] = {
            "limit": limit,
            "total_limit": total_limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "include_path": include_path,
        }
        self._results: dict[int, Results] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._results:  # from before a restart; some engines restore them only after `on_fit_start`
            _kept_results(pl_module).update(self._results)
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._interval = every_steps(steps) if self.every_n_steps == "auto" else self.every_n_steps
        if self.at_start and trainer.global_step == 0:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # While gradients accumulate, several batches end at the same step; `_evaluate` skips a step with results.
        step = trainer.global_step
        if self._interval and step and step % self._interval == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end:
            self._evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"results": self._results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._results = {int(step): results for step, results in state_dict["results"].items()}

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if not self.tasks or step in self._results:
            return
        with self._timed():
            results = self._run_together(trainer, pl_module)
        self._results[step] = results
        _kept_results(pl_module)[step] = results
        stage = getattr(pl_module, "stage", "recovery")
        metrics = {
            f"{stage}/{task}/{name}": value for task, scores in results.items() for name, value in scores.items()
        }
        for logger in trainer.loggers:  # they log on the first rank only
            logger.log_metrics(metrics, step=step)

    def _run_together(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Results:
        from recondense.recovery.engines import fsdp2
        from recondense.recovery.engines import trainer as trainer_module

        if not trainer_module.needs_all_processes(trainer.strategy):
            return processes.run_on_first(lambda: self._run(trainer, pl_module))
        if trainer.global_step == 0:
            with isolate_rng(), eval_mode(pl_module):
                fsdp2.prepare_passes(pl_module)
        with fsdp2.unshard_root(pl_module):
            return self._run(trainer, pl_module)

    def _run(self, trainer: L.Trainer, module: Any) -> Results:
        from recondense.evaluation import lm_eval

        with isolate_rng(), eval_mode(module), trainer.precision_plugin.forward_context():
            return lm_eval.run_tasks(module.model, module.tokenizer, list(self.tasks), **self._settings)


def every_steps(steps: float) -> int:
    """Return the optimizer steps between evaluations for every_n_steps="auto"; 0 without an end in sight.

    Args:
        steps: the optimizer steps of the training, which may be infinite.
    """
    return max(SHORTEST, math.ceil(steps / INTERVALS)) if math.isfinite(steps) else 0


def _kept_results(pl_module: L.LightningModule) -> dict[int, Results]:
    if not hasattr(pl_module, "task_results"):
        pl_module.task_results = {}  # type: ignore[assignment]
    return pl_module.task_results  # type: ignore[return-value]
