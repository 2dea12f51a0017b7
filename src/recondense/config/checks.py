"""What a config alone tells to be wrong: settings that contradict each other, and local files that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recondense.config.method_steps import step_entries
from recondense.config.problems import Problem
from recondense.config.schema import Config, DataConfig, RecoveryConfig
from recondense.config.stages import Stage

ADAPTER = "adapter_config.json"  # transformers puts the adapter that it describes into the model beside it
HOLDS_ADAPTER = (
    f"it holds a PEFT adapter ({ADAPTER}), which would be measured and not exported; merge it first, by "
    "`merge_and_unload()` of the peft model, and save what that returns in a folder of its own"
)


def check_config(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Problems of a config that show without a model.

    Args:
        stages: of the recovery, resolved.
    """
    yield from _check_model(config)
    yield from _check_method(config)
    if not config.plan_only:
        yield from _check_data(config, stages)
    yield from check_recovery(config.recovery, "recovery")
    yield from _check_name_and_teacher(config.recovery)
    yield from _check_stages(config, stages)
    yield from _check_evaluation(config)
    yield from _check_streaming(config, stages)
    yield from _check_cpu(config)


def _check_model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is None and model.pretrain is None:
        yield Problem("model.path", f"model={model.name} is not built in: give a local folder or a hub id.", None)
    if model.path is not None:
        without_tokenizer = None if model.tokenizer or config.plan_only else "model.tokenizer"
        yield from check_folder(model.path, "model.path", without_tokenizer, weights=not config.plan_only)


def check_folder(path: str, setting: str, tokenizer: str | None = None, *, weights: bool = True) -> Iterator[Problem]:
    """Problems of a local folder with a model; of a hub id, none can be seen from here.

    Args:
        setting: that names the folder.
        tokenizer: the setting that may name another folder with a tokenizer; None: no tokenizer is needed.
        weights: whether weights are needed.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            yield Problem(setting, "there is no such folder; give a folder with config.json, or a hub id.", path)
        return
    names = {entry.name for entry in folder.iterdir()}
    if ADAPTER in names:
        yield Problem(setting, f"{HOLDS_ADAPTER}.", path)
        return
    if "config.json" not in names:
        yield Problem(setting, "the folder has no config.json, so it holds no Hugging Face model.", path)
        return
    if weights and not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        text = "the folder has no weights (*.safetensors)."
        if pickles:
            text = (
                f"the weights are pickles ({', '.join(pickles)}), which are never loaded; convert them to safetensors."
            )
        yield Problem(setting, text, path)
    if tokenizer and not any("tokenizer" in name or name.startswith("vocab") for name in names):
        yield Problem(
            setting, f"the folder has no tokenizer; set {tokenizer} to a folder or hub id that has one.", path
        )


def _check_method(config: Config) -> Iterator[Problem]:
    method = config.method
    steps, refit = method.get("steps"), method.get("refit", False)
    if steps is None and "_target_" not in method:
        yield Problem("method", "has neither _target_ nor steps; see conf/method/cdmoe.yaml.")
    elif not isinstance(steps, list | tuple | None):
        yield Problem("method.steps", "expected a list of steps; see conf/method/moei2.yaml.", steps)
    if refit not in (False, True, "coefficients"):
        yield Problem("method.refit", "must be false, true, or coefficients (of condensed layers).", refit)


def _check_data(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Splits that the run needs and that have no file; `corpora.check_texts` looks into the files."""
    needs = {}
    if step_entries(config.method) and config.data.calibration.sources is None:
        needs["calibration"] = "the method searches on it"
    if config.recovery.objective != "none" and not all(stage.own_texts for stage in stages):
        needs["train"] = f"recovery={config.recovery.name} trains on it (or recovery=none)"
    yield from _check_splits(config.data, "data", needs)


def _check_splits(data: DataConfig, where: str, needs: Mapping[str, str]) -> Iterator[Problem]:
    """Splits that are needed and missing, and records where there are none.

    Args:
        needs: what each split is needed for.
    """
    for split, why in needs.items():
        if data.source == "texts" and getattr(data, split).path is None:
            yield Problem(f"{where}.{split}.path", f"{why}. Give a file of texts.", None)
        if data.source == "hub" and getattr(data.splits, split) is None:
            yield Problem(f"{where}.splits.{split}", f"{why}. Name a split of {data.dataset}.", None)
    if data.source == "stdlib" and data.form is not None:
        yield Problem(
            f"{where}.form",
            "the standard library holds no records. Use form=null, or source=texts or hub.",
            data.form,
        )


