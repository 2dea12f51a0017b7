"""The gradient of the model's loss with respect to the output of each layer, one layer in memory at a time.

The backward pass starts at the head and goes down. A tape has the states that enter every layer, so each layer runs
once more and passes the gradient on to the layer below it. No gradient of a weight is computed.

Legend: B texts of a batch, S their padded length, T predicted tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.calibration.text_batches import TextBatch
from recondense.methods.search.importance import LOGIT_BYTES
from recondense.models import decoder
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import TensorList


def loss_gradients(model: PreTrainedModel, tape: Tape, max_scratch_bytes: int) -> TensorList:
    """Compute the gradient of the loss with respect to the states that leave the last layer.

    The loss is the sum over all predicted tokens, that is all real tokens except each text's first. A sum, because the
    gradient of a mean would be close to the smallest numbers of half precision.

    Args:
        model: the recorded model.
        tape: its hidden states.
        max_scratch_bytes: bound on temporary tensors: the logits of a few tokens at a time.

    Returns:
        The gradients (B, S, D) of this process's batches.
    """
    gradients = tape.storage.tensor_list()
    for texts, state_BSD in zip(tape.texts.local, tape.states[-1], strict=True):
        gradients.append(_head_gradient(model, texts, state_BSD, max_scratch_bytes))
    return gradients


def _head_gradient(model: PreTrainedModel, texts: TextBatch, state_BSD: Tensor, max_scratch_bytes: int) -> Tensor:
    predicted_BS = texts.mask_BS[:, 1:]
    state_TD, ids_T = state_BSD[:, :-1][predicted_BS], texts.input_ids_BS[:, 1:][predicted_BS]
    parts = []
    with decoder.lm_head(model) as head, torch.enable_grad():
        rows = max(1, max_scratch_bytes // (2 * LOGIT_BYTES * len(head.weight_VD)))
        for x_TD, targets_T in zip(state_TD.split(rows), ids_T.split(rows), strict=True):
            x_TD = x_TD.detach().requires_grad_()
            logits_TV = head.logits(decoder.final_norm(model)(x_TD)).float()
            loss = nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
            parts += torch.autograd.grad(loss, x_TD)
    gradient_BSD = torch.zeros_like(state_BSD)
    gradient_BSD[:, :-1][predicted_BS] = torch.cat(parts)
    return gradient_BSD


def gradients_below(model: PreTrainedModel, tape: Tape, layer: int, leaving: TensorList) -> TensorList:
    """Pass the gradient through a layer.

    Args:
        model: the recorded model; its weights get no gradients.
        tape: its hidden states.
        layer: decoder-layer index.
        leaving: the gradients with respect to the states that leave the layer (B, S, D), per local batch.

    Returns:
        The gradients with respect to the states that enter the layer.
    """
    entering = tape.storage.tensor_list()
    with eval_mode(model), layer_store(model).resident(layer), torch.enable_grad():
        for index, gradient_BSD in enumerate(leaving):
            state_BSD = tape.states[layer][index].detach().requires_grad_()
            output_BSD = tape.run_layer(model, layer, index, state_BSD)
            entering.append(torch.autograd.grad(output_BSD, state_BSD, gradient_BSD)[0])
    return entering
