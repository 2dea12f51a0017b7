"""Operations that need the calibration set see the model that their step's search has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import byte_tokenizer
from support.tiny_models import bits, qwen2_moe, recorded, same_bits

from recondense.config.schema import ModelConfig
from recondense.models import decoder, loading
from recondense.models.layer_store import layer_store
from recondense.operations import PROJECTIONS, Constant, Factorize, Narrow, Operation
from recondense.plan import Plan
from recondense.surgery import execute

CHANNELS = [[*range(expert, expert + 8)] for expert in range(6)]
NARROW = tuple(Narrow.from_channels(layer, CHANNELS, True) for layer in range(3))
AGAIN = tuple(Narrow.from_channels(layer, [range(1, 5)] * 6, True) for layer in range(3))
CONSTANTS = tuple(Constant(layer, (0, 2, 3, 4)) for layer in (1, 2))
WHITENED = tuple(Factorize(layer, dict.fromkeys(PROJECTIONS, (4,) * 6), True) for layer in (1, 2))


def executed(*steps: tuple[Operation, ...]) -> tuple[dict[str, Any], int]:
    """The weights after some plans, one after another, and the number of tapes."""
    model, tapes = qwen2_moe(), []

    def record() -> Any:
        tapes.append(recorded(model))
        return tapes[-1]

    for operations in steps:
        execute.execute(model, Plan("tiny", operations), record)
    return bits(model), len(tapes)


@pytest.mark.parametrize("steps", [(NARROW, CONSTANTS), (NARROW, AGAIN), (NARROW, WHITENED)])
def test_one_plan_of_two_steps_is_executed_as_step_by_step(steps: tuple[tuple[Operation, ...], ...]) -> None:
    """Every step has one tape, of the model that the earlier steps leave."""
    together, tapes = executed(tuple(operation for step in steps for operation in step))
    apart, _ = executed(*steps)
    assert same_bits(together, apart) and tapes == 2
    assert executed(steps[0])[1] == 1


def test_a_streamed_model_reuses_the_blocks_of_both_steps(tmp_path: Path) -> None:
    """They are stored under the states that they were made from, whether as one plan or step by step."""
    qwen2_moe().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    expected, files = executed((*NARROW, *CONSTANTS))[0], []
    for plans in ([NARROW, CONSTANTS], [(*NARROW, *CONSTANTS)]):
        settings = ModelConfig(attention="sdpa", device="cpu")
        model: Any = loading.load(tmp_path / "model", settings, tmp_path / "pages")[0]
        for operations in plans:
            execute.execute(model, Plan("tiny", operations), lambda model=model: recorded(model))
        files.append(sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "pages").iterdir()))
        for layer, module in enumerate(decoder.decoder_layers(model)):
            with layer_store(model).resident(layer):
                weights = {f"model.layers.{layer}.{name}": value for name, value in bits(module).items()}
                assert weights and all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert len(files[0]) == 5 and files[0] == files[1]
