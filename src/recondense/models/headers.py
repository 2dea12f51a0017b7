"""Read the headers of safetensors files, to compare a checkpoint with the model of a config before weights are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from recondense.errors import UserError
from recondense.models import quantized
from recondense.models.differences import Comparison, Shape, foreign_weights, shown
from recondense.models.library_errors import damage, read_json

ROWS = 1 << 12  # of two matrices that are compared at once
FLOATING = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint.

    Args:
        path: the file.
        key: the name of the tensor in the file.
        shape: its shape.
        dtype: its dtype, as named by safetensors.
        pattern: the pattern of transformers' conversions that matches the name; None if none does.
    """

    path: str
    key: str
    shape: Shape
    dtype: str
    pattern: str | None


def list_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads from a local folder; empty if it has no weights.

    Raises:
        UserError: the index is damaged, or names files that are missing; or a link points nowhere.
    """
    if (folder / quantized.SINGLE).is_file():
        return [folder / quantized.SINGLE]
    index = folder / quantized.INDEX
    if not index.is_file():
        for link in (folder / quantized.SINGLE, index):
            if link.is_symlink():
                raise UserError(damage(link))
        return []
    names = _shard_names(index)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{index.name} names {len(absent)} files that do not exist ({shown(absent)}); download or copy them"
        )
    if not isinstance(read_json(index).get("metadata"), dict):  # transformers writes into it
        raise UserError(f'{index.name} has no object "metadata"; add "metadata": {{}}, or download it again')
    return [folder / name for name in names]


def _shard_names(index: Path) -> list[str]:
    """Return the names of the files in an index.

    Raises:
        UserError: the index is damaged, or names files that are no safetensors files of the same folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index.name} is not an index of safetensors files; download or copy it again")
    names = sorted({str(name) for name in weight_map.values()})
    inside = [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]
    if odd := [name for name in names if name not in inside or not name.endswith(".safetensors")]:
        raise UserError(
            f"{index.name} names {shown(odd)}, but only *.safetensors files of the same folder are read; "
            "download or convert the weights again"
        )
    return names


