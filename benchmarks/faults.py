"""Kill runs and fill their disks at random, repeat the same command, and compare the end with an undisturbed run.

    python benchmarks/faults.py [--kills 30] [--disks 10] [--seed 0] [--only kill-3] [--json FILE]

The runs are complete commands on a tiny model: search (CD-MoE or MoE-I²), recovery with checkpoints, evaluation with
held-out tasks, export; some with two processes. A kill is SIGKILL to the whole process group, at a random moment of the
run or of one phase, up to three times per run. A disk is a tmpfs of a random size that is enlarged afterwards; where
mounting is not allowed, the size of files is limited instead. Equal means: the same plan.json, the same figures of
every stage, and the same bytes in the exported folder. The exit code is 1 if a run ends otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from support.runs import arguments as run_arguments  # noqa: E402
from support.runs import model_folder, text_files  # noqa: E402

VARIANTS: dict[str, list[str]] = {
    "cdmoe": ["method=cdmoe", "method.num_experts=2", "method.num_layers=2"],
    "moei2": ["method=moei2", "method.removed_expert_ratio=0.25"],
    "two processes": [
        "method=cdmoe",
        "method.num_experts=2",
        "method.num_layers=2",
        "trainer=ddp",
        "trainer.devices=2",
    ],
}
EVERY = ["recovery=distill", "recovery.checkpoint_every=3", "recovery.steps=12", "callbacks.profile.enabled=false"]
EVERY += ["evaluation.tasks=[heldout_perplexity,heldout_next_line]", "evaluation.heldout.num_questions=8"]
EVERY += ["evaluation.heldout.num_texts=2", "export.max_shard_size=100000"]
PHASES = {  # lines with which a phase begins
    "search": re.compile(r"(search|calibrating|whole texts|pruning|ranks|importance).*: started"),
    "recovery": re.compile(r"recovery: started"),
    "evaluation": re.compile(r"(perplexity|lm-eval): \w+: started"),
    "export": re.compile(r"exporting: started"),
}
LONGEST = 600.0  # seconds of one run
SMALLEST = 4096  # bytes of a disk


@dataclass
class Ended:
    """How a run ended: its exit code (negative for a signal), its output, and when each line came."""

    code: int
    lines: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


@dataclass(frozen=True)
class Kill:
    """When to kill a run: some seconds after its start, or after the n-th line with which a phase begins."""

    phase: str | None
    number: int
    delay: float

    def __str__(self) -> str:
        return f"{self.phase or 'start'}{f' {self.number}' if self.number else ''} + {self.delay:.2f} s"


class Campaign:
    """The undisturbed runs, and the disturbances.

    Args:
        base: folder of everything that is written.
        seed: seed of all random numbers.
    """

    def __init__(self, base: Path, seed: int) -> None:
        self.base, self.seed = base, seed
        self.model, self.texts = model_folder(base / "model"), text_files(base / "texts")
        self._undisturbed: dict[str, Ended] = {}

    def command(self, variant: str, output: Path) -> list[str]:
        settings = run_arguments(self.model, self.texts, output, "run", *EVERY, *VARIANTS[variant])
        return [sys.executable, str(ROOT / "train.py"), *settings, f"cache_dir={output}/cache"]

    def folder(self, variant: str) -> Path:
        return self.base / "undisturbed" / variant.replace(" ", "-")

    def undisturbed(self, variant: str) -> Ended:
        """Return the undisturbed run of a variant, which runs on first use."""
        if variant not in self._undisturbed:
            ended = start(self.command(variant, self.folder(variant)))
            if ended.code:
                raise SystemExit(f"the undisturbed run ({variant}) ended with {ended.code}:\n{ended.text[-3000:]}")
            self._undisturbed[variant] = ended
            size = disk_bytes(self.folder(variant))
            print(f"undisturbed, {variant}: {ended.seconds:.1f} s, {size:,} bytes on disk", flush=True)
        return self._undisturbed[variant]

    def kill(self, index: int) -> dict[str, Any]:
        """Kill a run, up to three times, and let it end."""
        draw = random.Random(f"{self.seed} kill {index}")
        variant = draw.choices(list(VARIANTS), weights=[5, 3, 2][: len(VARIANTS)])[0]
        output, undisturbed = self.base / f"kill-{index}", self.undisturbed(variant)
        kills, ends = [], []
        for _ in range(draw.choice([1, 1, 2, 3])):
            kills.append(draw_kill(draw, undisturbed))
            ended = start(self.command(variant, output), kill=kills[-1])
            ends.append("killed" if ended.code == -signal.SIGKILL else "done before" if not ended.code else "failed")
            if ends[-1] == "failed":
                return self.judge(variant, output, ended, f"{', '.join(map(str, kills))}")
        last = start(self.command(variant, output))
        return self.judge(variant, output, last, ", ".join(f"{k} ({end})" for k, end in zip(kills, ends, strict=True)))

    def disk(self, index: int) -> dict[str, Any]:
        """Run on a small disk, enlarge it, and let the run end."""
        draw = random.Random(f"{self.seed} disk {index}")
        variant = draw.choices(list(VARIANTS), weights=[5, 3, 2][: len(VARIANTS)])[0]
        output = self.base / f"disk-{index}"
        self.undisturbed(variant)
        size = draw.randrange(SMALLEST, disk_bytes(self.folder(variant)))
        output.mkdir()
        mounted = mount(output, size)
        limit = None if mounted else draw.randrange(SMALLEST, largest_file(self.folder(variant)))
        what = f"a disk of {size:,} bytes" if mounted else f"no tmpfs here, so files of at most {limit:,} bytes"
        try:
            ended = start(self.command(variant, output), file_bytes=limit)
            what += f" (exit code {ended.code})"
            if ended.code not in (0, 2) or (ended.code == 2 and not says_it(ended)):
                return self.judge(variant, output, Ended(ended.code or 1, ended.lines), what)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
            return self.judge(variant, output, start(self.command(variant, output)), what)
        finally:
            if mounted:
                subprocess.run(["umount", str(output)], check=False)

    def judge(self, variant: str, output: Path, ended: Ended, what: str) -> dict[str, Any]:
        """Compare the end of a run with the undisturbed one."""
        problem = f"exit code {ended.code}" if ended.code else difference(output / "run", self.folder(variant) / "run")
        if problem:
            (self.base / f"{output.name}.log").write_text(ended.text, encoding="utf-8")
        return {"variant": variant, "disturbance": what, "problem": problem, "name": output.name}


def draw_kill(draw: random.Random, undisturbed: Ended) -> Kill:
    """Return a moment: half of them anywhere in the run, half within a phase."""
    phase = draw.choice([None, None, None, None, *PHASES])
    if phase is None:
        return Kill(None, 0, draw.uniform(0, undisturbed.seconds))
    times = [second for second, line in undisturbed.lines if PHASES[phase].search(line)]
    if not times:
        return Kill(None, 0, draw.uniform(0, undisturbed.seconds))
    number = draw.randrange(len(times))
    later = [second for second, _ in undisturbed.lines if second > times[number]]
    return Kill(phase, number, draw.uniform(0, 2 * (later[0] - times[number] if later else 0.1)))


def start(command: Sequence[str], kill: Kill | None = None, file_bytes: int | None = None) -> Ended:
    """Run a command in a process group of its own, and kill the group if asked to."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(ROOT / "src")}

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    began = time.monotonic()
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True,
        preexec_fn=limit,
    )  # fmt: skip
    ended, arriving = Ended(0), queue.Queue[str | None]()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, arriving.put), daemon=True).start()
    deadline = began + (kill.delay if kill is not None and kill.phase is None else LONGEST)
    remaining = kill.number if kill is not None else 0
    while True:
        try:
            line = arriving.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            os.killpg(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + LONGEST
            continue
        if line is None:
            break
        now = time.monotonic()
        ended.lines.append((now - began, line))
        if kill is not None and kill.phase is not None and PHASES[kill.phase].search(line):
            if remaining == 0:
                deadline = now + kill.delay
            remaining -= 1
    ended.code, ended.seconds = process.wait(), time.monotonic() - began
    return ended


def _read(stream: Any, put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line.rstrip("\n"))
    put(None)


def mount(folder: Path, size: int) -> bool:
    """Mount a tmpfs of some bytes on a folder; return whether that is possible."""
    options = f"size={size},nr_inodes=100k"
    return (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
        ).returncode
    )


