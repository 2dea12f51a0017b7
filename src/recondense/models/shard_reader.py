"""Reads weights from a checkpoint's safetensors files as transformers would load them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.utils import logging as transformers_logging

from recondense.models.blocks import shallow_copy
from recondense.models.headers import Names, Stored, opened, tensors_of

State = dict[str, Tensor]
ALIGNMENT = 64  # bytes, of what torch allocates


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where a CPU's products do not depend on it: those of MKL differ in the last bit with the alignment.

    Tensors that safetensors reads lie wherever the file has them.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


class Shards:
    """A checkpoint's weights under their names in the model.

    Args:
        model: without any weights yet.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: Sequence[str],
        load_config: Any,
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.device = torch.device(load_config.device_map[""])
        self._dtype = model.dtype
        self._load_config = load_config
        self._reading = reading
        # Reading assigns into a twin, so that what stands in the model does not matter.
        self._twin = copy.deepcopy(model)
        self._names = Names(self._twin, load_config.weight_mapping or [])
        self._stored = self._names.by_name(list(tensors_of(files)))

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a weight of the model."""
        return name in self._stored

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Some weights, one after the other, so that no more than one is held twice."""
        for name in names:
            yield name, self._read(name)

    def load(self, model: PreTrainedModel, wanted: Callable[[str], bool]) -> tuple[Any, Any]:
        """Read into a model the weights whose names are wanted."""
        tensors = [tensor for name, parts in self._stored.items() if wanted(name) for tensor in parts]
        with ExitStack() as stack:
            files = {path: stack.enter_context(opened(path)) for path in {each.path for each in tensors}}
            slices = {each.key: files[each.path].get_slice(each.key) for each in tensors}
            stack.enter_context(_without_bars())
            stack.enter_context(self._reading())
            return convert_and_load_state_dict_in_model(model, slices, self._load_config)

    def _read(self, name: str) -> Tensor:
        module_name, _, own = name.rpartition(".")
        module = self._twin.get_submodule(module_name)
        tensors: Any = module._parameters if own in module._parameters else module._buffers
        parts = self._names.parts_of_stack(self._stored[name])
        # What is stored in few bits has to be made whole by transformers.
        if parts is not None and self._load_config.hf_quantizer is None:
            return self._fused(tensors[own], list(parts.values()))
        self.load(self._twin, lambda other: other == name)
        tensor: Tensor = tensors[own].detach()
        tensors[own] = nn.Parameter(tensor.to("meta"), False) if own in module._parameters else tensor.to("meta")
        if tensor.is_floating_point() and tensor.dtype not in (self._dtype, torch.float32):
            tensor = tensor.to(self._dtype)  # as `quantized.settle` does
        return aligned(tensor)

    def _fused(self, like: Tensor, parts: Sequence[Sequence[Stored]]) -> Tensor:
        """(E, rows of all parts, columns), each expert's tensor read into its place: nothing is held twice."""
        fused = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        with ExitStack() as stack:
            files = {path: stack.enter_context(opened(path)) for path in {e.path for part in parts for e in part}}
            first = 0
            for part in parts:
                rows = 0
                for expert, each in enumerate(part):
                    tensor = files[each.path].get_tensor(each.key)
                    rows = len(tensor)
                    fused[expert, first : first + rows] = tensor
                first += rows
        assert first == like.shape[1] and all(len(part) == len(like) for part in parts), (like.shape, parts)
        return fused


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for every call, which here is one weight."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def exchanged(unit: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Put tensors in place of a unit's own, by their names; those that were there."""
    before: State = {}
    for name, tensor in state.items():
        module_name, _, own = name.rpartition(".")
        module = unit.get_submodule(module_name)
        tensors: Any = module._parameters if own in module._parameters else module._buffers
        before[name] = tensors[own]
        parameter = own in module._parameters and not isinstance(tensor, nn.Parameter)
        tensors[own] = nn.Parameter(tensor, False) if parameter else tensor
    return before


def without_weights(block: nn.Module) -> nn.Module:
    """A block of the same structure whose parameters and persistent buffers are on the meta device."""
    twin = shallow_copy(block)
    for name, child in block._modules.items():
        twin._modules[name] = None if child is None else without_weights(child)
    for name, parameter in block._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().to("meta"), False)
    for name, buffer in block._buffers.items():
        stays = buffer is None or name in block._non_persistent_buffers_set
        twin._buffers[name] = buffer if stays or buffer is None else buffer.to("meta")
    return twin


def without_aliases(state: State) -> State:
    """Tensors that share no storage, as safetensors wants them."""
    seen: set[int] = set()
    found: State = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes and pointer not in seen
        found[name] = tensor if alone else tensor.clone()
        seen.add(pointer)
    return found
