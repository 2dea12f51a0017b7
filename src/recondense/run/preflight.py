"""Everything that can be checked before weights are loaded, all problems together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import yaml
from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, Qwen2MoeConfig

from recondense.config.checks import ADAPTER, HOLDS_ADAPTER, check, task_files
from recondense.config.schema import CalibrationConfig, Config, EvaluationConfig, ModelConfig, differences, read
from recondense.config.stages import read_stages
from recondense.data.corpora import check_paths
from recondense.errors import UserError
from recondense.export.layout import layer_shapes, layout
from recondense.methods.dropping import Dropping
from recondense.methods.search.budget import Budget
from recondense.models import classes, families, headers, parameters, quantized
from recondense.models.model_files import history_of, model_file
from recondense.models.published_configs import recorded_config
from recondense.offline import reachable_or_offline
from recondense.recovery import trainable
from recondense.recovery.teachers import same_vocabulary
from recondense.run import launching
from recondense.run.run_folder import overwritten_inputs
from recondense.run.sizes import OutliningStep, outlined


def check_folder(config: Config, stored: Config | None) -> list[str]:
    """Problems of the run's folder.

    Args:
        stored: the config that the folder holds, None without any.
    """
    folder = config.run_folder()
    if folder.is_file():
        return [f"run_dir={folder}: is a file; a folder is needed."]
    if stored is not None:
        if config.overwrite or stored.run_hash() == config.run_hash():
            return []
        names = differences(stored.identity(), config.identity())
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return [
            f"run_dir={folder}: the folder holds a run with another config (different: {shown}). Choose another "
            "run_dir, or overwrite=true to start anew there."
        ]
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        return [f"run_dir={folder}: the folder is not empty and holds no run of recondense. Choose another run_dir."]
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [f"run_dir={folder}: {parent} cannot be written to. Choose another output_dir or run_dir."]
    return []


class Step(Protocol):
    """One step of a method, as far as checking goes."""

    def check(self, facts: families.Facts) -> list[str]: ...


def preflight(config: Config, steps: Sequence[Step], found: Sequence[str] = ()) -> list[str]:
    """Problems of a run that show without its weights, as sentences.

    Args:
        steps: the method's steps, in order.
        found: problems of its command that are known already; where model.path is among them, `config` holds a default
            in its place that nobody asked for.
    """
    problems = [
        *check(config),
        *([] if config.plan_only else [*check_paths(config.data), *_stages(config)]),
        *check_folder(config, stored_config(config.run_folder())),
        *overwritten_inputs([config]),
        *([] if config.plan_only else [*_machine(config.model), *_tasks(config.evaluation), *_push(config)]),
        *([] if config.plan_only else _processes(config)),
    ]
    if any("model.path" in problem for problem in found):
        return [problem for problem in problems if not problem.startswith("model.path")]
    if any(problem.startswith("model.path") for problem in problems):
        return problems
    try:
        planned = planned_config(config.model, config.plan_only)
        unreadable = quantized.check(planned.to_dict())
        problems += [f"model.path={config.model.path}: {problem}" for problem in unreadable]
        if not unreadable and not config.plan_only and config.model.path is not None:
            problems += _weights("model.path", config.model.path, config.model, planned)
        problems += [*_attention(config, planned), *_rounding(config, planned)]
        problems += [] if config.plan_only else _teachers(config, planned)
        if not steps and config.recovery.objective == "none":  # what is only measured needs no MoE layer
            return problems
        facts = families.facts(planned) if steps else families.original_facts(planned)
        problems += [] if steps else _nothing_trains(config, planned)
    except UserError as error:
        return [*problems, str(error)]
    problems += _low_rank_already(steps, facts)
    refused = [*(problem for step in steps for problem in step.check(facts)), *_budgets(steps, planned)]
    return [*problems, *refused, *([] if refused else _stock(config, steps, planned))]


def _weights(setting: str, path: str, model: ModelConfig, planned: PretrainedConfig) -> list[str]:
    """What the files of a local folder lack, by their headers; those of hub ids are looked at when they are loaded.

    Args:
        setting: that names the folder.
        planned: the folder's config.

    Raises:
        UserError: a config from which no model can be made.
    """
    if not Path(path).is_dir() or model.trust_remote_code:  # which class remote code has shows when it is loaded
        return []
    try:
        outline = classes.empty_model(planned)
    except Exception as error:  # whatever a class says to values that it cannot take
        raise UserError(f"{setting}={path}: no model can be made as config.json says: {error}.") from error
    try:
        files = headers.files_of(Path(path))
        problem = headers.compare(outline, files, quantized.method_of(planned.to_dict())).problem if files else ""
    except UserError as error:
        problem = str(error)
    return [f"{setting}={path}: {problem}."] if problem else []


def _nothing_trains(config: Config, planned: PretrainedConfig) -> list[str]:
    """Experts that are to train, of a model that has none and of which recondense condensed no layer."""
    wanted = [stage.where for stage in read_stages(config, []) if stage.recovery.needs_experts]
    changed = history_of(config.model).changed(planned.num_hidden_layers)
    if not wanted or trainable.trained_layers(classes.on_meta(planned), changed):
        return []
    return [
        f"{where}: the model ({planned.model_type}) has no experts to train. Use {where}.trainable=all, or "
        "recovery=none."
        for where in wanted
    ]


def _teachers(config: Config, planned: PretrainedConfig) -> list[str]:
    """Local teachers that cannot be loaded or lack the student's vocabulary; hub ids are looked at when loaded."""
    wanted = [stage.recovery for stage in read_stages(config, [])]
    paths = {each.teacher_path for each in wanted if (each.objective, each.teacher) == ("distill", "model")}
    own = config.model.tokenizer or config.model.path
    found = []
    for path in sorted(path for path in paths if path is not None and Path(path).is_dir()):
        try:
            classes.register_compressed(str(PretrainedConfig.get_config_dict(path)[0].get("model_type")))
            teacher = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
            found += _weights("recovery.teacher_path", path, config.model, teacher)
            size = json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("vocab_size")
            if size != planned.vocab_size:
                found.append(
                    f"recovery.teacher_path={path}: its head gives {size} logits and the student's "
                    f"{planned.vocab_size}; a teacher needs the student's vocabulary."
                )
            elif own is not None and Path(own).is_dir():
                theirs, mine = (AutoTokenizer.from_pretrained(each, local_files_only=True) for each in (path, own))
                same_vocabulary(theirs, mine, path)
        except (OSError, ValueError) as error:  # a folder without a config is `check`'s
            found += [str(error)] if str(error).startswith("recovery.") else []
    return found


