"""Log a run's plan and the folder of its export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recondense.models import families
from recondense.report import tracking
from recondense.report.plan_picture import draw_plan

log = logging.getLogger(__name__)


class PlanLogging(L.Callback):
    """Log `pl_module.plan` once, as a table and as a picture, and at the end the folder of the export.

    Use it with your own Trainer: `recondense.run.pipeline` logs the plan itself, even if nothing is trained. Nothing is
    logged without a plan or with an empty one.

    Args:
        folder: the folder for `plan.png`; None for the Trainer's default folder.
        export_folder: the folder of the exported model; None if there is no export.
    """

    def __init__(self, folder: str | Path | None = None, export_folder: str | Path | None = None) -> None:
        self.folder = folder
        self.export_folder = export_folder
        self._logged = False

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plan: Any = getattr(pl_module, "plan", None)
        if self._logged or plan is None or not plan.operations:
            return
        self._logged = True
        facts = families.facts(cast(Any, pl_module).model.config)
        path = Path(self.folder or trainer.default_root_dir) / "plan.png"
        picture = draw_plan(plan.to_dict(), facts.num_experts, facts.moe_layers, path)
        tracking.log_plan(trainer.loggers, plan.to_dict(), picture)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.export_folder is not None:
            tracking.log_export(trainer.loggers, Path(self.export_folder))
            log.info("the model will be exported to %s", self.export_folder)

    def state_dict(self) -> dict[str, Any]:
        return {"logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = state_dict["logged"]