def _check_stages(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """What is wrong with the stages of the recovery and not with the recovery itself."""
    recovery = config.recovery
    if recovery.stages is None:
        return
    if recovery.objective == "none":
        yield Problem("recovery.objective", "recovery.stages are given; set them to null, or an objective.", "none")
        return
    known = set(check_recovery(recovery, "recovery"))
    for stage in stages:
        inherited = check_recovery(stage.recovery, "recovery")
        problems = check_recovery(stage.recovery, stage.where)
        yield from (problem for problem, same in zip(problems, inherited, strict=True) if same not in known)
        if stage.own_texts:
            why = f"stage {stage.name} trains on it"
            yield from _check_splits(stage.data, f"{stage.where}.data", {"train": why})
        if stage.recovery.objective == "none":
            yield Problem(f"{stage.where}.objective", "a stage trains; leave it out instead.", "none")
        if stage.recovery.trainable == "all" != recovery.trainable and step_entries(config.method):
            yield _trains_all(stage.where)


def _trains_all(where: str) -> Problem:
    text = "the original shares the backbone and would change with the student. Use trainable=experts."
    return Problem(f"{where}.trainable", text, "all")


def _check_streaming(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """What a model larger than memory cannot do, and a tape in memory."""
    tape, dtype = config.data.calibration.tape, config.data.calibration.tape_dtype
    if dtype != "auto" and tape != "disk" and not (tape == "auto" and config.model.streaming):
        yield Problem(
            "data.calibration.tape_dtype",
            "only a tape on disk has one. Use data.calibration.tape=disk, or data.calibration.tape_dtype=auto.",
            dtype,
        )
    if not config.model.streaming or config.recovery.objective == "none":
        return
    for stage in stages:
        if stage.recovery.objective == "distill" and stage.recovery.teacher == "shared":
            yield Problem(
                f"{stage.where}.teacher",
                "with model.streaming=true the original is never completely in memory, so no student can share it. Use "
                f"{stage.where}.teacher=cached, which runs it once, or recovery=finetune.",
                "shared",
            )
    if config.recovery.control:
        yield Problem(
            "recovery.control",
            "trains the original, which with model.streaming=true is never completely in memory. Use "
            "recovery.control=false.",
            True,
        )


def check_recovery(recovery: RecoveryConfig, where: str) -> Iterator[Problem]:
    """Settings of one training that contradict each other.

    Args:
        where: its name in the config.
    """
    if recovery.objective == "none":
        return
    if recovery.epochs is None and recovery.warmup_steps >= recovery.steps:
        yield Problem(
            f"{where}.warmup_steps",
            f"must be below {where}.steps={recovery.steps}, or the learning rate never reaches its peak.",
            recovery.warmup_steps,
        )
    if (total := recovery.cross_entropy_share + recovery.hidden_share) > 1:
        yield Problem(
            f"{where}.hidden_share",
            f"with {where}.cross_entropy_share={recovery.cross_entropy_share} that makes {total:g}, and must be at "
            "most 1; the rest is the share of the divergence from the teacher.",
            recovery.hidden_share,
        )
    if recovery.objective == "distill":
        yield from _check_teacher(recovery, where)
    if (lora := recovery.lora).dropout and recovery.trainable == "lora" and lora.target != "attention":
        yield Problem(
            f"{where}.lora.dropout",
            f"adapters of experts have no dropout, and {where}.lora.target={lora.target}. Use "
            f"{where}.lora.target=attention or {where}.lora.dropout=0.",
            lora.dropout,
        )


def _check_teacher(recovery: RecoveryConfig, where: str) -> Iterator[Problem]:
    """Where a distillation's predictions come from."""
    why = {
        "cached": f"{where}.teacher=cached keeps predictions on disk, not hidden states",
        "model": f"the layers of {where}.teacher=model need not be the student's",
    }
    if recovery.hidden_share and recovery.teacher in why:
        yield Problem(
            f"{where}.hidden_share",
            f"{why[recovery.teacher]}. Use {where}.hidden_share=0, or {where}.teacher=shared.",
            recovery.hidden_share,
        )
    if recovery.teacher != "model":
        return
    if recovery.teacher_path is None:
        yield Problem(
            f"{where}.teacher_path", f"{where}.teacher=model learns from it. Give a folder or a hub id.", None
        )
    else:
        yield from check_folder(recovery.teacher_path, f"{where}.teacher_path")


def _check_name_and_teacher(recovery: RecoveryConfig) -> Iterator[Problem]:
    """A recovery called lora that trains something else, and a teacher that no stage asks."""
    if recovery.objective == "none":
        return
    if recovery.name == "lora" and recovery.trainable != "lora":
        yield Problem(
            "recovery.trainable",
            "recovery=lora trains adapters. Use recovery.trainable=lora, or recovery=finetune with "
            f"recovery.trainable={recovery.trainable}.",
            recovery.trainable,
        )
    distils = recovery.objective == "distill" and recovery.teacher != "model" and recovery.stages is None
    if distils and recovery.teacher_path is not None:
        yield Problem(
            "recovery.teacher_path",
            f"recovery.teacher={recovery.teacher} does not read it. Use recovery.teacher=model, or "
            "recovery.teacher_path=null.",
            recovery.teacher_path,
        )


def _check_evaluation(config: Config) -> Iterator[Problem]:
    evaluation = config.evaluation
    for index, task in enumerate(evaluation.tasks or ()):
        if not task.strip():
            text = "an empty name; name an lm-eval task, or write evaluation.tasks=null."
            yield Problem(f"evaluation.tasks[{index}]", text, task)
    folder = evaluation.include_path
    if folder is not None and not Path(folder).is_dir():
        yield Problem("evaluation.include_path", "there is no such folder; it holds task YAMLs.", folder)
    elif folder is not None and not task_files(folder):
        text = "the folder has no task YAML (*.yaml). Give one that has."
        yield Problem("evaluation.include_path", text, folder)
    if config.recovery.trainable == "all" and config.recovery.objective != "none" and step_entries(config.method):
        yield _trains_all("recovery")


def task_files(folder: str | Path) -> list[Path]:
    """The YAML files of a folder of lm-eval tasks, and of the folders in it."""
    return sorted(Path(folder).rglob("*.yaml"))


def _check_cpu(config: Config) -> Iterator[Problem]:
    if config.model.device == "cpu" and not config.plan_only:
        yield from check_on_cpu(config)


def check_on_cpu(config: Config) -> Iterator[Problem]:
    """Settings that do not suit a CPU."""
    if config.model.experts == "batched_mm":
        text = "some 60 times slower than the others on a CPU. Use auto, grouped_mm or eager."
        yield Problem("model.experts", text, "batched_mm")
    if config.model.attention == "flash_attention_2":
        yield Problem("model.attention", "runs on CUDA only. Use sdpa or eager.", "flash_attention_2")
