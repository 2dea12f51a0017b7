"""A Student: a compressed model and its original, on one backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.record import retape
from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.models import decoder, views
from recondense.models.parameters import resident_bytes
from recondense.operations import Refit
from recondense.plan import Plan
from recondense.surgery import apply as surgery

Record = Callable[[], Tape]


class Footprint(NamedTuple):
    """Bytes in memory.

    Args:
        student: the compressed model.
        with_original: the student and its original on one backbone, shared weights once.
        apart: the two as separate models.
    """

    student: int
    with_original: int
    apart: int


class Additions(Protocol):
    """Parts that a training puts into a model for its duration, such as adapters."""

    def disable(self) -> AbstractContextManager[None]:
        """A context in which the model computes as if they were not there."""


class Student:
    """A compressed model and its original, on one backbone.

    Attention, norms, embeddings, head and unchanged layers exist once. The student keeps beside the model only what the
    original has to itself: the blocks that surgery replaced, and the weights that training replaced.

    `execute` makes a student. Its weights are frozen until a recovery trains some of them.

    Args:
        model: the compressed model. Inside `original()` the same object is the uncompressed one.
        plan: the plan that it was compressed by.
        originals: the replaced blocks by decoder-layer index; a decoder layer where the plan removed all of it. None or
            empty: the model has no original apart from itself. They are frozen here.

    Attributes:
        additions: parts that a training has put in, such as adapters. `original()` disables them.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, originals: Mapping[int, nn.Module] | None = None) -> None:
        self.model = model
        self.plan = plan
        self.additions: Additions | None = None
        self._originals = dict(originals or {})
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._offloaded: dict[str, nn.Parameter] = {}
        for block in self._originals.values():
            block.requires_grad_(False)

    @property
    def originals(self) -> dict[int, nn.Module]:
        """The original's blocks by decoder-layer index; empty while they are offloaded and once they are released."""
        return {} if self._offloaded else self._originals

    @property
    def has_original(self) -> bool:
        """Whether there is an original to compare with: the plan changed something, and the original is in memory."""
        return bool(self.originals)

    def original(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which `model` is the uncompressed model. No weight is copied.

        If the plan changes nothing, it is the model as it is. An original that was released or is offloaded cannot be
        asked: an AssertionError.

        Example:
            >>> with student.original() as model:
            ...     logits = model(input_ids).logits
        """
        released = not self._originals and bool(surgery.structural_operations(self.plan))
        assert not self._offloaded and not released, "the original was released"
        return self._swap()

    @contextmanager
    def _swap(self) -> Iterator[PreTrainedModel]:
        with ExitStack() as stack:
            if self.additions is not None:
                stack.enter_context(self.additions.disable())
            trained = [(module, name, module._parameters[name]) for module, name, _ in self._kept]
            stack.enter_context(views.swap_blocks(self.model, self._originals))
            for module, name, weight in self._kept:
                module._parameters[name] = weight
            try:
                yield self.model
            finally:
                for module, name, parameter in trained:
                    module._parameters[name] = parameter

    def refit(self, record: Record) -> dict[int, dict[str, float]]:
        """Execute the plan's refits: solve output weights by least squares on the calibration set.

        Args:
            record: tapes the model on the calibration set as it is when called.

        Returns:
            By layer, ‖target − output‖ / ‖target‖ of its output before and after. Empty if the plan has no refit.
        """
        return surgery.refit(self.model, self.plan, self._originals, record)

    def give_own_copies(self, layers: Sequence[int]) -> None:
        """Copy the experts of some layers that the original uses too, so that training does not change the original.

        Experts that only the student uses are left alone. All other weights stay shared.

        Args:
            layers: decoder-layer indices.
        """
        if not self._originals:
            return
        for layer in layers:
            block = views.get_block(self.model, layer)
            original = self._originals.get(layer, block)
            weights = {id(parameter) for parameter in original.parameters()}
            experts = views.expert_modules(self.model, layer)
            shared = {name: part for name, part in experts.items() if any(id(p) in weights for p in part.parameters())}
            if not shared:
                continue
            copied = views.replace_parts(block)
            for name, part in shared.items():
                setattr(copied, name, copy.deepcopy(part))
            views.set_block(self.model, layer, copied)
            self._originals[layer] = original

    def replace_weights(self, replacements: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Replace weights of the model. The original keeps those that it uses.

        Args:
            replacements: a module of the model, the name of its parameter, and the new weight; taken one at a time.
        """
        used: set[int] = set()
        if self._originals:
            with self._swap() as model:
                used = {id(parameter) for parameter in model.parameters()}
        for module, name, weight in replacements:
            before = module._parameters[name]
            assert before is not None
            module._parameters[name] = weight
            if id(before) in used:
                self._kept.append((module, name, before))

    def kept_weights(self) -> list[nn.Parameter]:
        """The weights that only the original uses since `replace_weights`."""
        return [weight for _, _, weight in self._kept]

    def changed_layers(self) -> set[int]:
        """Decoder layers in which student and original differ, not counting `additions`."""
        modules = {id(module) for module, _, _ in self._kept}
        layers = enumerate(decoder.decoder_layers(self.model))
        replaced = {layer for layer, module in layers if any(id(inner) in modules for inner in module.modules())}
        return replaced | set(self._originals)

    def release_original(self) -> None:
        """Free the memory of everything that only the original uses. There is no original any more."""
        self._originals, self._kept = {}, []

    @contextmanager
    def offload_original(self, path: Path) -> Iterator[None]:
        """Inside, the blocks that only the original has lie in a file and `original()` must not be called.

        After, they are loaded back. Where an engine has moved the model's weights to another process meanwhile, the
        original is released instead.

        Args:
            path: the safetensors file; it is deleted at the end.
        """
        assert self.has_original
        used = {id(parameter) for parameter in (*self.model.parameters(), *self.kept_weights())}
        weights = {
            f"{layer}.{name}": parameter
            for layer, block in self._originals.items()
            for name, parameter in block.named_parameters()
            if id(parameter) not in used
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in weights.items()}, path)
        devices = {name: parameter.device for name, parameter in weights.items()}
        for parameter in weights.values():
            parameter.data = parameter.data.new_empty(0)
        self._offloaded = weights
        try:
            yield
        finally:
            self._offloaded = {}
            if any(parameter.is_meta for parameter in self.model.parameters()):
                self.release_original()
            else:
                with safe_open(path, framework="pt") as file:
                    for name, parameter in weights.items():
                        parameter.data = file.get_tensor(name).clone().to(devices[name])
            path.unlink()

    def footprint(self) -> Footprint:
        """Bytes in memory of the student, of the student with its original, and of the two apart."""
        student = resident_bytes(self.model)
        together = resident_bytes(self.model, *self.originals.values(), nn.ParameterList(self.kept_weights()))
        with self.original() as model:
            return Footprint(student, together, student + resident_bytes(model))


