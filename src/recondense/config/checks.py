"""What a config alone tells to be wrong: values out of range, settings that contradict each other, missing files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from recondense.config.schema import Config, DataConfig, RecoveryConfig, parse_bytes
from recondense.config.stages import read_stages
from recondense.config.steps import step_entries
from recondense.errors import UserError

SMALLEST_SCRATCH = 16 * 2**20
CONDENSING = ("recondense.methods.cdmoe.CDMoE", "recondense.methods.combined.Combined")  # what condenses layers
TRAINS_ALL = "trainable=all: the original shares the backbone and would change with the student. Use trainable=experts."
ADAPTER = "adapter_config.json"  # transformers puts the adapter that it describes into the model beside it
HOLDS_ADAPTER = (
    f"it holds a PEFT adapter ({ADAPTER}), which would be measured and not exported; merge it first, by "
    "`merge_and_unload()` of the peft model, and save what that returns in a folder of its own"
)
NO_TOKENIZER = "; set model.tokenizer to a folder or hub id that has one"
Row = tuple[str, float | None, float]  # name of a setting, value, least value
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def check(config: Config) -> list[str]:
    """Problems of a config, as sentences: what, the value, the limit, the remedy."""
    return [
        *_ranges(config),
        *_model(config),
        *_method(config),
        *([] if config.plan_only else _data(config)),
        *_recovery(config.recovery, "recovery"),
        *_stages(config),
        *_evaluation(config),
        *_export_and_memory(config),
        *_streaming(config),
    ]


def _ranges(config: Config) -> Iterator[str]:
    """Numbers below their smallest value."""
    evaluation, profile = config.evaluation, config.callbacks.profile
    rows: list[Row] = [
        ("seed", config.seed, 0),
        *_data_rows(config.data, "data"),
        ("data.calibration.num_samples", config.data.calibration.num_samples, 1),
        ("data.calibration.max_length", config.data.calibration.max_length, 1),
        ("evaluation.limit", evaluation.limit, 1),
        ("evaluation.num_fewshot", evaluation.num_fewshot, 0),
        ("evaluation.batch_size", evaluation.batch_size, 1),
        ("evaluation.every_n_steps", evaluation.every_n_steps, 0),
        ("evaluation.perplexity_windows", evaluation.perplexity_windows, 1),
        ("trainer.num_threads", config.trainer.num_threads, 1),
        ("trainer.timeout_hours", config.trainer.timeout_hours, 0.1),
    ]
    rows += _recovery_rows(config.recovery, "recovery")
    for name in ("batch_size", "prompt_length", "new_tokens", "repetitions"):
        rows.append((f"callbacks.profile.{name}", getattr(profile, name), 1))
    if evaluation.heldout is not None:
        rows.append(("evaluation.heldout.num_choices", evaluation.heldout.num_choices, 2))
        rows.append(("evaluation.heldout.num_questions", evaluation.heldout.num_questions, 1))
        rows.append(("evaluation.heldout.num_texts", evaluation.heldout.num_texts, 1))
    yield from _too_small(rows)


def _recovery_rows(recovery: RecoveryConfig, where: str) -> list[Row]:
    least = dict.fromkeys(("weight_decay", "gradient_clip", "warmup_steps", "validate_every"), 0)
    least |= dict.fromkeys(("steps", "batch_size", "accumulate_grad_batches", "checkpoint_every", "teacher_top_k"), 1)
    return [(f"{where}.{name}", getattr(recovery, name), value) for name, value in least.items()]


def _data_rows(data: DataConfig, where: str) -> list[Row]:
    return [
        (f"{where}.sequence_length", data.sequence_length, 2),
        (f"{where}.train.num_texts", data.train.num_texts, 1),
        (f"{where}.validation.num_texts", data.validation.num_texts, 1),
    ]


def _too_small(rows: Iterable[Row]) -> Iterator[str]:
    for name, value, least in rows:
        if value is not None and not value >= least:
            yield f"{name}={value}: must be at least {least}."


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if not DEVICE.fullmatch(model.device):
        yield f"model.device={model.device}: write auto, cpu, cuda or cuda:N."
    if model.path is None and model.pretrain is None:
        yield f"model.path is null and model={model.name} is not built in: give a local folder or a hub id."
    if model.path is not None:
        yield from _model_folder(model.path, model.tokenizer, config.plan_only)


def _model_folder(path: str, tokenizer: str | None, plan_only: bool) -> Iterator[str]:
    """Problems of a local folder; a hub id has none that can be seen from here.

    Args:
        plan_only: neither weights nor a tokenizer are needed.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            yield f"model.path={path}: there is no such folder; give a folder with config.json, or a hub id."
        return
    names = {entry.name for entry in folder.iterdir()}
    if ADAPTER in names:
        yield f"model.path={path}: {HOLDS_ADAPTER}."
        return
    if "config.json" not in names:
        yield f"model.path={path}: the folder has no config.json, so it holds no Hugging Face model."
        return
    if plan_only:
        return
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        found = (
            f"the weights are pickles ({', '.join(pickles)}), which are never loaded; convert them to safetensors"
            if pickles
            else "the folder has no weights (*.safetensors)"
        )
        yield f"model.path={path}: {found}."
    if tokenizer is None and not any("tokenizer" in name or name.startswith("vocab") for name in names):
        yield f"model.path={path}: the folder has no tokenizer{NO_TOKENIZER}."


