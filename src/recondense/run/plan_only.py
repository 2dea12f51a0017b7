"""`plan_only` in Python: a model's sizes before and after a method, computed from its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.methods.step import Step
from recondense.models import families, model_classes
from recondense.models.quantized import byte_counter, quantization
from recondense.run.model_checks import planned_config
from recondense.run.print_sizes import weights_dtype
from recondense.run.sizes import Sizes, compare
from recondense.run.steps import as_steps


def plan_only(path: str | Path, steps: Step | Sequence[Step] | str) -> Sizes:
    """Return the sizes of a model before and after a method, computed without weights or texts.

    Args:
        path: a local folder with config.json, or one of the hub ids whose configs are part of the package.
        steps: one step of a method, several, or the name of a method in conf/method.

    Returns:
        Parameters and bytes of the model before and after, and of each decoder layer.

    Raises:
        UserError: the model is unknown, a step does not suit it, or the method cannot meet its budget.

    Examples:
        >>> sizes = rc.plan_only("Qwen/Qwen1.5-MoE-A2.7B", rc.CDMoE(num_experts=4, num_layers=9))
        >>> f"{sizes.after.weights_bytes / sizes.before.weights_bytes:.3f}"
        '0.695'
    """
    planned = planned_config(ModelConfig(path=str(path)), plan_only=True)
    steps = as_steps(steps, planned)
    facts = families.facts(planned)
    if problems := [problem for step in steps for problem in step.check(facts)]:
        raise UserError("\n".join(problems))
    model = model_classes.on_meta(planned, weights_dtype(planned, "auto"))
    return compare(model, steps, byte_counter(model, quantization(planned)))
