"""The contestants of training.py: the model and the texts that they share, and the ways to train a step."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import subjects
import torch
import transformers
from resident_memory import resident_bytes
from training_turns import LightningTurns, Turns
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.config.schema import RecoveryConfig, TrainerConfig
from recondense.data.labels import MASKED
from recondense.data.loader import RecoveryData, ShuffledWindows
from recondense.data.stdlib import stdlib_corpora
from recondense.data.windows import pack
from recondense.models import moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.parameters import weights_bytes
from recondense.operations import Condense
from recondense.plan import Plan
from recondense.progress import allow_bars
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teacher_cache import keep_predictions
from recondense.recovery.teachers import OtherTeacher, Teacher
from recondense.recovery.trainable import trainable_parameters
from recondense.run.tiny import train_tokenizer
from recondense.surgery import execute
from recondense.surgery.apply import apply

sys.path.insert(0, str(subjects.ROOT / "tests"))
from support.losses import forward_kl

OURS = ("finetune", "shared", "cached", "model")
SETTINGS = ("checkpointed", "compiled", "bf16_mixed", "unfused")  # of the distillation with a shared teacher
MOST_STEPS = 100_000


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """A Qwen2-MoE with random weights, the same in every process."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden_size, intermediate_size=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=args.length, num_experts=args.num_experts, num_experts_per_tok=4,
        moe_intermediate_size=args.width, shared_expert_intermediate_size=4 * args.width, initializer_range=0.05,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def make_plan(args: argparse.Namespace) -> Plan:
    """Condense the upper half of the layers to their shared expert and four routed ones."""
    upper = range(args.layers // 2, args.layers)
    return Plan("random", tuple(Condense(layer, (0, 1, 2, 3), (0.25, 0.2, 0.15, 0.1), 0.5) for layer in upper))


def read_texts(path: Path | None) -> list[str]:
    """The texts of a file, or definitions of the standard library."""
    if path is not None:
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    files = stdlib_corpora().train or []
    return [part for file in files[:60] for part in str(file).split("\n\n\n") if part.strip()]


def tokenize_texts(args: argparse.Namespace) -> dict[str, Any]:
    """The texts as packed windows, and one by one, each cut at the length."""
    allow_bars(False)
    texts = read_texts(args.texts)
    tokenizer = train_tokenizer(texts, args.vocabulary, args.length)
    cut = [tokenizer(text, truncation=True, max_length=args.length)["input_ids"] for text in texts]
    return {"packed": pack(texts, tokenizer, args.length), "cut": [ids for ids in cut if ids]}


def padded(ids: list[int], length: int) -> dict[str, list[int]]:
    """A text padded to the length, as the authors train on it."""
    rest = length - len(ids)
    return {
        "input_ids": ids + [0] * rest, "attention_mask": [1] * len(ids) + [0] * rest, "labels": ids + [MASKED] * rest
    }  # fmt: skip


def run_recovery(name: str, args: argparse.Namespace, data: dict[str, Any], turns: Turns, folder: Path) -> None:
    """Recover with recondense as train.py does."""
    objective: Any = "finetune" if name == "finetune" else "distill"
    recovery = RecoveryConfig(
        objective=objective, steps=MOST_STEPS, batch_size=args.batch_size, checkpoint_every=MOST_STEPS,
        schedule="constant", learning_rate=1e-4, activation_checkpointing=name == "checkpointed",
        fused_optimizer=name != "unfused",
    )  # fmt: skip
    model = build_model(args)
    turns.facts["original_bytes"] = weights_bytes(model)
    student = apply(model, make_plan(args))
    teacher: Teacher | None = None
    windows: Any = {"input_ids": data["packed"]}
    if name == "cached":
        predictions = keep_predictions(
            student.original, windows, folder / "teacher", 64, 1.0, args.batch_size, nullcontext()
        )
        turns.facts["kept_bytes_per_token"] = (
            sum(file.stat().st_size for file in predictions.files) / data["packed"].numel()
        )
        windows["window"] = torch.arange(len(data["packed"]))
        teacher = predictions
    elif name == "model":
        teacher = OtherTeacher(build_model(args), model, "the original")
    module = RecoveryModule(student, recovery, teacher)
    module.prepare()
    turns.facts["trained_bytes"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    footprint = student.footprint()
    turns.facts["student_bytes"] = footprint.student
    turns.facts["student_and_original_bytes"] = footprint.with_original
    first = {key: value[: args.batch_size] for key, value in windows.items()}

    def one_more() -> None:
        module.zero_grad()
        module.losses(first["input_ids"], window=first.get("window"))["loss"].backward()  # type: ignore[no-untyped-call]

    turns.one_more = one_more
    loader = RecoveryData(windows, None, args.batch_size, MOST_STEPS, seed=0)
    precision: Any = "bf16-mixed" if name == "bf16_mixed" else "auto"
    trainer = TrainerConfig(progress_bar=False, compile=name == "compiled", precision=precision)
    needs_original = name in ("shared", *SETTINGS)
    with nullcontext() if needs_original else student.offload_original(folder / "original.safetensors"):
        fit(module, loader, folder / "checkpoints", trainer, 0, [LightningTurns(turns)])


def run_trainer(packed: bool, args: argparse.Namespace, data: dict[str, Any], turns: Turns, folder: Path) -> None:
    """Fine-tune the condensed model with transformers' Trainer; the original is not in memory."""
    model = build_model(args)
    execute.execute(model, make_plan(args))
    freeze_all_but_experts(model, args)

    class Counting(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            turns.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *rest, **options)

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *rest: Any, **options: Any) -> None:
            turns.start_step()

    full = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in data["packed"].tolist()]
    rows = full if packed else [padded(ids, args.length) for ids in data["cut"]]
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=MOST_STEPS, per_device_train_batch_size=args.batch_size, use_cpu=True,
        learning_rate=1e-4, lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0,
        optim="adamw_torch_fused", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    collate = transformers.default_data_collator
    training = Counting(model, settings, data_collator=collate, train_dataset=rows, callbacks=[Steps()])

    def one_more() -> None:
        model.zero_grad()
        training.training_step(model, collate(rows[: args.batch_size]))

    turns.one_more = one_more
    training.train()


