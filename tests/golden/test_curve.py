"""Golden numbers of a search and a distillation, which show silent changes of the method or of training.

Weights and texts come from NumPy's generator, so the numbers do not depend on the initialization of torch or
transformers. Another instruction set, thread count or matrix library changes them by less than 1e-6 (relative; measured
with ATEN_CPU_CAPABILITY=default, MKL_CBWR=COMPATIBLE, one and two threads), a change of the method by more than the
tolerance. After an intended change, copy the new numbers from the assertion's message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from support.tiny_models import VOCAB, qwen2_moe, recorded

from recondense.config.schema import RecoveryConfig, TrainerConfig
from recondense.data.loader import RecoveryData
from recondense.methods.cdmoe import CDMoE
from recondense.methods.step import SearchContext
from recondense.plan import Plan
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery.apply import apply

TOLERANCE = 1e-4  # relative
LAYERS = [2, 1, 0]
EXPERTS = [[0, 5], [4, 3], [5, 4]]
LAYER_JS = [0.0118514918, 0.0299384879, 0.0861633161]
LOSSES = [1.94989872, 2.04795694, 2.37543869, 1.96878684, 1.83980668, 1.94146454, 1.73884964, 1.96051800]


def model() -> Any:
    """Three layers with random weights of NumPy's; norms are ones, biases zeros."""
    small_model = qwen2_moe()
    generator = np.random.default_rng(2024)
    with torch.no_grad():
        for _, parameter in sorted(small_model.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(0.3 * generator.standard_normal(tuple(parameter.shape))))
            else:
                parameter.fill_(0.0 if bool((parameter == 0).all()) else 1.0)
    return small_model


def ids(num: int, length: int) -> list[list[int]]:
    texts: list[list[int]] = np.random.default_rng(7).integers(0, VOCAB, (num, length)).tolist()
    return texts


class Losses(L.Callback):
    """The loss of every batch, before its optimizer step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self.values.append(float(outputs["loss"]))


def test_search_and_loss_curve(tmp_path: Path) -> None:
    student = model()
    step = CDMoE(num_experts=2, num_layers=3)
    operations, record = step.search(SearchContext(student, lambda: recorded(student, ids(6, 14)), {}, 1 << 30))
    assert [operation.layer for operation in operations] == LAYERS
    assert [list(operation.experts) for operation in operations] == EXPERTS
    assert record["layer_search"]["js"] == pytest.approx(LAYER_JS, rel=TOLERANCE)

    recovery = RecoveryConfig(
        name="golden", objective="distill", steps=8, batch_size=4, learning_rate=5e-3, warmup_steps=2,
        schedule="cosine", temperature=2.0, cross_entropy_share=0.25, hidden_share=0.25, weight_decay=0.01,
    )  # fmt: skip
    module = RecoveryModule(apply(student, Plan("golden", tuple(operations))), recovery)
    losses = Losses()
    windows_NS = torch.tensor(ids(12, 10))
    data = RecoveryData(windows_NS, None, recovery.batch_size, recovery.steps, seed=11)
    fit(module, data, tmp_path, TrainerConfig(progress_bar=False), seed=0, callbacks=[losses])
    assert losses.values == pytest.approx(LOSSES, rel=TOLERANCE)
