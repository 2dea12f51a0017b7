"""Losses over a large vocabulary: in chunks of tokens with the LM head, compared with plain ones on full logits.

    python benchmarks/losses.py [--json FILE] [--tokens 4096] [--vocabulary 151936] [--hidden-size 256]

Every loss and its backward run in a process of their own. Memory is the peak of resident memory above what was resident
before the loss; hidden states and heads exist before, gradients do not. The plain losses are the definitions in torch,
with autograd. Both sides get the same tensors; the head trains.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from resident_memory import peak_bytes, reset_peak, resident_bytes
from torch import Tensor, nn

from recondense.models.decoder import Head
from recondense.recovery.losses import CrossEntropy, Hidden, TeacherDivergence, Term, sum_in_chunks

KINDS = ("cross_entropy", "forward_kl", "reverse_kl", "js")
MIB = 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def ours(kind: Any, student_TD: Tensor, teacher_TD: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The mean loss, in chunks."""
    with torch.no_grad():
        fixed = Head(head.weight.detach())
    term: Term = CrossEntropy(labels) if kind == "cross_entropy" else TeacherDivergence(kind, Hidden(teacher_TD, fixed))
    return sum_in_chunks([(1 / len(student_TD), term)], student_TD, Head(head.weight))[0]


def plain(kind: str, student_TD: Tensor, teacher_TD: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The mean loss, on full logits."""
    if kind == "cross_entropy":
        return F.cross_entropy(head(student_TD), labels)
    with torch.no_grad():
        log_p = head(teacher_TD).log_softmax(-1)
    log_q = head(student_TD).log_softmax(-1)
    if kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        return (_kl(log_p, log_m) + _kl(log_q, log_m)) / (2 * len(student_TD))
    return (_kl(log_p, log_q) if kind == "forward_kl" else _kl(log_q, log_p)) / len(student_TD)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def measure_here(way: Callable[..., Tensor], kind: str, args: argparse.Namespace, connection: Any) -> None:
    """Measure one loss and its backward in this process, and send the figures and parts of the gradients."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    student_TD = torch.randn(args.tokens, args.hidden_size, requires_grad=True)
    teacher_TD = student_TD.detach() + 0.3 * torch.randn(args.tokens, args.hidden_size)
    labels = torch.randint(args.vocabulary, (args.tokens,))
    head = nn.Linear(args.hidden_size, args.vocabulary, bias=False)
    # A small loss first, so that libraries loaded by the first use do not count.
    small = nn.Linear(args.hidden_size, 64, bias=False)
    way(kind, student_TD[:8].detach().requires_grad_(True), teacher_TD[:8], small, labels[:8] % 64).backward()
    reset_peak()
    before = resident_bytes()
    started = time.perf_counter()
    loss = way(kind, student_TD, teacher_TD, head, labels)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = peak_bytes() - before
    assert student_TD.grad is not None and head.weight.grad is not None
    norms = {"hidden": float(student_TD.grad.double().norm()), "head": float(head.weight.grad.double().norm())}
    gradients = [
        student_TD.grad[:: max(1, args.tokens // 64)].clone(),
        head.weight.grad[:: max(1, args.vocabulary // 256)].clone(),
    ]
    connection.send({"bytes": peak, "seconds": seconds, "loss": float(loss.detach()), "norms": norms})
    connection.send([gradient.numpy() for gradient in gradients])


def measure(way: Callable[..., Tensor], kind: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Measure in a new process; return the figures and parts of the gradients."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=measure_here, args=(way, kind, args, sender), daemon=True)
    process.start()
    sender.close()
    figures, gradients = receiver.recv(), receiver.recv()
    process.join()
    return figures, gradients


def main() -> None:
    """Measure, print, write."""
    import subjects  # here, so that the processes that measure import torch alone
    from rich.table import Table

    args = arguments()
    title = f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden size {args.hidden_size}, fp32, head trains"
    result = Table("", "plain, MiB", "in chunks, MiB", "of the plain", "plain, s", "in chunks, s", "same?", title=title)
    figures: dict[str, Any] = {}
    for kind in args.kinds:
        (full, expected), (chunks, actual) = measure(plain, kind, args), measure(ours, kind, args)
        differences = {"loss": abs(chunks["loss"] - full["loss"]) / abs(full["loss"])}
        for name, a, b in zip(("hidden", "head"), expected, actual, strict=True):
            differences[name] = float(abs(a - b).max() / abs(a).max())
        ratio = chunks["bytes"] / full["bytes"]
        figures[kind] = {"plain": full, "chunked": chunks, "memory_ratio": ratio, "relative_differences": differences}
        sizes = [f"{figure['bytes'] / MIB:.0f}" for figure in (full, chunks)]
        times = [f"{figure['seconds']:.1f}" for figure in (full, chunks)]
        result.add_row(kind, *sizes, f"{ratio:.1%}", *times, f"within {max(differences.values()):.0e} relative")
    subjects.console().print(result)
    subjects.write_json(args.json, vars(args), subjects.machine(), {"losses": figures})


if __name__ == "__main__":
    main()
