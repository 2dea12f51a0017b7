"""A training step of recovery against other ways to take it: real tokens per second, peak memory, and the loss.

    python benchmarks/training.py [--json FILE] [--texts FILE] [--rounds 4] [--steps 3] [--only NAME ...]
    python benchmarks/training.py --only shared checkpointed compiled bf16_mixed unfused    what the settings change

A Qwen2-MoE with random weights, its upper half of layers condensed; only the experts of condensed layers train, with
AdamW. Each contestant is a process of its own; they take turns, a few steps at a time, in one order and then in the
other, so that a slow minute of the machine meets all. A token counts when it is no padding.

On a machine that does other things too, compare tokens per second of CPU time, with --threads 1.

Memory is counted in tensors, as CUDA's allocator does: those alive between steps, and the most that a further step
adds, forward and backward. Beside it stands what was resident at most (the kernel's high-water mark, put back after
set-up), and the same less what the process had after its imports: with it come the holes in malloc's heap. The
recoveries of recondense run as in train.py: where nobody asks the original while training, it lies on the disk until
the final comparison.

    (a) transformers' Trainer on the same condensed model: the authors' fine-tuning, each text cut at the length and
        padded to it; and once on the same packed windows as ours
    (b) distillation by two whole models and full logits, in a plain loop
    (c) the same on one shared backbone, in two whole passes with full logits (the loss of TRL's GKD)

Texts are lines of a .jsonl file with `text`; without one, the top-level definitions of Python's standard library.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import subjects
import torch
import transformers
from rich.table import Table
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.config.schema import RecoveryConfig, TrainerConfig
from recondense.data.labels import MASKED
from recondense.data.loader import RecoveryData, ShuffledWindows
from recondense.data.stdlib import stdlib_corpora
from recondense.data.windows import pack
from recondense.evaluation.profiling import peak_tensor_bytes
from recondense.models import views
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
from recondense.surgery import apply
from recondense.surgery import student as student_module

sys.path.insert(0, str(subjects.ROOT / "tests"))
from support.losses import forward_kl

OURS = ("finetune", "shared", "cached", "model")
SETTINGS = ("checkpointed", "compiled", "bf16_mixed", "unfused")  # of the distillation with a shared teacher
TITLES = {
    "finetune": "recondense: fine-tuning",
    "trainer_padded": "(a) Trainer, padded texts",
    "trainer_packed": "(a) Trainer, packed texts",
    "shared": "recondense: teacher shared",
    "cached": "recondense: teacher cached",
    "model": "recondense: teacher a model",
    "two_models": "(b) two whole models",
    "full_logits": "(c) shared, full logits",
    "checkpointed": "... activation checkpointing",
    "compiled": "... trainer.compile",
    "bf16_mixed": "... precision=bf16-mixed",
    "unfused": "... fused_optimizer=false",
}
# No slower than the packed Trainer: within what a ratio moves from run to run.
AT_LEAST = {
    "finetune/trainer_padded speed": 1.2,
    "finetune/trainer_packed speed": 0.95,
    "shared/two_models speed": 1.25,
}
AT_MOST = {
    "finetune/trainer_padded memory": 1.0,
    "shared/two_models memory": 0.7,
    "shared largest difference of losses": 1e-5,
}
MOST_STEPS = 100_000
MIB = 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help=".jsonl with `text` (default: the standard library's definitions)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=TITLES,
        default=[name for name in TITLES if name not in SETTINGS],
        help="contestants",
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window, and at which a text is cut")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=60)
    parser.add_argument("--width", type=int, default=256, help="of an expert; shared ones have four times as much")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--show-only", action="store_true", help="judge nothing")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ model and texts


def model_of(args: argparse.Namespace) -> PreTrainedModel:
    """Random weights, the same in every process."""
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


def plan_of(args: argparse.Namespace) -> Plan:
    """The upper half of the layers, each to its shared expert and four routed ones."""
    upper = range(args.layers // 2, args.layers)
    return Plan("random", tuple(Condense(layer, (0, 1, 2, 3), (0.25, 0.2, 0.15, 0.1), 0.5) for layer in upper))


def texts_of(path: Path | None) -> list[str]:
    """The documents."""
    if path is not None:
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    files = stdlib_corpora().train or []
    return [part for file in files[:60] for part in str(file).split("\n\n\n") if part.strip()]


def tokens_of(args: argparse.Namespace) -> dict[str, Any]:
    """The same texts as packed windows, and as cut ones of which each is padded to the length."""
    allow_bars(False)
    texts = texts_of(args.texts)
    tokenizer = train_tokenizer(texts, args.vocabulary, args.length)
    cut = [tokenizer(text, truncation=True, max_length=args.length)["input_ids"] for text in texts]
    return {"packed": pack(texts, tokenizer, args.length), "cut": [ids for ids in cut if ids]}


def padded(ids: list[int], length: int) -> dict[str, list[int]]:
    """A text as the authors train on it."""
    rest = length - len(ids)
    return {
        "input_ids": ids + [0] * rest, "attention_mask": [1] * len(ids) + [0] * rest, "labels": ids + [MASKED] * rest
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- turns


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def alive() -> int:
    """Bytes of all tensors of this process, each memory once."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # no subclasses: a compiler's have no memory
    found = [each for each in gc.get_objects() if type(each) in kinds and each.device.type == "cpu"]
    found += [each.grad for each in found if each.is_leaf and each.grad is not None]
    return sum({(s := each.untyped_storage()).data_ptr(): s.nbytes() for each in found}.values())


