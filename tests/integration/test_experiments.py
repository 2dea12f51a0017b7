"""Every experiment of conf/experiment runs through the real train.py, with models and texts that take seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.corpus import documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from recondense.config.method_steps import step_entries
from recondense.config.schema import Config, from_dict
from recondense.data import corpora, corpus
from recondense.report.comparison import by_seed
from recondense.run import pipeline, tiny

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ("compare", "pareto")
EXPERIMENTS = sorted({path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} - set(SWEEPS))
SMOKE = (
    "model.pretrain.config.hidden_size=32", "model.pretrain.config.intermediate_size=32",
    "model.pretrain.config.num_hidden_layers=2", "model.pretrain.config.num_attention_heads=2",
    "model.pretrain.config.num_key_value_heads=2", "model.pretrain.config.num_experts=6",
    "model.pretrain.config.num_experts_per_tok=2", "model.pretrain.config.moe_intermediate_size=16",
    "model.pretrain.config.shared_expert_intermediate_size=32", "model.pretrain.vocab_size=300",
    "model.pretrain.steps=6", "model.pretrain.warmup_steps=2", "model.pretrain.sequence_length=32",
    "data.sequence_length=32", "data.calibration.num_samples=4", "data.calibration.max_length=24",
    "recovery.steps=4", "recovery.batch_size=2", "recovery.warmup_steps=1", "recovery.checkpoint_every=2",
    "evaluation.limit=2", "evaluation.perplexity_windows=8", "evaluation.heldout.num_questions=4",
    "evaluation.heldout.num_texts=2",
    "callbacks.profile.repetitions=1", "callbacks.profile.prompt_length=8", "callbacks.profile.new_tokens=2",
    "logger.wandb.mode=disabled", "trainer.progress_bar=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def short_texts(as_one_command: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the texts of the standard library by short ones."""
    few = corpus.Corpora(*(documents()[start::3] for start in range(3)))
    monkeypatch.setattr(corpora, "stdlib_corpora", lambda: few)
    monkeypatch.setattr(tiny, "stdlib_corpora", lambda: few)


def composed(arguments: tuple[str, ...]) -> Config:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        values = OmegaConf.to_container(compose("train", list(arguments)), resolve=True)
    return from_dict(cast(dict[str, Any], values))


def stages_of(config: Config) -> list[str]:
    """The result stages of a run of this config."""
    condenses, trains = bool(step_entries(config.method)), config.recovery.objective != "none"
    has_stage = {
        "original": True,
        "compressed": condenses,
        "recovered": trains,
        "control": trains and condenses and config.recovery.control,
    }
    return [name for name, has_it in has_stage.items() if has_it]


