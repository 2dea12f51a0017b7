"""From plain containers to a Config: types, unknown names, the run's hash and folder, and checks of a config alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from recondense.config.checks import check_config
from recondense.config.logger import WandbConfig
from recondense.config.problems import nearest, render, suggestion
from recondense.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoggerConfig,
    RecoveryConfig,
    TrainerConfig,
    from_dict,
    read,
)
from recondense.config.stages import resolve_stages
from recondense.config.types import parse_bytes
from recondense.errors import ConfigError

STEP = {"name": "example", "steps": [{"_target_": "builtins.dict"}]}


CONDENSING: dict[str, Any] = {"name": "cdmoe", "steps": ["recondense.methods.cdmoe.CDMoE"]}


def lora(trainable: Any = "lora", name: str = "lora", **settings: Any) -> dict[str, Any]:
    return {"recovery": {"name": name, "objective": "finetune", "trainable": trainable, "lora": settings}}


def problems(**values: Any) -> str:
    """The messages about a config that is valid but for `values`."""
    config, mistakes = read({"model": {"pretrain": {}}, "method": STEP, **values})
    stages, wrong_stages = resolve_stages(config)
    return "\n".join(render([*mistakes, *wrong_stages, *check_config(config, stages)]))


def test_defaults_are_valid() -> None:
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
        "model=tiny: expected a group of settings.",
        "recovery.steps=1.5: expected a whole number.",
        "recovery.learning_rate=true: expected a finite number.",
        "recovery.betas=[0.9]: expected a list of 2 (each a finite number).",
        "recovery.schedule=liner: there is no such choice. Did you mean linear? Choices: constant, cosine, linear.",
        "data.calibration.num_sample: there is no such setting. Did you mean data.calibration.num_samples? "
        "Choices: max_length, num_samples, path, sources, tape, tape_dtype.",
        "evaluation.tasks=piqa: expected a list (each a string). Write evaluation.tasks=[piqa].",
        "evaluation.limit=all: expected a whole number.",
        "seed=one: expected a whole number.",
        "sed: there is no such setting. Did you mean seed?",
    ]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 10**400], ids=["nan", "inf", "-inf", "huge"]
)
def test_numbers_are_finite(value: float) -> None:
    config, mistakes = read({"recovery": {"temperature": value}})
    assert render(mistakes) == [f"recovery.temperature={value}: expected a finite number."]
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
        {"evaluation": EvaluationConfig(every_n_steps=0, periodic_limit=3)},
        {"logger": LoggerConfig(csv=False, wandb=WandbConfig(project="mine"))},
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


def test_the_hash_of_what_trains() -> None:
    """A list of one is the word, the order of parts does not count, and a setting of its own only if it is set."""
    hashes = [
        Config(recovery=RecoveryConfig(**settings)).run_hash()  # type: ignore[arg-type]
        for settings in (
            {}, {"trainable": ("experts",)}, {"router_layers": "changed"}, {"router_layers": "all"},
            {"trainable": ("routers", "experts")}, {"trainable": ("experts", "routers")},
        )
    ]  # fmt: skip
    assert hashes[0] == hashes[1] == hashes[2] and hashes[4] == hashes[5] and len(set(hashes)) == 3
    assert "router_layers" not in Config().identity()["recovery"] and "router_layers" in Config().resolved()["recovery"]


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


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
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
        ({"seed": -1}, "seed=-1: must be in [0, 4294967295]."),
        ({"model": {}}, "model.path=null: model=tiny_moe is not built in: give a local folder or a hub id."),
        ({"model": {"pretrain": {}, "device": "gpu"}}, "model.device=gpu: write auto, cpu, cuda or cuda:N."),
        ({"model": {"pretrain": {}, "device": "cuda:x"}}, "model.device=cuda:x: write auto, cpu, cuda or cuda:N."),
        ({"method": {"name": "none"}}, "method: has neither _target_ nor steps"),
        ({"method": {"name": "none", "steps": "abc"}}, "method.steps=abc: expected a list of steps"),
        ({"method": {**STEP, "refit": "all"}}, "method.refit=all: must be false, true, or coefficients"),
        ({"recovery": {"steps": 0}}, "recovery.steps=0: must be at least 1."),
        ({"recovery": {"learning_rate": 0}}, "recovery.learning_rate=0: must be above 0."),
        ({"recovery": {"betas": [0.9, 1.0]}}, "recovery.betas[1]=1.0: must be in [0, 1)."),
        ({"recovery": {"learning_rate": float("nan")}}, "recovery.learning_rate=nan: expected a finite number."),
        ({"recovery": {"gradient_clip": -1.0}}, "recovery.gradient_clip=-1.0: must be at least 0."),
        (
            {"recovery": {"hidden_share": 1.5}},
            "recovery.hidden_share=1.5: must be in [0, 1]; it is a share of the loss.",
        ),
        ({"trainer": {"devices": 0}}, "trainer.devices=0: must be at least 1; it is the number of processes"),
        ({"trainer": {"devices": "two"}}, "trainer.devices=two: expected a whole number or auto."),
        ({"export": {"enabled": "maybe"}}, "export.enabled=maybe: expected true, false or auto."),
        ({"export": {"max_shard_size": True}}, "export.max_shard_size=true: True is not a number of bytes"),
        ({"evaluation": {"limit": 0}}, "evaluation.limit=0: must be at least 1."),
        ({"evaluation": {"tasks": ["piqa", " "]}}, "evaluation.tasks[1]=' ': the name is empty"),
        ({"max_scratch_bytes": 1}, "max_scratch_bytes=1: must be at least 16MiB"),
        ({"max_scratch_bytes": "-1"}, "max_scratch_bytes='-1': '-1' is not a number of bytes"),
        (lora(rank=0), "recovery.lora.rank=0: must be at least 1."),
        (lora(alpha=0), "recovery.lora.alpha=0: must be above 0; the adapters' output is scaled by alpha / rank."),
        (lora(dropout=1.0), "recovery.lora.dropout=1.0: must be in [0, 1)."),
        (lora(dropout=-0.1, target="attention"), "recovery.lora.dropout=-0.1: must be in [0, 1)."),
        (
            lora(dropout=0.1),
            "recovery.lora.dropout=0.1: with recovery.lora.target=both there are adapters of experts",
        ),
        (lora("experts"), "recovery.trainable=experts: recovery=lora trains adapters. Use recovery.trainable=lora"),
        (lora(["norms", "routers"]), "recovery.trainable=[routers, norms]: recovery=lora trains adapters"),
        (lora(["lora", "attention"]), "recovery.trainable=[attention, lora]: with recovery.lora.target=both, lora"),
        (lora(["lora", "experts"], target="experts"), "recovery.trainable=[experts, lora]: with recovery.lora.target="),
        (lora(["all", "lora"]), "recovery.trainable=[all, lora]: all already includes every other part."),
        (lora(["norms", "norms"]), "recovery.trainable=[norms, norms]: norms is named twice. Name each part once."),
        (lora([]), "recovery.trainable=[]: name at least one part: experts, routers"),
        (lora(["experts", "rooters"]), "recovery.trainable[1]=rooters: there is no such choice. Did you mean routers?"),
        (lora(3), "recovery.trainable=3: there is no such choice."),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], message: str) -> None:
    assert problems(**values).startswith(message)


@pytest.mark.parametrize(
    "values",
    [
        lora(dropout=0.1, target="attention"),
        lora(name="distill"),
        lora("experts", "finetune", dropout=0.5),
        lora(["lora", "routers", "norms"]),
        lora(["lora", "experts"], target="attention"),
        lora(["lora", "attention"], target="experts"),
        {"recovery": {"objective": "distill", "trainable": "all"}},
        {"method": {**STEP, "refit": "coefficients"}},
        {"method": {**STEP, "refit": True}},
        {"recovery": {"objective": "none", "warmup_steps": 9999, "hidden_share": 1, "cross_entropy_share": 1}},
    ],
)
def test_valid_values(values: dict[str, Any]) -> None:
    """Contradictions between settings that are not used do not matter."""
    assert problems(**values) == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "3",
            "'3': expected a whole number, not a string. To read a value from the environment, write "
            "'recovery.steps=\"${oc.decode:${oc.env:STEPS}}\"'.",
        ),
        (
            "true",
            "'true': expected a whole number, not a string. To read a value from the environment, write 'recovery",
        ),
        ("", "'': expected a whole number, not a string."),
        ("many", "many: expected a whole number."),
        (None, "null: expected a whole number."),
        ([1, "a"], "[1, a]: expected a whole number."),
        ({"a": None}, "{a: null}: expected a whole number."),
    ],
)
def test_a_value_is_shown_as_it_was_written(value: Any, message: str) -> None:
    """A text that looks like a number, as environment variables give it, is shown in quotes and with the remedy."""
    assert problems(recovery={"steps": value}).startswith(f"recovery.steps={message}")


def test_a_group_refuses_wrong_settings_when_it_is_constructed() -> None:
    with pytest.raises(ValueError, match="steps"):
        RecoveryConfig(steps=0)
    with pytest.raises(ValueError, match="learning_rat"):
        RecoveryConfig(learning_rat=1.0)  # type: ignore[call-arg]


def test_every_setting_is_part_of_the_identity_or_says_why_not() -> None:
    """The metadata of its field says it, not a list elsewhere."""
    identity = Config().identity()
    assert set(Config().resolved()) - set(identity) == {
        *("logger", "experiment_name", "output_dir", "cache_dir", "run_dir", "overwrite", "plan_only"),
        *("max_scratch_bytes", "metric"),
    }
    processes = {"progress_bar", "strategy", "devices", "num_nodes", "timeout_hours"}
    assert set(Config().resolved()["trainer"]) - set(identity["trainer"]) == processes
    changed: list[dict[str, Any]] = [
        {"recovery": {"epochs": 2}},
        {"recovery": {"stages": [{"name": "a"}]}},
        {"recovery": {"stages": [{"name": "b"}]}},
        {"data": {"form": "auto"}},
        {"data": {"packing": False}},
        {"data": {"calibration": {"sources": [{"path": "x"}]}}},
    ]
    assert len({from_dict(values).run_hash() for values in [{}, *changed]}) == 7
