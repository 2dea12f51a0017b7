"""The result of `apply`: a compressed model and its original on a shared backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.files import replace_file
from recondense.models import decoder, moe_blocks
from recondense.models.layer_store import layer_store
from recondense.models.loading import weights_fingerprint
from recondense.models.parameters import resident_bytes
from recondense.models.removed_blocks import SkippedLayer
from recondense.plan import Plan, join
from recondense.progress import progress
from recondense.surgery import own_copies
from recondense.surgery.execute import RecordTape, execute_further, refit, structural_operations


class Footprint(NamedTuple):
    """The bytes of memory that a student uses.

    Args:
        student: the compressed model.
        with_original: the student and its original, with shared weights counted once.
        apart: student and original as separate models.
    """

    student: int
    with_original: int
    apart: int


class Additions(Protocol):
    """Modules that are added to a model during training, such as adapters."""

    def disable(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes without them."""


class Student:
    """A compressed model and its original on a shared backbone.

    Attention, norms, embeddings, head and unchanged layers exist only once. In addition to the model, the student keeps
    only the weights that the original alone uses: the blocks that surgery replaced, and the weights that training
    replaces.

    `apply` makes a student. All its weights are frozen until a recovery trains some of them.

    Args:
        model: the compressed model. Inside `original()` the same object is the uncompressed model.
        plan: the plan by which the model was compressed.
        originals: the replaced blocks by decoder-layer index, or the decoder layer itself if the plan removed it
            entirely. They are frozen. None or empty if the model is its own original.

    Attributes:
        trainings: folders of checkpoints from which this student has been trained to the end.
        additions: modules that were added for training, such as adapters. `original()` disables them.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, originals: Mapping[int, nn.Module] | None = None) -> None:
        self.model = model
        self.plan = plan
        self.trainings: set[Path] = set()
        self._further: Plan | None = None  # the plan of the last `extend`
        self._fingerprint: str | None = None
        self.additions: Additions | None = None
        self._originals = dict(originals or {})
        self._outer: dict[str, nn.Module] = {}  # the original's modules outside the decoder layers
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._offloaded: dict[str, nn.Parameter] = {}
        for block in self._originals.values():
            block.requires_grad_(False)

    @property
    def originals(self) -> dict[int, nn.Module]:
        """The original's blocks or decoder layers by index; empty while they are offloaded and after their release."""
        return {} if self._offloaded else self._originals

    @property
    def outer_originals(self) -> dict[str, nn.Module]:
        """The original's embedding, final norm and head, if the student has its own; empty like `originals`."""
        return {} if self._offloaded else self._outer

    def own_originals(self) -> dict[str, nn.Module]:
        """Return `originals` and `outer_originals` in one dictionary, by index or name."""
        return {**{str(layer): module for layer, module in self.originals.items()}, **self.outer_originals}

    @property
    def has_original(self) -> bool:
        """Whether there is an original to compare with: the plan changed the model, and the original is in memory."""
        return bool(self.originals)

    def original(self) -> AbstractContextManager[PreTrainedModel]:
        """Return a context in which `model` is the uncompressed model. No weight is copied.

        If the plan changes nothing, that is the model itself. If the original was released or is offloaded, this raises
        an AssertionError.

        Examples:
            >>> with student.original() as model:
            ...     logits = model(input_ids).logits
        """
        released = not self._originals and bool(structural_operations(self.plan))
        assert not self._offloaded and not released, "the original was released or is offloaded"
        return self._swap()

    @contextmanager
    def _swap(self) -> Iterator[PreTrainedModel]:
        with ExitStack() as stack:
            if self.additions is not None:
                stack.enter_context(self.additions.disable())
            places = [_stored_at(module, name) for module, name, _ in self._kept]
            trained = [module._parameters[name] for module, name in places]
            stack.enter_context(moe_blocks.swap_blocks(self.model, self._originals))
            stack.enter_context(decoder.swap_outer_modules(self.model, self._outer))
            for (module, name), (_, _, weight) in zip(places, self._kept, strict=True):
                module._parameters[name] = weight
            try:
                yield self.model
            finally:
                for (module, name), parameter in zip(places, trained, strict=True):
                    module._parameters[name] = parameter

    def extend(self, plan: Plan, record: RecordTape | None = None) -> None:
        """Compress the model further, whether it has been trained or not. The original remains the first one.

        Afterwards `plan` has the operations of both plans (`plan.join`); `refit` executes those of the new one only.

        Args:
            plan: the operations; experts have the numbers that they have now. Refits wait for `refit`.
            record: records a tape of the model as it is at the call, see `execute.execute`.

        Raises:
            UserError: an operation does not fit the model, or the original was released. Nothing is changed then.
        """
        if self._offloaded or (not self._originals and structural_operations(self.plan)):
            raise UserError("the student cannot be compressed further, because it has released its original")
        if self.additions is not None:
            raise UserError("the student cannot be compressed further before its adapters are merged")
        self._originals = execute_further(self.model, plan, record, self._originals)
        for block in self._originals.values():
            block.requires_grad_(False)
        self.model.requires_grad_(False)
        self._further = plan
        self.plan = replace(self.plan, operations=join(self.plan.operations, plan.operations))

    def refit(self, record: RecordTape) -> dict[int, dict[str, float]]:
        """Execute the plan's refits: solve for output weights by least squares on the calibration set.

        Args:
            record: records a tape of the model on the calibration set, with the model as it is at the call.

        Returns:
            For each refitted layer, ‖target − output‖ / ‖target‖ before and after. Empty if the plan has no refit.
        """
        replaced = {layer: self._originals[layer] for layer in self.plan.layers if layer in self._originals}
        for layer, original in replaced.items():
            removed = isinstance(decoder.decoder_layers(self.model)[layer], SkippedLayer)
            if moe_blocks.is_decoder_layer(original) and not removed:  # the rest of the layer has not been trained yet
                replaced[layer] = moe_blocks.block_of(original)
        reference = None if self._further is None else self.original
        return refit(self.model, self._further or self.plan, replaced, record, reference)

    def give_own_copies(self, layers: Sequence[int]) -> None:
        """Copy the experts of some layers if the original uses them too, so that training does not change the original.

        Experts that only the student uses are not copied. All other weights stay shared.

        Args:
            layers: decoder-layer indices.
        """
        experts = [part for layer in layers for part in moe_blocks.expert_modules(self.model, layer).values()]
        self.separate(parameter for part in experts for parameter in part.parameters())

    def separate(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy those of some parameters of the model that the original uses too; all other weights stay shared.

        The original keeps the previous ones. A streamed model does not need this: its original is released before
        training.

        Args:
            parameters: the parameters that will be trained.
        """
        if self._originals and not layer_store(self.model).streamed:
            shared = {id(parameter) for parameter in parameters} & self._used_by_original()
            own_copies.separate(self.model, self._originals, self._outer, shared)

    def _used_by_original(self) -> set[int]:
        """Return the ids of the original's parameters."""
        with self._swap() as model:
            return {id(parameter) for parameter in model.parameters()}

    def replace_block(self, layer: int, block: nn.Module) -> None:
        """Set the block of a layer. If the layer had the original's block until now, the original keeps it.

        Args:
            layer: decoder-layer index.
            block: the block, which shares no trained weight with the original.
        """
        before = moe_blocks.get_block(self.model, layer)
        if self._originals:
            self._originals.setdefault(layer, before)
        moe_blocks.set_block(self.model, layer, block)

    def replace_weights(self, replacements: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Replace weights of the model. The original keeps the previous weights that it uses.

        Args:
            replacements: triples of a module of the model, the name of its parameter, and the new weight; they are
                taken from the iterable one at a time.
        """
        used = self._used_by_original() if self._originals else set()
        for module, name, weight in replacements:
            before = module._parameters[name]
            assert before is not None
            module._parameters[name] = weight
            if id(before) in used:
                self._kept.append((module, name, before))

    def kept_weights(self) -> list[nn.Parameter]:
        """Return the weights that only the original uses after `replace_weights`."""
        return [weight for _, _, weight in self._kept]

    def changed_layers(self) -> set[int]:
        """Return the decoder layers in which student and original differ, apart from `additions`."""
        modules = {id(module) for module, _, _ in self._kept}
        layers = enumerate(decoder.decoder_layers(self.model))
        replaced = {layer for layer, module in layers if any(id(inner) in modules for inner in module.modules())}
        return replaced | set(self._originals) | ({0} if self._outer else set())

    def release_original(self) -> None:
        """Free everything that only the original uses. Afterwards the student has no original."""
        self._originals, self._outer, self._kept = {}, {}, []

    def original_fingerprint(self) -> str:
        """Return a hash of the original's weights, or of the model's without an original. It is computed only once."""
        if self._fingerprint is None:
            with self.original() if self.has_original else nullcontext(self.model) as model:
                self._fingerprint = weights_fingerprint(model)
        return self._fingerprint

    def load_into_memory(self) -> None:
        """Load the weights of a streamed model into memory permanently, and release its original.

        A model that is in memory already is not changed.
        """
        if not layer_store(self.model).streamed:
            return
        self.release_original()
        with progress("loading the compressed model"):
            layer_store(self.model).load_all()

    @contextmanager
    def offload_original(self, path: Path) -> Iterator[None]:
        """Offload the weights that only the original uses to a file inside the context.

        `original()` must not be called inside it. At the end the weights are loaded back. If an engine has moved the
        model's weights to another process in the meantime, the original is released instead.

        Args:
            path: the safetensors file, which is deleted at the end.
        """
        assert self.has_original
        weights = _weights_besides(self.own_originals(), [*self.model.parameters(), *self.kept_weights()])
        with replace_file(path, sum(parameter.nbytes for parameter in weights.values())) as aside:
            save_file({name: parameter.detach().cpu().contiguous() for name, parameter in weights.items()}, aside)
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
        """Return the bytes of memory of the student, of student and original, and of both as separate models."""
        student = resident_bytes(self.model)
        alone = (*self.own_originals().values(), nn.ParameterList(self.kept_weights()))
        together = resident_bytes(self.model, *alone)
        with self.original() as model:
            return Footprint(student, together, student + resident_bytes(model))


def _weights_besides(modules: Mapping[str, nn.Module], others: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the weights of some modules that are not among others, by name; tied weights once."""
    used = {id(parameter) for parameter in others}
    weights: dict[str, nn.Parameter] = {}
    for key, module in modules.items():
        alone = {name: value for name, value in module.named_parameters() if id(value) not in used}
        weights |= {f"{key}.{name}": parameter for name, parameter in alone.items()}
        used |= {id(parameter) for parameter in alone.values()}
    return weights


def _stored_at(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that stores a parameter, and its name there. Adapters on a weight move it into their own."""
    if parametrize.is_parametrized(module, name):
        return getattr(module.parametrizations, name), "original"
    return module, name
