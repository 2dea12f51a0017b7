"""Make the block of a layer for each of its options, to measure the options before one is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.moments import inner_moments
from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.methods.search import ranks
from recondense.methods.search.cdmoe_search import condensed_block
from recondense.models import moe_blocks
from recondense.models.factors import Factors, factors
from recondense.models.low_rank import LowRankExperts
from recondense.models.moe_blocks import SparseBlock
from recondense.models.narrowing import narrow_experts
from recondense.operations import Condense, Factorize, Narrow, Operation, Prune


class OptionBlocks:
    """Makes the blocks of one layer after another.

    Factors and traces are kept until `release`, for other options of the layer. If the processes share the texts, all
    of them make the same blocks in the same order.

    Args:
        model: the recorded model.
        tape: its hidden states.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self._traces: Sequence[LayerTrace] | None = None
        self._factors: dict[tuple[int, int, str], Factors] = {}

    def make(self, block: SparseBlock, operations: Sequence[Operation]) -> nn.Module | None:
        """Make the block after some operations, without copying unchanged experts; None is the original block."""
        retained = tuple(range(block.num_experts))
        module: nn.Module | None = None
        experts: nn.Module | None = None
        for operation in operations:
            if isinstance(operation, Condense):
                return condensed_block(block, operation)
            if isinstance(operation, Narrow):
                experts = self._narrow(block, operation)
                module = moe_blocks.replace_parts(block.module, experts=experts)
            if isinstance(operation, Prune):
                retained = operation.retained
                module = moe_blocks.replace_parts(moe_blocks.masked_block(block, retained), experts=experts)
            if isinstance(operation, Factorize):
                return moe_blocks.replace_parts(
                    block.module,
                    router=moe_blocks.pruned_router(block, retained),
                    experts=self._factorize(block, retained, operation),
                )
        return module

    def release(self) -> None:
        """Free what was made for the current layer."""
        self._factors.clear()
        self._traces = None

    def _narrow(self, block: SparseBlock, operation: Narrow) -> nn.Module:
        """Make the experts that surgery makes: their least squares see all texts, of all processes."""
        if self._traces is None:
            tape = self.tape.excerpt([block.layer] * processes.world_size())
            assert tape is not None
            self._traces = tape.trace(self.model, block.layer)
        moment = inner_moments(block.weights, self._traces) if operation.compensate else None
        return narrow_experts(block, operation.channels, moment)

    def _factorize(self, block: SparseBlock, retained: tuple[int, ...], operation: Factorize) -> LowRankExperts:
        weights = block.weights
        _, hidden_size, expert_width = weights.down_EDF.shape
        with torch.device(weights.down_EDF.device):
            low_rank = LowRankExperts(hidden_size, expert_width, operation.ranks, weights.glu, bool(weights.biases()))
        biases = {name: bias[list(retained)] for name, bias in weights.biases().items()}
        return low_rank.to(weights.down_EDF.dtype).fill(
            lambda place: weights.projections(retained[place]), partial(self._factors_of, block, retained), biases
        )

    def _factors_of(
        self, block: SparseBlock, retained: tuple[int, ...], place: int, name: str
    ) -> tuple[Tensor, Tensor]:
        key = block.layer, retained[place], name
        if key not in self._factors:
            weights = block.weights
            _, hidden_size, expert_width = weights.down_EDF.shape
            most = math.ceil(ranks.break_even(hidden_size, expert_width))  # no expert's rank is above it
            output_factor, input_factor = factors(weights.projections(retained[place])[name])
            self._factors[key] = Factors(output_factor[:, :most].clone(), input_factor[:most].clone())
        return self._factors[key]
