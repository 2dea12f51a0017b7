"""The settings of a run: frozen dataclasses with the type and the range of every setting.

The constructors reject invalid values. `read` builds a Config from plain containers and reports all problems together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from recondense.config.logger import LoggerConfig
from recondense.config.method_steps import method_identity, step_entries
from recondense.config.problems import Problem, render
from recondense.config.run_identity import LATER, NO_RESULT, identity_of
from recondense.config.types import (
    BelowOne,
    Bytes,
    Count,
    Device,
    Devices,
    FromZero,
    LocalPath,
    NotNegative,
    Number,
    Part,
    Positive,
    Repository,
    ScratchBytes,
    Seed,
    Shares,
    Switch,
    Trainable,
    Whole,
    ends_of,
)
from recondense.config.validation import validated
from recondense.errors import ConfigError

WORK = "work"  # the subfolder for a run's temporary files
FORBID = ConfigDict(extra="forbid")
GENERAL = "general"  # the choice of model= for families without a file of their own
Free = Mapping[str, Any]  # a mapping whose keys are not known here: a method's settings, a model's config
Form = Literal["auto", "alpaca", "chat", "commonsense"]  # of records
Figure = Literal["perplexity", "loss", "kl_to_original", "gap_closed"]
Ratio = Literal["memory", "routed_expert_parameters", "prefill_speedup", "decode_speedup"]
Metric = Literal[Figure, Ratio]
Divergence = Literal["forward_kl", "reverse_kl", "js"]  # of the distillation; computed in recovery/losses.py
Strategy = Literal["auto", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"]


@dataclass(frozen=True, config=FORBID)
class ModelConfig:
    """The model that a run compresses."""

    name: str = "tiny_moe"
    path: LocalPath | None = None
    revision: str | None = None
    tokenizer: LocalPath | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Device = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    trust_remote_code: Switch = False
    streaming: Switch = False
    budgets: Free = field(default_factory=dict, metadata=NO_RESULT)  # the method has what the run uses of them
    pretrain: Free | None = None


@dataclass(frozen=True, config=FORBID)
class SourceConfig:
    """One of the sources that are mixed into a calibration set: a local file, or a split of a hub dataset."""

    path: LocalPath | None = None
    dataset: LocalPath | None = None
    subset: str | None = None
    split: str = "train"
    streaming: Switch = False
    weight: Annotated[Number, Field(gt=0, description="remove the source instead")] = 1.0
    text_field: str = "text"
    form: Form | None = None


@dataclass(frozen=True, config=FORBID)
class CalibrationConfig:
    """The calibration texts of a search."""

    path: LocalPath | None = None
    num_samples: Count = 100
    max_length: Count = 256
    tape: Literal["auto", "memory", "disk"] = "auto"
    tape_dtype: Literal["auto", "bfloat16"] = "auto"
    sources: tuple[SourceConfig, ...] | None = None


@dataclass(frozen=True, config=FORBID)
class SplitConfig:
    """The local file of a split, and how many of its documents are used."""

    path: LocalPath | None = None
    num_texts: Count | None = None


@dataclass(frozen=True, config=FORBID)
class SplitNames:
    """The names of a hub dataset's splits; None if there is no such split."""

    train: str | None = None
    validation: str | None = None
    calibration: str | None = None


@dataclass(frozen=True, config=FORBID)
class DataConfig:
    """The texts of a run."""

    name: str = "stdlib"
    source: Literal["stdlib", "texts", "hub"] = "stdlib"
    sequence_length: Annotated[Whole, Field(ge=2)] = 256
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    train: SplitConfig = field(default_factory=SplitConfig)
    validation: SplitConfig = field(default_factory=SplitConfig)
    text_field: str = "text"
    form: Form | None = None
    packing: Switch = True
    bos: Switch | None = None
    answer_only: Switch = True
    dataset: LocalPath | None = None
    subset: str | None = None
    splits: SplitNames = field(default_factory=SplitNames)
    streaming: Switch = False


