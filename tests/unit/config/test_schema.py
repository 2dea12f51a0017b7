"""Plain containers to a Config: types, unknown names, the run's hash and folder; checks of one config alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from recondense.config.checks import check
from recondense.config.reader import nearest, suggestion
from recondense.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoraSettings,
    ModelConfig,
    RecoveryConfig,
    TrainerConfig,
    differences,
    from_dict,
    parse_bytes,
    read,
)
from recondense.errors import ConfigError
from recondense.run.preflight import check_folder

STEP = {"name": "example", "steps": [{"_target_": "builtins.dict"}]}


CONDENSING: dict[str, Any] = {"name": "cdmoe", "steps": ["recondense.methods.cdmoe.CDMoE"]}


def lora(trainable: Any = "lora", name: str = "lora", **settings: Any) -> dict[str, Any]:
    adapters = LoraSettings(**settings)
    return {"recovery": RecoveryConfig(name=name, objective="finetune", trainable=trainable, lora=adapters)}


def problems(**values: Any) -> str:
    """What `check` says of a config that is right but for `values`."""
    return "\n".join(check(Config(**{"model": ModelConfig(pretrain={}), "method": STEP, **values})))


def test_defaults_are_right() -> None:
    assert problems() == ""
    assert from_dict({}) == Config()


def test_round_trip_through_yaml() -> None:
    config = from_dict(
        {
            "model": {"path": "x", "pretrain": {"config": {"hidden_size": 8}}},
            "recovery": {"betas": [0.8, 0.9], "learning_rate": 1, "gradient_clip": 2},
            "evaluation": {"tasks": ["piqa"], "heldout": {"num_texts": 3}},
            "max_scratch_bytes": "512MiB",
        }
    )
    assert config.recovery.betas == (0.8, 0.9)
    assert isinstance(config.recovery.learning_rate, float)
    assert config.evaluation.heldout is not None and config.evaluation.heldout.num_texts == 3
    again = from_dict(yaml.safe_load(config.to_yaml()))
    assert again == config and again.run_hash() == config.run_hash()


def test_all_wrong_values_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(
            {
                "seed": "one",
                "sed": 1,
                "recovery": {"steps": 1.5, "learning_rate": True, "schedule": "liner", "betas": [0.9]},
                "model": "tiny",
                "evaluation": {"tasks": "piqa", "limit": "all"},
                "data": {"calibration": {"num_sample": 3}},
            }
        )
    assert list(caught.value.messages) == [
        "sed: there is no such setting. Did you mean seed?",
        "model=tiny: expected a group of settings.",
        "recovery.steps=1.5: expected a whole number.",
        "recovery.learning_rate=true: expected a finite number.",
        "recovery.betas=[0.9]: expected a list of 2 (each a finite number).",
        "recovery.schedule=liner: there is no such choice. Did you mean linear? Choices: constant, cosine, linear.",
        "data.calibration.num_sample: there is no such setting. Did you mean data.calibration.num_samples? "
        "Choices: max_length, num_samples, path, sources, tape, tape_dtype.",
        "evaluation.tasks=piqa: expected a list (each a text). Write evaluation.tasks=[piqa].",
        "evaluation.limit=all: expected a whole number.",
        "seed=one: expected a whole number.",
    ]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 10**400], ids=["nan", "inf", "-inf", "huge"]
)
def test_numbers_are_finite(value: float) -> None:
    config, messages = read({"recovery": {"temperature": value}})
    assert messages == [f"recovery.temperature={value}: expected a finite number."]
    assert config.recovery.temperature == RecoveryConfig().temperature


def test_a_wrong_value_leaves_its_default_and_its_neighbours() -> None:
    config, messages = read({"recovery": {"steps": "many", "batch_size": 3}})
    assert len(messages) == 1
    assert (config.recovery.steps, config.recovery.batch_size) == (RecoveryConfig().steps, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"overwrite": True},
        {"run_dir": "/elsewhere"},
        {"output_dir": "/elsewhere"},
        {"cache_dir": "/elsewhere"},
        {"max_scratch_bytes": "1GiB"},
        {"trainer": TrainerConfig(progress_bar=False)},
    ],
)
def test_what_cannot_change_a_result_leaves_the_hash(change: dict[str, Any]) -> None:
    assert Config(**change).run_hash() == Config().run_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"method": STEP},
        {"method": {"name": "none", "_target_": "builtins.dict"}},
        {"recovery": RecoveryConfig(steps=2)},
        {"data": DataConfig(name="texts")},
    ],
)
def test_what_changes_a_result_changes_the_hash(change: dict[str, Any]) -> None:
    assert Config(**change).run_hash() != Config().run_hash()


def test_hash_does_not_depend_on_the_order_of_keys() -> None:
    one, other = ({**STEP, **more} for more in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert Config(method=one).run_hash() == Config(method=other).run_hash()
    assert Config(method=one).run_hash() != Config(method={**one, "a": 2}).run_hash()


def test_settings_of_a_method_without_steps_leave_the_hash() -> None:
    """A sweep of budgets runs method=none once."""
    none = {"name": "none", "steps": [], "memory_ratio": None}
    assert Config(method=none).run_hash() == Config(method={**none, "memory_ratio": 0.5}).run_hash()
    assert Config(method=none).run_hash() != Config(method={**none, "name": "other"}).run_hash()


def test_run_folder() -> None:
    config = Config(output_dir="out", experiment_name="trial")
    assert config.run_folder() == Path("out", "trial", config.run_hash())
    assert dataclasses.replace(config, run_dir="there").run_folder() == Path("there")
    sizes = dataclasses.replace(config, plan_only=True)
    assert sizes.run_hash() == config.run_hash(), "the same run"
    assert sizes.run_folder() == Path("out", "trial", f"{config.run_hash()}-plan_only")
    assert dataclasses.replace(sizes, run_dir="there").run_folder() == Path("there-plan_only")


def test_home_is_expanded_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = {"path": "~/x.jsonl"}
    config = from_dict(
        {
            "model": {"path": "~/model", "tokenizer": "~/tokenizer"},
            "evaluation": {"include_path": "~/tasks"},
            "data": {"calibration": paths, "train": paths, "validation": paths},
            "run_dir": "~/run", "output_dir": "~", "cache_dir": "~/cache",
        }
    )  # fmt: skip
    assert (config.model.path, config.model.tokenizer) == ("/home/me/model", "/home/me/tokenizer")
    assert config.evaluation.include_path == "/home/me/tasks"
    assert {getattr(config.data, split).path for split in ("calibration", "train", "validation")} == {
        "/home/me/x.jsonl"
    }
    assert (config.run_dir, config.output_dir, config.cache_dir) == ("/home/me/run", "/home/me", "/home/me/cache")
    assert from_dict({"model": {"path": "Qwen/Qwen1.5-MoE-A2.7B"}}).model.path == "Qwen/Qwen1.5-MoE-A2.7B"


def test_differences_name_dotted_settings() -> None:
    one = Config(seed=1, recovery=RecoveryConfig(steps=2)).identity()
    assert differences(one, Config().identity()) == ["recovery.steps", "seed"]


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("7", 7), ("512MiB", 2**29), ("2 GB", 2 * 10**9), ("1.5KiB", 1536), ("16B", 16)]
)
def test_parse_bytes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "5 parsecs", "MiB", "5MiBMiB", "inf", "nan"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="not a number of bytes"):
        parse_bytes(text)


def test_suggestions() -> None:
    assert nearest("cdmoee", ["none", "cdmoe"]) == "cdmoe"
    assert suggestion("xyz", ["none", "cdmoe"]) == "Choices: cdmoe, none."
    assert suggestion("stepz", [*"abcdefgh", "steps"], prefix="recovery.") == "Did you mean recovery.steps?"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"model": ModelConfig()}, "model.path is null"),
        ({"model": ModelConfig(pretrain={}, device="gpu")}, "model.device=gpu: write auto, cpu, cuda or cuda:N"),
        ({"method": {"name": "none"}}, "method: has neither _target_ nor steps"),
        ({"method": {"name": "none", "steps": "abc"}}, "method.steps=abc: expected a list of steps"),
        ({"recovery": RecoveryConfig(steps=0)}, "recovery.steps=0: must be at least 1"),
        (
            {"recovery": RecoveryConfig(objective="finetune", learning_rate=0.0)},
            "recovery.learning_rate=0.0: must be above",
        ),
        ({"recovery": RecoveryConfig(objective="finetune", betas=(0.9, 1.0))}, "recovery.betas=[0.9, 1.0]"),
        ({"recovery": RecoveryConfig(objective="finetune", learning_rate=float("nan"))}, "recovery.learning_rate=nan"),
        ({"recovery": RecoveryConfig(gradient_clip=-1.0)}, "recovery.gradient_clip=-1.0: must be at least 0"),
        (
            {"recovery": RecoveryConfig(objective="distill", hidden_share=1.5)},
            "recovery.hidden_share=1.5: must be in [0, 1]",
        ),
        ({"evaluation": EvaluationConfig(limit=0)}, "evaluation.limit=0: must be at least 1"),
        ({"evaluation": EvaluationConfig(tasks=("piqa", " "))}, "evaluation.tasks[1] is an empty name"),
        ({"max_scratch_bytes": "-1"}, "max_scratch_bytes=-1: must be at least 16MiB"),
        ({"method": {**CONDENSING, "refit": "all"}}, "method.refit=all: must be false, true, or coefficients"),
        ({"method": {**STEP, "refit": "coefficients"}}, "method=example condenses no layer"),
        (
            {"method": {"name": "x", "_target_": "builtins.dict", "refit": "coefficients"}},
            "method=x condenses no layer",
        ),
        (lora(rank=0), "recovery.lora.rank=0: must be at least 1"),
        (lora(alpha=0), "recovery.lora.alpha=0: must be above 0"),
        (lora(dropout=1.0), "recovery.lora.dropout=1.0: must be in [0, 1)"),
        (lora(dropout=-0.1, target="attention"), "recovery.lora.dropout=-0.1: must be in [0, 1)"),
        (lora(dropout=0.1), "recovery.lora.target=both. Use recovery.lora.target=attention"),
        (lora(dropout=0.1, target="experts"), "recovery.lora.target=experts. Use recovery.lora.target=attention"),
        (lora("experts"), "recovery.trainable=experts: recovery=lora trains adapters. Use recovery.trainable=lora"),
    ],
)
def test_checks(values: dict[str, Any], message: str) -> None:
    assert message in problems(**values)


@pytest.mark.parametrize(
    "values",
    [
        lora(dropout=0.1, target="attention"),
        lora(name="distill"),
        lora("experts", "finetune", rank=0, alpha=0, dropout=2.0),
        {"method": {**CONDENSING, "refit": "coefficients"}},
        {"method": {"name": "cdmoe", "_target_": CONDENSING["steps"][0], "refit": "coefficients"}},
        {"method": {**STEP, "steps": [*STEP["steps"], *CONDENSING["steps"]], "refit": "coefficients"}},
        {"method": {**STEP, "refit": True}},
    ],
)
def test_right_values(values: dict[str, Any]) -> None:
    assert problems(**values) == ""


def test_values_of_a_recovery_that_does_not_run_do_not_matter() -> None:
    assert problems(recovery=RecoveryConfig(objective="none", learning_rate=0.0, warmup_steps=9999)) == ""


def test_run_folder_of_the_same_config_is_taken_up(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    assert check_folder(config, None) == []
    (tmp_path / ".lock").touch()
    assert check_folder(config, None) == []
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert check_folder(config, config) == []
    other = dataclasses.replace(config, seed=3)
    assert "different: seed" in check_folder(other, config)[0]
    assert check_folder(dataclasses.replace(other, overwrite=True), config) == []


def test_a_run_goes_on_with_another_engine(tmp_path: Path) -> None:
    """Checkpoints have one form, so the engine is no more part of a run than its processes are."""
    one = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": "auto"}})
    (tmp_path / "config.yaml").write_text(one.to_yaml())
    for strategy in ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"):
        other = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": strategy, "devices": 2}})
        assert other.run_hash() == one.run_hash() and check_folder(other, one) == []
    other = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": "ddp", "precision": "bf16-true"}})
    assert "different: trainer.precision" in check_folder(other, one)[0]


def test_settings_that_came_later_leave_the_names_of_earlier_runs() -> None:
    """A run's folder is found by its hash: what asks for nothing has no part in it."""
    identity = Config().identity()
    assert not {"epochs", "stages"} & identity["recovery"].keys()
    assert not {"form", "packing"} & identity["data"].keys()
    assert "sources" not in identity["data"]["calibration"]
    changed = [
        {"recovery": {"epochs": 2}},
        {"recovery": {"stages": [{"name": "a"}]}},
        {"recovery": {"stages": [{"name": "b"}]}},
        {"data": {"form": "auto"}},
        {"data": {"packing": False}},
        {"data": {"calibration": {"sources": [{"path": "x"}]}}},
    ]
    assert len({from_dict(values).run_hash() for values in [{}, *changed]}) == 7