def _method(config: Config) -> Iterator[str]:
    steps = config.method.get("steps")
    if steps is None and "_target_" not in config.method:
        yield "method: has neither _target_ nor steps; see conf/method/cdmoe.yaml."
        return
    if not isinstance(steps, list | None):
        yield f"method.steps={steps}: expected a list of steps; see conf/method/moei2.yaml."
        return
    targets = [step.get("_target_") if isinstance(step, Mapping) else step for step in step_entries(config.method)]
    if (refit := config.method.get("refit", False)) not in (False, True, "coefficients"):
        yield f"method.refit={refit}: must be false, true, or coefficients (of condensed layers)."
    elif refit == "coefficients" and not any(target in CONDENSING for target in targets):
        yield (
            f"method.refit=coefficients: method={config.method.get('name')} condenses no layer, so there are none. Use "
            "method.refit=true or false."
        )


def _data(config: Config) -> Iterator[str]:
    """Splits that the run needs and that have no file; `corpora.check_paths` looks into the files."""
    data = config.data
    needs = {}
    if step_entries(config.method) and data.calibration.sources is None:
        needs["calibration"] = "the method searches on it"
    if config.recovery.objective != "none" and not all(stage.own_texts for stage in read_stages(config, [])):
        needs["train"] = f"recovery={config.recovery.name} trains on it (or recovery=none)"
    yield from _splits(data, "data", needs)


def _splits(data: DataConfig, where: str, needs: Mapping[str, str]) -> Iterator[str]:
    """Splits that are needed and missing, and records where there are none.

    Args:
        needs: what each split is needed for.
    """
    for split, why in needs.items():
        if data.source == "texts" and getattr(data, split).path is None:
            yield f"{where}.{split}.path is missing: {why}. Give a file of texts."
        if data.source == "hub" and getattr(data.splits, split) is None:
            yield f"{where}.splits.{split} is null: {why}. Name a split of {data.dataset}."
    if data.source == "stdlib" and data.form is not None:
        yield f"{where}.form={data.form}: the standard library holds no records. Use form=null, or source=texts or hub."


def _stages(config: Config) -> Iterator[str]:
    """What is wrong with the stages of the recovery and not with the recovery itself."""
    recovery = config.recovery
    if recovery.stages is None:
        return
    if recovery.objective == "none":
        yield "recovery.objective=none: recovery.stages are given; set them to null, or an objective."
        return
    messages: list[str] = []
    stages = read_stages(config, messages)
    yield from messages
    known = {*_recovery(recovery, "recovery"), *_too_small(_recovery_rows(recovery, "recovery"))}
    for stage in stages:
        rows = [*_recovery_rows(stage.recovery, stage.where), *_data_rows(stage.data, f"{stage.where}.data")]
        found = [*_recovery(stage.recovery, stage.where), *_too_small(rows)]
        yield from (text for text in found if text.replace(stage.where, "recovery") not in known)
        if stage.own_texts:
            yield from _splits(stage.data, f"{stage.where}.data", {"train": f"stage {stage.name} trains on it"})
        if stage.recovery.objective == "none":
            yield f"{stage.where}.objective=none: a stage trains; leave it out instead."
        if stage.recovery.trainable == "all" != recovery.trainable and step_entries(config.method):
            yield f"{stage.where}.{TRAINS_ALL}"


