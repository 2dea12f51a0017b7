"""The recipes of the papers: their names and models, and the settings with which tiny models run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recondense.config.schema import Config, from_dict
from recondense.models.published_configs import recorded_values
from support.runs import paper_tasks

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conf" / "experiment" / "paper"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))

DEEPSEEK, QWEN = "deepseek-ai/deepseek-moe-16b-base", "Qwen/Qwen1.5-MoE-A2.7B"
NUMBERS: dict[str, dict[str, Any]] = {
    "cdmoe_deepseek_e6": {"model.path": DEEPSEEK, "method.num_experts": 6, "method.num_layers": 9},
    "cdmoe_deepseek_e0": {"model.path": DEEPSEEK, "method.num_experts": 0, "method.num_layers": 8},
    "cdmoe_qwen_e4": {"model.path": QWEN, "method.num_experts": 4, "method.num_layers": 9},
    "cdmoe_qwen_e0": {"model.path": QWEN, "method.num_experts": 0, "method.num_layers": 6},
    "cdmoe_qwen_e0_nine": {"model.path": QWEN, "method.num_experts": 0, "method.num_layers": 9},
    "moei2_qwen": {"model.path": QWEN, "method.average_rank": 512, "method.search": "genetic"},
    "moei2_deepseek_v2_lite": {
        "model.path": "deepseek-ai/DeepSeek-V2-Lite", "method.average_rank": 512, "method.search": "genetic",
    },
    "moei2_mixtral": {
        "model.path": "mistralai/Mixtral-8x7B-v0.1", "method.average_rank": 2048, "method.search": "exact",
    },
}  # fmt: skip
FAMILY = {name: str(recorded_values(NUMBERS[name]["model.path"])["model_type"]) for name in RECIPES}
BY_HAND = {"cdmoe_deepseek_e6", "moei2_mixtral"}  # run without the hub, as their comments say; others on cloned sets

# A byte is a token here, so Alpaca's prompt alone has about 150 tokens.
SMALL = (
    "data.calibration.num_samples=8", "data.calibration.max_length=24", "data.validation.num_texts=4",
    "evaluation.perplexity_windows=8", "callbacks.profile.repetitions=1", "callbacks.profile.prompt_length=8",
    "callbacks.profile.new_tokens=2", "logger.wandb.mode=disabled", "trainer.progress_bar=false",
)  # fmt: skip
SMALL_OF = {
    "cdmoe": (
        "method.num_layers=2", "data.sequence_length=32", "recovery.stages.0.sequence_length=32",
        "recovery.stages.0.steps=2", "recovery.stages.1.sequence_length=320", "recovery.stages.1.batch_size=4",
    ),
    "moei2": (
        "method.population=6", "method.iterations=3", "method.parents=3", "method.average_rank=5",
        "data.sequence_length=32", "recovery.stages.0.sequence_length=320", "recovery.batch_size=2",
        "recovery.accumulate_grad_batches=2", "recovery.warmup_steps=1",
    ),
}  # fmt: skip


def composed(name: str, *overrides: str) -> Config:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        values = OmegaConf.to_container(compose("train", [f"experiment=paper/{name}", *overrides]), resolve=True)
    return from_dict(cast(dict[str, Any], values))


def paper_of(name: str) -> str:
    return name.partition("_")[0]


def without_the_hub(name: str, base: Path, model: Path) -> list[str]:
    """The settings in the comment of the recipe's base file, with local files."""
    text = (FOLDER / f"_{paper_of(name)}.yaml").read_text()
    block = re.search(r"^# Without the hub.*?(?=^# evaluation=)", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    words = [word for word in block.group().split() if re.fullmatch(r"[\w.]+=\S+", word)]
    assert words[0].startswith("experiment=paper/") and words[1].startswith("model.path=")
    paths = [re.sub(r"=([\w-]+\.jsonl?)$", rf"={base}/\1", word) for word in words[2:]]
    heldout = ("limit=2", "heldout.num_questions=4", "heldout.num_texts=2")
    return [f"model.path={model}", *paths, *(f"evaluation.{setting}" for setting in heldout)]


def on_cloned_sets(name: str, base: Path, model: Path) -> list[str]:
    """The settings for data sets of the hub as folders, and for tasks with the names of the paper's."""
    hub, tasks = base / "hub", base / f"{paper_of(name)}-tasks"
    if not tasks.exists():
        paper_tasks(tasks, paper_of(name))
    stage = {"cdmoe": "stages.1.data.dataset={}/commonsense_170k", "moei2": "stages.0.data.dataset={}/alpaca"}
    sources = (f"data.calibration.sources.{index}.dataset={hub / name}" for index, name in enumerate(("c4", "alpaca")))
    return [
        f"model.path={model}", f"data.dataset={hub / 'c4'}", f"recovery.{stage[paper_of(name)].format(hub)}",
        f"evaluation.include_path={tasks}", *(sources if paper_of(name) == "moei2" else ()),
    ]  # fmt: skip
