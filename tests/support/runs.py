"""Real runs of the pipeline on a tiny model and texts, and a way to kill one at an exact point."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from recondense import progress
from recondense.config.schema import Config, from_dict
from recondense.files import JsonFolder
from recondense.methods.cdmoe import CDMoE
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.report.published import CDMOE, PAPER_TASKS
from recondense.run import pipeline
from support.corpus import documents
from support.log_handlers import restore_loggers
from support.small import byte_tokenizer
from support.tiny_models import qwen2_moe

ROOT = Path(__file__).resolve().parents[2]
NORMALISED = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa")  # tasks for which lm-eval has acc_norm


def model_folder(folder: Path, family: Callable[..., Any] = qwen2_moe, tokenizer: Any = None) -> Path:
    """Save a random model of three layers, by default with a byte tokenizer, as models on the hub are saved."""
    tokenizer = tokenizer or byte_tokenizer()
    model = family(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_files(folder: Path) -> dict[str, str]:
    """Write a few thousand characters for each split; return the paths by split."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = documents(24, 1500)
    splits = {"calibration": texts[:12], "train": texts[12:20], "validation": texts[20:]}
    paths = {split: folder / f"{split}.jsonl" for split in splits}
    for split, path in paths.items():
        if not path.exists():
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in splits[split]))
    return {split: str(path) for split, path in paths.items()}


def config(model: Path, texts: dict[str, str], output: Path, **recovery: Any) -> Config:
    """The config of a complete run of seconds: six steps of distillation."""
    return from_dict(
        {
            "model": {"name": "small", "path": str(model)},
            "method": {"name": "cdmoe", "steps": []},
            "recovery": {
                "name": "distill", "objective": "distill", "steps": 6, "batch_size": 2, "learning_rate": 1e-2,
                "checkpoint_every": 2, **recovery,
            },
            "data": {
                "name": "texts", "source": "texts", "sequence_length": 32,
                "calibration": {"path": texts["calibration"], "num_samples": 10, "max_length": 24},
                "train": {"path": texts["train"]}, "validation": {"path": texts["validation"]},
            },
            "evaluation": {"name": "perplexity", "tasks": None, "perplexity_windows": 20},
            "callbacks": {"profile": {"enabled": False}},
            "logger": {"csv": True, "wandb": {"mode": "disabled"}},
            "output_dir": str(output), "cache_dir": str(output / "cache"), "run_dir": str(output / "run"),
        }
    )  # fmt: skip


def arguments(model: Path, texts: dict[str, str], output: Path, run: str, *more: str) -> tuple[str, ...]:
    """The arguments of train.py for a complete run of seconds in the folder `output/run`."""
    return (
        f"model.path={model}", f"output_dir={output}", f"run_dir={output / run}", "data=texts",
        *(f"data.{split}.path={path}" for split, path in texts.items()),
        "data.sequence_length=32", "data.calibration.num_samples=10", "data.calibration.max_length=24",
        "recovery.steps=6", "recovery.batch_size=2", "recovery.learning_rate=1e-2", "recovery.warmup_steps=0",
        "recovery.checkpoint_every=2", "evaluation.tasks=[]", "evaluation.perplexity_windows=8",
        "callbacks.profile.repetitions=1", "callbacks.profile.prompt_length=8", "callbacks.profile.new_tokens=2",
        "logger.wandb.mode=disabled", "trainer.progress_bar=false", *more,
    )  # fmt: skip


@contextmanager
def one_command() -> Iterator[None]:
    """Restore the loggers and progress bars that a command changes, which a process of its own need not do."""
    with restore_loggers():
        yield
    progress.allow_bars(None)


