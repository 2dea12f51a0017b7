"""Measure memory, prefill speed and decode speed of variants of a model side by side.

Shapes: B batch, T tokens of a sequence, prompt and new ones.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recondense.errors import UserError
from recondense.models.hooks import eval_mode
from recondense.models.parameters import weights_bytes

Variant = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Profile:
    """Memory and speed of one variant of a model.

    `peak_memory_bytes` is the variant's weights plus the peak of the tensors that one prefill and decode allocate:
    key-value cache, activations and logits. It excludes tensors that do not belong to the variant (weights of another
    variant, optimizer states) and memory outside tensors (libraries, Python).
    """

    weights_bytes: int
    peak_memory_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float

    def to_dict(self) -> dict[str, int | float]:
        """Return the four numbers, as in `summary.json`."""
        return asdict(self)


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process in bytes, including mapped files.

    On systems without /proc, the memory of the process that started this one may be included.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def profile_variants(
    variants: Mapping[str, Variant],
    *,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    repetitions: int,
    vocab_size: int,
    device: torch.device | str,
    seed: int,
) -> dict[str, Profile]:
    """Measure variants of a model alternately, so that a temporary slowdown of the machine affects all of them.

    Each variant runs once to warm up and once to measure its memory. Then every repetition runs each variant once,
    alternating between the given and the reverse order; the speed is the median over repetitions. One run is a forward
    pass of the prompt (with logits of the last position only) and `new_tokens` forward passes of one token each, with
    the key-value cache.

    Args:
        variants: for each name, a function that makes a context that yields the model in that variant. The variants
            can be one module with different blocks inside the context, so weights are counted inside it.
        batch_size: B, number of sequences.
        prompt_length: tokens per sequence in the prefill.
        new_tokens: tokens per sequence in the decode.
        repetitions: timed runs per variant.
        vocab_size: token ids are drawn uniformly below it; all variants see the same ids.
        device: the device of the model.
        seed: the seed of the token ids. The global random state does not change.

    Returns:
        A Profile for each name, in the order of `variants`. Speeds are tokens per second over the entire batch.

    Raises:
        UserError: a size or `repetitions` is below 1.
    """
    _check(batch_size=batch_size, prompt_length=prompt_length, new_tokens=new_tokens, repetitions=repetitions)
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(vocab_size, (batch_size, prompt_length + new_tokens), generator=generator).to(device)
    memory = {name: _memory(variant, ids_BT, prompt_length) for name, variant in variants.items()}
    seconds = _seconds(variants, ids_BT, prompt_length, repetitions)
    return {
        name: Profile(
            weights_bytes=weights,
            peak_memory_bytes=weights + working,
            prefill_tokens_per_second=batch_size * prompt_length / statistics.median(p for p, _ in seconds[name]),
            decode_tokens_per_second=batch_size * new_tokens / statistics.median(d for _, d in seconds[name]),
        )
        for name, (weights, working) in memory.items()
    }


def _memory(variant: Variant, ids_BT: Tensor, prompt_length: int) -> tuple[int, int]:
    """Return the bytes of a variant's weights, and the peak bytes of its other tensors after a warm-up run."""
    with variant() as model, eval_mode(model):
        _generate(model, ids_BT, prompt_length)
        return weights_bytes(model), peak_tensor_bytes(partial(_generate, model, ids_BT, prompt_length), ids_BT.device)


def _seconds(
    variants: Mapping[str, Variant], ids_BT: Tensor, prompt_length: int, repetitions: int
) -> dict[str, list[tuple[float, float]]]:
    """Return for each variant the seconds of the prefill and of the decode in each repetition."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for repetition in range(repetitions):
        for name in list(variants)[:: 1 if repetition % 2 == 0 else -1]:
            with variants[name]() as model, eval_mode(model):
                seconds[name].append(_generate(model, ids_BT, prompt_length))
    return seconds


def _check(**counts: int) -> None:
    wrong = [f"{name} is {value}" for name, value in counts.items() if value < 1]
    if wrong:
        raise UserError(f"profile: {', '.join(wrong)}; each must be at least 1")


def peak_tensor_bytes(work: Callable[[], Any], device: torch.device | str) -> int:
    """Return the peak bytes of tensors while `work` runs, above the bytes that were allocated at its start.

    CUDA's allocator records this peak. The CPU's does not, so it is the maximum of the running sum of all allocations
    and releases that the profiler reports. Releases of older tensors lower the sum; the result is never below zero.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - start)
    profiler = torch.autograd.profiler.profile(profile_memory=True)
    with _native_stderr_silenced():
        profiler.__enter__()  # type: ignore[no-untyped-call]
    try:
        work()
    finally:
        with _native_stderr_silenced():
            profiler.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    results = profiler.kineto_results
    assert results is not None
    changes = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    # The sort is stable, so changes in the same nanosecond keep the order in which they were reported.
    changes.sort(key=lambda change: change[0])
    peak = current = 0
    for _, size in changes:
        current += size
        peak = max(peak, current)
    return peak


@torch.inference_mode()
def _generate(model: nn.Module, ids_BT: Tensor, prompt_length: int) -> tuple[float, float]:
    """Run one prefill and decode, and return their seconds. All variants process the same tokens."""
    clock = Clock(ids_BT.device)
    output = model(input_ids=ids_BT[:, :prompt_length], use_cache=True, logits_to_keep=1)
    clock.mark()
    for position in range(prompt_length, ids_BT.shape[1]):
        output = model(
            input_ids=ids_BT[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    clock.mark()
    prefill, decode = clock.seconds()
    return prefill, decode


class Clock:
    """Measure the time between marks: with stream events on CUDA, where the host runs ahead, else the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        """Record the current time."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between consecutive marks."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [max(end - start, 1e-9) for start, end in pairs]


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Silence file descriptor 2 inside the context: the profiler's library writes a line that no setting disables."""
    try:
        saved = os.dup(2)
    except OSError:  # the process was started without stderr
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