def _push(config: Config) -> list[str]:
    """An upload that nobody is logged in for."""
    if config.export.push_to_hub is None or config.export.enabled is False or get_token() is not None:
        return []
    return [
        f"export.push_to_hub={config.export.push_to_hub}: there is no token for the hub; run `hf auth login`, or set "
        "HF_TOKEN."
    ]


def _attention(config: Config, planned: PretrainedConfig) -> list[str]:
    """An attention that the family's class has not, and what it has."""
    wanted = config.model.attention
    if config.plan_only or classes.has_attention(planned, wanted):
        return []
    return [f"model.attention={wanted}: model_type {planned.model_type} has no such attention. Use eager."]


def _low_rank_already(steps: Sequence[Step], facts: families.Facts) -> list[str]:
    """A folder whose experts were factorized, given to a method that needs whole ones."""
    if not facts.factorized or all(isinstance(step, Dropping) for step in steps):
        return []
    layers = ", ".join(map(str, facts.factorized[:6])) + (", ..." if len(facts.factorized) > 6 else "")
    return [
        f"model.path: the experts of layers {layers} are low-rank already, and this method needs whole ones. Use "
        "method=layer_drop or block_drop, or compress a folder that was exported with export.format=dense."
    ]


def _stock(config: Config, steps: Sequence[Step], planned: PretrainedConfig) -> list[str]:
    """Why the family's own class can never hold what this method makes, where it is asked to."""
    if config.export.format != "stock" or config.export.enabled is False or not steps:
        return []
    model = classes.on_meta(planned)
    try:
        with outlined(model, cast(Sequence[OutliningStep], steps)):
            layout(model, layer_shapes(model), config.export)
    except UserError as error:  # NotStock, or a budget that the method cannot keep
        return [f"{error}."]
    return []


def _stages(config: Config) -> list[str]:
    """Problems of the texts that stages have of their own; that a stage can be read at all is `check`'s."""
    found = []
    for stage in read_stages(config, []) if config.recovery.objective != "none" else ():
        if stage.own_texts:
            data = replace(stage.data, calibration=CalibrationConfig())
            found += check_paths(data, f"{stage.where}.data")
    return found


def _budgets(steps: Sequence[Step], planned: PretrainedConfig) -> list[str]:
    """Sizes that no method reaches which takes only routed experts and routers away; a dropped layer is more."""
    budgets = [getattr(step, "budget", None) for step in steps]
    wanted = [budget.memory_ratio for budget in budgets if isinstance(budget, Budget) and budget.memory_ratio]
    if not wanted or any(isinstance(step, Dropping) for step in steps):
        return []
    counts, facts = parameters.parameter_counts(planned), families.facts(planned)
    gates = len(facts.moe_layers) * (facts.hidden_size + counts.router_row * facts.num_experts)
    rest = (counts.total - counts.routed_experts - gates) / counts.total
    return [
        f"method.memory_ratio={ratio}: without any of its routed experts the model still has {rest:.4g} of its size; "
        "ask for more, or use method=layer_drop or block_drop"
        for ratio in dict.fromkeys(wanted)
        if ratio <= rest
    ]


