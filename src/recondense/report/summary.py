"""The machine-readable result of a run, summary.json, with the schema `Summary`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from recondense.config.rounds import rounds_of
from recondense.config.schema import GENERAL, Config, ModelConfig
from recondense.errors import UserError
from recondense.models import families
from recondense.models.model_files import read_history
from recondense.models.quantized import StoredWeights
from recondense.plan import Plan
from recondense.report import beside_published
from recondense.report.operation_counts import operation_counts
from recondense.report.published import PAPER_TASKS
from recondense.report.tables import STAGES

SCHEMA = 1
GIT_HOOK_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE")
MEASURING_PACKAGES = ("torch", "transformers", "lm-eval", "datasets")  # their versions can change a figure
PACKAGES = ("recondense", *MEASURING_PACKAGES, "lightning", "hydra-core", "wandb", "deepspeed")
Sizes = Mapping[str, Mapping[str, int]]  # `parameters.sizes` of the original and of the compressed model


@dataclass
class Summary:
    """Content of summary.json. The fields are its keys; a field that is None was not measured and is absent.

    Args:
        model, method, recovery: names of the model, the method and the recovery.
        objective: objective of the training that ran. It differs from the config's if the model is uncompressed and
            therefore has no teacher.
        seed: seed of the run.
        environment: what the result depends on besides its config (`environment`).
        parameters: number of all parameters (`total`) and of the routed experts' (`routed_experts`), by stage.
        operations: `operation_counts` of the plan.
        refit: for each layer that the last round refits, the relative error of its output before and after it.
        plan_only: true if nothing ran and the sizes were computed from shapes.
        weights_bytes: size of the weights by stage, in bytes; only with plan_only.
        stages: figures of each result stage: perplexity, loss and kl_to_original (nats), tasks, profile.
        published: published results of the same model, for comparison.
        ratios: compressed / original for memory, routed-expert parameters and speed; and the shares of the added loss
            that the refit and all stages together remove, in a run with one round.
        seconds: duration of each part of the run.
        artifacts: files in the run's folder, and the repository to which an export was uploaded.
        recovery_stages: description of each recovery stage.
        rounds: the quality and the parameters after each of several rounds.
        quantization, bytes_on_disk: format and sizes of an original that is stored in fewer bits than it computes in.
        memory: the parts, in bytes, of the peak memory of a run with a streamed model.
    """

    model: str
    method: str
    recovery: str
    objective: str
    seed: int
    environment: dict[str, Any]
    parameters: dict[str, dict[str, int]]
    operations: dict[str, dict[str, float]]
    refit: dict[str, dict[str, float]] | None = None
    super_experts: dict[str, Any] | None = None
    plan_only: bool | None = None
    weights_bytes: dict[str, int] | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: dict[str, Any] | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    recovery_stages: list[dict[str, Any]] | None = None
    rounds: list[dict[str, Any]] | None = None
    quantization: str | None = None
    bytes_on_disk: dict[str, int] | None = None
    memory: dict[str, int] | None = None

    @classmethod
    def of_plan(
        cls, config: Config, objective: str, plan: Plan, sizes: Sizes, model: PreTrainedModel, data: Mapping[str, str]
    ) -> Summary:
        """Return the summary of a plan, without any measured figures.

        Args:
            config: settings of the run.
            objective: objective of the training that runs.
            plan: the plan.
            sizes: parameters of the original and of the compressed model.
            model: the model, for its config, device and dtype.
            data: sha256 of each split.
        """
        operations: dict[str, dict[str, float]] = {}
        if plan.operations:  # a model without MoE layers has no facts about experts, but can be measured
            operations = operation_counts(plan, families.facts(model.config).num_experts)
        return cls(
            model=name_of(config.model),
            method=config.method.get("name", "none"),
            recovery=config.recovery.name,
            objective=objective,
            seed=config.seed,
            environment=environment(model, data),
            parameters={kind: {stage: sizes[stage][kind] for stage in sizes} for kind in sizes["original"]},
            operations=operations,
            super_experts=plan.search.get("super_experts"),
        )

    @classmethod
    def of_run(
        cls,
        config: Config,
        objective: str,
        plan: Plan,
        sizes: Sizes,
        model: PreTrainedModel,
        data: Mapping[str, str],
        measured: Mapping[str, Mapping[str, Any]],
    ) -> Summary:
        """Return the summary of a run with its measured figures.

        Args:
            config: settings of the run.
            objective: objective of the training that ran.
            plan: the plan.
            sizes: parameters of the original and of the compressed model.
            model: the model, for its config, device and dtype.
            data: sha256 of each split.
            measured: the figures of each result stage.
        """
        stages = {name: dict(measured[name]) for name in STAGES if name in measured}
        for figures in stages.values():
            if means := beside_published.task_means(figures.get("tasks", {})):
                figures["task_mean"] = means
        profiles = (figures["original_profile"] for figures in stages.values() if figures.get("original_profile"))
        if (first := next(profiles, None)) is not None:
            stages["original"]["profile"] = first
        published = published_beside(config, plan, sizes, model.config, stages)
        if not plan.operations and config.recovery.objective == "none":  # the run only evaluates the original
            sizes = {"original": sizes["original"]}
        summary = cls.of_plan(config, objective, plan, sizes, model, data)
        summary.stages = stages
        summary.published = published
        summary.ratios = ratios(stages, sizes, with_gaps=rounds_of(config.method) == 1)
        summary.artifacts = {"plan": "plan.json"} if plan.operations else {}
        return summary

    def count_bytes_on_disk(self, original: StoredWeights, compressed: int) -> None:
        """Compute the ratio `memory` from bytes on disk, for an original stored in fewer bits than it computes in.

        Args:
            original: size and format of the original's files.
            compressed: size in bytes of the exported compressed weights.
        """
        self.quantization = original.method
        self.bytes_on_disk = {"original": original.num_bytes, "compressed": compressed}
        self.ratios["memory"] = compressed / original.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {"schema": SCHEMA, **{name: value for name, value in values.items() if value is not None}}


def add_upload(summary: Mapping[str, Any], repository: str) -> dict[str, Any]:
    """Return the content of summary.json with the hub repository to which the export was uploaded."""
    return {**summary, "artifacts": {**summary["artifacts"], "hub": repository}}


def name_of(model: ModelConfig) -> str:
    """Return the name of a model: the config's name, or the path if the config is not that of this very model."""
    other = model.pretrain is not None or model.name == GENERAL or model.budgets.get("by_path")
    return model.path if model.path and other else model.name