class Turns:
    """Lets a process take its steps when it is told to, and reports them.

    Args:
        connection: to the process that hands out turns: it sends numbers of steps, and 0 at the end.
        imported: bytes that were resident after the imports.
    """

    def __init__(self, connection: Any, imported: int) -> None:
        self.connection = connection
        self.imported = imported
        self.left = 0
        self.tokens = 0
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        self.one_more: Callable[[], Any] | None = None  # forward and backward of a step
        self._started: float | None = None
        self._cpu = 0.0

    def step(self) -> None:
        """A step begins: the one before it is done."""
        if self.left == 0:
            now = time.perf_counter()
            if self._started is not None:
                self.connection.send((now - self._started, time.process_time() - self._cpu, self.tokens))
            else:
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # puts VmHWM back
                self.connection.send(None)
            try:
                self.left = self.connection.recv()
            except EOFError:  # whoever hands out turns is gone
                os._exit(1)
            if self.left == 0:
                self._end()
            self.tokens, self._started, self._cpu = 0, time.perf_counter(), time.process_time()
        self.left -= 1

    def _end(self) -> None:
        peak = resident("VmHWM")
        memory = {"peak_bytes": peak, "peak_bytes_over_imports": peak - self.imported, "imports_bytes": self.imported}
        assert self.one_more is not None
        between = alive()
        step = peak_tensor_bytes(self.one_more, "cpu")
        self.facts |= {"alive_bytes": between, "step_bytes": step, "tensor_bytes": between + step}
        self.connection.send({**memory, **self.facts, "losses": self.losses})
        os._exit(0)


class LightningTurns(L.Callback):
    """For our recoveries."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.turns.step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turns.losses.append(float(outputs["loss"]))
        self.turns.tokens += batch["input_ids"].numel()


# ---------------------------------------------------------------------------------------------------- contestants


def recondense(name: str, args: argparse.Namespace, data: dict[str, Any], turns: Turns, folder: Path) -> None:
    """A recovery as train.py runs it."""
    objective: Any = "finetune" if name == "finetune" else "distill"
    recovery = RecoveryConfig(
        objective=objective, steps=MOST_STEPS, batch_size=args.batch_size, checkpoint_every=MOST_STEPS,
        schedule="constant", learning_rate=1e-4, activation_checkpointing=name == "checkpointed",
        fused_optimizer=name != "unfused",
    )  # fmt: skip
    model = model_of(args)
    turns.facts["original_bytes"] = weights_bytes(model)
    student = student_module.apply(model, plan_of(args))
    teacher: Teacher | None = None
    windows: Any = {"input_ids": data["packed"]}
    if name == "cached":
        kept = keep_predictions(student.original, windows, folder / "teacher", 64, 1.0, args.batch_size, nullcontext())
        turns.facts["kept_bytes_per_token"] = sum(file.stat().st_size for file in kept.files) / data["packed"].numel()
        windows["window"] = torch.arange(len(data["packed"]))
        teacher = kept
    elif name == "model":
        teacher = OtherTeacher(model_of(args), model, "the original")
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
    asked = name in ("shared", *SETTINGS)
    with nullcontext() if asked else student.offload_original(folder / "original.safetensors"):
        fit(module, loader, folder / "checkpoints", trainer, 0, [LightningTurns(turns)])


def trainer(packed: bool, args: argparse.Namespace, data: dict[str, Any], turns: Turns, folder: Path) -> None:
    """transformers' Trainer on the condensed model, of which nothing else is in memory."""
    model = model_of(args)
    apply.execute(model, plan_of(args))
    freeze_but_experts(model, args)

    class Counting(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            turns.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *rest, **options)

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *rest: Any, **options: Any) -> None:
            turns.step()

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


