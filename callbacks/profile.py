"""Memory and speed: of the live model against the original, and of training itself."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from recondense.profiling import Profile, Variant, profile_variants, resident_bytes, weights_bytes


class ProfileMemoryAndSpeed(L.Callback):
    """Profile `pl_module.model` at the start and the end of fitting, and follow memory and speed while it trains.

    Logged: `profile/<variant>/weights_bytes`, `.../peak_memory_bytes`, `.../prefill_tokens_per_second`,
    `.../decode_tokens_per_second`. The variants are `compressed` (at the start) or `recovered` (at the end), and
    `original`, in alternation, when the module has a `teacher` with `active()`. While training, every N steps:
    `profile/train_tokens_per_second`, `profile/train_peak_bytes` (on CUDA of tensors since the last time, elsewhere of
    the whole process since its start), and once `profile/resident_bytes` (student and teacher, shared weights once).

    Args:
        batch_size, prompt_length, new_tokens, repetitions: as for `profiling.profile_variants`.
        at_start, at_end: when to profile.
        every_n_steps: optimiser steps between figures of training; 0 for none.
        seed: of the token ids that are fed.
    """

    def __init__(
        self,
        batch_size: int = 1,
        prompt_length: int = 256,
        new_tokens: int = 32,
        repetitions: int = 5,
        at_start: bool = True,
        at_end: bool = True,
        every_n_steps: int = 10,
        seed: int = 0,
    ) -> None:
        self._settings = {
            "batch_size": batch_size,
            "prompt_length": prompt_length,
            "new_tokens": new_tokens,
            "repetitions": repetitions,
            "seed": seed,
        }
        self.at_start = at_start
        self.at_end = at_end
        self.every_n_steps = every_n_steps
        self.profiles: dict[str, dict[str, Profile]] = {}  # "start" and "end" -> variant -> profile
        self._tokens = 0
        self._seconds = 0.0
        self._batch_started = 0.0
        self._logged_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resident = resident_bytes(pl_module)
        _log(trainer, {"profile/resident_bytes": resident})
        original = _original(pl_module)
        if original is not None:
            model: Any = pl_module.model
            apart = weights_bytes(model)
            with original() as teacher:
                apart += weights_bytes(teacher)
            text = "student and teacher hold %.1f MB of weights together; they would hold %.1f MB apart"
            rank_zero_info(text % (resident / 1e6, apart / 1e6))
        if self.at_start:
            self._profile(trainer, pl_module, "start", "compressed")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._batch_started
        self._tokens += _num_tokens(batch)
        step = trainer.global_step
        if not self.every_n_steps or step < self._logged_step + self.every_n_steps:
            return
        rate = self._tokens / max(self._seconds, 1e-9)
        _log(trainer, {"profile/train_tokens_per_second": rate, "profile/train_peak_bytes": _peak(pl_module.device)})
        self._tokens, self._seconds, self._logged_step = 0, 0.0, step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end:
            self._profile(trainer, pl_module, "end", "recovered")

    def _profile(self, trainer: L.Trainer, pl_module: L.LightningModule, moment: str, name: str) -> None:
        model: Any = pl_module.model
        original = _original(pl_module)
        variants: dict[str, Variant] = {} if original is None else {"original": original}
        variants[name] = lambda: nullcontext(model)
        # Libraries may draw numbers when they run for the first time: the training that follows must not notice.
        with isolate_rng(), trainer.precision_plugin.forward_context():
            found = profile_variants(
                variants, vocab_size=model.config.vocab_size, device=pl_module.device, **self._settings
            )
        self.profiles[moment] = found
        values = {f"profile/{name}/{key}": value for name, one in found.items() for key, value in one.to_dict().items()}
        _log(trainer, values)


def _original(pl_module: L.LightningModule) -> Variant | None:
    """Gives contexts that yield the original model; None when the module keeps no teacher on its own backbone."""
    return getattr(getattr(pl_module, "teacher", None), "active", None)


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _num_tokens(batch: Any) -> int:
    if not isinstance(batch, dict) or "input_ids" not in batch:
        return 0
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