def published_beside(
    config: Config, plan: Plan, sizes: Sizes, model: PretrainedConfig, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return published results of this model and setting; None if there are none and no paper's tasks were measured.

    Args:
        config: settings of the run.
        plan: plan of this run. The plan of a folder that was compressed earlier is prepended.
        sizes: parameters of the original and of the compressed model.
        model: config of the model.
        stages: figures of each result stage.
    """
    measured = [name for name in PAPER_TASKS if any(name in stage.get("task_mean", {}) for stage in stages.values())]
    history = read_history(config.model)
    earlier = bool(history.operations)
    try:
        facts = families.original_facts(model)
    except UserError:  # a run that only evaluates a model of another family
        return None
    known = beside_published.recognise(
        *(families.family_name(facts.model_type), facts.hidden_size, facts.num_layers, facts.num_experts),
        compressed=earlier,
    )
    setting = beside_published.Setting(None)
    if known is not None:
        operations = operation_counts(Plan("", history.extend(plan.operations, ()).operations), known.num_experts)
        removed = 1 - sizes["compressed"]["routed_experts"] / known.routed_expert_parameters
        groupings = [s["grouping"] for s in plan.search.get("steps", [plan.search]) if "grouping" in s]
        setting = beside_published.setting_of(operations, removed, groupings)
    papers = beside_published.papers_beside(known, setting, measured)
    if not papers:
        return None
    evaluation = config.evaluation
    differs = [] if evaluation.limit is None else [f"evaluation.limit={evaluation.limit}"]
    differs += [] if evaluation.num_fewshot == 0 else [f"evaluation.num_fewshot={evaluation.num_fewshot}"]
    return {
        **beside_published.published_rows(known, setting, papers, differs),
        **({"earlier": True} if earlier else {}),
    }


def ratios(stages: Mapping[str, Any], sizes: Sizes, *, with_gaps: bool = True) -> dict[str, float]:
    """Return compressed / original for memory, parameters and speed, and the shares of the added loss removed.

    Args:
        stages: figures of each result stage.
        sizes: parameters of the original and of the compressed model.
        with_gaps: whether to return the shares of the added loss. They have no meaning after several rounds, because
            the recovery of earlier rounds has already removed some of what the last round measures as added.
    """
    values = {}
    if "compressed" in sizes and sizes["original"]["routed_experts"]:
        retained = sizes["compressed"]["routed_experts"]
        values["routed_expert_parameters"] = retained / sizes["original"]["routed_experts"]
    original, compressed = (stages.get(name, {}).get("profile", {}) for name in ("original", "compressed"))
    for name, key in (
        ("memory", "weights_bytes"),
        ("prefill_speedup", "prefill_tokens_per_second"),
        ("decode_speedup", "decode_tokens_per_second"),
    ):
        if key in original and key in compressed:
            values[name] = compressed[key] / original[key]
    original_loss, compressed_loss = (stages.get(name, {}).get("loss") for name in ("original", "compressed"))
    if with_gaps and None not in (original_loss, compressed_loss) and compressed_loss != original_loss:
        for name, stage in (("refit_gap_closed", "refitted"), ("gap_closed", "recovered")):
            if "loss" in stages.get(stage, {}):
                values[name] = (compressed_loss - stages[stage]["loss"]) / (compressed_loss - original_loss)
    return values


def environment(model: PreTrainedModel, data: Mapping[str, str]) -> dict[str, Any]:
    """Return what a result depends on besides its config: versions, device, dtype, threads and data.

    Args:
        model: the model.
        data: sha256 of each split.
    """
    device = model.device
    return {
        "git": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "data": dict(data),
    }


def metric(summary: Mapping[str, Any], name: str | Sequence[str]) -> Any:
    """Return a figure that a sweep compares: a ratio, or that of the last stage that has it; None if not measured.

    Args:
        summary: content of `summary.json`.
        name: name of the figure; for several names, the result is a tuple.
    """
    if not isinstance(name, str):
        return tuple(metric(summary, part) for part in name)
    if name in summary["ratios"]:
        return float(summary["ratios"][name])
    for stage in ("recovered", "refitted", "compressed", "original"):
        if name in summary["stages"].get(stage, {}):
            return float(summary["stages"][stage][name])
    return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that contains this code; None if the package is installed elsewhere."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    # Git sets variables for its hooks that may name a different repository.
    variables = {name: value for name, value in os.environ.items() if name not in GIT_HOOK_VARIABLES}
    try:
        result = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=10, env=variables)
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = result.stdout.strip().rpartition("\n")
    return commit if result.returncode == 0 and Path(top, "src", "recondense").resolve() == package else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