def _streaming(config: Config) -> Iterator[str]:
    """What a model larger than memory cannot do, and a tape in memory."""
    tape, dtype = config.data.calibration.tape, config.data.calibration.tape_dtype
    on_disk = tape == "disk" or (tape == "auto" and config.model.streaming)
    if dtype != "auto" and not on_disk:
        yield (
            f"data.calibration.tape_dtype={dtype}: is of a tape on disk; use data.calibration.tape=disk, or "
            "data.calibration.tape_dtype=auto."
        )
    if not config.model.streaming or config.recovery.objective == "none":
        return
    for stage in read_stages(config, []):
        if stage.recovery.objective == "distill" and stage.recovery.teacher == "shared":
            yield (
                f"{stage.where}.teacher=shared: with model.streaming=true the original is never whole in memory: "
                f"no student can share it. Use {stage.where}.teacher=cached, which asks it once, or recovery=finetune."
            )
    if config.recovery.control:
        yield (
            "recovery.control=true: trains the original, which with model.streaming=true is never whole in memory. Use "
            "recovery.control=false."
        )


def _recovery(recovery: RecoveryConfig, where: str) -> Iterator[str]:
    if recovery.objective == "none":
        return
    yield from _adapters(recovery, where)
    if not recovery.learning_rate > 0:
        yield f"{where}.learning_rate={recovery.learning_rate}: must be above 0."
    if not all(0 <= beta < 1 for beta in recovery.betas):
        yield f"{where}.betas={list(recovery.betas)}: must be two numbers in [0, 1)."
    if recovery.epochs is not None and not recovery.epochs > 0:
        yield f"{where}.epochs={recovery.epochs}: must be above 0, or null to train for {where}.steps."
    if recovery.epochs is None and recovery.warmup_steps >= recovery.steps > 0:
        yield (
            f"{where}.warmup_steps={recovery.warmup_steps}: must be below {where}.steps={recovery.steps}, or the "
            "learning rate never reaches its peak."
        )
    if not recovery.temperature > 0:
        yield f"{where}.temperature={recovery.temperature}: must be above 0; 1.0 leaves the distributions as they are."
    if recovery.objective == "distill":
        yield from _teacher(recovery, where)
    shares = {"cross_entropy_share": recovery.cross_entropy_share, "hidden_share": recovery.hidden_share}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            yield f"{where}.{name}={share}: must be in [0, 1]; it is a share of the loss."
    if all(0 <= share <= 1 for share in shares.values()) and sum(shares.values()) > 1:
        yield (
            f"{where}.cross_entropy_share + {where}.hidden_share = {sum(shares.values()):g}: must be at most 1; the "
            "rest is the share of the divergence from the teacher."
        )


def _teacher(recovery: RecoveryConfig, where: str) -> Iterator[str]:
    """Where a distillation's predictions come from."""
    path = recovery.teacher_path
    if recovery.teacher == "cached" and recovery.hidden_share:
        yield (
            f"{where}.hidden_share={recovery.hidden_share}: {where}.teacher=cached keeps predictions on disk, not "
            f"hidden states. Use {where}.hidden_share=0, or {where}.teacher=shared."
        )
    if recovery.teacher == "model" and recovery.hidden_share:
        yield (
            f"{where}.hidden_share={recovery.hidden_share}: the layers of {where}.teacher=model need not be the "
            f"student's. Use {where}.hidden_share=0, or {where}.teacher=shared."
        )
    if recovery.teacher == "model" and path is None:
        yield f"{where}.teacher_path is missing: {where}.teacher=model learns from it. Give a folder or a hub id."
    elif recovery.teacher == "model" and path is not None:
        found = _model_folder(path, None, False)
        yield from (
            problem.replace("model.path=", f"{where}.teacher_path=").replace(NO_TOKENIZER, "") for problem in found
        )
    elif path is not None and where == "recovery" and recovery.stages is None:
        yield (
            f"{where}.teacher_path={path}: {where}.teacher={recovery.teacher} does not read it. Use "
            f"{where}.teacher=model, or {where}.teacher_path=null."
        )


