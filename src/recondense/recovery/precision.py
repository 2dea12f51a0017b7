"""The precision of training: of the computation and of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.config.schema import TrainerConfig
from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.models.autocast_experts import autocast_experts
from recondense.models.low_rank import LowRankExperts


def resolve_precision(trainer: TrainerConfig, dtype: torch.dtype) -> str:
    """Return Lightning's precision.

    With "auto", a model in half precision computes in bf16, and its trained weights are kept in fp32.
    """
    if trainer.precision == "auto":
        return "32-true" if dtype == torch.float32 else "bf16-mixed"
    return trainer.precision


def refuse_rounding(trainer: TrainerConfig, precision: str, dtype: torch.dtype) -> None:
    """Check that the precision does not round the weights of a model that is not in bf16.

    Raises:
        UserError: it does; the message names a precision that does not.
    """
    if dtype == torch.bfloat16 or not (precision == "bf16-true" or (trainer.deepspeed and precision == "bf16-mixed")):
        return
    instead = "trainer.precision=32-true" if trainer.deepspeed else "trainer.precision=bf16-mixed"
    raise UserError(
        f"trainer.precision={precision} would round all weights of a {dtype} model, including frozen ones; use "
        f"{instead}, or model.dtype=bfloat16"
    )


@contextmanager
def keep_trained_weights(model: PreTrainedModel, precision: str) -> Iterator[None]:
    """Keep trained weights in fp32 inside the context in mixed precision; in bf16, AdamW's small steps would vanish."""
    dtypes = {name: value.dtype for name, value in model.named_parameters() if value.requires_grad}
    mixed = precision.endswith("mixed")
    try:
        if mixed:
            _convert(model, dict.fromkeys(dtypes, torch.float32))
        with autocast_experts(model, mixed and _has_fused_fp32(model)):
            yield
    finally:
        _convert(model, dtypes)


def _has_fused_fp32(model: PreTrainedModel) -> bool:
    """Return whether a model has fused experts with weights in fp32."""
    blocks = moe_blocks.sparse_blocks(model).values()
    fused = [block for block in blocks if not isinstance(block.experts, LowRankExperts)]
    return any(block.fused_weights.down_EDF.dtype == torch.float32 for block in fused)


def _convert(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Convert some of a model's parameters to other dtypes, by name."""
    for name, value in model.named_parameters():
        if name in dtypes:
            value.data = value.data.to(dtypes[name])


class UnusualPrecisions:
    """The tensors of a model that have another dtype than the model, such as routers of some families in fp32.

    bf16-true converts all tensors of a module. Rounded rotary frequencies, for example, would give wrong angles for
    distant positions.

    Args:
        module: a module that will be moved or converted; `restore` undoes the conversion of these tensors.
        dtype: the dtype of the model.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self._buffers = [(part, dict(part._buffers)) for part in module.modules()]
        self._parameters: list[tuple[torch.nn.Parameter, Tensor]] = [
            (parameter, parameter.data)
            for parameter in module.parameters()
            if parameter.dtype != dtype and not parameter.requires_grad
        ]

    def restore(self) -> None:
        """Restore the dtypes of buffers and frozen parameters, on their new device."""
        for part, buffers in self._buffers:
            for name, before in buffers.items():
                after = part._buffers.get(name)
                if before is not None and after is not None and after.dtype != before.dtype:
                    part._buffers[name] = before.to(after.device)
        for parameter, data in self._parameters:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
