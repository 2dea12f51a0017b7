"""The settings of a run: dataclasses made from plain containers, with all wrong values reported together.

Hydra's containers do not come here: train.py turns them into dicts, and `from_dict` turns those into a `Config`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from recondense.config.reader import read_dataclass
from recondense.config.steps import step_entries
from recondense.errors import ConfigError, UserError

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Entry = typing.TypeVar("Entry", bound="DataclassInstance")
Form = Literal["auto", "alpaca", "chat", "commonsense"]  # of records; see instructions.py
# What a run returns to a sweep: a figure of its last stage, or a ratio of summary.json.
Metric = Literal[
    "perplexity", "loss", "kl_to_original", "gap_closed", "memory", "routed_expert_parameters", "prefill_speedup",
    "decode_speedup",
]  # fmt: skip
Free = Mapping[str, Any]  # a mapping whose keys belong to somebody else: a method's settings, a model's config
BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What cannot change a result has no part in a run's hash.
NOT_IDENTITY = (
    *("experiment_name", "output_dir", "cache_dir", "run_dir", "overwrite", "plan_only", "max_scratch_bytes", "metric"),
)
OF_PROCESSES = ("progress_bar", "strategy", "devices", "num_nodes", "timeout_hours")  # of the trainer
# Settings that are younger than the first runs: where they ask for nothing, they have no part in it either.
YOUNGER: dict[str, dict[str, Any]] = {
    "recovery": {
        "epochs": None, "stages": None, "divergence": "forward_kl", "teacher": "shared", "teacher_top_k": 64,
        "teacher_path": None, "teacher_revision": None, "activation_checkpointing": False,
        "fused_optimizer": True,
    },
    "trainer": {"compile": False},
    "data": {"form": None, "packing": True},
    "data.calibration": {"sources": None, "tape": "auto", "tape_dtype": "auto"},
    "model": {"streaming": False},
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    name: str = "tiny_moe"
    path: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    trust_remote_code: bool = False
    streaming: bool = False
    pretrain: Free | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources that a calibration set is mixed from: a local file, or a split of a hub dataset."""

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    weight: float = 1.0
    text_field: str = "text"
    form: Form | None = None


@dataclass(frozen=True)
class CalibrationConfig:
    path: str | None = None
    num_samples: int = 100
    max_length: int = 256
    tape: Literal["auto", "memory", "disk"] = "auto"
    tape_dtype: Literal["auto", "bfloat16"] = "auto"
    sources: tuple[SourceConfig, ...] | None = None


@dataclass(frozen=True)
class SplitConfig:
    path: str | None = None
    num_texts: int | None = None


@dataclass(frozen=True)
class SplitNames:
    """What a hub dataset calls its splits; null: there is none."""

    train: str | None = None
    validation: str | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class DataConfig:
    name: str = "stdlib"
    source: Literal["stdlib", "texts", "hub"] = "stdlib"
    sequence_length: int = 256
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    train: SplitConfig = field(default_factory=SplitConfig)
    validation: SplitConfig = field(default_factory=SplitConfig)
    text_field: str = "text"
    form: Form | None = None
    packing: bool = True
    dataset: str | None = None
    subset: str | None = None
    splits: SplitNames = field(default_factory=SplitNames)
    streaming: bool = False


