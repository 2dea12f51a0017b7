"""APPLY: execute a plan. The result is a Student."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedModel

from recondense.calibration.calibrate import retape
from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.models.layer_shapes import differs_from_config, refuse_bundled_classes
from recondense.operations import Refit
from recondense.plan import Plan
from recondense.surgery.execute import RecordTape, execute, restore_on_error
from recondense.surgery.student import Student


def apply(model: PreTrainedModel, plan: Plan, tape: Tape | RecordTape | None = None, *, refit: bool = True) -> Student:
    """Execute a plan: compress a model in place.

    Args:
        model: a causal LM of a supported family, as it was loaded. It becomes the compressed model.
        plan: the operations, from a search or from `Plan.load`.
        tape: the tape from `calibrate`, or a function that records one of the model as it is. Plans with whitening or a
            refit need it. The texts of a tape are recorded again when the model has changed.
        refit: whether to execute the plan's refits. Otherwise `Student.refit` does so later.

    Returns:
        The student: the model, the plan, and the original blocks that were replaced.

    Raises:
        UserError: an operation does not fit the model; the plan needs a tape, and there is none; the tape is of another
            model; or the model has been compressed since it was loaded. The model is then left as it was.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> with student.original() as original:
        ...     logits_BSV = original(**tokenizer("some text", return_tensors="pt")).logits
        >>> student.plan.layers  # this model has three MoE layers
        (0, 1, 2)
    """
    require_uncompressed(model)
    if isinstance(tape, Tape) and tape.model is not model:
        raise UserError("the tape is of another model; calibrate the model that the plan is applied to")
    record = partial(retape, tape) if isinstance(tape, Tape) else tape
    needs_tape = refit and any(isinstance(operation, Refit) for operation in plan.operations)
    if needs_tape and record is None:
        raise UserError("plan: refit needs the calibration set, but there is no tape")
    student = Student(model, plan, execute(model, plan, record))
    if needs_tape and record is not None:
        with restore_on_error(model, student.originals):
            student.refit(record)
    model.requires_grad_(False)
    return student


def require_uncompressed(model: PreTrainedModel) -> None:
    """Refuse a model that `apply` has compressed since it was loaded: its config still describes the original.

    Raises:
        UserError: it was compressed, or its classes come from a bundled export.
    """
    refuse_bundled_classes(model)
    if differs_from_config(model):
        raise UserError(
            "the model has been compressed since it was loaded. Search all steps together, as a list, or export the "
            "student and load the exported folder"
        )