def freeze_but_experts(model: PreTrainedModel, args: argparse.Namespace) -> list[torch.nn.Parameter]:
    """What a recovery trains."""
    model.requires_grad_(False)
    trained = list(trainable_parameters(model, plan_of(args).layers, "experts").values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def plain(shared: bool, args: argparse.Namespace, data: dict[str, Any], turns: Turns, folder: Path) -> None:
    """Distillation with full logits in a plain loop; the teacher is a model of its own, or the student's backbone."""
    student = model_of(args)
    originals = apply.execute(student, plan_of(args))
    trained = freeze_but_experts(student, args)
    teacher = student if shared else model_of(args).requires_grad_(False)
    if shared:
        active: Callable[[], Any] = partial(views.swap_blocks, student, originals)
    else:
        originals, active = {}, nullcontext
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    student.train()

    def computed(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), active(), eval_mode(teacher):
            theirs = teacher(input_ids=ids, use_cache=False).logits
        loss = forward_kl(student(input_ids=ids, use_cache=False).logits, theirs)
        del theirs
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    turns.one_more = lambda: computed(data["packed"][: args.batch_size])
    for batch in ShuffledWindows({"input_ids": data["packed"]}, args.batch_size, MOST_STEPS, 0, lambda: 0):
        turns.step()
        loss = computed(batch["input_ids"])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        turns.losses.append(float(loss))
        turns.tokens += batch["input_ids"].numel()


WAYS: dict[str, Callable[..., None]] = {
    **{name: partial(recondense, name) for name in (*OURS, *SETTINGS)},
    "trainer_padded": partial(trainer, False),
    "trainer_packed": partial(trainer, True),
    "two_models": partial(plain, False),
    "full_logits": partial(plain, True),
}


def contestant(name: str, args: argparse.Namespace, data: dict[str, Any], connection: Any) -> None:
    """The process of one contestant."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    allow_bars(False)
    torch.randn(8, 8).matmul(torch.randn(8, 8)).sum()  # what the first operation loads
    turns = Turns(connection, resident("VmRSS"))
    with tempfile.TemporaryDirectory() as folder:
        WAYS[name](args, data, turns, Path(folder))


# ------------------------------------------------------------------------------------------------------ the figures


def measure(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Hand out turns; tokens per second is the median over the rounds."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name in args.only:
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=contestant, args=(name, args, data, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes[name].recv()  # is set up
    speeds: dict[str, list[float]] = {name: [] for name in args.only}
    efforts: dict[str, list[float]] = {name: [] for name in args.only}
    for round_ in range(args.rounds + 1):
        for name in args.only[:: 1 if round_ % 2 else -1]:
            pipes[name].send(args.steps if round_ else 2)  # the first warms up
            seconds, cpu_seconds, tokens = pipes[name].recv()
            if round_:
                speeds[name].append(tokens / seconds)
                efforts[name].append(tokens / cpu_seconds)
                print(f"{name}: {tokens} tokens in {seconds:.1f} s ({cpu_seconds:.1f} of CPU)", file=sys.stderr)
    figures = {}
    for name, pipe in pipes.items():
        pipe.send(0)
        found = pipe.recv()
        figures[name] = {
            **found,
            "tokens_per_second": subjects.spread(speeds[name]),
            "tokens_per_cpu_second": subjects.spread(efforts[name]),
        }
    return figures


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Ours against the others: medians of the turns, memory, and how far the losses of distillations are apart."""
    found: dict[str, float] = {}
    pairs = [("finetune", "trainer_padded"), ("finetune", "trainer_packed"), ("shared", "two_models")]
    pairs += [("shared", "full_logits"), ("cached", "two_models"), *((name, "shared") for name in SETTINGS)]
    for ours, theirs in pairs:
        if ours in figures and theirs in figures:
            speeds = [figures[name]["tokens_per_second"]["median"] for name in (ours, theirs)]
            tensors = [figures[name]["tensor_bytes"] for name in (ours, theirs)]
            memory = [figures[name]["peak_bytes"] for name in (ours, theirs)]
            over = [figures[name]["peak_bytes_over_imports"] for name in (ours, theirs)]
            efforts = [figures[name]["tokens_per_cpu_second"]["median"] for name in (ours, theirs)]
            found[f"{ours}/{theirs} speed"] = speeds[0] / speeds[1]
            found[f"{ours}/{theirs} speed by CPU time"] = efforts[0] / efforts[1]
            found[f"{ours}/{theirs} memory"] = tensors[0] / tensors[1]
            found[f"{ours}/{theirs} resident"] = memory[0] / memory[1]
            found[f"{ours}/{theirs} resident over imports"] = over[0] / over[1]
    curves = {name: figures[name]["losses"] for name in ("shared", "two_models", "full_logits", "model", "cached")
              if name in figures}  # fmt: skip
    reference = curves.get("two_models", [])
    for name, losses in curves.items():
        if reference and name != "two_models":
            both = list(zip(losses, reference, strict=False))
            found[f"{name} first loss"], found["two_models first loss"] = both[0]
            found[f"{name} largest difference of losses"] = max(abs(a - b) / b for a, b in both)
    return found


def table(figures: dict[str, Any]) -> Table:
    """One row a contestant."""
    result = Table(
        "",
        "real tokens/s",
        "per CPU second",
        "tensors, MiB",
        "resident",
        "over imports",
        "first loss",
        title="training step",
    )
    for name, found in figures.items():
        speed = found["tokens_per_second"]
        cells = [
            f"{speed['median']:.0f} ({speed['min']:.0f} to {speed['max']:.0f})",
            f"{found['tensor_bytes'] / MIB:.0f}",
            f"{found['peak_bytes'] / MIB:.0f}",
        ]
        cells.insert(1, f"{found['tokens_per_cpu_second']['median']:.0f}")
        cells += [f"{found['peak_bytes_over_imports'] / MIB:.0f}"]
        result.add_row(TITLES[name], *cells, f"{found['losses'][0]:.6f}" if found["losses"] else "")
    return result


def bounds(figures: dict[str, Any]) -> list[str]:
    """What the teachers may take at most, from sizes alone, with AdamW's two moments and the gradient."""
    lines = []
    ours = figures.get("shared") or {}
    if ours:
        states = 4 * ours["trained_bytes"]  # weights, gradient, two moments
        dropped = ours["student_and_original_bytes"] - ours["student_bytes"]
        lines.append(
            f"original {ours['original_bytes'] / MIB:.0f} MiB; trained parameters with their states "
            f"{states / MIB:.0f}; what of the original the student does not use {dropped / MIB:.0f}"
        )
        for name in ("shared", "cached"):
            if name in figures:
                size = ours["original_bytes"] + states - (dropped if name == "cached" else 0)
                found, step = figures[name]["tensor_bytes"], figures[name]["step_bytes"]
                lines.append(
                    f"{name}: weights and states {size / MIB:.0f} MiB, a step's tensors {step / MIB:.0f}, "
                    f"together {(size + step) / MIB:.0f}; found were {found / MIB:.0f}"
                )
    return lines


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    data = tokens_of(args)
    lengths = torch.tensor([float(len(ids)) for ids in data["cut"]])
    console = subjects.console()
    share = float(lengths.mean() / args.length)
    console.print(
        f"{len(lengths)} texts, cut at {args.length} tokens: {lengths.mean():.0f} tokens on average, so padded ones "
        f"are {share:.0%} text; {len(data['packed'])} packed windows; batches of {args.batch_size}; "
        f"{args.threads} threads"
    )
    figures = measure(args, data)
    found = ratios(figures)
    console.print(table(figures))
    for name, value in found.items():
        console.print(f"{name}: {value:.6g}")
    for line in bounds(figures):
        console.print(line)
    subjects.write_json(
        args.json, vars(args), subjects.machine(), {"text_share": share, "contestants": figures, "ratios": found}
    )
    missed = [
        f"{name} {found[name]:.4g} < {limit}" for name, limit in AT_LEAST.items() if found.get(name, limit) < limit
    ]
    missed += [
        f"{name} {found[name]:.4g} > {limit}" for name, limit in AT_MOST.items() if found.get(name, limit) > limit
    ]
    if missed and not args.show_only:
        raise SystemExit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