def notes(folder: Path) -> Iterator[str]:
    """Yield what is odd about the files of a checkpoint that can be read.

    Args:
        folder: a folder whose files `list_files` lists without an error.
    """
    index = folder / quantized.INDEX
    if not index.is_file():
        return
    if (folder / quantized.SINGLE).is_file():
        yield f"holds both {quantized.SINGLE}, which is read, and {quantized.INDEX}, which is ignored with its files"
        return
    keys = Counter(tensor.key for tensor in read_headers(list_files(folder)))
    if twice := [key for key, number in keys.items() if number > 1]:
        yield f"{len(twice)} tensors are in several files, of which one is read ({shown(twice)})"
    if absent := [key for key in read_json(index)["weight_map"] if key not in keys]:
        yield f"{quantized.INDEX} names {len(absent)} tensors that are in none of its files ({shown(absent)})"


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file without memory-mapping it, if possible: mapped pages count as resident memory."""
    try:
        file = safe_open(path, framework="pt", backend="pread")
    except TypeError:
        file = safe_open(path, framework="pt")
    with file as content:
        yield content


def read_headers(files: Sequence[str | Path]) -> Iterator[StoredTensor]:
    """Yield all tensors of some files, without patterns; only the headers are read.

    Raises:
        UserError: a file is truncated or is not a safetensors file.
    """
    for path in files:
        try:
            with open_safetensors(path) as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    yield StoredTensor(str(path), key, tuple(part.get_shape()), str(part.get_dtype()), None)
        except SafetensorError as error:
            reason = damage(Path(path)) or f"{Path(path).name} cannot be read ({error}); download or copy it again"
            raise UserError(reason) from error


class Names:
    """Maps the tensors of a checkpoint to the weights of a model, by transformers' conversions.

    Args:
        model: the model, with or without weights.
        mapping: the conversions.
    """

    def __init__(self, model: PreTrainedModel, mapping: Sequence[Any]) -> None:
        self._state = dict.fromkeys(model.state_dict(), True)
        self._prefix = model.base_model_prefix
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def group_by_weight(self, tensors: Sequence[StoredTensor]) -> dict[str, list[StoredTensor]]:
        """Return the tensors that make up each weight, in the order in which they are combined."""
        groups: dict[str, list[StoredTensor]] = {}
        latest = {tensor.key: tensor for tensor in tensors}
        for key in sorted(latest, key=dot_natural_key):
            name, pattern = self._name(key, self._renamings, self._converters)
            if name not in self._state and key in self._state:
                name, pattern = self._name(key, [], [])
            groups.setdefault(name, []).append(latest[key]._replace(pattern=pattern))
            first, *others = self._by_pattern[pattern].target_patterns if pattern else [""]
            for other in others:  # one tensor may be split into several weights
                groups.setdefault(name.replace(first, other), [])
        return groups

    def _name(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        return rename_source_key(key, renamings, converters, self._prefix, self._state)

    def parts_of_stack(self, tensors: Sequence[StoredTensor]) -> dict[str, list[StoredTensor]] | None:
        """Return the single experts' tensors that transformers stacks into one weight, by pattern.

        Tensors of several patterns, such as gate and up, are concatenated in the stack.

        Returns:
            The tensors by pattern; None if the weight is not such a stack.
        """
        converter = self._by_pattern.get(tensors[0].pattern or "") if tensors else None
        if converter is None:
            return None
        steps = [type(step) for step in converter.operations]
        dims = [getattr(step, "dim", None) for step in converter.operations]
        if (steps, dims) not in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1])):
            return None
        return {pattern: [part for part in tensors if part.pattern == pattern] for pattern in converter.source_patterns}


def compare(model: PreTrainedModel, files: Sequence[str | Path], method: str | None = None) -> Comparison:
    """Compare the files of a checkpoint with a model: missing, unexpected and misshapen weights, and integers.

    Only headers are read, and the numbers of two weights that the config ties although both are stored.

    Args:
        model: the model, with or without weights.
        files: the safetensors files.
        method: the quantization of the files, as returned by `quantized.method_of`. The shapes of scales are not
            compared.

    Raises:
        UserError: a file cannot be read.
    """
    tensors = list(read_headers(files))
    names = Names(model, get_model_conversion_mapping(model))
    stored = names.group_by_weight([_unquantized(tensor, method) for tensor in tensors])
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = set(_untied(model, [name for name in state if name not in stored]))
    lacking: list[str] = []
    misshapen: list[tuple[str, Shape, Shape]] = []
    for name, shape in state.items():
        if name in missing:
            lacking.append(name)
        parts = names.parts_of_stack(stored.get(name, []))
        if parts is not None:
            lacking += (absent := _absent_experts(parts, shape[0]))
            stored_shape = None if absent or len(shape) != 3 else _stacked(parts, shape)
        elif not stored.get(name) or stored[name][0].pattern is not None:
            continue
        else:
            stored_shape = stored[name][-1].shape
        if stored_shape is not None and stored_shape != shape:
            misshapen.append((name, stored_shape, shape))
    unexpected = tuple(name for name in stored if name not in state)
    keys = {tensor.key for tensor in tensors}
    lacking += [name for tensor in tensors for name in quantized.missing_scales(tensor.key, tensor.dtype, method, keys)]
    foreign = () if method else foreign_weights(_not_ignored(model, unexpected), state)
    integers = () if method else _not_floating(model, stored)
    untied = tuple(pair for pair in model.all_tied_weights_keys.items() if _differ(*(stored.get(one) for one in pair)))
    return Comparison(tuple(lacking), unexpected, tuple(misshapen), foreign, integers, untied)


def _unquantized(tensor: StoredTensor, method: str | None) -> StoredTensor:
    """Return a tensor with the name and the shape that it would have in an unquantized checkpoint."""
    shape = quantized.weight_shape(tensor.key, tensor.shape, method)
    return tensor._replace(key=quantized.weight_name(tensor.key, method), shape=shape)


def _differ(one: Sequence[StoredTensor] | None, other: Sequence[StoredTensor] | None) -> bool:
    """Return whether two weights are both stored, in one shape, and have other numbers; these are read."""
    if not one or not other or one[-1].shape != other[-1].shape or not one[-1].shape:
        return False
    first, second = one[-1], other[-1]
    # Mapped into memory, because a slice takes time in proportion to the whole weight otherwise.
    with safe_open(first.path, framework="pt") as file, safe_open(second.path, framework="pt") as another:
        numbers, others = file.get_slice(first.key), another.get_slice(second.key)
        rows = [slice(at, min(at + ROWS, first.shape[0])) for at in range(0, first.shape[0], ROWS)]
        return not all(
            torch.equal(numbers[part].float().nan_to_num(), others[part].float().nan_to_num()) for part in rows
        )


def _not_ignored(model: PreTrainedModel, unexpected: Sequence[str]) -> list[str]:
    """Return the unexpected names without those that the model's class knows and ignores."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return [name for name in unexpected if not any(pattern.search(name) for pattern in ignored)]


