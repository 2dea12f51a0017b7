"""The part of a student that one stage trains: some of its weights, adapters, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from recondense.config.schema import RecoveryConfig
from recondense.models import moe_blocks
from recondense.models.replacement_blocks import CondensedMoE
from recondense.recovery import lora, trainable
from recondense.surgery.student import Student


@dataclass
class TrainedPart:
    """The part of a student that a stage trains. Use `begin` to make one.

    Args:
        student: the student. All its other weights are frozen.
        settings: the settings of the stage.
        layers: decoder layers whose experts and routers are trained.
        adapters: the adapters of the stage; None if it only trains weights of the model itself.
    """

    student: Student
    settings: RecoveryConfig
    layers: Sequence[int]
    adapters: lora.Adapters | None = None

    @classmethod
    def begin(cls, student: Student, settings: RecoveryConfig, layers: Sequence[int] | None) -> TrainedPart:
        """Freeze a student and prepare its trained part: copy the weights that the original shares, or add adapters.

        Args:
            student: the student.
            settings: the settings of the stage.
            layers: decoder layers whose experts and routers are trained; None for the layers of the student's plan.

        Raises:
            UserError: there is nothing to train.
        """
        model = student.model
        layers = student.plan.layers if layers is None else layers
        trainable.check_trainable(student, layers, settings)
        model.requires_grad_(False)
        part = cls(student, settings, layers)
        if settings.fold_coefficients and not {"experts", "all"}.isdisjoint(settings.parts):
            fold_coefficients(model, trainable.trainable_layers(model, layers))
        student.separate(part._weights())
        if "lora" in settings.parts:
            part.adapters = lora.inject(student, trainable.trainable_layers(model, layers), settings.lora)
        return part

    def unfreeze(self) -> None:
        """Unfreeze the part."""
        for parameter in self._parameters():
            parameter.requires_grad_(True)

    def _parameters(self) -> list[nn.Parameter]:
        adapters = [] if self.adapters is None else self.adapters.parameters()
        assert adapters or "lora" not in self.settings.parts, "the adapters were merged: the stage is over"
        return [*adapters, *self._weights()]

    def _weights(self) -> list[nn.Parameter]:
        """Return the weights of the model itself that are trained."""
        parts, router_layers = self.settings.parts, self.settings.router_layers
        return list(trainable.trainable_parameters(self.student.model, self.layers, parts, router_layers).values())

    def merge_adapters(self) -> None:
        """Merge any adapters into the weights. The stage cannot be trained further afterwards."""
        if self.adapters is not None:
            self.adapters.merge()
            self.adapters = None

    def remove_adapters(self) -> None:
        """Take the adapters out without merging them, if there are any."""
        if self.adapters is not None:
            self.adapters.remove()
            self.adapters = None


def fold_coefficients(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Multiply the constants of condensed layers into their weights, so that AdamW's steps are those of the product."""
    for layer in layers:
        block = moe_blocks.get_block(model, layer)
        if isinstance(block, CondensedMoE):
            block.fold()
