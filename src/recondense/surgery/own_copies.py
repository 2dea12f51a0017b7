"""Give a student its own copies of weights that its original uses too, before they are trained."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.models import decoder, moe_blocks
from recondense.models.removed_blocks import SkippedLayer
from recondense.models.replacement_blocks import shallow_copy

Copies = dict[int, nn.Parameter]  # by the id of the parameter that was copied


def separate(
    model: PreTrainedModel, originals: dict[int, nn.Module], outer: dict[str, nn.Module], shared: Collection[int]
) -> None:
    """Replace the modules of a student that have some parameters by copies with their own; share everything else.

    Entire modules are replaced, because engines that shard weights have their hooks on modules. Weights that are tied
    stay tied.

    Args:
        model: the student's model.
        originals: the original's blocks or decoder layers by index. Layers that now differ are added. A block is
            replaced by its decoder layer if student and original now differ outside the block.
        outer: the original's modules outside the decoder layers, by the names of `decoder.outer_modules`. Those that
            now differ are added.
        shared: ids of parameters of the student that the original uses too.
    """
    copies: Copies = {}
    for layer, module in enumerate(decoder.decoder_layers(model)):
        if not isinstance(module, SkippedLayer):
            _separate_layer(model, layer, originals, shared, copies)
    for name, module in decoder.outer_modules(model).items():
        duplicate = copy_parameters(module, shared, copies)
        if duplicate is not module:
            outer.setdefault(name, module)
            decoder.set_outer_module(model, name, duplicate)


def _separate_layer(
    model: PreTrainedModel, layer: int, originals: dict[int, nn.Module], shared: Collection[int], copies: Copies
) -> None:
    before, block = decoder.decoder_layers(model)[layer], moe_blocks.get_block(model, layer)
    inside = {id(parameter) for parameter in block.parameters()}
    if not any(id(parameter) in shared for parameter in before.parameters() if id(parameter) not in inside):
        duplicate = copy_parameters(block, shared, copies)
        if duplicate is not block:
            originals.setdefault(layer, block)
            moe_blocks.set_block(model, layer, duplicate)
        return
    duplicate = copy_parameters(before, shared, copies)
    original = originals.get(layer, block)
    if not moe_blocks.is_decoder_layer(original):  # the student's layer becomes that of the original
        moe_blocks.set_block(model, layer, original)
        originals[layer] = before
    moe_blocks.set_block(model, layer, duplicate)


def copy_parameters(module: nn.Module, chosen: Collection[int], copies: Copies) -> nn.Module:
    """Return a module with copies of some parameters, which shares everything else; itself if it has none of them.

    Args:
        module: the module.
        chosen: ids of the parameters to copy. Others that are directly in the same submodule are copied too.
        copies: the copies so far. A parameter that is among them gets the same copy.
    """
    if not any(id(parameter) in chosen for parameter in module.parameters()):
        return module
    duplicate = shallow_copy(module)
    direct = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if any(id(parameter) in chosen for parameter in direct.values()):
        for name, parameter in direct.items():
            if id(parameter) not in copies:
                data = parameter.detach().clone(memory_format=torch.preserve_format)
                copies[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            duplicate._parameters[name] = copies[id(parameter)]
    for name, child in module._modules.items():
        if child is not None:
            duplicate._modules[name] = copy_parameters(child, chosen, copies)
    return duplicate
