"""The LightningModule: applies a method's plan in setup, then trains what the recovery names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from recondense import processes
from recondense.calibration.tape import Tape
from recondense.config.schema import RecoveryConfig
from recondense.data.labels import predicting
from recondense.errors import UserError
from recondense.models import decoder, families, views
from recondense.models.forward import model_inputs, run
from recondense.models.hooks import evaluating, outputs_of
from recondense.models.low_rank import LowRankExperts
from recondense.operations import Refit
from recondense.plan import Plan
from recondense.recovery import lora, shared_passes, trainable
from recondense.recovery.chunked_losses import CrossEntropy, Divergent, Hidden, Term, TopK, chunked
from recondense.recovery.engines import deepspeed, full_tensors, trainer
from recondense.recovery.losses import feature_matching, load_balancing
from recondense.recovery.random_states import random_states, set_random_states
from recondense.recovery.teacher_cache import CachedTeacher
from recondense.recovery.teachers import OtherTeacher, SharedBackboneTeacher
from recondense.recovery.trainable import trainable_parameters
from recondense.surgery import apply

Source = Literal["shared"] | OtherTeacher | CachedTeacher
NAMES = {"forward_kl": "kl", "reverse_kl": "reverse_kl", "js": "js"}  # of metrics


class Taught(NamedTuple):
    """What a teacher says of a batch.

    Args:
        target: its predictions; None: there is no teacher.
        states: its hidden states after the layers that the plan changes.
        layer: the first that is the student's own; the student starts there from `entering`, what enters it.
    """

    target: Hidden | TopK | None = None
    states: Sequence[Tensor] = ()
    layer: int = 0
    entering: Sequence[Tensor] = ()


class RecoveryModule(L.LightningModule):
    """Setup steps, what trains, and the teacher; works in any Lightning Trainer.

    `setup` applies the plan once, however often Lightning calls it; it searches only when it was handed none.
    Checkpoints hold what trains, not the frozen rest.

    Args:
        model: the causal LM; changed in place by setup.
        recovery: objective, optimiser and schedule.
        plan: what to do; None calls `search`.
        search: decides a plan for the model.
        tokenizer: for callbacks that evaluate.
        stage: prefix of logged metrics.
        trained_layers: layers whose experts train, when not those of the plan.
        computes_on: device of the training; None: where the model lies.
        router_auxiliary_loss: weight of the router's load-balancing loss; for training a sparse model from nothing.
        record: tapes the model on the calibration set as it is when called; plans that whiten or refit need it.
        later: stages of training that `begin` will take up after this one; what they train is set apart with the rest.

    Raises:
        UserError: neither plan nor search given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recovery: RecoveryConfig,
        plan: Plan | None = None,
        search: Callable[[PreTrainedModel], Plan] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stage: str = "recovery",
        trained_layers: Sequence[int] | None = None,
        router_auxiliary_loss: float = 0.0,
        record: Callable[[], Tape] | None = None,
        later: Sequence[RecoveryConfig] = (),
        computes_on: torch.device | None = None,
    ) -> None:
        super().__init__()
        if plan is None and search is None:
            raise UserError("RecoveryModule needs a plan, or a search that makes one")
        self.model = model
        self.recovery = recovery
        self.plan = plan
        self.tokenizer = tokenizer
        self.stage = stage
        self.teacher: SharedBackboneTeacher | None = None
        self.source: Source = "shared"  # whose predictions it learns
        self.task_results: dict[int, dict[str, dict[str, float]]] = {}  # optimiser step -> lm-eval results
        self.strict_loading = False  # checkpoints hold what trains
        self._all = (recovery, *later)
        self._search = search
        self._trained_layers = trained_layers
        self._router_auxiliary_loss = router_auxiliary_loss
        self._record = record
        self._originals: dict[int, nn.Module] = {}
        self.adapters: lora.Adapters | None = None
        self._prepared = False
        self._freed = False
        self._released = False
        self._refitted: dict[int, dict[str, float]] | None = None
        self._random_states: dict[str, Any] | None = None
        self._sums: dict[str, Tensor] = {}  # losses of the batches of a step so far
        self.computes_on = computes_on or decoder.device(model)  # also while its weights lie elsewhere
        self.shard: Callable[[], None] | None = None  # spreads the weights over the processes, once

    def prepare(self, refit: bool = True) -> Plan:
        """Search if there is no plan, apply the plan, freeze what does not train. Idempotent.

        Args:
            refit: execute the plan's refits too; without it, `refit` does so later.
        """
        assert self._search is not None or self.plan is not None
        if self.plan is None:
            self.plan = self._search(self.model)  # type: ignore[misc]
        if not self._prepared:
            if any(stage.trainable == "all" for stage in self._all) and self.plan.operations:
                raise UserError(
                    "recovery.trainable=all: the original shares the backbone and would change with the student; use "
                    "recovery.trainable=experts"
                )
            self._originals = apply.apply(self.model, self.plan, self._record)
            self.model.requires_grad_(False)
            self._refuse_nothing_to_train()
            # A control trains the original's experts afterwards: not the student's with them.
            trains = any(stage.trainable == "experts" or stage.control for stage in self._all)
            if self._originals and self.recovery.objective != "none" and trains:
                self._separate()
            self.teacher = SharedBackboneTeacher(self.model, self._originals) if self._originals else None
            self._prepared = True
        if refit:
            self.refit()
            self._free()
        return self.plan

    @property
    def _layers(self) -> Sequence[int]:
        """Those whose experts train, as far as they have any."""
        assert self.plan is not None
        return self.plan.layers if self._trained_layers is None else self._trained_layers

    def _refuse_nothing_to_train(self) -> None:
        experts = any(stage.needs_experts for stage in self._all)
        none = self.recovery.objective == "none"
        if not none and experts and not trainable_parameters(self.model, self._layers, "experts"):
            raise UserError(
                "recovery: no experts are left to train, all MoE layers were removed; use recovery=none or remove less"
            )

    def _free(self) -> None:
        """Let train what the recovery names; adapters come last, when weights are as they will stay."""
        if self.recovery.objective == "none" or self._freed:
            return
        self._freed = True
        if self.recovery.trainable == "lora":
            if self.adapters is None:
                layers = trainable.trained_layers(self.model, self._layers)
                self.adapters = lora.inject(self.model, layers, self.recovery.lora)
            for parameter in self.adapters.parameters():
                parameter.requires_grad_(True)
            if self.teacher is not None:
                self.teacher.adapters = self.adapters
            return
        for parameter in trainable_parameters(self.model, self._layers, self.recovery.trainable).values():
            parameter.requires_grad_(True)

    def begin(self, recovery: RecoveryConfig, stage: str) -> None:
        """Take up a stage of training on the model as the one before left it.

        Args:
            recovery: its settings.
            stage: prefix of its metrics.
        """
        assert self.adapters is None, "the stage before is not finished"
        self.recovery, self.stage = recovery, stage
        self.task_results = {}
        self._freed = False
        self._random_states = None  # of a checkpoint after which no step was left

    def finish(self) -> None:
        """Merge adapters into the weights, once; the teacher goes on with the weights as they were."""
        if self.adapters is None:
            return
        shared = {id(parameter) for parameter in self._original_parameters()} if self.teacher is not None else set()

        def replaced(module: nn.Module, name: str, before: nn.Parameter) -> None:
            if self.teacher is not None and id(before) in shared:
                self.teacher.keep(module, name, before)

        self.adapters.merge(replaced)
        self.adapters = None
        self._freed = True  # until `begin`, or others would be put in
        if self.teacher is not None:
            self.teacher.adapters = None

    def release_original(self) -> None:
        """Forget what the student does not use of the original; from here on there is none."""
        self.teacher, self._originals = None, {}
        self._released = True

    @contextmanager
    def without_original(self, path: Path) -> Iterator[None]:
        """Inside there is no original, and the memory of what it alone has is free; after, it is back.

        Not in a process whose weights an engine has taken meanwhile: there it stays away.

        Args:
            path: of a file that holds it meanwhile.
        """
        assert self.teacher is not None
        teacher, originals = self.teacher, self._originals
        with teacher.set_aside(path) if processes.is_first() else nullcontext():
            self.release_original()
            yield
        if processes.is_first():
            self.teacher, self._originals, self._released = teacher, originals, False

    def _original_parameters(self) -> list[nn.Parameter]:
        with self.original() as model:
            return list(model.parameters())

    def refit(self) -> dict[int, dict[str, float]]:
        """Execute the plan's refits, once; the errors that `surgery.refit` returns.

        Raises:
            UserError: the plan refits, and no `record` was given.
        """
        assert self.plan is not None
        if self._refitted is None:
            if self._record is None and any(isinstance(operation, Refit) for operation in self.plan.operations):
                raise UserError("plan: refit needs the calibration set; none was given")
            record = cast(Callable[[], "Tape"], self._record)
            self._refitted = apply.refit(self.model, self.plan, self._originals, record)
        return self._refitted

    def _separate(self) -> None:
        """What will train gets weights of its own where the original uses them too; all else stays shared."""
        for layer in trainable.trained_layers(self.model, self._layers):
            original = self._originals.get(layer, views.get_block(self.model, layer))
            if trainable.separated(self.model, layer, original):
                self._originals[layer] = original

    def setup(self, stage: str) -> None:
        self.prepare()
        if stage == "fit":
            self.train()  # transformers hands models out in evaluation mode

    def configure_model(self) -> None:
        shard, self.shard = self.shard, None
        if shard is not None:
            shard()

    def in_common(self) -> list[object]:
        """What a twin of this module shares with it: what is no part of the computation."""
        kept = [self.teacher.kept()] if self.teacher is not None else []
        return [
            self.tokenizer,
            self.plan,
            self.task_results,
            self._search,
            self._record,
            *([] if isinstance(self.source, str) else [self.source]),
            *(p for own in kept for p in own),
        ]

    def originals(self) -> dict[int, nn.Module]:
        """The teacher's own blocks, by decoder layer."""
        return {} if self.teacher is None else {int(layer): block for layer, block in self.teacher.blocks.items()}

    def data_dependent(self) -> list[nn.Module]:
        """Blocks in which the tokens decide what runs, the teacher's among them."""
        blocks = [views.get_block(self.model, layer) for layer in range(len(decoder.decoder_layers(self.model)))]
        return [block for block in (*blocks, *self.originals().values()) if views.is_sparse(block)]

    def original(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which the model is the uncompressed one."""
        assert not self._released, "the original was freed: its predictions are on disk"
        return self.teacher.active() if self.teacher is not None else nullcontext(self.model)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of the student."""
        with lora.once(self.adapters):
            logits: Tensor = self.model(**model_inputs(self.model, input_ids, position_ids), use_cache=False).logits
        return logits.view(*input_ids.shape, -1)

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        window: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The objective (`loss`) and its parts, nats per token, for token ids (B, S).

        Args:
            labels: the ids where they are to be predicted, MASKED elsewhere; None: each token but the first is.
            position_ids: begin at 0 with each example of a window; None: a window is one text.
            window: numbers of the windows, by which a teacher on disk keeps its predictions.
            weight: predicted tokens (3,), where an optimiser step has several parts (batches, processes) of unequal
                sizes: of this part × parts of the step, of this batch × batches of the step, of the step. The mean of
                the parts' losses is then the mean over the tokens of the step. Whole numbers: training in bf16 would
                round others.
        """
        recovery = self.recovery
        distill = recovery.objective == "distill"
        counted = shared_passes.Counted.of(input_ids, labels, last=distill)
        arguments: dict[str, Any] = {**model_inputs(self.model, input_ids, position_ids), "use_cache": False}
        if self._router_auxiliary_loss:
            arguments["output_router_logits"] = True
        taught = self._taught(arguments, counted, window) if distill else Taught()
        # The teacher's pass knows no adapters, so it comes before.
        with (
            lora.once(self.adapters),
            self._states() as mine,
            shared_passes.starting(self.model, taught.layer, taught.entering, arguments) as own,
            shared_passes.differentiable(
                self.model, self._trainer is not None and trainer.has_leaves(self.trainer.strategy)
            ),
        ):
            student = run(self.model, own)
        losses = self._divided(counted.rows(student.logits), counted, taught)
        part, of_batch = (1.0, 1.0) if weight is None else weight[:2].float() / weight[2].float()
        if weight is not None:
            losses = {name: part * value for name, value in losses.items()}
        if recovery.hidden_share and distill:
            mask = None if labels is None else predicting(labels)
            # Relative to the teacher's states of this batch: those of a step's later ones are not known yet.
            losses["hidden"] = of_batch * feature_matching(mine, taught.states, mask, processes.mean)
            losses["loss"] = losses["loss"] + recovery.hidden_share * losses["hidden"]
        if self._router_auxiliary_loss and not distill:
            top_k = families.facts(self.model.config).top_k
            losses["load_balancing"] = load_balancing(student.router_logits, top_k)
            losses["loss"] = losses["loss"] + self._router_auxiliary_loss * losses["load_balancing"]
        return losses

    def _divided(self, hidden_TD: Tensor, counted: shared_passes.Counted, taught: Taught) -> dict[str, Tensor]:
        """The losses of the student's predictions, each a mean over the tokens that it counts."""
        recovery = self.recovery
        shares = {"cross_entropy": recovery.cross_entropy_share, "hidden": recovery.hidden_share}
        terms: dict[str, tuple[float, int, Term]] = {}
        entropy = CrossEntropy(counted.labels_T)
        if taught.target is None:
            terms["cross_entropy"] = 1.0, counted.num_labels, entropy
        else:
            divergent = Divergent(recovery.divergence, taught.target, recovery.temperature)
            terms[NAMES[recovery.divergence]] = 1 - sum(shares.values()), len(counted), divergent
            if recovery.cross_entropy_share:
                terms["cross_entropy"] = recovery.cross_entropy_share, counted.num_labels, entropy
        counts = [max(1, count) for _, count, _ in terms.values()]
        with decoder.gathered(self.model) as head:
            weighted = [(share / max(1, count), term) for share, count, term in terms.values()]
            loss, sums = chunked(weighted, hidden_TD, head)
        losses = {name: total / count for name, total, count in zip(terms, sums, counts, strict=True)}
        if taught.target is None:
            losses["cross_entropy"] = loss
        return {**losses, "loss": loss}

    @torch.no_grad()
    def _taught(self, arguments: Mapping[str, Any], counted: shared_passes.Counted, window: Tensor | None) -> Taught:
        """The teacher's pass, without dropout, or what is kept of one."""
        if self.source == "shared":
            changed = set() if self.teacher is None else self.teacher.changed()
            layer = shared_passes.first_own_layer(self.model, changed)
            with (
                self.original(),
                evaluating(self.model),
                self._states() as states,
                shared_passes.keeping(self.model, layer) as entering,
            ):
                found = run(self.model, arguments)
            with decoder.gathered(self.model) as head:
                return Taught(Hidden(counted.rows(found.logits), head), states, layer, entering)
        if isinstance(self.source, OtherTeacher):
            with evaluating(self.source.model):
                found = run(self.source.model, arguments)
            with decoder.gathered(self.source.model) as head:
                return Taught(Hidden(counted.rows(found.logits), head))
        assert window is not None, "a teacher on disk is asked by the numbers of windows"
        kept = self.source.read(window.tolist())
        return Taught(TopK(*(counted.rows(column).to(self.model.device) for column in kept)))

    def _states(self) -> AbstractContextManager[list[Tensor]]:
        """Hidden states (B, S, D) after the layers that the plan changes, after the final norm for the last.

        transformers' own `hidden_states` are the same, but lack those of removed layers.
        """
        if self.recovery.objective != "distill" or not self.recovery.hidden_share:
            return nullcontext([])
        assert self.plan is not None
        after = [*decoder.decoder_layers(self.model)[:-1], decoder.final_norm(self.model)]
        return outputs_of([after[layer] for layer in self.plan.layers])

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        losses = self.losses(**batch)
        self._log_step(processes.mean({name: value.detach() for name, value in losses.items()}), batch_index)
        return losses["loss"]

    def _log_step(self, losses: Mapping[str, Tensor], batch_index: int) -> None:
        """Log the means over the batches of an optimiser step; in the middle of it over those so far."""
        number = batch_index % self.trainer.accumulate_grad_batches
        self._sums = {name: value + self._sums.get(name, 0) if number else value for name, value in losses.items()}
        means = {name: value / (number + 1) for name, value in self._sums.items()}
        self.log_dict({f"{self.stage}/{name}": value for name, value in means.items() if name != "loss"})
        self.log(f"{self.stage}/loss", means["loss"], prog_bar=True)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        ids, labels = batch["input_ids"], batch.get("labels")
        arguments = {**model_inputs(self.model, ids, batch.get("position_ids")), "use_cache": False}
        counted = shared_passes.Counted.of(ids, labels, last=True)
        taught = Taught()
        if isinstance(self.source, OtherTeacher) or (self.teacher is not None and self.source == "shared"):
            taught = self._taught(arguments, counted, None)
        with (
            lora.once(self.adapters),
            shared_passes.starting(self.model, taught.layer, taught.entering, arguments) as own,
        ):
            student_TD = counted.rows(run(self.model, own).logits)
        terms: list[tuple[float, Term]] = [(1.0, CrossEntropy(counted.labels_T))]
        terms += [] if taught.target is None else [(1.0, Divergent("forward_kl", taught.target))]
        with decoder.gathered(self.model) as head:
            _, sums = chunked(terms, student_TD, head)
        # A batch counts by what it predicts. A process that has no window left computes one with the others, and it
        # does not count. Sizes are averaged as whole numbers, so they are given as multiples.
        size = len(ids) if labels is None else counted.num_labels
        several = processes.world_size()
        counts: dict[str, Any] = {"batch_size": 0 if "idle" in batch else size * several, "sync_dist": several > 1}
        loss = sums[0] / max(1, counted.num_labels)
        self.log(f"{self.stage}/validation_loss", loss, prog_bar=True, **counts)
        if taught.target is not None:
            self.log(f"{self.stage}/validation_kl", sums[1] / max(1, len(counted)), **counts)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, as an optimiser takes it: norms and biases, whatever their shape, are not decayed."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matrix = full_tensors.num_dimensions(parameter) > 1 and not views.is_norm_or_bias(self, name)
                (decayed if matrix else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.recovery.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> Any:
        recovery = self.recovery
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=recovery.learning_rate,
            betas=(recovery.betas[0], recovery.betas[1]),
            fused=recovery.fused_optimizer or None,
        )
        schedule = get_scheduler(
            recovery.schedule if recovery.schedule != "constant" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=recovery.warmup_steps,
            num_training_steps=recovery.steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def check_checkpoint(self, stored: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that was made under another plan; one of this plan holds all that trains.

        Raises:
            UserError: it was made under another.
        """
        if self.plan is None or Plan.from_dict(stored["plan"]).operations != self.plan.operations:
            raise UserError("the checkpoint belongs to another plan; start anew in another folder or overwrite=true")
        missing = {name for name, value in self.named_parameters() if value.requires_grad} - stored["state_dict"].keys()
        assert not missing, f"not in the checkpoint: {sorted(missing)}"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By norm. Lightning refuses a fused AdamW under mixed precision, which may unscale; bf16 has no scale."""
        if gradient_clip_val and not isinstance(self.trainer.strategy, deepspeed.Zero):  # DeepSpeed clips itself
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_state(self)
        checkpoint["plan"] = self.plan.to_dict() if self.plan else None
        first, *others = processes.gather(random_states())
        checkpoint["random_states"] = first
        if others:
            checkpoint["random_states_of_others"] = others

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        states = [checkpoint["random_states"], *checkpoint.get("random_states_of_others", ())]
        self._random_states = states[min(processes.rank(), len(states) - 1)]

    @contextmanager
    def training_in(self, precision: str) -> Iterator[None]:
        """Inside, what trains is in fp32 under mixed precision: AdamW's small steps would vanish in bf16."""
        dtypes = {name: value.dtype for name, value in self.model.named_parameters() if value.requires_grad}
        eager = False
        if precision.endswith("mixed"):
            self._convert(dict.fromkeys(dtypes, torch.float32))
            blocks = views.sparse_blocks(self.model).values()
            fused = [block for block in blocks if not isinstance(block.experts, LowRankExperts)]
            # Autocast does not cover transformers' grouped products.
            eager = any(block.weights.down_EDF.dtype == torch.float32 for block in fused)
        try:
            with views.eager_experts(self.model, eager):
                yield
        finally:
            self._convert(dtypes)

    def _convert(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Bring weights of the model to a dtype each."""
        for name, value in self.model.named_parameters():
            if name in dtypes:
                value.data = value.data.to(dtypes[name])

    def rest(self) -> None:
        """Leave training: frozen, in evaluation mode, without gradients and Trainer; `prepare` lets it train again."""
        self.model.requires_grad_(False)
        self.zero_grad()
        self.eval()
        self.trainer = None
        self._freed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecoveryModule:
        """Move and convert as any module, but what loading left in another precision than the model's keeps it.

        bf16-true converts whole modules: rounded rotary frequencies turn far positions by another angle, and some
        families' routers are in fp32.
        """
        before = [(each, dict(each._buffers)) for each in self.modules()]
        usual = self.model.dtype
        others = [(each, each.data) for each in self.parameters() if each.dtype != usual and not each.requires_grad]
        super()._apply(fn, recurse)
        for each, buffers in before:
            for name, own in buffers.items():
                now = each._buffers.get(name)
                if own is not None and now is not None and now.dtype != own.dtype:
                    each._buffers[name] = own.to(now.device)
        for parameter, data in others:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if self._random_states is not None:  # here, after Lightning and data loaders have drawn their own numbers
            set_random_states(self._random_states)
            self._random_states = None


def trained_state(module: RecoveryModule) -> dict[str, Tensor]:
    """The part of a module's state that trains, detached and whole; empty in all processes but the first."""
    found = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            whole = full_tensors.whole(value)
            if processes.is_first():
                found[name] = whole.cpu()  # all of them on one card would be much
    return found
