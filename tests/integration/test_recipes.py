"""The recipes of the papers compose, have the papers' numbers, and run to their export on tiny models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.checks import run_messages
from support.runs import model_folder, one_command, paper_sets, paper_tasks
from support.small import beginning_with
from support.tiny_models import EVERY

from recondense.config.schema import Config, ModelConfig, from_dict
from recondense.config.stages import require_stages
from recondense.data.labels import MASKED
from recondense.data.texts import Texts, Tokenizing
from recondense.models import checkpoint_checks, loading
from recondense.models.config_checks import Checkpoint
from recondense.models.published_configs import recorded_config, recorded_values
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.report.published import PAPER_TASKS
from recondense.run.build_steps import build_steps

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conf" / "experiment" / "paper"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))

# ------------------------------------------------------------------------------------------------- the papers' numbers

CDMOE: dict[str, Any] = {
    "data.source": "hub", "data.dataset": "allenai/c4", "data.subset": "en", "data.calibration.num_samples": 100,
    "data.calibration.max_length": 256, "data.calibration.sources": None, "data.train.num_texts": 10_000,
    "data.bos": True, "method.shared_gate": "mean", "method.expert_search": "greedy", "method.refit": False,
    "method.coefficient_max_length": None,
    "recovery.objective": "finetune", "evaluation.num_fewshot": 0, "evaluation.limit": None,
}  # fmt: skip
MOEI2: dict[str, Any] = {
    "data.bos": True, "method.importance": "layer_output", "method.normalize": False,
    "data.calibration.num_samples": 2048, "data.calibration.sources.0.dataset": "allenai/c4",
    "data.calibration.sources.1.dataset": "tatsu-lab/alpaca", "data.calibration.sources.0.weight": 1.0,
    "data.calibration.sources.1.weight": 1.0, "method.prune_ratio": 0.25, "method.population": 100,
    "method.iterations": 50, "method.num_candidates": 3, "method.block_size": 3, "method.alpha": 0.15,
    "method.rank_multiple": 1, "method.whitening": False, "method.ratio": None, "method.memory_ratio": None,
    "method.removed_expert_ratio": None, "method.refit": False, "evaluation.num_fewshot": 0, "evaluation.limit": None,
}  # fmt: skip
# By recovery stage. MoE-I² has the data and epochs of LLM-Pruner, and so its other settings: batches of 64, rank 8.
LM = {
    "objective": "finetune", "trainable": "experts", "steps": 1250, "epochs": None, "batch_size": 8,
    "accumulate_grad_batches": 1, "learning_rate": 1e-5, "schedule": "linear", "warmup_steps": 0, "gradient_clip": 1.0,
    "weight_decay": 0.01, "betas": (0.9, 0.999),
}  # fmt: skip
SFT = {**LM, "epochs": 1, "batch_size": 16, "learning_rate": 5e-5}
LORA = {
    **LM, "trainable": "lora", "epochs": 2, "accumulate_grad_batches": 8, "learning_rate": 1e-4, "warmup_steps": 100,
    "weight_decay": 0.0, "betas": (0.9, 0.95),
}  # fmt: skip
ALONE, PROMPTS = {"packing": False, "bos": True}, {"answer_only": False}
STAGES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "cdmoe": [
        (LM, {"dataset": "allenai/c4", "sequence_length": 256, "form": None, **ALONE}),
        (SFT, {"dataset": "zwhe99/commonsense_170k", "sequence_length": 128, "form": "alpaca", **ALONE, **PROMPTS}),
    ],
    "moei2": [(LORA, {"dataset": "tatsu-lab/alpaca", "sequence_length": 256, "form": "alpaca", **ALONE})],
}
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
# Ratio of the model's memory (CD-MoE) or of the routed experts' parameters (MoE-I²), and the row that is printed.
SIZES: dict[str, tuple[str, float, str | None]] = {
    "cdmoe_deepseek_e6": ("memory", 0.7242, "cdmoe: shared+6, 9 layers 0.7242 0.725 55.5"),
    "cdmoe_deepseek_e0": ("memory", 0.7295, "cdmoe: shared+0, 8 layers 0.7295 0.731 55.1"),
    "cdmoe_qwen_e4": ("memory", 0.6954, "cdmoe: shared+4, 9 layers 0.6954 0.697 60.2"),
    "cdmoe_qwen_e0": ("memory", 0.7824, "cdmoe: shared+0, 6 layers 0.7824 0.783 62.6"),
    "cdmoe_qwen_e0_nine": ("memory", 0.6736, "cdmoe: shared+0, 9 layers 0.6736 0.675 60.1"),
    "moei2_qwen": ("routed_expert_parameters", 1 - 0.5398, None),  # the paper has no row of this model
    "moei2_deepseek_v2_lite": ("routed_expert_parameters", 1 - 0.5398, "53.98% 53.98% 14.78 15.03 59.62"),
    "moei2_mixtral": ("routed_expert_parameters", 1 - 0.5179, "51.79% 50.00% 43.49"),
}


@pytest.fixture(autouse=True)
def as_one_command() -> Iterator[None]:
    with one_command():
        yield


def composed(name: str, *overrides: str) -> Config:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        values = OmegaConf.to_container(compose("train", [f"experiment=paper/{name}", *overrides]), resolve=True)
    return from_dict(cast(dict[str, Any], values))


def paper_of(name: str) -> str:
    return name.partition("_")[0]


def setting(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def test_every_published_result_has_a_recipe() -> None:
    assert set(RECIPES) == set(NUMBERS) == set(SIZES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_papers_numbers(name: str) -> None:
    config = composed(name)
    values = config.resolved()
    expected = {**{"cdmoe": CDMOE, "moei2": MOEI2}[paper_of(name)], **NUMBERS[name], "experiment_name": name}
    assert {key: setting(values, key) for key in expected} == expected
    assert config.evaluation.tasks == PAPER_TASKS[paper_of(name)]
    stages = require_stages(config)
    for stage, (recovery, data) in zip(stages, STAGES[paper_of(name)], strict=True):
        assert {key: getattr(stage.recovery, key) for key in recovery} == recovery
        assert {key: getattr(stage.data, key) for key in data} == data
    if paper_of(name) == "moei2":
        [stage] = stages
        assert stage.recovery.batch_size * stage.recovery.accumulate_grad_batches == 64
        assert stage.data.splits.train == "train[-50000:]"


def test_mmlu_in_the_second_stage() -> None:
    first, second = require_stages(composed("cdmoe_deepseek_e6", "recovery=two_stage_mmlu"))
    [lm, _] = require_stages(composed("cdmoe_deepseek_e6"))
    assert first == lm and first.recovery.weight_decay == second.recovery.weight_decay == 0.01
    recovery, data = second.recovery, second.data
    assert (recovery.learning_rate, recovery.batch_size, recovery.epochs) == (5e-5, 2, 1)
    assert (data.dataset, data.subset, data.splits.train) == ("cais/mmlu", "auxiliary_train", "train")
    assert (data.sequence_length, data.form, data.packing, data.bos, data.answer_only) == (
        *(2048, "commonsense"),
        *(False, True, False),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_no_problems(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the real shapes of its model, with the recorded config in place of the one on the hub."""
    monkeypatch.setattr(
        checkpoint_checks, "check_checkpoint", lambda path, *_, **__: Checkpoint(recorded_config(path), None, ())
    )
    config = composed(name, f"output_dir={tmp_path}")
    assert run_messages(config, build_steps(config.method)) == []


