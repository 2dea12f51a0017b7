"""summary.json: the machine-readable result of a run, and the model card made from it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from recondense.config.schema import Config, ModelConfig
from recondense.models import families
from recondense.models.model_files import history_of
from recondense.models.quantized import Stored
from recondense.operations import Condense, Drop, Factorize, Merge, Prune
from recondense.plan import Plan
from recondense.report import beside_published
from recondense.report.published import PAPER_TASKS

SCHEMA = 1
OF_GIT_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE")
PACKAGES = (
    "recondense",
    "torch",
    "transformers",
    "lightning",
    "datasets",
    "lm-eval",
    "hydra-core",
    "wandb",
    "deepspeed",
)


def collect(
    config: Config,
    objective: str,
    plan: Plan,
    counted: Mapping[str, Mapping[str, int]],
    model: PreTrainedModel,
    measured: Mapping[str, Mapping[str, Any]],
    refit: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    data: Mapping[str, str],
) -> dict[str, Any]:
    """Everything a run found, as summary.json keeps it; what was not measured is absent.

    Args:
        objective: of the training that ran, which need not be the config's: an uncompressed model has no teacher.
        counted: `sizes` of the original and of the compressed model.
        measured: the figures of each stage.
        refit: the errors of each layer before and after a refit.
        seconds: what each part of the run took.
        data: sha256 of each split.
    """
    stages = {
        name: dict(measured[name])
        for name in ("original", "compressed", "refitted", "recovered", "control")
        if name in measured
    }
    for stage in stages.values():
        if means := beside_published.task_means(stage.get("tasks", {})):
            stage["task_mean"] = means
    first = next((stage["original_profile"] for stage in stages.values() if stage.get("original_profile")), None)
    if first is not None:
        stages["original"]["profile"] = first
    beside = published(config, plan, counted, model.config, stages)
    if not plan.operations and config.recovery.objective == "none":  # only measured: there is nothing to compare
        counted = {"original": counted["original"]}
    return {
        **header(config, objective, plan, counted, model, data),
        **({"refit": refit} if refit else {}),
        "stages": stages,
        **beside,
        "ratios": ratios(stages, counted),
        "seconds": seconds,
        "artifacts": {"plan": "plan.json"} if plan.operations else {},
    }


def header(
    config: Config,
    objective: str,
    plan: Plan,
    counted: Mapping[str, Mapping[str, int]],
    model: PreTrainedModel,
    data: Mapping[str, str],
) -> dict[str, Any]:
    """What summary.json says before anything that is measured: which run, where, its parameters and operations.

    Args:
        counted: `sizes` of the original and of the compressed model.
    """
    operations: dict[str, dict[str, float]] = {}
    if plan.operations:  # a model without MoE layers can be measured all the same
        operations = operation_counts(plan, families.facts(model.config).num_experts)
    return {
        "schema": SCHEMA,
        "model": name_of(config.model),
        "method": config.method.get("name", "none"),
        "recovery": config.recovery.name,
        "objective": objective,
        "seed": config.seed,
        "environment": environment(model, data),
        "parameters": {
            kind: {stage: numbers[kind] for stage, numbers in counted.items()} for kind in counted["original"]
        },
        "operations": operations,
    }


def name_of(model: ModelConfig) -> str:
    """What to call a model: the entry's name, or the path that was given in place of the built-in one's."""
    return model.name if model.path is None or model.pretrain is None else model.path


def with_bytes_on_disk(found: Mapping[str, Any], original: Stored, compressed: int) -> dict[str, Any]:
    """The summary of a run whose original is stored in fewer bits than it computes in: `memory` counts bytes on disk.

    Args:
        compressed: bytes of the compressed weights as they are exported.
    """
    return {
        **found,
        "quantization": original.method,
        "bytes_on_disk": {"original": original.num_bytes, "compressed": compressed},
        "ratios": {**found["ratios"], "memory": compressed / original.num_bytes},
    }


def operation_counts(plan: Plan, num_experts: int) -> dict[str, dict[str, float]]:
    """How many layers each kind of operation changes, and how many experts or which ranks it leaves there.

    Args:
        num_experts: routed experts in a layer of the uncompressed model.

    Returns:
        by kind (`drop_moe` and `drop_layer` apart): layers; retained, of; groups, of; lowest, highest and mean rank.
    """
    found: dict[str, dict[str, float]] = {}
    layers: dict[str, set[int]] = {}
    ranks: list[int] = []
    there: dict[int, int] = {}
    for operation in plan.operations:
        name = f"drop_{operation.part}" if isinstance(operation, Drop) else operation.kind
        own = found.setdefault(name, {"layers": 0})
        layers.setdefault(name, set()).add(operation.layer)
        own["layers"] = len(layers[name])
        before = there.get(operation.layer, num_experts)
        left, word = before, ""
        if isinstance(operation, Prune):
            left, word = len(operation.retained), "retained"
        elif isinstance(operation, Condense):
            left, word = len(operation.experts), "retained"
        elif isinstance(operation, Merge):
            left, word = len(operation.groups), "groups"
        elif isinstance(operation, Factorize):
            ranks += [rank for each in operation.ranks.values() for rank in each if rank is not None]
        if word:
            own[word], own["of"] = own.get(word, 0) + left, own.get("of", 0) + before
        there[operation.layer] = left
    if ranks:
        found["factorize"] |= {"lowest": min(ranks), "highest": max(ranks), "mean": sum(ranks) / len(ranks)}
    return found


def published(
    config: Config,
    plan: Plan,
    counted: Mapping[str, Mapping[str, int]],
    model: PretrainedConfig,
    stages: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """`{"published": …}`: what was published on this model and setting; nothing where no paper's mean was measured.

    Args:
        plan: of this run; a folder that was compressed before has one of its own, which comes first.
        counted: `sizes` of the original and of the compressed model.
        model: its config.
    """
    measured = [name for name in PAPER_TASKS if any(name in stage.get("task_mean", {}) for stage in stages.values())]
    if not measured:
        return {}
    history = history_of(config.model)
    earlier = bool(history.operations)
    facts = families.original_facts(model)
    known = beside_published.recognise(
        *(families.family_name(facts.model_type), facts.hidden_size, facts.num_layers, facts.num_experts),
        compressed=earlier,
    )
    setting = beside_published.Setting(None)
    if known is not None:
        operations = operation_counts(Plan("", history.then(plan.operations, ()).operations), known.num_experts)
        removed = 1 - counted["compressed"]["routed_experts"] / known.routed_expert_parameters
        setting = beside_published.setting_of(operations, removed)
    evaluation = config.evaluation
    differs = [] if evaluation.limit is None else [f"evaluation.limit={evaluation.limit}"]
    differs += [] if evaluation.num_fewshot == 0 else [f"evaluation.num_fewshot={evaluation.num_fewshot}"]
    beside = beside_published.beside(known, setting, measured, differs)
    return {"published": {**beside, **({"earlier": True} if earlier else {})}}


def ratios(stages: Mapping[str, Any], counted: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """compressed / original of memory, routed-expert parameters and speed, and the share of the lost loss regained."""
    found = {}
    if "compressed" in counted and counted["original"]["routed_experts"]:
        retained = counted["compressed"]["routed_experts"]
        found["routed_expert_parameters"] = retained / counted["original"]["routed_experts"]
    original, compressed = (stages.get(name, {}).get("profile", {}) for name in ("original", "compressed"))
    for name, key in (
        ("memory", "weights_bytes"),
        ("prefill_speedup", "prefill_tokens_per_second"),
        ("decode_speedup", "decode_tokens_per_second"),
    ):
        if key in original and key in compressed:
            found[name] = compressed[key] / original[key]
    original_loss, compressed_loss = (stages.get(name, {}).get("loss") for name in ("original", "compressed"))
    if None not in (original_loss, compressed_loss) and compressed_loss != original_loss:
        for name, stage in (("refit_gap_closed", "refitted"), ("gap_closed", "recovered")):
            if "loss" in stages.get(stage, {}):
                found[name] = (compressed_loss - stages[stage]["loss"]) / (compressed_loss - original_loss)
    return found


def environment(model: PreTrainedModel, data: Mapping[str, str]) -> dict[str, Any]:
    """What a result depends on besides its config."""
    device = model.device
    return {
        "git": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "data": dict(data),
    }


def metric(summary: Mapping[str, Any], name: str | Sequence[str]) -> Any:
    """The figure that a sweep compares: a ratio, or the last stage's; a tuple for several. None: not measured."""
    if not isinstance(name, str):
        return tuple(metric(summary, each) for each in name)
    if name in summary["ratios"]:
        return float(summary["ratios"][name])
    for stage in ("recovered", "refitted", "compressed", "original"):
        if name in summary["stages"].get(stage, {}):
            return float(summary["stages"][stage][name])
    return None


def _git_commit() -> str | None:
    """The commit of the checkout that this code lies in; None where it is installed, even below some repository."""
    package = Path(__file__).resolve().parent
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    # Hooks of git run with variables that name another repository than the folder's.
    variables = {name: value for name, value in os.environ.items() if name not in OF_GIT_HOOKS}
    try:
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=10, env=variables)
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = done.stdout.strip().rpartition("\n")
    return commit if done.returncode == 0 and Path(top, "src", "recondense").resolve() == package else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
