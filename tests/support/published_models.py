"""The published models by name."""

from __future__ import annotations

from recondense.report.published import MODELS, Model


def model_named(name: str) -> Model:
    """Return the facts of a published model."""
    return {model.name: model for model in MODELS}[name]
