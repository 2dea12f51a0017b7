"""A small model in a real Trainer, for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.plan import Plan


class Recorder(Logger):
    """Keeps all metrics that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    name = "recorder"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def steps(self, name: str) -> list[int | None]:
        return [step for step, metrics in self.metrics if name in metrics]


class Module(L.LightningModule):
    """A small MoE with dropout, so that training draws random numbers."""

    def __init__(self, plan: Plan | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            attention_dropout=0.2,
        )
        self.model = Qwen2MoeForCausalLM(config)
        self.tokenizer = "tokenizer"
        self.plan = plan
        self.task_results: dict[int, Any] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("recovery/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: L.LightningModule, callbacks: Sequence[L.Callback], folder: Path, *, num_batches: int = 6, **settings: Any
) -> tuple[L.Trainer, Recorder]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(64, (2, 8), generator=generator)} for _ in range(num_batches)]
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": recorder, "log_every_n_steps": 1, "enable_checkpointing": False, **settings},
    )
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer, recorder
