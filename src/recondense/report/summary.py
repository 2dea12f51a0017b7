"""summary.json: the machine-readable result of a run. `Summary` is its schema."""

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

from recondense.config.schema import Config, ModelConfig
from recondense.models import families
from recondense.models.model_files import read_history
from recondense.models.quantized import StoredWeights
from recondense.operations import Condense, Drop, Factorize, Merge, Prune
from recondense.plan import Plan
from recondense.report import beside_published
from recondense.report.published import PAPER_TASKS
from recondense.report.tables import STAGES

SCHEMA = 1
GIT_HOOK_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE")
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
Sizes = Mapping[str, Mapping[str, int]]  # `parameters.sizes` of the original and of the compressed model


@dataclass
class Summary:
    """What summary.json says. The fields are its keys; one that is None is absent, for it was not measured.

    Args:
        model, method, recovery: names of what ran.
        objective: of the training that ran, which need not be the config's: an uncompressed model has no teacher.
        seed: of the run.
        environment: what the result depends on besides its config.
        parameters: numbers of all parameters and of the routed experts', by stage.
        operations: `operation_counts` of the plan.
        refit: by layer, relative error of its output before and after a refit.
        plan_only: true where nothing ran and the sizes come from shapes alone.
        weights_bytes: of plan_only, by stage.
        stages: figures of each result stage: perplexity, loss and kl_to_original (nats), tasks, profile.
        published: results that a paper published of the same model, beside this run's.
        ratios: compressed / original of memory, routed-expert parameters and speed; the share of the loss regained.
        seconds: of each part of the run.
        artifacts: files in the run's folder, and the repository that an export was uploaded to.
        recovery_stages: what each recovery stage was.
        quantization, bytes_on_disk: of an original that is stored in fewer bits than it computes in.
        memory: bytes that make up the peak of a run with a streamed model.
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
    plan_only: bool | None = None
    weights_bytes: dict[str, int] | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: dict[str, Any] | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    recovery_stages: list[dict[str, Any]] | None = None
    quantization: str | None = None
    bytes_on_disk: dict[str, int] | None = None
    memory: dict[str, int] | None = None

    @classmethod
    def of_plan(
        cls, config: Config, objective: str, plan: Plan, sizes: Sizes, model: PreTrainedModel, data: Mapping[str, str]
    ) -> Summary:
        """The summary before anything is measured.

        Args:
            objective: of the training that runs.
            data: sha256 of each split.
        """
        operations: dict[str, dict[str, float]] = {}
        if plan.operations:  # a model without MoE layers can be measured all the same
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
        """The summary of what a run measured.

        Args:
            objective: of the training that ran.
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
        if not plan.operations and config.recovery.objective == "none":  # only measured: there is nothing to compare
            sizes = {"original": sizes["original"]}
        summary = cls.of_plan(config, objective, plan, sizes, model, data)
        summary.stages = stages
        summary.published = published
        summary.ratios = ratios(stages, sizes)
        summary.artifacts = {"plan": "plan.json"} if plan.operations else {}
        return summary

    def count_bytes_on_disk(self, original: StoredWeights, compressed: int) -> None:
        """Let `memory` count bytes on disk, for the original is stored in fewer bits than it computes in.

        Args:
            compressed: bytes of the compressed weights as they are exported.
        """
        self.quantization = original.method
        self.bytes_on_disk = {"original": original.num_bytes, "compressed": compressed}
        self.ratios["memory"] = compressed / original.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {"schema": SCHEMA, **{name: value for name, value in values.items() if value is not None}}


def add_upload(summary: Mapping[str, Any], repository: str) -> dict[str, Any]:
    """The content of summary.json after an upload of the export to the hub."""
    return {**summary, "artifacts": {**summary["artifacts"], "hub": repository}}


def name_of(model: ModelConfig) -> str:
    """What to call a model: the entry's name, or the path that was given in place of the built-in one's."""
    return model.name if model.path is None or model.pretrain is None else model.path