def record_file(folder: Path) -> str:
    """Write short chats; the answer of the last one lies beyond any window."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    turns = [(f"Open letter {number}.", text[:27]) for number, text in enumerate(documents(20, 60))]
    records = [
        {"system": "Do.", "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in [*turns, ("words " * 100, "no")]
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def paper_tasks(folder: Path, paper: str = CDMOE) -> Path:
    """Write tasks with the names of a paper's tasks, the metrics of lm-eval, and a dozen questions each."""
    folder.mkdir(parents=True)
    for number, name in enumerate(PAPER_TASKS[paper]):
        data = folder / f"{name}.jsonl"
        lines = [
            {
                "question": f"{name}: which is number {index * (number + 3)}?",
                "choices": [chr(97 + index), f"{index} or {number}", "none of the two others"],
                "label": (index * index + number) % 3,
            }
            for index in range(12)
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")[: 1 + (name in NORMALISED)]],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def paper_sets(folder: Path) -> None:
    """Write a few texts and records like those of C4, Alpaca and commonsense_170k, as files and as hub folders."""
    texts = {split: Path(path).read_text() for split, path in text_files(folder / "texts").items()}
    lines = {"c4": texts["train"] + texts["calibration"], "c4-validation": texts["validation"]}
    rows = {name: [{**json.loads(line), "url": "x"} for line in text.splitlines()] for name, text in lines.items()}
    rows["alpaca"] = [
        {"instruction": f"Add {n}.", "input": f"{n}" if n % 2 else "", "output": f"{2 * n}."} for n in range(12)
    ]
    rows["commonsense_170k"] = [
        {"instruction": f"True or false: is {n} odd?", "input": "", "output": "true", "answer": "true"}
        for n in range(10)
    ]
    rows["mmlu"] = [
        {"train": {"question": f"What is {n} + 1?", "subject": "", "choices": ["0", f"{n + 1}", "-1"], "answer": 1}}
        for n in range(9)
    ]
    hub = folder / "hub"
    for name, path in {
        "c4": "c4/train", "c4-validation": "c4/validation", "alpaca": "alpaca/train",
        "commonsense_170k": "commonsense_170k/train", "mmlu": "mmlu/train",
    }.items():  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows[name])
        (folder / f"{name}.jsonl").write_text(text)
        (folder / f"{name}.json").write_text(json.dumps(rows[name]))
        (hub / path).parent.mkdir(parents=True, exist_ok=True)
        (hub / f"{path}.jsonl").write_text(text)
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation"))
    (hub / "c4" / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{files}---\n")
    config = "- config_name: auxiliary_train\n  data_files:\n  - split: train\n    path: train.jsonl\n"
    (hub / "mmlu" / "README.md").write_text(f"---\nconfigs:\n{config}---\n")


def stages(base: Path) -> list[dict[str, Any]]:
    """Recovery stages: distillation on texts, adapters on instructions, and an epoch that trains the experts again."""
    data = {"source": "texts", "form": "auto", "train": {"path": record_file(base / "texts")}}
    return [
        {"name": "first", "steps": 3},
        {"name": "sft", "objective": "finetune", "trainable": "lora", "steps": 5, "sequence_length": 230, "data": data},
        {"name": "last", "epochs": 1, "learning_rate": 1e-3, "batch_size": 8, "sequence_length": 230, "data": data},
    ]


def step() -> CDMoE:
    return CDMoE(num_experts=2, num_layers=2)


def kill_at(phase: str) -> None:
    """Make this process kill itself with SIGKILL at a point of its run.

    Args:
        phase: "search" after the fifth write of the search's cache (in the layer search), "recovery" in the fourth
            optimizer step of the first recovery stage that has one (a step after a checkpoint), "second round" in that
            of the second round, "export" just before the folder gets its final name, "never" not at all.
    """
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if phase == "search":
        writes = {"remaining": 5}
        write = JsonFolder.__setitem__

        def counting_write(self: JsonFolder, key: str, value: dict[str, Any]) -> None:
            write(self, key, value)
            writes["remaining"] -= self.folder.parent.name == "search"
            if not writes["remaining"]:
                die()

        JsonFolder.__setitem__ = counting_write  # type: ignore[method-assign,assignment]
    elif phase in ("recovery", "second round"):
        from recondense.recovery.module import RecoveryModule

        train = RecoveryModule.training_step

        def training_step(self: RecoveryModule, batch: Any, index: int) -> Any:
            if self.trainer.global_step == 3 and (phase == "recovery" or self.stage.startswith("round-2")):
                die()
            return train(self, batch, index)

        RecoveryModule.training_step = training_step  # type: ignore[method-assign,assignment]
    elif phase == "export":
        from recondense import files as files_module

        files_module._exchange = lambda *_: die()
    else:
        assert phase == "never"


if __name__ == "__main__":
    base, output, *flags = sys.argv[1:]
    recovery = {"stages": stages(Path(base))} if "staged" in flags else {}
    settings = config(Path(base) / "model", text_files(Path(base) / "texts"), Path(output), **recovery)
    if "rounds" in flags:  # four steps each, and a refit
        method = {"name": "reap", "steps": ["a step"], "rounds": 2, "refit": True}
        settings = replace(settings, method=method, recovery=replace(settings.recovery, steps=8))
        pipeline.run(settings, [SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.5))])
    else:
        pipeline.run(settings, [step()])