def freeze_all_but_experts(model: PreTrainedModel, args: argparse.Namespace) -> list[torch.nn.Parameter]:
    """Freeze all parameters but those that a recovery trains, and return these."""
    model.requires_grad_(False)
    trained = list(trainable_parameters(model, make_plan(args).layers, "experts").values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def run_plain_loop(shared: bool, args: argparse.Namespace, data: dict[str, Any], turns: Turns, folder: Path) -> None:
    """Distil with full logits in a plain loop. The teacher is a second model, or shares the student's backbone."""
    student = build_model(args)
    originals = execute.execute(student, make_plan(args))
    trained = freeze_all_but_experts(student, args)
    teacher = student if shared else build_model(args).requires_grad_(False)
    if shared:
        active: Callable[[], Any] = partial(moe_blocks.swap_blocks, student, originals)
    else:
        originals, active = {}, nullcontext
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    student.train()

    def forward_backward(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), active(), eval_mode(teacher):
            teacher_logits = teacher(input_ids=ids, use_cache=False).logits
        loss = forward_kl(student(input_ids=ids, use_cache=False).logits, teacher_logits)
        del teacher_logits
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    turns.one_more = lambda: forward_backward(data["packed"][: args.batch_size])
    for batch in ShuffledWindows({"input_ids": data["packed"]}, args.batch_size, MOST_STEPS, 0, lambda: 0):
        turns.start_step()
        loss = forward_backward(batch["input_ids"])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        turns.losses.append(float(loss))
        turns.tokens += batch["input_ids"].numel()


CONTESTANTS: dict[str, Callable[..., None]] = {
    **{name: partial(run_recovery, name) for name in (*OURS, *SETTINGS)},
    "trainer_padded": partial(run_trainer, False),
    "trainer_packed": partial(run_trainer, True),
    "two_models": partial(run_plain_loop, False),
    "full_logits": partial(run_plain_loop, True),
}


def run_contestant(name: str, args: argparse.Namespace, data: dict[str, Any], connection: Any) -> None:
    """What the process of a contestant does."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    allow_bars(False)
    torch.randn(8, 8).matmul(torch.randn(8, 8)).sum()  # so that the first operation loads its libraries now
    turns = Turns(connection, resident_bytes())
    with tempfile.TemporaryDirectory() as folder:
        CONTESTANTS[name](args, data, turns, Path(folder))
