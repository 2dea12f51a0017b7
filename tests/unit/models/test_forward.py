"""A forward pass layer by layer equals that of the model, and shares the arguments of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import EVERY, windows

from recondense.models import decoder, forward


@pytest.mark.parametrize("family", EVERY)
def test_arguments_of_layers_are_not_made_for_every_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EVERY[family]()
    batches = [{"input_ids": windows(rows, length)} for rows, length in ((2, 7), (1, 9), (2, 7))]
    calls: list[int] = []
    arguments_of_layers = decoder.arguments_of_layers

    def count_calls(*args: Any) -> Any:
        calls.append(1)
        return arguments_of_layers(*args)

    monkeypatch.setattr(decoder, "arguments_of_layers", count_calls)
    states = forward.layer_by_layer(model, batches)
    assert len(calls) == len(batches)  # every batch is embedded; no layer makes them again
    for batch, hidden_BSD in zip(batches, states, strict=True):
        with torch.no_grad():
            assert torch.equal(hidden_BSD, forward.run(model, batch).logits)


def test_batches_of_packed_examples_share_no_positions() -> None:
    model = EVERY["qwen2_moe"]()
    ids = windows(1, 8)
    batches = [
        {"input_ids": ids, "position_ids": torch.tensor([positions]), "use_cache": False}
        for positions in ([0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5])
    ]
    for batch, hidden_BSD in zip(batches, forward.layer_by_layer(model, batches), strict=True):
        with torch.no_grad():
            assert torch.equal(hidden_BSD, forward.run(model, batch).logits)