@dataclass(frozen=True, config=FORBID)
class LoraSettings:
    """The adapters that recovery.trainable=lora trains."""

    rank: Count = 8
    alpha: Annotated[Whole, Field(gt=0, description="the adapters' output is scaled by alpha / rank")] = 16
    dropout: BelowOne = 0.0
    target: Literal["attention", "experts", "both"] = "both"


@dataclass(frozen=True, config=FORBID)
class RecoveryConfig:
    """How the compressed model is trained."""

    name: str = "none"
    objective: Literal["none", "finetune", "distill", "local"] = "none"
    steps: Count = 1250
    epochs: Annotated[Number, Field(gt=0, description="null trains for a number of steps")] | None = None
    batch_size: Count = 8
    accumulate_grad_batches: Count = 1
    learning_rate: Positive = 1e-5
    weight_decay: NotNegative = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    gradient_clip: NotNegative = 1.0
    warmup_steps: FromZero = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    trainable: Trainable = "experts"
    router_layers: Literal["changed", "all"] = field(default="changed", metadata=LATER)
    lora: LoraSettings = field(default_factory=LoraSettings)
    divergence: Divergence = "forward_kl"
    temperature: Annotated[Number, Field(gt=0, description="1.0 does not change the distributions")] = 1.0
    teacher: Literal["shared", "cached", "model"] = "shared"
    teacher_top_k: Count = 64
    teacher_path: LocalPath | None = None
    teacher_revision: str | None = None
    cross_entropy_share: Shares = 0.0
    hidden_share: Shares = 0.0
    fold_coefficients: Switch = field(default=False, metadata=LATER)
    local_inputs: Literal["student", "original"] = field(default="student", metadata=LATER)
    checkpoint_every: Count = 50
    validate_every: FromZero = 0
    control: Switch = False
    activation_checkpointing: Switch = False
    fused_optimizer: Switch = True
    stages: tuple[Free, ...] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the model that are trained, from `trainable`, which may be one word."""
        return (self.trainable,) if isinstance(self.trainable, str) else self.trainable

    @property
    def compares_states(self) -> bool:
        """Whether the loss contains hidden states in some step."""
        return any(ends_of(self.hidden_share))


@dataclass(frozen=True, config=FORBID)
class HeldoutConfig:
    """Questions made from the validation text."""

    num_choices: Annotated[Whole, Field(ge=2)] = 4
    num_questions: Count = 200
    num_texts: Count = 20


@dataclass(frozen=True, config=FORBID)
class EvaluationConfig:
    """What is measured at each result stage."""

    name: str = "none"
    tasks: tuple[str, ...] | None = None
    limit: Count | None = None
    num_fewshot: FromZero | None = 0
    batch_size: Count = 8
    every_n_steps: FromZero | Literal["auto"] = field(default="auto", metadata=NO_RESULT)
    periodic_limit: Count | None = field(default=100, metadata=NO_RESULT)
    at_end: Switch = True
    include_path: LocalPath | None = None
    heldout: HeldoutConfig | None = None
    perplexity_windows: FromZero | None = 0

    @property
    def reads_validation(self) -> bool:
        """Whether the validation text is needed: for perplexity, or for tasks, which may be made from it."""
        return self.perplexity_windows != 0 or bool(self.tasks)


@dataclass(frozen=True, config=FORBID)
class ProfileConfig:
    """The measurement of memory and speed."""

    enabled: Switch = True
    batch_size: Count = 1
    prompt_length: Count = 256
    new_tokens: Count = 32
    repetitions: Count = 5


@dataclass(frozen=True, config=FORBID)
class CallbacksConfig:
    """The settings of the callbacks."""

    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass(frozen=True, config=FORBID)
class TrainerConfig:
    """The processes of a run, and how they train together."""

    strategy: Strategy = field(default="auto", metadata=NO_RESULT)
    devices: Devices = field(default=1, metadata=NO_RESULT)
    num_nodes: Count = field(default=1, metadata=NO_RESULT)
    timeout_hours: Annotated[Number, Field(ge=0.1)] = field(default=12.0, metadata=NO_RESULT)
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    num_threads: Count | None = None
    deterministic: Switch = False
    compile: Switch = False
    progress_bar: Switch = field(default=True, metadata=NO_RESULT)

    @property
    def shards(self) -> bool:
        """Whether each process holds only a part of the weights, so that a forward pass needs all processes."""
        return self.strategy == "fsdp2" or self.strategy.startswith("deepspeed_zero3")

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed is used for training."""
        return self.strategy.startswith("deepspeed")