@dataclass(frozen=True)
class LoraSettings:
    """What recovery.trainable=lora trains."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target: Literal["attention", "experts", "both"] = "both"


@dataclass(frozen=True)
class RecoveryConfig:
    name: str = "none"
    objective: Literal["none", "finetune", "distill"] = "none"
    steps: int = 1250
    epochs: float | None = None
    batch_size: int = 8
    accumulate_grad_batches: int = 1
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    trainable: Literal["experts", "all", "lora"] = "experts"
    lora: LoraSettings = field(default_factory=LoraSettings)
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    temperature: float = 1.0
    teacher: Literal["shared", "cached", "model"] = "shared"
    teacher_top_k: int = 64
    teacher_path: str | None = None
    teacher_revision: str | None = None
    cross_entropy_share: float = 0.0
    hidden_share: float = 0.0
    checkpoint_every: int = 50
    validate_every: int = 0
    control: bool = False
    activation_checkpointing: bool = False
    fused_optimizer: bool = True
    stages: tuple[Free, ...] | None = None

    @property
    def needs_experts(self) -> bool:
        """Whether nothing would train in a model that has no experts left."""
        return self.trainable == "experts" or (self.trainable, self.lora.target) == ("lora", "experts")


@dataclass(frozen=True)
class HeldoutConfig:
    num_choices: int = 4
    num_questions: int = 200
    num_texts: int = 20


@dataclass(frozen=True)
class EvaluationConfig:
    name: str = "none"
    tasks: tuple[str, ...] | None = None
    limit: int | None = None
    num_fewshot: int | None = 0
    batch_size: int = 8
    every_n_steps: int = 0
    at_end: bool = True
    include_path: str | None = None
    heldout: HeldoutConfig | None = None
    perplexity_windows: int | None = None


@dataclass(frozen=True)
class ProfileConfig:
    enabled: bool = True
    batch_size: int = 1
    prompt_length: int = 256
    new_tokens: int = 32
    repetitions: int = 5


@dataclass(frozen=True)
class CallbacksConfig:
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass(frozen=True)
class TrainerConfig:
    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"] = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    timeout_hours: float = 12.0
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    num_threads: int | None = None
    deterministic: bool = False
    compile: bool = False
    progress_bar: bool = True

    @property
    def shards(self) -> bool:
        """Whether each process holds a part of the weights, so that a forward pass needs all of them."""
        return self.strategy == "fsdp2" or self.strategy.startswith("deepspeed_zero3")

    @property
    def deepspeed(self) -> bool:
        return self.strategy.startswith("deepspeed")


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "recondense"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoggerConfig:
    csv: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class ExportConfig:
    enabled: bool | str = "auto"
    format: Literal["auto", "stock", "bundled", "dense"] = "auto"
    max_padding: float = 0.05
    max_shard_size: str | int = "5GB"
    push_to_hub: str | None = None
    private: bool = True


@dataclass(frozen=True)
class Config:
    """One run, resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Free = field(default_factory=lambda: {"name": "none", "steps": []})
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    experiment_name: str = "default"
    seed: int = 0
    output_dir: str = "outputs"
    cache_dir: str = "outputs/cache"
    run_dir: str | None = None
    overwrite: bool = False
    plan_only: bool = False
    max_scratch_bytes: int | str = "auto"
    metric: Metric | tuple[Metric, ...] = "perplexity"

    def resolved(self) -> dict[str, Any]:
        """The whole config as plain JSON values."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(asdict(self))))

    def identity(self) -> dict[str, Any]:
        """The part of the config that a result depends on."""
        found = {key: value for key, value in self.resolved().items() if key not in (*NOT_IDENTITY, "logger")}
        for name in OF_PROCESSES:
            del found["trainer"][name]
        for where, settings in YOUNGER.items():
            group = functools.reduce(operator.getitem, where.split("."), found)
            for name in [name for name, absent in settings.items() if group[name] == absent]:
                del group[name]
        if not step_entries(self.method):  # a budget, or any other setting, means nothing to no step
            found["method"] = {"name": self.method.get("name", "none"), "steps": []}
        return found

    def run_hash(self) -> str:
        """Eight hexadecimal digits that name the run: equal for configs that can only give equal results."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run_folder(self) -> Path:
        """`run_dir`, or `<output_dir>/<experiment_name>/<hash>`; of plan_only one beside it, for it holds no run."""
        folder = Path(self.run_dir) if self.run_dir else Path(self.output_dir, self.experiment_name, self.run_hash())
        return Path(f"{folder}-plan_only") if self.plan_only else folder

    def to_yaml(self) -> str:
        """What a run's folder keeps as config.yaml; `from_dict` reads it back."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def scratch_bytes(self) -> int | None:
        """Bytes that the search may take for itself; None: it decides.

        Raises:
            UserError: a text that is no number of bytes.
        """
        return None if self.max_scratch_bytes == "auto" else parse_bytes(self.max_scratch_bytes)


def parse_bytes(text: int | str) -> int:
    """Bytes in 1048576, "512MiB" or "2 GB".

    Raises:
        UserError: neither a number nor a number with a unit.
    """
    number = str(text).strip().rstrip("BKMGibkmg").strip()
    unit = str(text).strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * BYTE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{text!r} is not a number of bytes: write 536870912, 512MiB or 2GB") from None


def from_dict(values: Free) -> Config:
    """A config from plain containers.

    Raises:
        ConfigError: unknown keys and values of a wrong type, all of them.
    """
    config, messages = read(values)
    if messages:
        raise ConfigError(messages)
    return config


def read(values: Free) -> tuple[Config, list[str]]:
    """A config and what is wrong with it; a wrong value is replaced by its default, so that checking can go on.

    `~` in a path becomes the home folder here, once for all that use it.
    """
    messages: list[str] = []
    config = typing.cast(Config, read_dataclass(Config, values, "", messages))
    config = replace(
        _expand_home(config, "output_dir", "cache_dir", "run_dir"),
        model=_expand_home(config.model, "path", "tokenizer"),
        recovery=_expand_home(config.recovery, "teacher_path"),
        evaluation=_expand_home(config.evaluation, "include_path"),
        data=expand_homes(config.data),
    )
    return config, messages


def expand_homes(data: DataConfig) -> DataConfig:
    """The same with `~` expanded wherever a path stands."""
    sources = data.calibration.sources
    if sources is not None:
        sources = tuple(_expand_home(source, "path", "dataset") for source in sources)
    return replace(
        _expand_home(data, "dataset"),
        calibration=replace(_expand_home(data.calibration, "path"), sources=sources),
        train=_expand_home(data.train, "path"),
        validation=_expand_home(data.validation, "path"),
    )


def _expand_home(entry: Entry, *names: str) -> Entry:
    """The entry with `~` expanded in some of its texts, which may be None."""
    paths = {name: getattr(entry, name) for name in names}
    return replace(entry, **{name: path and os.path.expanduser(path) for name, path in paths.items()})


def differences(one: Free, other: Free, path: str = "") -> list[str]:
    """Dotted names of the settings in which two resolved configs differ."""
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        mine, theirs = one.get(key), other.get(key)
        where = f"{path}.{key}" if path else str(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += differences(mine, theirs, where)
        elif mine != theirs:
            found.append(where)
    return found


WORK = "work"  # what a run keeps on disk while it works