def apply(model: PreTrainedModel, plan: Plan, tape: Tape | Record | None = None, *, refit: bool = True) -> Student:
    """Compress a model in place: execute a plan.

    Args:
        model: a causal LM of a known family; afterwards it is the compressed model.
        plan: the operations, from a search or from `Plan.load`.
        tape: of the model on the calibration set, whose texts are taped again as the model changes; or a function that
            does so. Plans that whiten or refit need it.
        refit: execute the plan's refits too. Otherwise `Student.refit` does so later.

    Returns:
        The student: the model, the plan, and the original blocks that surgery replaced.

    Raises:
        UserError: an operation does not fit the model; then the model is as it was. The plan needs the calibration set
            and there is no `tape`.

    Example:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2)), tape)
        >>> with student.original() as original:
        ...     logits_BSV = original(**tokenizer("some text", return_tensors="pt")).logits
        >>> student.plan.layers
        (0, 1, 2)
    """
    record = partial(retape, tape) if isinstance(tape, Tape) else tape
    needs_tape = refit and any(isinstance(operation, Refit) for operation in plan.operations)
    if needs_tape and record is None:
        raise UserError("plan: refit needs the calibration set; none was given")
    student = Student(model, plan, surgery.execute(model, plan, record))
    model.requires_grad_(False)
    if needs_tape and record is not None:
        student.refit(record)
    return student