def test_a_recipe_needs_only_the_hub(command: Callable[..., tuple[int, str]]) -> None:
    """Without the hub, only the model is missing."""
    code, err = command("experiment=paper/moei2_mixtral")
    assert (code, err.count("\n")) == (2, 1), err
    assert "model.path=mistralai/Mixtral-8x7B-v0.1: there is no such folder here, and the hub" in err


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_sizes(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", f"experiment=paper/{name}", "plan_only=true", f"output_dir={tmp_path}"])
        train.main()
    [path] = tmp_path.glob(f"{name}/*-plan_only/summary.json")
    summary, (key, ratio, line) = json.loads(path.read_text()), SIZES[name]
    assert round(summary["ratios"][key], 4) == pytest.approx(ratio)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert line is None or any(line in printed for printed in lines), lines


# ------------------------------------------------------------------------------------------------------------ dry runs

FAMILY = {name: str(recorded_values(NUMBERS[name]["model.path"])["model_type"]) for name in RECIPES}
QUICK = {"cdmoe_deepseek_e6", "moei2_deepseek_v2_lite", "moei2_mixtral"}
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    paper_sets(folder)
    return folder


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


@pytest.fixture
def finished(
    command: Callable[..., tuple[int, str]], base: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[str, Config, Path, dict[str, Any]]:
    """The name of a recipe, and the config, folder and summary of its dry run."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", base / "cache")
    name: str = request.param
    model = base / FAMILY[name]
    if not model.exists():
        model_folder(model, EVERY[FAMILY[name]])
    num_experts = ("method.num_experts=3",) if NUMBERS[name].get("method.num_experts") else ()  # of six experts
    inputs = (without_the_hub if name in BY_HAND else on_cloned_sets)(name, base, model)
    arguments = (
        *inputs,
        *SMALL,
        *SMALL_OF[paper_of(name)],
        *num_experts,
        f"output_dir={base / 'out'}",
        f"cache_dir={base / name}",
    )
    code, err = command(f"experiment=paper/{name}", *arguments)
    assert code == 0, err
    config = composed(name, *arguments)
    folder = config.run_folder()
    return name, config, folder, json.loads((folder / "summary.json").read_text())


DRY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("finished", DRY, indirect=True)
def test_a_recipe_runs_to_its_export(finished: tuple[str, Config, Path, dict[str, Any]]) -> None:
    name, config, folder, summary = finished
    assert_recovered(name, config, summary)
    assert_measured(name, summary)

    plan = Plan.load(folder / "plan.json")
    kinds = {operation.kind for operation in plan.operations}
    assert kinds == ({"condense"} if paper_of(name) == "cdmoe" else {"prune", "factorize"})
    if paper_of(name) == "cdmoe":
        num_experts = config.method["num_experts"]
        assert [len(step.experts) for step in plan.operations if step.kind == "condense"] == [num_experts, num_experts]
    model, tokenizer = loading.load(folder / "model", ModelConfig(path=str(folder / "model")))
    assert model.num_parameters() == summary["parameters"]["total"]["compressed"]
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer("Is 3 odd?", return_tensors="pt")).logits).all()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("second", ["commonsense", "mmlu"])
def test_the_stages_train_as_published(
    second: str, command: Callable[..., tuple[int, str]], base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Windows of one text or question each, with BOS; torch's AdamW; and losses that cover prompts, but no padding."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", base / "cache")
    tokenizer = beginning_with("<s>", bos=True)
    model = model_folder(tmp_path / "model", EVERY["qwen2_moe"], tokenizer)
    texts = [f"{'short' if n % 2 else 'a text that is longer than its window'} {n}" for n in range(24)]
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [
        word.replace(f"{base}/c4.jsonl", f"{tmp_path}/c4.jsonl")
        for word in without_the_hub("cdmoe_qwen_e4", base, model)
        if second == "commonsense" or not word.startswith("recovery.stages.1")
    ]
    if second == "mmlu":
        inputs += ["recovery=two_stage_mmlu", f"recovery.stages.1.data.dataset={base}/hub/mmlu"]
    small = [word for word in SMALL_OF["cdmoe"] if "batch_size" not in word]
    fewer = ("evaluation.tasks=[]", "export.enabled=false", "callbacks.profile.enabled=false", "method.num_experts=3")
    with watched_training() as (batches, optimizers):
        arguments = (*inputs, *SMALL, *small, *fewer, f"output_dir={tmp_path}")
        code, err = command("experiment=paper/cdmoe_qwen_e4", *arguments)
    assert code == 0, err

    for optimizer, rate in zip(optimizers, (1e-5, 5e-5), strict=True):
        assert type(optimizer) is torch.optim.AdamW
        for group in optimizer.param_groups:
            assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.01, (0.9, 0.999), 1e-8)
            assert group["initial_lr"] == rate
    first, questions = batches[:2], batches[2:]
    size, number = {"commonsense": (16, 10), "mmlu": (2, 9)}[second]
    assert [len(batch["input_ids"]) for batch in first] == [8, 8]
    assert [len(batch["input_ids"]) for batch in questions] == [size] * math.ceil(number / size)
    beginnings = {tuple(tokenizer(text)["input_ids"][:32]) for text in texts[8:]}  # eight calibrate
    for batch in first:
        lengths = [assert_all_predicted(*row, int(tokenizer.bos_token_id or 0)) for row in rows(batch)]
        assert {tuple(ids[:length]) for (ids, _), length in zip(rows(batch), lengths, strict=True)} <= beginnings
        assert min(lengths) < max(lengths) == 32
    for batch in questions:
        for ids, labels in rows(batch):
            assert_all_predicted(ids, labels, int(tokenizer.bos_token_id or 0), end=True)
            text = tokenizer.decode([token for token in labels if token != MASKED])
            answer = "the correct answer is answer2" if second == "mmlu" else "true"
            assert text.startswith("Below is an instruction") and text.endswith(f"{answer}<|endoftext|>")


@contextmanager
def watched_training() -> Iterator[tuple[list[dict[str, torch.Tensor]], list[torch.optim.Optimizer]]]:
    """The batches and the optimizers of the trainings inside the context."""
    batches: list[dict[str, torch.Tensor]] = []
    optimizers: list[torch.optim.Optimizer] = []
    step, configure = RecoveryModule.training_step, RecoveryModule.configure_optimizers

    def watch_step(self: Any, batch: Any, index: int) -> Any:
        batches.append({name: column.clone() for name, column in batch.items()})
        return step(self, batch, index)

    def watch_optimizer(self: Any) -> Any:
        configured: Any = configure(self)
        optimizers.append(configured["optimizer"])
        return configured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecoveryModule, "training_step", watch_step)
        patch.setattr(RecoveryModule, "configure_optimizers", watch_optimizer)
        yield batches, optimizers


def rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    assert set(batch) == {"input_ids", "labels"}
    return list(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))


def assert_all_predicted(ids: list[int], labels: list[int], bos: int, end: bool = False) -> int:
    """A window begins with BOS, and its loss covers every token but the first and the padding, which is token 0.

    Args:
        end: the text ends with the end-of-text token, which is token 0 too.

    Returns:
        The number of tokens of the text.
    """
    length = (ids.index(0) if 0 in ids else len(ids)) + end
    assert ids[0] == bos and labels == [MASKED, *ids[1:length], *[MASKED] * (len(ids) - length)]
    return length


def test_the_windows_of_the_perplexity_begin_with_bos(base: Path, tmp_path: Path) -> None:
    tokenizer = beginning_with("<s>", bos=True)
    for name in ("cdmoe_qwen_e4", "moei2_mixtral"):
        config = composed(name, *without_the_hub(name, base, tmp_path), *SMALL, "data.sequence_length=32")
        tokens = Tokenizing(Texts.read(config, (), calibrates=True), tokenizer).tokens(config, ())
        assert tokens.validation is not None and (tokens.validation[:, 0] == tokenizer.bos_token_id).all()
        assert (tokens.validation[:, 1:] != tokenizer.bos_token_id).all()
        assert tokens.calibration is not None
        assert all(ids[0] == tokenizer.bos_token_id for ids in tokens.calibration.ids)


def assert_recovered(name: str, config: Config, summary: dict[str, Any]) -> None:
    """Every recovery stage ran, with the learning rate and the objective of the recipe."""
    published = require_stages(composed(name))
    for stage, ran, done in zip(published, require_stages(config), summary["recovery_stages"], strict=True):
        assert done["name"] == stage.name
        for key in ("objective", "trainable", "learning_rate"):
            assert done[key] == getattr(stage.recovery, key), key
        epochs, batch = ran.recovery.epochs, ran.recovery.batch_size * ran.recovery.accumulate_grad_batches
        assert done["steps"] == (math.ceil(epochs * done["windows"] / batch) if epochs else ran.recovery.steps)
    last = summary["recovery_stages"][-1]
    assert (last["examples"], last["left_out"]) == ({"cdmoe": 10, "moei2": 12}[paper_of(name)], 0)
    texts = {"train"} if paper_of(name) == "cdmoe" else set()
    assert set(summary["environment"]["data"]) == {"calibration", "validation", f"{last['name']}/train", *texts}


def assert_measured(name: str, summary: dict[str, Any]) -> None:
    """Every result stage has its figures, and the summary has all other entries."""
    paper = paper_of(name)
    assert list(summary["stages"]) == ["original", "compressed", "recovered"]
    for stage, figures in summary["stages"].items():
        assert figures["loss"] > 0 and figures["perplexity"] > 1, stage
        assert set(figures["tasks"]) == set(summary["stages"]["original"]["tasks"]) != set()
        if name not in BY_HAND:
            assert set(figures["tasks"]) == set(PAPER_TASKS[paper]) and set(figures["task_mean"]) == {paper}
    assert summary["stages"]["original"]["profile"]["weights_bytes"] > 0
    assert summary["stages"]["compressed"]["kl_to_original"] > 0
    assert summary["stages"]["recovered"]["loss"] != summary["stages"]["compressed"]["loss"]
    ratios = {"memory", "routed_expert_parameters", "prefill_speedup", "decode_speedup", "gap_closed"}
    assert set(summary["ratios"]) == ratios and 0 < summary["ratios"]["memory"] < 1
    assert set(summary["seconds"]) >= {"calibrate", "search", "apply", "recover", "evaluate", "export"}
    assert summary["artifacts"].keys() >= {"plan", "model", "export_format"}
