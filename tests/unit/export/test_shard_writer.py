"""An export holds one shard and one layer in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from support.plain_moe import RANKS
from support.tiny_models import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recondense.config.schema import ExportConfig
from recondense.export.write_folder import write_folder
from recondense.models import decoder
from recondense.operations import Condense, Factorize, Operation
from recondense.plan import Plan
from recondense.surgery import execute


class Living(TorchDispatchMode):
    """The peak number of bytes in tensors that operations inside create; the storages of `model` do not count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model_storages = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
        self.references: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, Tensor):
                self.references.append(weakref.ref(value))
        living = [tensor for reference in self.references if (tensor := reference()) is not None]
        self.references = [weakref.ref(tensor) for tensor in living]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in living}
        self.peak = max(self.peak, sum(size for place, size in storages.items() if place not in self.model_storages))
        return output


EXPORTS: dict[str, tuple[str, tuple[Operation, ...], ExportConfig]] = {
    "unchanged": ("qwen2_moe", (), ExportConfig()),
    "gpt_oss": ("gpt_oss", (), ExportConfig()),
    "condensed": ("qwen2_moe", tuple(Condense(layer, (3, 0), (0.4, 0.2), 0.5) for layer in range(8)), ExportConfig()),
    "multiplied out": (
        "qwen2_moe", tuple(Factorize(layer, dict.fromkeys(RANKS, (4,) * 6)) for layer in range(8)),
        ExportConfig(format="dense"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_holds_one_shard_and_one_layer(name: str, tmp_path: Path) -> None:
    family, operations, settings = EXPORTS[name]
    model = tiny(family, num_hidden_layers=8, vocab_size=16, **({"layer_types": None} if family == "gpt_oss" else {}))
    execute.execute(model, Plan("tiny", operations))
    layer_bytes = max(
        sum(value.nbytes for value in layer.state_dict().values()) for layer in decoder.decoder_layers(model)
    )
    if settings.format == "dense":
        layer_bytes += 6 * 3 * 32 * 16 * 4
    shard_bytes = 30_000
    gc.collect()
    with Living(model) as living:
        write_folder(
            model,
            None,
            Plan("tiny"),
            tmp_path / "out",
            "",
            ExportConfig(format=settings.format, max_shard_size=shard_bytes, verify="shapes"),
        )
    files = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 4 and max(files) < shard_bytes + 10_000
    assert living.peak <= shard_bytes + layer_bytes < sum(files) / 2
