"""Read weights from a checkpoint's safetensors files as transformers would load them."""

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

from recondense.models.headers import Names, StoredTensor, open_safetensors, read_headers
from recondense.models.library_errors import MORE_MEMORY, library_calls
from recondense.models.replacement_blocks import shallow_copy

State = dict[str, Tensor]
ALIGNMENT = 64  # bytes; torch's allocations have this alignment


def align(tensor: Tensor) -> Tensor:
    """Return a tensor at an aligned address; a copy if the given one is not aligned.

    MKL's products depend in the last bit on the alignment, and safetensors reads tensors to any address.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


class ShardReader:
    """Reads the weights of a checkpoint by their names in the model.

    Args:
        model: a model that does not have any weights yet.
        files: the safetensors files of the checkpoint.
        load_config: transformers' settings for loading: conversions, dtypes, quantization.
        reading: makes a context in which transformers reads the stored weights correctly.
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
        # transformers loads into a copy, so that the blocks that are currently in the model do not matter.
        self._copy = copy.deepcopy(model)
        self._names = Names(self._copy, load_config.weight_mapping or [])
        self._stored = self._names.group_by_weight(list(read_headers(files)))

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint has a weight of the model."""
        return name in self._stored

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights one after another with their names, so that at most one is in memory twice."""
        for name in names:
            yield name, self._read(name)

    def load(self, model: PreTrainedModel, selected: Callable[[str], bool]) -> tuple[Any, Any]:
        """Read the weights with selected names into a model, and return what transformers' own loading returns."""
        tensors = [tensor for name, parts in self._stored.items() if selected(name) for tensor in parts]
        with ExitStack() as stack:
            files = {path: stack.enter_context(open_safetensors(path)) for path in {tensor.path for tensor in tensors}}
            slices = {tensor.key: files[tensor.path].get_slice(tensor.key) for tensor in tensors}
            stack.enter_context(no_progress_bars())
            stack.enter_context(self._reading())
            stack.enter_context(library_calls("the weights cannot be read", MORE_MEMORY))
            return convert_and_load_state_dict_in_model(model, slices, self._load_config)

    def _read(self, name: str) -> Tensor:
        tensors, leaf = _holder(self._copy, name)
        parts = self._names.parts_of_stack(self._stored[name])
        # Quantized weights can only be read by transformers.
        if parts is not None and self._load_config.hf_quantizer is None:
            return self._read_stack(tensors[leaf], list(parts.values()))
        self.load(self._copy, lambda other: other == name)
        is_parameter = isinstance(tensors[leaf], nn.Parameter)
        tensor: Tensor = tensors[leaf].detach()
        tensors[leaf] = nn.Parameter(tensor.to("meta"), False) if is_parameter else tensor.to("meta")
        if tensor.is_floating_point() and tensor.dtype not in (self._dtype, torch.float32):
            tensor = tensor.to(self._dtype)  # as `quantized.finish_dequantization` does
        return align(tensor)

    def _read_stack(self, like: Tensor, parts: Sequence[Sequence[StoredTensor]]) -> Tensor:
        """Read a stack of experts (E, rows of all parts, columns), each tensor directly into its place."""
        stack_ERC = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        with ExitStack() as stack:
            paths = {tensor.path for part in parts for tensor in part}
            files = {path: stack.enter_context(open_safetensors(path)) for path in paths}
            first = 0
            for part in parts:
                rows = 0
                for expert, stored in enumerate(part):
                    with library_calls(f"{stored.key} cannot be read", MORE_MEMORY):
                        tensor = files[stored.path].get_tensor(stored.key)
                    rows = len(tensor)
                    stack_ERC[expert, first : first + rows] = tensor
                first += rows
        assert first == like.shape[1] and all(len(part) == len(like) for part in parts), (like.shape, parts)
        return stack_ERC


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars inside the context; there would be one for each weight."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def swap_tensors(module: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Replace tensors of a module by name, and return the previous ones."""
    before: State = {}
    for name, tensor in state.items():
        tensors, leaf = _holder(module, name)
        before[name] = tensors[leaf]
        to_parameter = isinstance(before[name], nn.Parameter) and not isinstance(tensor, nn.Parameter)
        tensors[leaf] = nn.Parameter(tensor, False) if to_parameter else tensor
    return before


def _holder(module: nn.Module, name: str) -> tuple[Any, str]:
    """Return the dictionary of the submodule that has the tensor with this name, and the tensor's key in it."""
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    return (parent._parameters if leaf in parent._parameters else parent._buffers), leaf


def empty_copy(block: nn.Module) -> nn.Module:
    """Return a copy of a block whose parameters and persistent buffers are on the meta device."""
    empty = shallow_copy(block)
    for name, child in block._modules.items():
        empty._modules[name] = None if child is None else empty_copy(child)
    for name, parameter in block._parameters.items():
        empty._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().to("meta"), False)
    for name, buffer in block._buffers.items():
        stays = buffer is None or name in block._non_persistent_buffers_set
        empty._buffers[name] = buffer if stays or buffer is None else buffer.to("meta")
    return empty


def unalias(state: State) -> State:
    """Copy tensors that share a storage or are part of a larger one, because safetensors cannot write them."""
    seen: set[int] = set()
    copies: State = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes and pointer not in seen
        copies[name] = tensor if alone else tensor.clone()
        seen.add(pointer)
    return copies