def test_the_demo_has_every_stage() -> None:
    """So that at least one smoke run below covers all of them."""
    assert "demo" in EXPERIMENTS
    assert stages_of(composed(("experiment=demo",))) == ["original", "compressed", "recovered", "control"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(command: Callable[..., tuple[int, str]], tmp_path: Path, name: str) -> None:
    published = composed((f"experiment={name}",))
    assert published.model.pretrain and published.data.source == "stdlib", (
        f"{name}: give SMOKE a small stand-in for its inputs"
    )
    arguments = (f"experiment={name}", *SMOKE, f"output_dir={tmp_path}/out")
    config = composed(arguments)
    code, err = command(*arguments)
    assert code == 0, err
    folder = config.run_folder()
    assert folder.is_relative_to(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())

    stages = summary["stages"]
    assert list(stages) == stages_of(published)
    for stage, figures in stages.items():
        assert figures["loss"] > 0, stage
        assert set(figures["tasks"]) == set(config.evaluation.tasks or ()), stage
    for stage in {"original", "compressed"} & set(stages):
        assert stages[stage]["profile"]["weights_bytes"] > 0
        assert stages[stage]["profile"]["decode_tokens_per_second"] > 0
    if "compressed" in stages:
        assert stages["compressed"]["kl_to_original"] > 0
        ratios = summary["ratios"]
        assert set(ratios) >= {"routed_expert_parameters", "memory", "prefill_speedup", "decode_speedup"}
        assert 0 < ratios["routed_expert_parameters"] < 1 and 0 < ratios["memory"] < 1
        assert ("gap_closed" in ratios) == ("recovered" in stages)
        for file in ("plan.json", "plan.png"):
            assert (folder / file).stat().st_size > 0
    assert summary["artifacts"]["export_format"] == "stock"

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert type(model).__module__.startswith("transformers.")
    assert model.num_parameters() == summary["parameters"]["total"]["compressed"]
    with torch.no_grad():
        logits = model(**tokenizer("def run(self):", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    assert not [path for path in folder.parent.rglob("*.partial")]


def test_the_comparison(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Without -m, because the experiment defines the sweep: a method and the control, two budgets, two seeds."""
    small = [setting for setting in SMOKE if "num_texts" not in setting and "moe_intermediate" not in setting]
    # Routed experts have most of the parameters, so that both budgets can be met.
    small.append("model.pretrain.config.moe_intermediate_size=96")
    sweep = ["hydra.sweeper.params.method='none,random'", "hydra.sweeper.params.seed='0,1'"]
    arguments = ("experiment=compare", *small, *sweep, "method.refit=true", f"output_dir={tmp_path}/out")
    code, err = command(*arguments)
    assert code == 0, err
    (folder,) = (tmp_path / "out" / "compare" / "sweeps").iterdir()
    rows = json.loads((folder / "comparison.json").read_text())
    assert len(rows) == 8 and all(row["status"] == "done" for row in rows)
    # The control is one row for both budgets.
    entries = [entry for entry in by_seed(rows) if entry["method"] != "none"]
    assert [entry["count"] for entry in entries] == [2] * 2
    for entry in entries:
        perplexities = [
            row["recovered_perplexity"] for row in rows if row["settings"].items() >= entry["settings"].items()
        ]
        mean = sum(perplexities) / 2
        assert entry["recovered_perplexity"][0] == pytest.approx(mean)
        assert entry["recovered_perplexity"][1] == pytest.approx(((perplexities[0] - mean) ** 2 * 2) ** 0.5)
        assert entry["memory_ratio"][0] <= float(entry["settings"]["method.memory_ratio"])
        assert "refit_gap_closed" in entry
    budgets = [entry["settings"]["method.memory_ratio"] for entry in entries]
    assert budgets == sorted(budgets, reverse=True)
    control = next(entry for entry in by_seed(rows) if entry["method"] == "none")
    assert control["memory_ratio"] == (1.0, 0.0)
    for row in rows:
        summary = json.loads((Path(row["run_folder"]) / "summary.json").read_text())
        assert summary["recovery"] == "distill"
        assert summary["objective"] == ("distill" if summary["operations"] else "finetune")
        refitted = {int(layer): error for layer, error in summary.get("refit", {}).items()}
        assert set(refitted) == ({0, 1} if summary["operations"] else set())
        assert all(0 < error["error_after"] <= error["error_before"] for error in refitted.values())
        assert ("refitted_heldout_next_line" in row) == bool(refitted)
    table = (folder / "comparison.md").read_text()
    assert (
        "±" in table
        and re.search(r"next line [01]\.", table)
        and "refit closes" in table
        and (folder / "comparison.png").stat().st_size > 0
    )


def test_the_comparison_has_all_methods() -> None:
    """Except cdmoe_s, which is cdmoe without routed experts."""
    sweep = OmegaConf.load(ROOT / "conf" / "experiment" / "compare.yaml").hydra.sweeper.params
    compared = sweep.method.split(",")
    assert len(compared) == len(set(compared))
    assert {*compared, "cdmoe_s"} == {path.stem for path in (ROOT / "conf" / "method").glob("[!_]*.yaml")}


def test_what_an_experiment_sweeps_is_checked_before_it_runs(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    arguments = ("experiment=compare", "hydra.sweeper.params.method='cdmoe,reapp'", f"output_dir={tmp_path}/out")
    code, err = command(*arguments)
    assert code == 2 and "reapp" in err and "reap" in err


def test_the_command_line_wins_over_what_an_experiment_sweeps(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr(pipeline, "run", lambda config, steps, *rest: configs.append(config) or 1.0)
    for multirun in ((), ("-m",)):
        configs.clear()
        arguments = (*multirun, "experiment=compare", "method=none,reap", "method.memory_ratio=0.7,0.6", "seed=5")
        code, err = command(*arguments, f"output_dir={tmp_path}/out")
        assert code == 0, err
        assert [(config.method["name"], config.method["memory_ratio"], config.seed) for config in configs] == [
            *(("none", 0.7, 5), ("none", 0.6, 5), ("reap", 0.7, 5), ("reap", 0.6, 5))
        ]
        assert len({config.run_folder() for config in configs}) == 3, "the control is one run for all budgets"
        assert all(config.method["refit"] for config in configs)
