"""Losses over a large vocabulary: in chunks of tokens with the LM head inside, against plain ones on whole logits.

    python benchmarks/losses.py [--json FILE] [--tokens 4096] [--vocabulary 151936] [--hidden-size 256]

Each loss and its backward run in a process of their own. Memory is the most that was resident in it above what was
resident before: hidden states and heads are there, gradients are not (the kernel's high-water mark, put back then).
The plain losses are the definitions in torch, with autograd. Both sides get the same numbers; the head trains.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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


def ours(kind: Any, mine: Tensor, theirs: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The mean loss, in chunks."""
    with torch.no_grad():
        fixed = Head(head.weight.detach())
    term: Term = CrossEntropy(labels) if kind == "cross_entropy" else TeacherDivergence(kind, Hidden(theirs, fixed))
    return sum_in_chunks([(1 / len(mine), term)], mine, Head(head.weight))[0]


def plain(kind: str, mine: Tensor, theirs: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The mean loss, on whole logits."""
    if kind == "cross_entropy":
        return F.cross_entropy(head(mine), labels)
    with torch.no_grad():
        log_p = head(theirs).log_softmax(-1)
    log_q = head(mine).log_softmax(-1)
    if kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        return (_kl(log_p, log_m) + _kl(log_q, log_m)) / (2 * len(mine))
    return (_kl(log_p, log_q) if kind == "forward_kl" else _kl(log_q, log_p)) / len(mine)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def one(way: Callable[..., Tensor], kind: str, args: argparse.Namespace, connection: Any) -> None:
    """A process: one loss and its backward."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    mine = torch.randn(args.tokens, args.hidden_size, requires_grad=True)
    theirs = mine.detach() + 0.3 * torch.randn(args.tokens, args.hidden_size)
    labels = torch.randint(args.vocabulary, (args.tokens,))
    head = nn.Linear(args.hidden_size, args.vocabulary, bias=False)
    # Once small, so that what the first use loads is not counted.
    small = nn.Linear(args.hidden_size, 64, bias=False)
    way(kind, mine[:8].detach().requires_grad_(True), theirs[:8], small, labels[:8] % 64).backward()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # puts VmHWM back
    started = time.perf_counter()
    loss = way(kind, mine, theirs, head, labels)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = resident("VmHWM") - before
    assert mine.grad is not None and head.weight.grad is not None
    norms = {"hidden": float(mine.grad.double().norm()), "head": float(head.weight.grad.double().norm())}
    some = [
        mine.grad[:: max(1, args.tokens // 64)].clone(),
        head.weight.grad[:: max(1, args.vocabulary // 256)].clone(),
    ]
    connection.send({"bytes": peak, "seconds": seconds, "loss": float(loss.detach()), "norms": norms})
    connection.send([each.numpy() for each in some])


def measured(way: Callable[..., Tensor], kind: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The figures of a process, and parts of its gradients."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=one, args=(way, kind, args, theirs), daemon=True)
    process.start()
    theirs.close()
    found = mine.recv(), mine.recv()
    process.join()
    return found


def main() -> None:
    """Measure, print, write."""
    import subjects  # here, so that the processes that measure import torch alone
    from rich.table import Table

    args = arguments()
    title = f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden size {args.hidden_size}, fp32, head trains"
    result = Table("", "plain, MiB", "in chunks, MiB", "of the plain", "plain, s", "in chunks, s", "same?", title=title)
    figures: dict[str, Any] = {}
    for kind in args.kinds:
        (whole, gradients), (chunks, own) = measured(plain, kind, args), measured(ours, kind, args)
        differences = {"loss": abs(chunks["loss"] - whole["loss"]) / abs(whole["loss"])}
        for name, a, b in zip(("hidden", "head"), gradients, own, strict=True):
            differences[name] = float(abs(a - b).max() / abs(a).max())
        ratio = chunks["bytes"] / whole["bytes"]
        figures[kind] = {"plain": whole, "chunked": chunks, "memory_ratio": ratio, "relative_differences": differences}
        sizes = [f"{each['bytes'] / MIB:.0f}" for each in (whole, chunks)]
        times = [f"{each['seconds']:.1f}" for each in (whole, chunks)]
        result.add_row(kind, *sizes, f"{ratio:.1%}", *times, f"within {max(differences.values()):.0e} relative")
    subjects.console().print(result)
    subjects.write_json(args.json, vars(args), subjects.machine(), {"losses": figures})


if __name__ == "__main__":
    main()