def _adapters(recovery: RecoveryConfig, where: str) -> Iterator[str]:
    """Settings of LoRA, and a recovery called so that trains something else."""
    if where == "recovery" and recovery.name == "lora" and recovery.trainable != "lora":
        yield (
            f"recovery.trainable={recovery.trainable}: recovery=lora trains adapters. Use recovery.trainable=lora, or "
            f"recovery=finetune with recovery.trainable={recovery.trainable}."
        )
    if recovery.trainable != "lora":
        return
    lora = recovery.lora
    if lora.rank < 1:
        yield f"{where}.lora.rank={lora.rank}: must be at least 1."
    if lora.alpha <= 0:
        yield f"{where}.lora.alpha={lora.alpha}: must be above 0; what adapters add is scaled by alpha / rank."
    if not 0 <= lora.dropout < 1:
        yield f"{where}.lora.dropout={lora.dropout}: must be in [0, 1)."
    elif lora.dropout and lora.target != "attention":
        yield (
            f"{where}.lora.dropout={lora.dropout}: adapters of experts have no dropout, and {where}.lora.target="
            f"{lora.target}. Use {where}.lora.target=attention or {where}.lora.dropout=0."
        )


def _evaluation(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    for index, task in enumerate(evaluation.tasks or ()):
        if not task.strip():
            yield f"evaluation.tasks[{index}] is an empty name; name an lm-eval task, or write evaluation.tasks=null."
    folder = evaluation.include_path
    if folder is None and evaluation.name == "local":
        yield "evaluation.include_path is missing: evaluation=local runs a folder's tasks. Give a folder of task YAMLs."
    elif folder is not None and not Path(folder).is_dir():
        yield f"evaluation.include_path={folder}: there is no such folder; it holds task YAMLs."
    elif folder is not None and not task_files(folder):
        yield f"evaluation.include_path={folder}: the folder has no task YAML (*.yaml). Give one that has."
    if config.recovery.trainable == "all" and config.recovery.objective != "none" and step_entries(config.method):
        yield f"recovery.{TRAINS_ALL}"


def task_files(folder: str | Path) -> list[Path]:
    """The YAML files of a folder of lm-eval tasks, and of the folders in it."""
    return sorted(Path(folder).rglob("*.yaml"))


def _export_and_memory(config: Config) -> Iterator[str]:
    if config.export.enabled not in (True, False, "auto"):
        yield f"export.enabled={config.export.enabled}: must be true, false or auto (where the run changed the model)."
    if not 0 <= config.export.max_padding <= 1:
        yield f"export.max_padding={config.export.max_padding}: must be in [0, 1]; it is a fraction of the parameters."
    if (name := config.export.push_to_hub) is not None and not REPOSITORY.fullmatch(name):
        yield f"export.push_to_hub={name}: is no repository of the hub; write owner/name, or null."
    for name, value in (
        ("max_scratch_bytes", config.max_scratch_bytes),
        ("export.max_shard_size", config.export.max_shard_size),
    ):
        if value == "auto" and name == "max_scratch_bytes":
            continue
        try:
            size = parse_bytes(value)
        except UserError as error:
            yield f"{name}: {error}."
            continue
        if name == "max_scratch_bytes" and size < SMALLEST_SCRATCH:
            yield f"{name}={value}: must be at least 16MiB ({SMALLEST_SCRATCH} bytes), or auto."
        elif size <= 0:
            yield f"{name}={value}: must be above 0."
