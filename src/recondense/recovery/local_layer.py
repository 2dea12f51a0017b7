"""Train one block on its recorded inputs and targets: no attention, no head, no other layer.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from recondense.config.schema import RecoveryConfig
from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.recovery.local_tape import BlockData
from recondense.recovery.optimizer import make_optimizer, parameter_groups

Errors = dict[str, float]


@torch.no_grad()
def relative_error(block: nn.Module, data: BlockData, at_once: int) -> float:
    """Return ‖target − output‖_F / ‖target‖_F over all windows, of which `at_once` run together."""
    squares = total = 0.0
    for windows in _in_turns(len(data), at_once):
        x_TD, target_TD = data.batch(windows)
        squares += float(_difference(block, x_TD, target_TD).double().square().sum())
        total += float(target_TD.double().square().sum())
    return float((squares / max(total, 1e-300)) ** 0.5)


def train_block(
    block: nn.Module,
    data: BlockData,
    rows: Callable[[int], Sequence[int]],
    settings: RecoveryConfig,
    autocast: Callable[[], torch.autocast],
    advance: Callable[[int, float], None],
) -> None:
    """Minimize the squared error of a block's outputs, relative to the mean square of all targets, with AdamW.

    So a loss of 1 is that of a block that returns zeros, in every layer, and one learning rate suits all layers.

    Args:
        block: the block; its parameters that require a gradient are trained in place.
        data: its inputs and targets.
        rows: returns the windows of the batch at a position, counted from 0.
        settings: steps, accumulated batches, optimizer, schedule and clipping.
        autocast: makes a context for the forward pass.
        advance: called after each step with its number, from 1, and its loss.

    Raises:
        UserError: a loss is not finite.
    """
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    made = make_optimizer(parameter_groups(block, settings.weight_decay), settings)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    scale, accumulate = mean_square(data), settings.accumulate_grad_batches
    for step in range(settings.steps):
        batches = [rows(step * accumulate + index) for index in range(accumulate)]
        tokens = sum(map(data.num_tokens, batches))
        loss = 0.0
        for windows in batches:
            x_TD, target_TD = data.batch(windows)
            with autocast():
                difference_TD = _difference(block, x_TD, target_TD)
            part = difference_TD.square().sum() / (max(1, tokens) * target_TD.shape[1] * scale)
            part.backward()
            loss += float(part.detach())
        if settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if not loss < float("inf"):
            raise UserError(
                f"the loss of step {step + 1} is {loss}, so the training diverges. Lower the learning rate, or check "
                "the training data"
            )
        advance(step + 1, loss)


def mean_square(data: BlockData) -> float:
    """Return the mean square of all targets."""
    squares, number = 0.0, 0
    for window in range(len(data)):
        target_TD = data.target(window)
        squares += float(target_TD.double().square().sum())
        number += target_TD.numel()
    return max(squares / max(1, number), 1e-30)


def _difference(block: nn.Module, x_TD: Tensor, target_TD: Tensor) -> Tensor:
    return moe_blocks.block_output(block(x_TD[None]))[0].float() - target_TD.float()


def _in_turns(number: int, at_once: int) -> Iterator[range]:
    return (range(start, min(start + at_once, number)) for start in range(0, number, at_once))
