"""Make AdamW and its learning-rate schedule for the trained parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from recondense.config.schema import RecoveryConfig
from recondense.models import moe_blocks
from recondense.recovery.engines import full_tensors


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return a module's trained parameters as parameter groups for an optimizer.

    Norms and biases have no weight decay, whatever their shape.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = full_tensors.num_dimensions(parameter) > 1 and not moe_blocks.is_norm_or_bias(module, name)
            (decayed if matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], settings: RecoveryConfig) -> dict[str, Any]:
    """Make AdamW and its schedule in the form that Lightning's `configure_optimizers` returns."""
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        fused=settings.fused_optimizer or None,
    )
    schedule = get_scheduler(
        settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
