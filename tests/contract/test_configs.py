"""Every YAML of conf/ composes and fits the schema, and every setting of the schema is in a YAML."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recondense.config.schema import Config, read
from recondense.methods.cdmoe import CDMoE
from recondense.methods.naee import NAEE
from recondense.methods.search.budget import Budget
from recondense.run.build_steps import build_steps
from recondense.run.help_page import help_page

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/[!_]*.yaml") if path.parent.name != "hydra")


@functools.cache
def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return typing.cast(dict[str, Any], OmegaConf.to_container(compose("train", list(overrides)), resolve=True))


@pytest.mark.parametrize("option", OPTIONS)
def test_option_fits_the_schema(option: str) -> None:
    values = composed(option)
    config, messages = read(values)
    assert messages == []
    group, _, name = option.partition("=")
    settings = values.get(group)
    if settings is not None and "name" in settings:
        assert settings["name"] == name
    assert config.resolved()


@pytest.mark.parametrize("option", OPTIONS)
def test_option_has_every_setting(option: str) -> None:
    """So that every setting can be overridden on the command line, and readers of the YAML see it."""
    group = option.partition("=")[0]
    values = composed(option)
    kind = typing.get_type_hints(Config).get(group)
    if kind is not None and dataclasses.is_dataclass(kind):
        assert list(_missing(kind, values[group])) == []
    assert {field.name for field in dataclasses.fields(Config)} <= values.keys()


def _missing(kind: Any, values: Mapping[str, Any]) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        # A data YAML omits the settings of other sources of text.
        if field.name not in values:
            if field.name not in ("dataset", "subset", "splits", "streaming"):
                yield field.name
        elif dataclasses.is_dataclass(hints[field.name]) and values[field.name] is not None:
            yield from (f"{field.name}.{name}" for name in _missing(hints[field.name], values[field.name]))


@pytest.mark.parametrize("model", ["qwen_moe", "deepseek_v2_lite"])
def test_a_model_brings_its_text_and_the_command_line_wins(model: str) -> None:
    assert composed(f"model={model}")["data"]["name"] == "c4"
    assert composed(f"model={model}", "data=texts")["data"]["name"] == "texts"


def test_the_tiny_model_brings_its_recovery_and_the_command_line_wins() -> None:
    published = composed("model=qwen_moe")["recovery"]
    assert (published["learning_rate"], published["batch_size"], published["schedule"]) == (1e-5, 8, "linear")
    assert composed()["recovery"]["learning_rate"] > published["learning_rate"]
    assert composed("recovery.learning_rate=0.5")["recovery"]["learning_rate"] == 0.5


@pytest.mark.parametrize("method", ["cdmoe", "moei2", "none", "reap"])
def test_steps_of_the_command_line_take_the_place_of_a_methods_own(method: str) -> None:
    """With their own settings and no others: NAEE does not get the budget of reap."""
    prune, condense = "recondense.methods.naee.NAEE,memory_ratio:0.7", "recondense.methods.cdmoe.CDMoE,num_layers:2"
    values = composed(f"method={method}", f"method.steps=[{{_target_:{prune}}},{{_target_:{condense}}}]")
    assert build_steps(values["method"]) == [NAEE(budget=Budget(memory_ratio=0.7)), CDMoE(num_layers=2)]


@pytest.mark.parametrize("path", sorted(CONF.glob("method/*.yaml")), ids=lambda path: path.stem)
def test_a_setting_of_a_method_is_written_once(path: Path) -> None:
    assert "${method." not in path.read_text(encoding="utf-8")


def test_a_choice_fits_its_line_of_the_help_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = help_page(CONF).splitlines()
    assert [line for line in lines if line.endswith("...") or len(line) > 120] == []


def test_demo() -> None:
    config, messages = read(composed("experiment=demo"))
    assert messages == []
    assert config.run_folder() == Path("outputs/demo")
    assert config.recovery.objective == "distill" and config.recovery.control
    assert (config.method["num_layers"], config.method["num_experts"]) == ("all", 4)
