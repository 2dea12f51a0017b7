"""What a run shows and leaves: the picture of its plan, its summary from its records, and its export."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.config.rounds import rounds_of
from recondense.config.schema import Config
from recondense.config.stages import without_teacher
from recondense.data.tokens import Tokens
from recondense.export.export import export
from recondense.models import families
from recondense.models.quantized import StoredWeights, bytes_on_disk
from recondense.plan import Plan
from recondense.progress import progress
from recondense.report import model_card, tracking
from recondense.report.figures import try_to_draw
from recondense.report.plan_picture import draw_plan
from recondense.report.summary import Summary
from recondense.run.inputs import keep_export
from recondense.run.recover import DESCRIBED_IF_CHANGED
from recondense.run.run_record import RunRecord, name_of_round
from recondense.surgery.student import Student

log = logging.getLogger(__name__)


def summary_of(
    config: Config,
    plan: Plan,
    sizes: Mapping[str, Mapping[str, int]],
    model: PreTrainedModel,
    tokens: Tokens,
    record: RunRecord,
    recovery_stages: list[dict[str, Any]],
) -> Summary:
    """Return the summary of a run. Only the first process may call this function.

    Args:
        config: settings of the run.
        plan: the plan of all rounds.
        sizes: parameters of the original and of the compressed model.
        model: the compressed model.
        tokens: token ids of the run.
        record: the figures of the run.
        recovery_stages: description of each recovery stage, of all rounds.
    """
    objective = (config.recovery if plan.operations else without_teacher(config.recovery)).objective
    summary = Summary.of_run(config, objective, plan, sizes, model, tokens.sha256, record.stages)
    summary.refit = record.refit_errors or None
    described = config.recovery.stages or config.recovery.trainable != "experts"
    described = described or any({"layers", *DESCRIBED_IF_CHANGED} & stage.keys() for stage in recovery_stages)
    if described or any(windows.counts for windows in tokens.stages.values()):
        summary.recovery_stages = recovery_stages or None
    count = rounds_of(config.method)
    if count > 1:
        summary.rounds = [dict(record.stages[name_of_round(number)]) for number in range(1, count)]
        summary.rounds.append({**_last_figures(record), "parameters": sizes["compressed"]["total"]})
    return summary


def _last_figures(record: RunRecord) -> dict[str, Any]:
    """Return the quality of the model at the end of a run."""
    last = next(stage for stage in ("recovered", "refitted", "compressed", "original") if stage in record.stages)
    return {name: value for name, value in record.stages[last].items() if isinstance(value, float)}


def draw_and_log(plan: Plan, model: PreTrainedModel, folder: Path, loggers: Sequence[Logger]) -> None:
    """Draw the plan of a run, and log plan and picture. Only the first process may call this function."""
    facts = families.facts(model.config)
    data, path = plan.to_dict(), folder / "plan.png"
    picture = try_to_draw(lambda: draw_plan(data, facts.num_experts, facts.moe_layers, path), path)
    tracking.log_plan(loggers, data, picture)


def export_student(
    config: Config,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    summary: Summary,
    stored: StoredWeights | None,
) -> None:
    """Write the folder `model` of a run. Only the first process may call this function.

    Args:
        config: settings of the run.
        student: the student after all stages.
        tokenizer: its tokenizer.
        folder: the run's folder.
        summary: the summary, which also says what was exported.
        stored: size and format of the original's files, if it is quantized.
    """
    model = folder / "model"

    def card(exported: Path) -> str:
        if stored and student.plan.operations:
            summary.count_bytes_on_disk(stored, bytes_on_disk(exported) or 0)
        return model_card.model_card(summary.to_dict())

    with progress("exporting"):
        kind = export(student, tokenizer, model, config.export, card=card)
    keep_export(folder)
    log.info("exported: %s (%s)", model, kind)
    summary.artifacts |= {"model": "model", "export_format": kind}
