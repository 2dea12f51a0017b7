"""Problems that show from the config alone: settings that contradict each other, and missing local files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recondense.config.method_steps import step_entries
from recondense.config.problems import Problem, show
from recondense.config.rounds import check_rounds
from recondense.config.schema import Config, DataConfig, RecoveryConfig
from recondense.config.stages import Stage
from recondense.config.types import ends_of

ADAPTER = "adapter_config.json"  # if a model's folder has one, transformers loads the adapter into the model
HOLDS_ADAPTER = (
    f"it holds a PEFT adapter ({ADAPTER}), which would be measured but not exported; merge it first with the peft "
    "model's `merge_and_unload()`, and save the result in another folder"
)


def check_config(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield the problems of a config that show without a model.

    Args:
        config: the config of the run.
        stages: the resolved stages of the recovery.
    """
    yield from _check_model(config)
    yield from _check_method(config)
    yield from check_rounds(config, stages)
    if not config.plan_only:
        yield from _check_data(config, stages)
    yield from check_recovery(config.recovery, "recovery")
    yield from _check_name_and_teacher(config.recovery)
    yield from _check_stages(config, stages)
    yield from _check_local_first(config, stages)
    yield from _check_evaluation(config)
    yield from _check_streaming(config, stages)
    yield from _check_cpu(config)


def _check_model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is None and model.pretrain is None:
        yield Problem("model.path", f"model={model.name} is not built in: give a local folder or a hub id.", None)
    if model.path is not None:
        needed = not (model.tokenizer or config.plan_only)
        remedy = "Set model.tokenizer to a folder or hub id that has one." if needed else None
        yield from check_folder(model.path, "model.path", remedy, weights=not config.plan_only)


def check_folder(path: str, setting: str, tokenizer: str | None = None, *, weights: bool = True) -> Iterator[Problem]:
    """Yield the problems of a local folder with a model. Hub ids are not checked here.

    Args:
        path: the folder or hub id.
        setting: the setting that names the folder.
        tokenizer: what to do about a missing tokenizer, in a sentence; None if no tokenizer is needed.
        weights: whether weights are needed.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            yield Problem(setting, "there is no such folder; give a folder with a config.json, or a hub id.", path)
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
        yield Problem(setting, f"the folder has no tokenizer. {tokenizer}", path)


def _check_method(config: Config) -> Iterator[Problem]:
    method = config.method
    steps, refit = method.get("steps"), method.get("refit", False)
    if steps is None and "_target_" not in method:
        yield Problem("method", "has neither _target_ nor steps; see conf/method/cdmoe.yaml.")
    elif not isinstance(steps, list | tuple | None):
        yield Problem("method.steps", "expected a list of steps; see conf/method/moei2.yaml.", steps)
    if refit not in (False, True, "coefficients"):
        yield Problem("method.refit", "must be false, true, or coefficients (of condensed layers).", refit)
    protects = method.get("protect_super_experts", True)
    if not isinstance(protects, bool):
        yield Problem("method.protect_super_experts", "must be true or false.", protects)


def _check_data(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield the splits that the run needs and that have no file; `corpora.check_paths` reads the files."""
    needs = {}
    if step_entries(config.method) and config.data.calibration.sources is None:
        needs["calibration"] = "the method needs it for its search"
    if config.recovery.objective != "none" and not all(stage.own_texts for stage in stages):
        needs["train"] = f"recovery={config.recovery.name} trains on it (otherwise set recovery=none)"
    if config.recovery.objective != "none" and (validating := _validates(stages, own_texts=False)):
        needs["validation"] = f"{validating} measures on it (otherwise set it to 0)"
    yield from _check_splits(config.data, "data", needs)


def _validates(stages: Sequence[Stage], *, own_texts: bool) -> str:
    """Return the setting of the first stage that validates during its training; empty if there is none."""
    validating = (stage for stage in stages if stage.recovery.validate_every and stage.own_texts == own_texts)
    return next((f"{stage.where}.validate_every={stage.recovery.validate_every}" for stage in validating), "")


def _check_splits(data: DataConfig, where: str, needs: Mapping[str, str]) -> Iterator[Problem]:
    """Yield the missing splits, and a form of records for a source that has no records.

    Args:
        data: the settings of the data.
        where: the dotted name of `data` in the config.
        needs: for each split that is needed, the reason.
    """
    for split, why in needs.items():
        if data.source == "texts" and getattr(data, split).path is None:
            yield Problem(f"{where}.{split}.path", f"{why}. Give a file of texts.", None)
        if data.source == "hub" and getattr(data.splits, split) is None:
            yield Problem(f"{where}.splits.{split}", f"{why}. Name a split of {data.dataset}.", None)
    if data.source == "stdlib" and data.form is not None:
        yield Problem(
            f"{where}.form",
            "the standard library has no records. Use form=null, or source=texts or hub.",
            data.form,
        )