@dataclass(frozen=True, config=FORBID)
class ExportConfig:
    """The exported Hugging Face folder. With enabled="auto", it is written if the run changed the model."""

    enabled: Switch | Literal["auto"] = "auto"
    format: Literal["auto", "stock", "bundled", "dense"] = "auto"
    max_padding: Annotated[Number, Field(ge=0, le=1, description="it is a fraction of the parameters")] = 0.05
    max_shard_size: Bytes = 5 * 10**9
    verify: Literal["auto", "shapes", "logits"] = field(default="auto", metadata=NO_RESULT)
    push_to_hub: Repository | None = None
    private: Switch = True


@dataclass(frozen=True, config=FORBID)
class Config:
    """All settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Free = field(default_factory=lambda: {"name": "none", "steps": []})
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig, metadata=NO_RESULT)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    experiment_name: str = field(default="default", metadata=NO_RESULT)
    seed: Seed = 0
    output_dir: LocalPath = field(default="outputs", metadata=NO_RESULT)
    cache_dir: LocalPath = field(default="outputs/cache", metadata=NO_RESULT)
    run_dir: LocalPath | None = field(default=None, metadata=NO_RESULT)
    overwrite: Switch = field(default=False, metadata=NO_RESULT)
    plan_only: Switch = field(default=False, metadata=NO_RESULT)
    max_scratch_bytes: Literal["auto"] | ScratchBytes = field(default="auto", metadata=NO_RESULT)
    metric: Metric | tuple[Metric, ...] = field(default="perplexity", metadata=NO_RESULT)

    def resolved(self) -> dict[str, Any]:
        """Return all settings as plain JSON values."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))

    def identity(self) -> dict[str, Any]:
        """Return the settings that a result depends on, as plain JSON values."""
        settings: dict[str, Any] = json.loads(json.dumps(identity_of(self)))
        if not step_entries(self.method):  # without a step, no other setting of the method has an effect
            settings["method"] = {"name": self.method.get("name", "none"), "steps": []}
        settings["method"] = method_identity(settings["method"])
        return settings

    def run_hash(self) -> str:
        """Return eight hexadecimal digits that name the run; configs that must give equal results have equal hashes."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run_folder(self) -> Path:
        """Return `run_dir` or `<output_dir>/<experiment_name>/<hash>`; with plan_only its name ends in -plan_only."""
        folder = Path(self.run_dir) if self.run_dir else Path(self.output_dir, self.experiment_name, self.run_hash())
        return Path(f"{folder}-plan_only") if self.plan_only else folder

    def to_yaml(self) -> str:
        """Return the text of config.yaml in a run's folder; `from_dict` reads it back."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def read(values: Free) -> tuple[Config, list[Problem]]:
    """Return a config and its problems. Invalid values are replaced by defaults, so that the rest can be checked."""
    return validated(Config, values)


def from_dict(values: Free) -> Config:
    """Return a config from plain containers.

    Raises:
        ConfigError: there are unknown names, or values of a wrong type or out of range; it reports all of them.
    """
    config, problems = read(values)
    if problems:
        raise ConfigError(render(problems))
    return config
