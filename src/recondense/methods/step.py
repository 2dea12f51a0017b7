"""The protocol of a method's steps: everything that the rest of the package knows of a method.

A step holds settings alone. A method is a file with such a class, and a YAML in conf/method that names it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.budget import Budget
from recondense.models.families import Facts
from recondense.operations import Operation

Record = dict[str, Any]  # JSON values: keys are texts, and tuples are lists
Cache = MutableMapping[str, Record]


@dataclass(frozen=True)
class SearchContext:
    """What a search works on.

    Args:
        model: the causal LM as the steps before left it. A search leaves it bit-identical.
        tape: returns the hidden states on the calibration set. A search calls it only if the cache lacks something.
        cache: partial results of earlier searches with the same weights, calibration set and `Step.key`. A search
            writes to it as it goes, so that it can resume.
        max_scratch_bytes: bound on temporary tensors. The result does not depend on it.
    """

    model: PreTrainedModel
    tape: Callable[[], Tape]
    cache: Cache
    max_scratch_bytes: int


class Step(Protocol):
    """One step of a method: its settings, and the search that turns them into operations.

    Implementations are frozen dataclasses. A field whose default is itself a dataclass, such as a `Budget`, takes its
    settings from beside the step's own in the YAML. A constructor raises UserError for settings outside their range,
    with all problems in one message, one a line.
    """

    @property
    def budget(self) -> Budget:
        """How much the step has to remove."""

    @property
    def condenses(self) -> bool:
        """True if some operations may be `Condense`."""

    @property
    def removes_layers(self) -> bool:
        """True if MoE blocks or decoder layers go with all they hold, not only routed experts and routers."""

    @property
    def needs_whole_experts(self) -> bool:
        """True if the experts of the model must not be factorized already."""

    @property
    def left_open(self) -> str:
        """Which sizes in `outline` the calibration set may change, in words; empty if none."""

    def check(self, facts: Facts) -> list[str]:
        """List the problems of these settings on a model, as sentences.

        Args:
            facts: read from the model's config.
        """

    def key(self) -> dict[str, Any]:
        """The settings that a cached result depends on; JSON values. Budgets are not among them."""

    def outline(self, model: PreTrainedModel) -> Sequence[Operation]:
        """Operations of the sizes that the search will reach, from shapes alone. Which experts and layers is made up.

        Args:
            model: may be on the meta device.

        Raises:
            UserError: the budget cannot be kept.
        """

    def search(self, context: SearchContext) -> tuple[Sequence[Operation], Record]:
        """Decide the operations.

        Returns:
            the operations in the order in which they were chosen, and what decided them, for plan.json. Two entries of
            the record are logged and not kept: `seconds` by part of the search, and `reused`, in words.

        Raises:
            UserError: the budget cannot be kept, or the calibration set does not suffice.
        """