def _not_floating(model: PreTrainedModel, stored: Mapping[str, Sequence[StoredTensor]]) -> tuple[tuple[str, str], ...]:
    """Return the stored tensors, with their dtypes, that have no floating-point numbers although the weights do."""
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    parts = (part for name, parts in stored.items() if name in floating for part in parts)
    return tuple((part.key, part.dtype) for part in parts if part.dtype not in FLOATING)


def _untied(model: PreTrainedModel, missing: Sequence[str]) -> list[str]:
    """Return the missing weights that the model needs: those not tied to a stored weight and not optional."""
    groups: dict[Any, set[str]] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        groups.setdefault(id(tensor), set()).add(name)
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    tied = set[str]().union(*(group for group in groups.values() if not group <= set(missing)))
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [name for name in missing if name not in tied and not any(pattern.search(name) for pattern in optional)]


def _absent_experts(parts: Mapping[str, Sequence[StoredTensor]], num_experts: int) -> list[str]:
    """Return the names, as in the files, of the experts that a stack lacks."""
    absent = []
    for pattern, tensors in parts.items():
        numbers = {_number(tensor.key)[1] for tensor in tensors}
        sibling = next(tensor.key for part in parts.values() for tensor in part)
        before, _, after = _number(tensors[0].key if tensors else sibling)
        end = after if tensors else pattern.partition("*")[2]
        absent += [f"{before}{number}{end}" for number in range(num_experts) if number not in numbers]
    return absent


def _number(key: str) -> tuple[str, int, str]:
    """Split a name into the text before the expert's number, the number, and the text after it."""
    *_, last = re.finditer(r"(?<=\.)\d+(?=\.)", key)
    return key[: last.start()], int(last.group()), key[last.end() :]


def _stacked(parts: Mapping[str, Sequence[StoredTensor]], expected: Shape) -> Shape:
    """Return the shape of a complete stack of experts; if the experts do not match, any shape other than `expected`."""
    kinds = [{tensor.shape for tensor in tensors} for tensors in parts.values()]
    rows, columns = expected[1] // len(kinds), expected[2]
    odd = [shape for shapes in kinds if len(shapes) > 1 for shape in sorted(shapes) if shape != (rows, columns)]
    shapes = odd[:1] or [next(iter(shapes)) for shapes in kinds]
    most = max(len(tensors) for tensors in parts.values())
    if odd or any(len(shape) != 2 for shape in shapes) or len({shape[1:] for shape in shapes}) > 1:
        return (most, *shapes[0])
    return (most, sum(shape[0] for shape in shapes), shapes[0][1])