def says_it(ended: Ended) -> bool:
    """Return whether a run that found no room ended with one sentence, without a traceback."""
    return (
        "Traceback" not in ended.text and re.search(r"^recondense: .*(full|larger|room)", ended.text, re.M) is not None
    )


def files_of(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def disk_bytes(folder: Path) -> int:
    """Return the bytes of the files of a folder as a tmpfs counts them, in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files_of(folder).values())


def largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in files_of(folder).values())


def difference(run: Path, other: Path) -> str:
    """Return in what the results of two runs differ; empty if they are equal."""
    if (run / "plan.json").read_bytes() != (other / "plan.json").read_bytes():
        return "plan.json differs"
    stages = [json.loads((folder / "summary.json").read_text(encoding="utf-8"))["stages"] for folder in (run, other)]
    if stages[0] != stages[1]:
        return f"the figures differ: {stages[0]} and {stages[1]}"
    exports = [files_of(folder / "model") for folder in (run, other)]
    if exports[0].keys() != exports[1].keys():
        return f"the exports have other files: {sorted(exports[0].keys() ^ exports[1].keys())}"
    compared = [name for name in exports[0] if name != "README.md"]  # it has the seconds of the run
    names = [name for name in compared if exports[0][name].read_bytes() != exports[1][name].read_bytes()]
    return f"the exports differ in {', '.join(names)}" if names else ""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="runs that are killed")
    parser.add_argument("--disks", type=int, default=10, help="runs whose disk is full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="repeat one disturbance, such as kill-3 or disk-0")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, help="write here, and keep it; a temporary folder otherwise")
    parser.add_argument("--json", type=Path, help="write the outcomes here too")
    return parser.parse_args()


def main() -> int:
    args = parse()
    for name in set(VARIANTS) - set(args.variants):
        del VARIANTS[name]
    base = (args.folder or Path(tempfile.mkdtemp(prefix="faults-"))).absolute()
    names = [f"kill-{index}" for index in range(args.kills)] + [f"disk-{index}" for index in range(args.disks)]
    outcomes: list[dict[str, Any]] = []
    campaign, began = Campaign(base, args.seed), time.monotonic()
    for name in [args.only] if args.only else names:
        kind, index = name.split("-")
        outcome = (campaign.kill if kind == "kill" else campaign.disk)(int(index))
        outcomes.append(outcome)
        end = outcome["problem"] or "equal"
        print(f"{name} (seed {args.seed}): {outcome['variant']}, {outcome['disturbance']}: {end}", flush=True)
        if not outcome["problem"]:
            shutil.rmtree(base / name, ignore_errors=True)
    equal = sum(not outcome["problem"] for outcome in outcomes)
    print(f"{equal} of {len(outcomes)} equal, in {(time.monotonic() - began) / 60:.1f} minutes")
    if args.json:
        args.json.write_text(json.dumps({"equal": equal, "of": len(outcomes), "outcomes": outcomes}), encoding="utf-8")
    if equal < len(outcomes):
        print(f"the folders and logs of the others are in {base}")
        return 1
    if args.folder is None:
        shutil.rmtree(base, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
