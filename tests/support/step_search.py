"""The search of a step, as the pipeline calls it."""

from __future__ import annotations

from typing import Any

from recondense.methods.step import SearchContext
from recondense.models import families
from support.tiny_models import recorded, unchanged


def search(step: Any, model: Any) -> tuple[list[Any], dict[str, Any]]:
    """Check the step, then return its operations and its record. The search must not change the model."""
    assert step.check(families.facts(model.config)) == []
    with unchanged(model):
        result: tuple[list[Any], dict[str, Any]] = step.search(
            SearchContext(model, lambda: recorded(model), {}, 1 << 30)
        )
    return result