def operation_counts(plan: Plan, num_experts: int) -> dict[str, dict[str, float]]:
    """How many layers each kind of operation changes, and how many experts or which ranks it leaves there.

    Args:
        num_experts: routed experts in a layer of the uncompressed model.

    Returns:
        by kind (`drop_moe` and `drop_layer` apart): layers; retained, of; groups, of; lowest, highest and mean rank.
    """
    counts: dict[str, dict[str, float]] = {}
    layers: dict[str, set[int]] = {}
    ranks: list[int] = []
    num_now: dict[int, int] = {}  # experts by layer, after the operations so far
    for operation in plan.operations:
        name = f"drop_{operation.part}" if isinstance(operation, Drop) else operation.kind
        count = counts.setdefault(name, {"layers": 0})
        layers.setdefault(name, set()).add(operation.layer)
        count["layers"] = len(layers[name])
        before = num_now.get(operation.layer, num_experts)
        after, word = before, ""
        if isinstance(operation, Prune):
            after, word = len(operation.retained), "retained"
        elif isinstance(operation, Condense):
            after, word = len(operation.experts), "retained"
        elif isinstance(operation, Merge):
            after, word = len(operation.groups), "groups"
        elif isinstance(operation, Factorize):
            ranks += [rank for column in operation.ranks.values() for rank in column if rank is not None]
        if word:
            count[word], count["of"] = count.get(word, 0) + after, count.get("of", 0) + before
        num_now[operation.layer] = after
    if ranks:
        counts["factorize"] |= {"lowest": min(ranks), "highest": max(ranks), "mean": sum(ranks) / len(ranks)}
    return counts


def published_beside(
    config: Config, plan: Plan, sizes: Sizes, model: PretrainedConfig, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What was published on this model and setting; None where no paper's mean was measured.

    Args:
        plan: of this run; a folder that was compressed before has one of its own, which comes first.
        model: its config.
        stages: figures of each result stage.
    """
    measured = [name for name in PAPER_TASKS if any(name in stage.get("task_mean", {}) for stage in stages.values())]
    if not measured:
        return None
    history = read_history(config.model)
    earlier = bool(history.operations)
    facts = families.original_facts(model)
    known = beside_published.recognise(
        *(families.family_name(facts.model_type), facts.hidden_size, facts.num_layers, facts.num_experts),
        compressed=earlier,
    )
    setting = beside_published.Setting(None)
    if known is not None:
        operations = operation_counts(Plan("", history.extend(plan.operations, ()).operations), known.num_experts)
        removed = 1 - sizes["compressed"]["routed_experts"] / known.routed_expert_parameters
        setting = beside_published.setting_of(operations, removed)
    evaluation = config.evaluation
    differs = [] if evaluation.limit is None else [f"evaluation.limit={evaluation.limit}"]
    differs += [] if evaluation.num_fewshot == 0 else [f"evaluation.num_fewshot={evaluation.num_fewshot}"]
    return {
        **beside_published.published_rows(known, setting, measured, differs),
        **({"earlier": True} if earlier else {}),
    }


def ratios(stages: Mapping[str, Any], sizes: Sizes) -> dict[str, float]:
    """compressed / original of memory, routed-expert parameters and speed, and the share of the lost loss regained.

    Args:
        stages: figures of each result stage.
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
    if None not in (original_loss, compressed_loss) and compressed_loss != original_loss:
        for name, stage in (("refit_gap_closed", "refitted"), ("gap_closed", "recovered")):
            if "loss" in stages.get(stage, {}):
                values[name] = (compressed_loss - stages[stage]["loss"]) / (compressed_loss - original_loss)
    return values


def environment(model: PreTrainedModel, data: Mapping[str, str]) -> dict[str, Any]:
    """What a result depends on besides its config.

    Args:
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
    """The figure that a sweep compares: a ratio, or the last stage's; a tuple for several. None: not measured."""
    if not isinstance(name, str):
        return tuple(metric(summary, part) for part in name)
    if name in summary["ratios"]:
        return float(summary["ratios"][name])
    for stage in ("recovered", "refitted", "compressed", "original"):
        if name in summary["stages"].get(stage, {}):
            return float(summary["stages"][stage][name])
    return None


def _git_commit() -> str | None:
    """The commit of the checkout that this code lies in; None where it is installed, even below some repository."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    # Hooks of git run with variables that name another repository than the folder's.
    variables = {name: value for name, value in os.environ.items() if name not in GIT_HOOK_VARIABLES}
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