def planned_config(model: ModelConfig, plan_only: bool = False) -> PretrainedConfig:
    """The config of the model that a run starts from, without its weights.

    Args:
        plan_only: of a hub id, what is recorded here; the hub is not asked.

    Raises:
        UserError: a config that transformers cannot read or does not know; a hub id that is unknown or out of reach.
    """
    if model.path is None:
        return _pretrain_config(dict(model.pretrain or {}))
    path = Path(model.path)
    try:
        if not path.is_dir():
            return recorded_config(model.path) if plan_only else _hub_config(model.path, model)
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not model.trust_remote_code:
            families.family_name(values.get("model_type"))
        classes.register_compressed(str(values.get("model_type")))
        return AutoConfig.from_pretrained(str(path), trust_remote_code=model.trust_remote_code)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"model.path={model.path}: {' '.join(reason.split())}") from error


def _pretrain_config(pretrain: dict[str, Any]) -> PretrainedConfig:
    """The config of the model that is trained on first use."""
    try:
        return Qwen2MoeConfig(**{"vocab_size": pretrain.get("vocab_size"), **pretrain.get("config", {})})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.pretrain.config: {' '.join(str(error).split())}") from error


def _hub_config(path: str, model: ModelConfig) -> PretrainedConfig:
    """The config of a hub id, from the cache when the hub is out of reach."""
    with reachable_or_offline() as online:
        where: dict[str, Any] = {"revision": model.revision, "local_files_only": not online}
        try:
            values, _ = PretrainedConfig.get_config_dict(path, **where)
            classes.register_compressed(str(values.get("model_type")))
            return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **where)
        except OSError as error:
            if model_file(path, ADAPTER, model.revision) is not None:
                raise UserError(f"{HOLDS_ADAPTER}.") from error
            why = (
                "has no such model (or not for you)"
                if online
                else "cannot be reached and has left nothing in the cache"
            )
            raise UserError(f"there is no such folder here, and the hub {why}.") from error


def _machine(model: ModelConfig) -> list[str]:
    """What this machine cannot do."""
    problems = []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = model.device.startswith("cuda")
    if wanted and not count:
        problems.append(f"model.device={model.device}: this machine has no CUDA device. Use model.device=cpu or auto.")
    elif wanted and (index := model.device.partition(":")[2]).isdigit() and int(index) >= count:
        problems.append(f"model.device={model.device}: this machine has {count} CUDA devices, numbered from 0.")
    on_cpu = model.device == "cpu" or (model.device == "auto" and not count)
    if on_cpu and model.experts == "batched_mm":
        problems.append(
            "model.experts=batched_mm: some 60 times slower than the others on a CPU. Use auto, grouped_mm or eager."
        )
    if on_cpu and model.attention == "flash_attention_2":
        problems.append("model.attention=flash_attention_2: runs on CUDA only. Use sdpa or eager.")
    return problems


def _processes(config: Config) -> list[str]:
    """What is wrong with the processes of the run and with what trains on them."""
    trainer, recovery = config.trainer, config.recovery
    stages = read_stages(config, []) if recovery.objective != "none" else []
    gpu = config.model.device.startswith("cuda") or (config.model.device == "auto" and torch.cuda.is_available())
    problems = launching.problems(
        trainer, gpu, {f"{each.where}.batch_size": each.recovery.batch_size for each in stages}
    )
    if not problems and ":" in config.model.device and launching.layout(trainer, gpu).world_size > 1:
        problems.append(f"model.device={config.model.device}: each process has a card of its own. Use auto.")
    if trainer.shards:
        problems += [
            f"{each.where}.trainable=lora: adapters are merged into whole weights, and trainer={trainer.strategy} "
            "leaves a part of them to each process. Use trainer=ddp or deepspeed_zero2, or trainable=experts."
            for each in stages
            if each.recovery.trainable == "lora"
        ]
    return problems


def _rounding(config: Config, planned: PretrainedConfig) -> list[str]:
    """A precision in which DeepSpeed would round the weights that are frozen."""
    trainer = config.trainer
    wanted = config.model.dtype if config.model.dtype != "auto" else str(planned.dtype).rpartition(".")[2]
    if config.plan_only or not trainer.deepspeed or config.recovery.objective == "none":
        return []
    if trainer.precision.startswith("bf16") and wanted != "bfloat16":
        return [
            f"trainer.precision={trainer.precision}: DeepSpeed would round all weights of a model in {wanted}, the "
            "original's too. Use trainer.precision=32-true, or model.dtype=bfloat16."
        ]
    if wanted == "float16":
        return ["model.dtype=float16: DeepSpeed would train in fp16. Use model.dtype=bfloat16."]
    return []


def _tasks(evaluation: EvaluationConfig) -> list[str]:
    """Unknown lm-eval tasks; its import takes seconds, so only where some are named."""
    folder = evaluation.include_path
    if folder is not None and not task_files(folder):
        return []
    if not evaluation.tasks and (folder is None or evaluation.tasks is not None):
        return []
    from recondense.evaluation.lm_eval import check_tasks

    named = None if evaluation.tasks is None else [task for task in evaluation.tasks if task.strip()]
    return check_tasks(named, folder)


def stored_config(folder: Path) -> Config | None:
    """The config that a run's folder holds; None if what it holds is not recondense's."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(values, dict) or not values.keys() >= {"model", "method", "recovery"}:
        return None
    config, problems = read(values)
    return None if problems else config
