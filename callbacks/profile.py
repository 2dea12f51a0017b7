"""Measure memory and speed of the model and its original before and after a training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from recondense.evaluation.profiling import Profile, Variant, profile_variants
from recondense.models.parameters import resident_bytes, weights_bytes


class ProfileMemoryAndSpeed(L.Callback):
    """Profile `pl_module.model` at the start and the end of fitting; `TrainingMetrics` logs the speed of the training.

    At the start and the end, these metrics are logged: `profile/<variant>/weights_bytes`, `.../peak_memory_bytes`,
    `.../prefill_tokens_per_second` and `.../decode_tokens_per_second`. The variant is `compressed` at the start and
    `recovered` at the end. If the module has a `student` with its original, the variant `original` is measured
    alternately with it.

    `profile/resident_bytes` is logged once: the weights of student and teacher, with shared weights counted once.

    Args:
        batch_size, prompt_length, new_tokens, repetitions: as for `profiling.profile_variants`.
        at_start, at_end: when to profile.
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
        self.profiles: dict[str, dict[str, Profile]] = {}  # "start" and "end" -> variant -> profile

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
