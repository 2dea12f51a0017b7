"""The LightningModule of one recovery stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.config.schema import RecoveryConfig
from recondense.data.labels import target_mask
from recondense.models import decoder, families
from recondense.plan import Plan
from recondense.recovery import lora, objective, shared_passes
from recondense.recovery.auxiliary_losses import load_balancing
from recondense.recovery.checkpoints import check_checkpoint, trained_state
from recondense.recovery.engines import deepspeed, trainer
from recondense.recovery.objective import StudentOutput
from recondense.recovery.optimizer import make_optimizer, parameter_groups
from recondense.recovery.precision import UnusualPrecisions
from recondense.recovery.random_states import gather_random_states, set_random_states, states_of_process
from recondense.recovery.shared_passes import CountedTokens, PassInputs
from recondense.recovery.teachers import OriginalTeacher, Teacher, TeacherOutput
from recondense.recovery.trained_part import TrainedPart
from recondense.surgery.student import Student


class RecoveryModule(L.LightningModule):
    """One stage of training a student, for any Lightning Trainer.

    `setup` makes the student if necessary (only once, however often Lightning calls it) and unfreezes the part that the
    settings name. Checkpoints contain the trained weights, but not the frozen ones. Each stage has its own module.

    Args:
        student: the student, or a function that makes it.
        settings: objective, optimizer and schedule. The objective is "finetune" or "distill".
        teacher: what the student is trained on and compared with; None for the original on the student's backbone.
        tokenizer: a tokenizer for callbacks that evaluate.
        stage: the prefix of logged metrics.
        layers: decoder layers whose experts and routers are trained; None for the layers of the plan.
        router_auxiliary_loss: the weight of the router's load-balancing loss, for training a sparse model from scratch.
        training_device: the device for training; None for the device of the model.

    Attributes:
        model: the student's model, set in `setup`. Its parameters are those of the module.
        originals: the original's own blocks, decoder layers and other modules, set in `setup`. They are not trained.
        part: the trained part of the student, set in `setup`.
        task_results: lm-eval results by optimizer step, set by a callback.

    Examples:
        >>> module = RecoveryModule(lambda: apply(model, plan, tape), RecoveryConfig(objective="distill", steps=200))
        >>> lightning.Trainer(max_steps=200).fit(module, datamodule=data)
    """

    model: PreTrainedModel
    originals: nn.ModuleDict

    def __init__(
        self,
        student: Student | Callable[[], Student],
        settings: RecoveryConfig,
        teacher: Teacher | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stage: str = "recovery",
        layers: Sequence[int] | None = None,
        router_auxiliary_loss: float = 0.0,
        training_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        assert settings.objective in ("finetune", "distill"), "there is nothing to train with a Trainer"
        self.settings = settings
        self.tokenizer = tokenizer
        self.stage = stage
        self.training_device = training_device
        self.part: TrainedPart | None = None
        self.task_results: dict[int, dict[str, dict[str, float]]] = {}
        self.strict_loading = False  # checkpoints contain only the trained weights
        self.shard: Callable[[], None] | None = None  # set if an engine shards the weights
        self._source = student
        self._teacher = teacher
        self._layers = layers
        self._router_auxiliary_loss = router_auxiliary_loss
        self._random_states: dict[str, Any] | None = None  # from the checkpoint that is resumed
        self._sums: dict[str, Tensor] = {}  # summed losses of the current step's batches so far

    @property
    def student(self) -> Student:
        assert isinstance(self._source, Student), "the student is made in `setup`"
        return self._source

    @property
    def plan(self) -> Plan | None:
        """The student's plan; None before the student is made."""
        return self._source.plan if isinstance(self._source, Student) else None

    @property
    def teacher(self) -> Teacher:
        return OriginalTeacher(self.student) if self._teacher is None else self._teacher

    def prepare(self) -> None:
        """Make the student if necessary, and unfreeze the part that is trained. `setup` calls it.

        Raises:
            UserError: there is nothing to train.
        """
        if not isinstance(self._source, Student):
            self._source = self._source()
        if self.part is None:
            student = self._source
            self.part = TrainedPart.begin(student, self.settings, self._layers)
            self.model = student.model
            self.originals = nn.ModuleDict(student.own_originals())
            self.training_device = self.training_device or decoder.device(student.model)
        self.part.unfreeze()

    def stop_training(self) -> None:
        """Freeze all weights, set evaluation mode, and drop gradients and Trainer. `prepare` undoes this."""
        self.model.requires_grad_(False)
        self.zero_grad()
        self.eval()
        self.trainer = None

    def merge_adapters(self) -> None:
        """Merge the stage's adapters, if any, into the weights. The stage cannot be trained further afterwards."""
        assert self.part is not None
        self.part.merge_adapters()

    def remove_adapters(self) -> None:
        """Take the stage's adapters out without merging them, if it has any. `prepare` begins the stage again."""
        if self.part is not None and self.part.adapters is not None:
            self.part.remove_adapters()
            self.part = None

    @property
    def adapters(self) -> lora.Adapters | None:
        """The LoRA adapters that are being trained; None if there are none."""
        return None if self.part is None else self.part.adapters

    def objects_to_share(self) -> list[object]:
        """Return the objects that a copy of this module shares with it, see `training_copy.make_copy`."""
        return [self.tokenizer, self.plan, self.task_results, *self.student.kept_weights()]

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Compute the student's logits (B, S, V) for token ids (B, S)."""
        with lora.cache_updates(self.adapters):
            arguments = shared_passes.forward_arguments(self.model, input_ids, position_ids)
            logits: Tensor = self.model(**arguments).logits
        return logits.view(*input_ids.shape, -1)

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        window: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the objective (`loss`) and its parts, in nats per token.

        Args:
            input_ids: token ids (B, S).
            labels: ids (B, S) of the targets, MASKED elsewhere; None if every token except the first is a target.
            position_ids: positions (B, S), which restart at 0 for each example; None if a window is one text.
            window: the numbers (B,) of the windows, by which a teacher on disk finds its predictions.
            weight: the weight of this part of an optimizer step (3,), see `objective.training_losses`.
        """
        distill = self.settings.objective == "distill"
        tokens = CountedTokens.select(input_ids, labels, last=distill)
        router_logits = bool(self._router_auxiliary_loss)
        arguments = shared_passes.forward_arguments(self.model, input_ids, position_ids, router_logits)
        inputs = PassInputs(arguments, tokens, window)
        layers = self.student.plan.layers if distill and self.settings.compares_states else ()
        answer = self.teacher.teach(inputs, layers) if distill else TeacherOutput()
        output, states = self._run_student(inputs, answer, layers)  # last: the teacher runs without adapters
        student = StudentOutput(tokens.select_rows(output.logits), states)
        mask_BS = None if labels is None else target_mask(labels)
        shares = objective.shares_at(self.settings, 0 if self._trainer is None else self.global_step)
        options: Any = {"mask_BS": mask_BS, "weight": weight, "mean": processes.mean, "shares": shares}
        with decoder.lm_head(self.model) as head:
            losses = objective.training_losses(student, head, tokens, answer, self.settings, **options)
        if self._router_auxiliary_loss and not distill:
            losses["load_balancing"] = load_balancing(output.router_logits, families.facts(self.model.config).top_k)
            losses["loss"] = losses["loss"] + self._router_auxiliary_loss * losses["load_balancing"]
        return losses

    def _run_student(
        self, inputs: PassInputs, answer: TeacherOutput, layers: Sequence[int] = ()
    ) -> tuple[Any, Sequence[Tensor]]:
        leaves = self._trainer is not None and trainer.has_leaves(self.trainer.strategy)
        with lora.cache_updates(self.adapters), shared_passes.require_input_gradient(self.model, leaves):
            return shared_passes.run_from(self.model, answer.layer, answer.entering, inputs.arguments, layers)

    def setup(self, stage: str) -> None:
        self.prepare()
        if stage == "fit":
            self.train()  # transformers returns models in evaluation mode

    def configure_model(self) -> None:
        shard, self.shard = self.shard, None
        if shard is not None:
            shard()

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        losses = self.losses(**batch)
        self._log_step(processes.mean({name: value.detach() for name, value in losses.items()}), batch_index)
        return losses["loss"]

    def _log_step(self, losses: Mapping[str, Tensor], batch_index: int) -> None:
        """Log the mean losses over the batches of an optimizer step so far."""
        number = batch_index % self.trainer.accumulate_grad_batches
        self._sums = {name: value + self._sums.get(name, 0) if number else value for name, value in losses.items()}
        means = {name: value / (number + 1) for name, value in self._sums.items()}
        self.log_dict({f"{self.stage}/{name}": value for name, value in means.items() if name != "loss"})
        self.step_loss = means["loss"]  # in the step's last batch, that of the step in all processes
        self.log(f"{self.stage}/loss", self.step_loss, prog_bar=True)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        ids, labels = batch["input_ids"], batch.get("labels")
        tokens = CountedTokens.select(ids, labels, last=True)
        inputs = PassInputs(shared_passes.forward_arguments(self.model, ids, batch.get("position_ids")), tokens)
        answer = self.teacher.teach(inputs) if self.teacher.answers_any_text else TeacherOutput()
        output, _ = self._run_student(inputs, answer)
        with decoder.lm_head(self.model) as head:
            losses = objective.validation_losses(tokens.select_rows(output.logits), head, tokens, answer)
        # A batch is weighted by its number of predictions. A process without windows left runs one with the others,
        # with weight 0. Lightning averages sizes as integers, so they are multiplied by the number of processes.
        size, several = len(ids) if labels is None else tokens.num_labels, processes.world_size()
        counts: dict[str, Any] = {"batch_size": 0 if "idle" in batch else size * several, "sync_dist": several > 1}
        self.log(f"{self.stage}/validation_loss", losses["loss"], prog_bar=True, **counts)
        if "kl" in losses:
            self.log(f"{self.stage}/validation_kl", losses["kl"], **counts)
        self.log("step", float(self.global_step), batch_size=1, sync_dist=several > 1, reduce_fx="max")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("step", float(self.global_step + 1))  # Lightning takes it in place of its own, which counts from 0

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.parameter_groups(), self.settings)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters as parameter groups for an optimizer."""
        return parameter_groups(self, self.settings.weight_decay)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm. Lightning refuses to do so with a fused AdamW in mixed precision, but bf16 is not scaled."""
        if gradient_clip_val and not isinstance(self.trainer.strategy, deepspeed.Zero):  # DeepSpeed clips itself
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_state(self, self.stage)
        checkpoint["plan"] = self.student.plan.to_dict()
        checkpoint.update(gather_random_states())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self, self.student.plan)
        self._random_states = states_of_process(checkpoint)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if self._random_states is not None:  # now that Lightning and the data loaders have drawn their random numbers
            set_random_states(self._random_states)
            self._random_states = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecoveryModule:
        """Move and convert like any module, but keep tensors that have another dtype than the model."""
        if "model" not in self._modules:
            return super()._apply(fn, recurse)  # type: ignore[return-value]
        unusual = UnusualPrecisions(self, self.model.dtype)
        super()._apply(fn, recurse)
        unusual.restore()
        return self
