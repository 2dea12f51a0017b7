"""The protocol of a method's steps: everything that the rest of the package knows about a method.

A step has only settings. A method is a file with such a class, and a YAML in conf/method that names the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.data.calibration_set import CalibrationSet
from recondense.methods.search.budget import Budget
from recondense.models.families import Facts
from recondense.operations import Operation

Record = dict[str, Any]  # JSON values: string keys, and lists instead of tuples
Cache = MutableMapping[str, Record]


@dataclass(frozen=True)
class SearchContext:
    """The inputs of a search.

    Args:
        model: the causal LM after the earlier steps. A search leaves it bit-identical.
        tape: returns the hidden states on the calibration set. A search calls it only if the cache lacks something.
        cache: partial results of earlier searches with the same weights, calibration set and `Step.key`. A search
            writes to it while it works, so that it can resume.
        max_scratch_bytes: bound on temporary tensors. The result does not depend on it.
        calibration_set: the token ids of the calibration set, also of the parts of its texts that are not on the tape;
            None if nothing but the tape is known.
        split: whether the processes of the run share the texts. All of them then make the same search.
        protected: the super experts of each layer. A search should lose none of them if it can meet its budget
            otherwise; what it loses is reported after the search.
        unchanged: the number of layers, from the lowest, that are as they were before the first of several rounds.
        inherited: the cache of the first round, or of any other run that searches the original.
    """

    model: PreTrainedModel
    tape: Callable[[], Tape]
    cache: Cache
    max_scratch_bytes: int
    calibration_set: CalibrationSet | None = None
    split: bool = False
    protected: Mapping[int, frozenset[int]] = field(default_factory=dict)
    unchanged: int = 0
    inherited: Cache | None = None

    def cache_of(self, layer: int) -> Cache:
        """Return the cache for what depends on a layer and on the layers below it, but not on those above it."""
        return self.cache if self.inherited is None or layer >= self.unchanged else self.inherited


class Step(Protocol):
    """One step of a method: its settings, and the search that turns them into operations.

    Implementations are frozen dataclasses. If the default of a field is itself a dataclass, such as a `Budget`, its
    settings are on the same level as the step's other settings in the YAML. A constructor raises UserError for settings
    outside their range, with all problems in one message, one per line.
    """

    @property
    def budget(self) -> Budget:
        """How much the step must remove."""

    @property
    def condenses(self) -> bool:
        """Whether operations of the step may be `Condense`."""

    @property
    def removes_layers(self) -> bool:
        """Whether the step may remove entire MoE blocks or decoder layers, not only routed experts and routers."""

    @property
    def needs_whole_experts(self) -> bool:
        """Whether the step needs experts that are not yet factorized."""

    @property
    def repeatable(self) -> bool:
        """Whether the step can run again on a model that it has already compressed, as `method.rounds` needs it."""

    @property
    def left_open(self) -> str:
        """The sizes in `outline` that depend on the calibration set, in words; empty if there are none."""

    def check(self, facts: Facts) -> list[str]:
        """Return the problems of these settings for a model, as sentences.

        Args:
            facts: facts about the model, read from its config.
        """

    def key(self) -> dict[str, Any]:
        """Return the settings on which a cached result depends, as JSON values. Budgets are not among them."""

    def for_round(self, number: int, count: int, model: PreTrainedModel) -> Step | None:
        """Return the step for one of several rounds, after which number / count of the removal is done.

        It is only called if the step is repeatable. Other steps run in the last round only. Budgets count what earlier
        rounds have removed, so the last part has the budget of the step itself.

        Args:
            number: the number of the round, from 1.
            count: the number of rounds, at least 2.
            model: the model before the first round; it may be on the meta device.

        Returns:
            The step, or None if it has nothing to do in this round.

        Raises:
            UserError: the budget cannot be met.
        """

    def outline(self, model: PreTrainedModel) -> Sequence[Operation]:
        """Return operations of the sizes that the search will reach, with placeholders for the experts and layers.

        Args:
            model: the model; it may be on the meta device, because only shapes are used.

        Raises:
            UserError: the budget cannot be met.
        """

    def search(self, context: SearchContext) -> tuple[Sequence[Operation], Record]:
        """Decide the operations.

        Args:
            context: the model, its tape and the cache.

        Returns:
            The operations in the order in which they were chosen, and the record for plan.json that explains them. Two
            entries of the record are only logged: `seconds`, by part of the search, and `reused`, in words.

        Raises:
            UserError: the budget cannot be met, or the calibration set is too small.
        """
