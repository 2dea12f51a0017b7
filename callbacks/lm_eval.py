"""Run lm-eval tasks on the model while it trains: every N optimizer steps and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from recondense import processes
from recondense.errors import UserError
from recondense.models.hooks import eval_mode

Results = dict[str, dict[str, float]]


class LmEval(L.Callback):
    """Evaluate `pl_module.model` with `pl_module.tokenizer`, and log `<stage>/<task>/<metric>`.

    The results are also kept in `pl_module.task_results`, by optimizer step. Training is not affected: the random
    states and the mode of every submodule are restored. A sharded model is evaluated by all processes, an unsharded one
    only by the first, which also logs. The results are saved in checkpoints, so a resumed run does not evaluate a step
    again.

    Args:
        tasks: names of lm-eval tasks; None or an empty list disables the callback.
        every_n_steps: optimizer steps (not batches) between evaluations; 0 evaluates only at the end.
        at_end: also evaluate when training ends, unless its last step was just evaluated.
        limit: examples per task; None for all.
        num_fewshot: examples in the prompt; None for the task's default.
        batch_size: sequences per forward pass.
        include_path: a folder with your own task files, or several.

    Raises:
        UserError: `every_n_steps` is negative.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None,
        every_n_steps: int = 0,
        at_end: bool = True,
        limit: int | None = None,
        num_fewshot: int | None = 0,
        batch_size: int = 8,
        include_path: str | Path | Sequence[str | Path] | None = None,
    ) -> None:
        if every_n_steps < 0:
            raise UserError(f"LmEval: every_n_steps is {every_n_steps}; use 0 to evaluate at the end only")
        self.tasks = tuple(tasks or ())
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self._settings: dict[str, Any] = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "include_path": include_path,
        }
        self._results: dict[int, Results] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._results:  # from before a restart; some engines restore them only after `on_fit_start`
            _kept_results(pl_module).update(self._results)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # While gradients accumulate, several batches end at the same step; `_evaluate` skips a step with results.
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0:
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
        from recondense.recovery.engines import fsdp2
        from recondense.recovery.engines import trainer as trainer_module

        if trainer_module.needs_all_processes(trainer.strategy):
            with fsdp2.unshard_root(pl_module):
                results = self._run(trainer, pl_module)
        else:
            results = processes.run_on_first(lambda: self._run(trainer, pl_module))
        self._results[step] = results
        _kept_results(pl_module)[step] = results
        stage = getattr(pl_module, "stage", "recovery")
        metrics = {
            f"{stage}/{task}/{name}": value for task, scores in results.items() for name, value in scores.items()
        }
        for logger in trainer.loggers:  # they log on the first rank only
            logger.log_metrics(metrics, step=step)

    def _run(self, trainer: L.Trainer, module: Any) -> Results:
        from recondense.evaluation import lm_eval

        with isolate_rng(), eval_mode(module), trainer.precision_plugin.forward_context():
            return lm_eval.run_tasks(module.model, module.tokenizer, list(self.tasks), **self._settings)


def _kept_results(pl_module: L.LightningModule) -> dict[int, Results]:
    if not hasattr(pl_module, "task_results"):
        pl_module.task_results = {}  # type: ignore[assignment]
    return pl_module.task_results  # type: ignore[return-value]
