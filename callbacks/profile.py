"""Measure memory and speed: of the model and its original, and of training."""

from __future__ import annotations

import resource
import sys
from contextlib import nullcontext
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from recondense.data.labels import MASKED
from recondense.evaluation.profiling import Clock, Profile, Variant, profile_variants
from recondense.models.parameters import resident_bytes, weights_bytes


class ProfileMemoryAndSpeed(L.Callback):
    """Profile `pl_module.model` at the start and the end of fitting, and track memory and speed while it trains.

    At the start and the end, these metrics are logged: `profile/<variant>/weights_bytes`, `.../peak_memory_bytes`,
    `.../prefill_tokens_per_second` and `.../decode_tokens_per_second`. The variant is `compressed` at the start and
    `recovered` at the end. If the module has a `student` with its original, the variant `original` is measured
    alternately with it.

    While training, these metrics are logged every N steps: `profile/train_tokens_per_second` (of all processes, without
    padding) and `profile/train_peak_bytes` (on CUDA the peak of allocated tensors since the last log, elsewhere that of
    the process since its start). `profile/resident_bytes` is logged once: the weights of student and teacher, with
    shared weights counted once.

    Args:
        batch_size, prompt_length, new_tokens, repetitions: as for `profiling.profile_variants`.
        at_start, at_end: when to profile.
        every_n_steps: optimizer steps between metrics of training; 0 for none.
        seed: seed of the random token ids.
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
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._clock: Clock | None = None  # marked before and after each batch
        self._logged_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resident = resident_bytes(pl_module)
        _log(trainer, {"profile/resident_bytes": resident})
        original = _original(pl_module)
        if original is not None:
            model: Any = pl_module.model
            separate = weights_bytes(model)
            with original() as teacher:
                separate += weights_bytes(teacher)
            text = "student and teacher share weights: %.1f MB together instead of %.1f MB as separate models"
            rank_zero_info(text % (resident / 1e6, separate / 1e6))
        if self.at_start:
            self._profile(trainer, pl_module, "start", "compressed")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_counting(trainer, pl_module)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_steps:
            return
        if self._clock is None:
            self._clock = Clock(pl_module.device)
        else:
            self._clock.mark()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            return
        self._clock.mark()
        self._tokens += _num_tokens(batch)  # on the device, without synchronizing
        if trainer.global_step < self._logged_step + self.every_n_steps:
            return
        tokens = int(trainer.strategy.reduce(self._tokens, reduce_op="sum"))
        rate = tokens / sum(self._clock.seconds()[::2])
        _log(trainer, {"profile/train_tokens_per_second": rate, "profile/train_peak_bytes": _peak(pl_module.device)})
        self._start_counting(trainer, pl_module)

    def _start_counting(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._clock, self._logged_step = None, trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end:
            self._profile(trainer, pl_module, "end", "recovered")

    def _profile(self, trainer: L.Trainer, pl_module: L.LightningModule, moment: str, name: str) -> None:
        model: Any = pl_module.model
        original = _original(pl_module)
        variants: dict[str, Variant] = {} if original is None else {"original": original}
        variants[name] = lambda: nullcontext(model)
        # Libraries may draw random numbers on their first call, which must not change the training that follows.
        with isolate_rng(), trainer.precision_plugin.forward_context():
            profiles = profile_variants(
                variants, vocab_size=model.config.vocab_size, device=pl_module.device, **self._settings
            )
        self.profiles[moment] = profiles
        values = {
            f"profile/{name}/{key}": value for name, one in profiles.items() for key, value in one.to_dict().items()
        }
        _log(trainer, values)


def _original(pl_module: L.LightningModule) -> Variant | None:
    """Return a function whose contexts yield the original model; None without a student that has its original."""
    student = getattr(pl_module, "student", None)
    return student.original if student is not None and student.has_original else None


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _num_tokens(batch: Any) -> Tensor | int:
    """Count a batch's tokens without padding: by its mask, or up to the last label of each window."""
    if not isinstance(batch, dict) or "input_ids" not in batch:
        return 0
    if "attention_mask" in batch:
        return cast(Tensor, batch["attention_mask"].sum())
    if "labels" in batch:
        labels_BS: Tensor = batch["labels"]
        places_S = torch.arange(1, labels_BS.shape[-1] + 1, device=labels_BS.device)
        return ((labels_BS != MASKED) * places_S).amax(-1).sum()
    return int(batch["input_ids"].numel())


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    # Linux reports KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