def _check_stages(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield the problems of the recovery's stages, except those that the recovery itself has."""
    recovery = config.recovery
    if recovery.stages is None:
        return
    if recovery.objective == "none":
        text = "recovery.stages needs an objective. Set recovery.objective, or recovery.stages=null."
        yield Problem("recovery.objective", text, "none")
        return
    known = set(check_recovery(recovery, "recovery"))
    for stage in stages:
        inherited = check_recovery(stage.recovery, "recovery")
        problems = check_recovery(stage.recovery, stage.where)
        yield from (problem for problem, same in zip(problems, inherited, strict=True) if same not in known)
        if stage.own_texts:
            why = f"stage {stage.name} trains on it"
            needs = {"train": why}
            if validating := _validates([stage], own_texts=True):
                needs["validation"] = f"{validating} measures on it (otherwise set it to 0)"
            yield from _check_splits(stage.data, f"{stage.where}.data", needs)
        if stage.recovery.objective == "none":
            yield Problem(f"{stage.where}.objective", "a stage must train. Remove the stage instead.", "none")


def _check_streaming(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield settings that do not work with model.streaming=true, and a tape_dtype for a tape in memory."""
    tape, dtype = config.data.calibration.tape, config.data.calibration.tape_dtype
    if dtype != "auto" and tape != "disk" and not (tape == "auto" and config.model.streaming):
        yield Problem(
            "data.calibration.tape_dtype",
            "is only for a tape on disk. Use data.calibration.tape=disk, or data.calibration.tape_dtype=auto.",
            dtype,
        )
    if not config.model.streaming or config.recovery.objective == "none":
        return
    for stage in stages:
        if stage.recovery.objective == "distill" and stage.recovery.teacher == "shared":
            yield Problem(
                f"{stage.where}.teacher",
                "with model.streaming=true the original is never completely in memory, so the student cannot share its "
                f"weights. Use {stage.where}.teacher=cached, which runs the original once, or recovery=finetune.",
                "shared",
            )
    if config.recovery.control:
        yield Problem(
            "recovery.control",
            "trains the original, which is never completely in memory with model.streaming=true. Use "
            "recovery.control=false.",
            True,
        )


def check_recovery(recovery: RecoveryConfig, where: str) -> Iterator[Problem]:
    """Yield the settings of one training that contradict each other.

    Args:
        recovery: the settings of a recovery or of one of its stages.
        where: the dotted name of `recovery` in the config.
    """
    if recovery.objective == "none":
        return
    if recovery.epochs is None and recovery.warmup_steps >= recovery.steps:
        yield Problem(
            f"{where}.warmup_steps",
            f"must be below {where}.steps={recovery.steps}, or the learning rate never reaches its peak.",
            recovery.warmup_steps,
        )
    entropy, hidden = recovery.cross_entropy_share, recovery.hidden_share
    if (total := max(map(sum, zip(ends_of(entropy), ends_of(hidden), strict=True)))) > 1:
        shown = list(entropy) if isinstance(entropy, tuple) else entropy
        yield Problem(
            f"{where}.hidden_share",
            f"with {where}.cross_entropy_share={shown} the sum is {total:g}, and must be at most 1; the rest is the "
            "share of the divergence from the teacher.",
            hidden,
        )
    if recovery.objective == "distill":
        yield from _check_teacher(recovery, where)
    if recovery.objective == "local":
        yield from _check_local(recovery, where)
    if "lora" in recovery.parts:
        yield from _check_adapters(recovery, where)


def _check_adapters(recovery: RecoveryConfig, where: str) -> Iterator[Problem]:
    """Yield the problems of adapters: parts that would train twice, and dropout of experts."""
    lora = recovery.lora
    targets = ("experts", "attention") if lora.target == "both" else (lora.target,)
    if twice := [part for part in recovery.parts if part in targets]:
        yield Problem(
            f"{where}.trainable",
            f"with {where}.lora.target={lora.target}, lora already trains adapters of {twice[0]}. Leave out "
            f"{twice[0]} or lora, or use another {where}.lora.target.",
            recovery.trainable,
        )
    if lora.dropout and lora.target != "attention":
        yield Problem(
            f"{where}.lora.dropout",
            f"with {where}.lora.target={lora.target} there are adapters of experts, which do not support dropout. Use "
            f"{where}.lora.target=attention or {where}.lora.dropout=0.",
            lora.dropout,
        )


def _check_local(recovery: RecoveryConfig, where: str) -> Iterator[Problem]:
    """Yield the settings that a local recovery does not have."""
    if not {"experts", "routers"}.issuperset(recovery.parts):
        text = f"{where}.objective=local trains the weights of one MoE block at a time. Use experts, routers, or both."
        yield Problem(f"{where}.trainable", text, recovery.trainable)
    if "routers" in recovery.parts and recovery.router_layers == "all":
        text = f"{where}.objective=local trains changed layers only. Use {where}.router_layers=changed."
        yield Problem(f"{where}.router_layers", text, "all")
    if recovery.validate_every:
        text = f"{where}.objective=local has no predictions to validate. Use {where}.validate_every=0."
        yield Problem(f"{where}.validate_every", text, recovery.validate_every)


def _check_local_first(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield the stages that need the original's blocks when an earlier stage has given them up."""
    if config.model.streaming:
        why = "with model.streaming=true, a stage of another objective loads the compressed model without its original"
    elif config.trainer.shards:
        why = f"with trainer.strategy={config.trainer.strategy}, a stage of another objective shards the weights"
    else:
        return
    later = False
    for stage in stages:
        if stage.recovery.objective == "local" and stage.recovery.fold_coefficients and config.model.streaming:
            text = "the blocks of a streamed model are not changed before they train. Use fold_coefficients=false."
            yield Problem(f"{stage.where}.fold_coefficients", text, True)
        if stage.recovery.objective == "local" and later:
            yield Problem(f"{stage.where}.objective", f"{why}. Put this stage first.", "local")
        later = later or stage.recovery.objective != "local"


def _check_teacher(recovery: RecoveryConfig, where: str) -> Iterator[Problem]:
    """Yield the problems of the teacher of a distillation."""
    why = {
        "cached": f"{where}.teacher=cached keeps predictions on disk, but no hidden states",
        "model": f"the layers of {where}.teacher=model may not correspond to the student's",
    }
    if recovery.compares_states and recovery.teacher in why:
        yield Problem(
            f"{where}.hidden_share",
            f"{why[recovery.teacher]}. Use {where}.hidden_share=0, or {where}.teacher=shared.",
            recovery.hidden_share,
        )
    if recovery.teacher != "model":
        return
    if recovery.teacher_path is None:
        yield Problem(f"{where}.teacher_path", f"{where}.teacher=model needs it. Give a folder or a hub id.", None)
    else:
        remedy = "Save the tokenizer there too: it must be the student's."
        yield from check_folder(recovery.teacher_path, f"{where}.teacher_path", remedy)


def _check_name_and_teacher(recovery: RecoveryConfig) -> Iterator[Problem]:
    """Yield the problem of recovery=lora that trains no adapters, and that of a teacher that is not used."""
    if recovery.objective == "none":
        return
    if recovery.name == "lora" and "lora" not in recovery.parts:
        yield Problem(
            "recovery.trainable",
            "recovery=lora trains adapters. Use recovery.trainable=lora, or recovery=finetune with "
            f"recovery.trainable={show(recovery.trainable)}.",
            recovery.trainable,
        )
    distils = recovery.objective == "distill" and recovery.teacher != "model" and recovery.stages is None
    if distils and recovery.teacher_path is not None:
        yield Problem(
            "recovery.teacher_path",
            f"recovery.teacher={recovery.teacher} does not use it. Use recovery.teacher=model, or "
            "recovery.teacher_path=null.",
            recovery.teacher_path,
        )


def _check_evaluation(config: Config) -> Iterator[Problem]:
    evaluation = config.evaluation
    for index, task in enumerate(evaluation.tasks or ()):
        if not task.strip():
            text = "the name is empty. Name an lm-eval task, or set evaluation.tasks=null."
            yield Problem(f"evaluation.tasks[{index}]", text, task)
    folder = evaluation.include_path
    if folder is None and evaluation.name == "local":
        text = "evaluation=local reads the tasks of a folder. Give a folder with lm-eval task YAMLs."
        yield Problem("evaluation.include_path", text, None)
    elif folder is not None and not Path(folder).is_dir():
        text = "there is no such folder. Give a folder with lm-eval task YAMLs."
        yield Problem("evaluation.include_path", text, folder)
    elif folder is not None and not task_files(folder):
        text = "the folder has no task YAML (*.yaml). Give a folder that has one."
        yield Problem("evaluation.include_path", text, folder)


def task_files(folder: str | Path) -> list[Path]:
    """Return the YAML files of a folder of lm-eval tasks and its subfolders."""
    return sorted(Path(folder).rglob("*.yaml"))


def _check_cpu(config: Config) -> Iterator[Problem]:
    if config.model.device == "cpu" and not config.plan_only:
        yield from check_on_cpu(config)


def check_on_cpu(config: Config) -> Iterator[Problem]:
    """Yield the settings that do not work well on a CPU."""
    if config.model.experts == "batched_mm":
        text = "is about 60 times slower than the others on a CPU. Use auto, grouped_mm or eager."
        yield Problem("model.experts", text, "batched_mm")
    if config.model.attention == "flash_attention_2":
        yield Problem("model.attention", "needs CUDA. Use sdpa or eager.", "flash_attention_2")
