"""The default budgets of conf/model, and what a command sets instead of them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.composed import composed
from support.tiny_models import qwen2_moe

from recondense.config.problems import Problem, render
from recondense.config.schema import from_dict
from recondense.models import config_json
from recondense.models.published_configs import recorded_values
from recondense.run.search_path import CONFIGS, initialize_hydra
from recondense.run.unknown_overrides import compose_run

SETTINGS = (
    *("num_experts", "num_layers", "prune_ratio", "average_rank", "ratio"),
    "removed_expert_ratio",
    "memory_ratio",
)


def sizes(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the method that decide the size and are not null."""
    return {name: values["method"][name] for name in SETTINGS if values["method"].get(name) is not None}


def folder(path: Path, **changes: Any) -> str:
    """A folder with the config of Qwen1.5-MoE, changed."""
    (path / "config.json").write_text(json.dumps({**recorded_values("Qwen/Qwen1.5-MoE-A2.7B"), **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("model=qwen_moe", {"num_experts": 4, "num_layers": 9}),
        ("model=qwen_moe method=cdmoe_s", {"num_experts": 0, "num_layers": 6}),
        ("model=qwen_moe method=moei2", {"prune_ratio": 0.25, "average_rank": 512}),
        ("model=qwen_moe method=reap", {"memory_ratio": 0.75}),
        ("model=qwen_moe method=svd_llm", {"memory_ratio": 0.75}),
        ("model=qwen_moe method=none", {}),
        ("model=deepseek_moe", {"num_experts": 6, "num_layers": 9}),
        ("model=deepseek_moe method=cdmoe_s", {"num_experts": 0, "num_layers": 8}),
        ("model=deepseek_moe method=moei2", {"prune_ratio": 0.25, "average_rank": "auto", "memory_ratio": 0.75}),
        ("model=deepseek_v2_lite method=moei2", {"prune_ratio": 0.25, "average_rank": 512}),
        ("model=mixtral method=moei2", {"prune_ratio": 0.25, "average_rank": 2048}),
        ("model=mixtral", {"num_experts": 4, "num_layers": "all", "memory_ratio": 0.75}),
        ("model=olmoe method=cdmoe_moei2", {"num_experts": [4], "memory_ratio": 0.75}),
        ("model=general model.path=/nowhere method=naee", {"memory_ratio": 0.75}),
        ("", {"num_experts": 4, "num_layers": "all"}),  # the embedded model has its own
        ("method=cdmoe_s", {"num_experts": 0, "num_layers": "all"}),
        ("method=moei2", {"prune_ratio": 0.25, "average_rank": "auto"}),
        ("method=cdmoe_moei2", {"num_experts": [4], "memory_ratio": 0.7}),
        *((f"method={name}", {"removed_expert_ratio": 0.25}) for name in ("reap", "random", "mc_smoe", "block_drop")),
    ],
)
def test_the_default_of_a_model_and_a_method(arguments: str, expected: dict[str, Any]) -> None:
    assert sizes(composed(*arguments.split())) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # A ratio replaces all of it.
        ("model=deepseek_moe method.memory_ratio=0.8", {"num_experts": 4, "num_layers": "all", "memory_ratio": 0.8}),
        (
            "model=qwen_moe method.removed_expert_ratio=0.3",
            {"num_experts": 4, "num_layers": "all", "removed_expert_ratio": 0.3},
        ),
        ("model=qwen_moe method=reap method.removed_expert_ratio=0.3", {"removed_expert_ratio": 0.3}),
        ("method=reap method.memory_ratio=0.8", {"memory_ratio": 0.8}),
        ("method=cdmoe_moei2 method.removed_expert_ratio=0.3", {"num_experts": [4], "removed_expert_ratio": 0.3}),
        (
            "model=mixtral method=moei2 method.memory_ratio=0.6",
            {"prune_ratio": 0.25, "average_rank": "auto", "memory_ratio": 0.6},
        ),
        # Another size replaces only the size.
        ("model=deepseek_moe method.num_layers=6", {"num_experts": 6, "num_layers": 6}),
        ("model=deepseek_moe method.num_layers=all", {"num_experts": 6, "num_layers": "all"}),
        ("model=deepseek_moe method.num_layers=[3,4]", {"num_experts": 6, "num_layers": [3, 4]}),
        ("model=olmoe method.num_layers=3", {"num_experts": 4, "num_layers": 3}),
        ("model=mixtral method=moei2 method.average_rank=900", {"prune_ratio": 0.25, "average_rank": 900}),
        ("model=mixtral method=moei2 method.average_rank=null", {"prune_ratio": 0.25}),
        ("model=mixtral method=moei2 method.ratio=0.5", {"prune_ratio": 0.25, "average_rank": "auto", "ratio": 0.5}),
        ("model=olmoe method=moei2 method.average_rank=null", {"prune_ratio": 0.25}),
        ("model=olmoe method=svd_llm method.average_rank=300", {"average_rank": 300}),
        ("model=olmoe method=svd_llm method.ratio=0.5", {"ratio": 0.5}),
        # What is no size of its own replaces itself.
        ("model=qwen_moe method.num_experts=2", {"num_experts": 2, "num_layers": 9}),
        ("model=mixtral method=moei2 method.prune_ratio=0.4", {"prune_ratio": 0.4, "average_rank": 2048}),
        ("model=olmoe method.num_experts=2", {"num_experts": 2, "num_layers": "all", "memory_ratio": 0.75}),
        # null is what the other ratio is anyway.
        ("model=qwen_moe method.memory_ratio=null", {"num_experts": 4, "num_layers": 9}),
        ("model=olmoe method.removed_expert_ratio=null", {"num_experts": 4, "num_layers": "all", "memory_ratio": 0.75}),
        # An experiment sets as the command line does.
        ("experiment=paper/cdmoe_deepseek_e6 method.num_layers=12", {"num_experts": 6, "num_layers": 12}),
        ("experiment=demo model=qwen_moe", {"num_experts": 4, "num_layers": "all"}),
    ],
)
def test_what_the_user_sets_comes_first(arguments: str, expected: dict[str, Any]) -> None:
    assert sizes(composed(*arguments.split())) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_experts": 45},
        {"hidden_size": 64},
        {"moe_intermediate_size": 64},
        {"mlp_only_layers": [1]},
        {"compressed_layers": {"1": {"kind": "dense"}}},
        {"model_type": "qwen3_moe"},
    ],
    ids=str,
)
def test_a_folder_of_another_shape_has_the_general_budget(changes: dict[str, Any], tmp_path: Path) -> None:
    values = composed("model=qwen_moe", f"model.path={folder(tmp_path, **changes)}")
    assert sizes(values) == {"num_experts": 4, "num_layers": "all", "memory_ratio": 0.75}
    assert values["model"]["budgets"] == {
        "used": {"num_experts": 4, "memory_ratio": 0.75},
        "from": "the budget of model=qwen_moe for cdmoe is for a model of another shape",
        "of_shape": False,
        "open": ["removed_expert_ratio", "memory_ratio", "num_experts", "num_layers"],
    }


def test_a_folder_of_the_published_shape_has_the_published_budget(tmp_path: Path) -> None:
    chat = folder(tmp_path, vocab_size=1000, eos_token_id=3, torch_dtype="float32")
    assert sizes(composed("model=qwen_moe", f"model.path={chat}")) == {"num_experts": 4, "num_layers": 9}


def test_the_embedded_models_budget_is_not_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen2_moe().config.to_dict()))
    values = composed("model=tiny_moe", f"model.path={tmp_path}", "method=reap")
    assert sizes(values) == {"memory_ratio": 0.75} and values["recovery"]["steps"] == 200


@pytest.mark.parametrize(
    ("entry", "method", "expected"),
    [
        ("{num_layers: 2}", "cdmoe", {"num_experts": 4, "num_layers": 2}),
        ("{prune_ratio: 0.5, average_rank: 9, from: me}", "moei2", {"prune_ratio": 0.5, "average_rank": 9}),
        ("{memory_ratio: 0.9}", "reap", {"memory_ratio": 0.9}),
    ],
)
def test_an_entry_without_shape_of_is_for_the_files_model(
    entry: str, method: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen2_moe().config.to_dict()))
    (tmp_path / "model").mkdir()
    text = f"# @package _global_\ndefaults: [_base, _self_]\nmodel:\n  name: mine\n  path: {tmp_path}\n"
    (tmp_path / "model" / "mine.yaml").write_text(f"{text}  budgets: {{methods: {{{method}: {entry}}}}}\n")
    values = composed("model=mine", f"method={method}", config_dir=str(tmp_path))
    assert sizes(values) == expected
    assert values["model"]["budgets"]["from"] == ("me" if "me}" in entry else "the budgets of model=mine")
    given = f"++model.budgets.methods.{method}={entry}"
    assert sizes(composed("model=general", f"model.path={tmp_path}", f"method={method}", given)) == expected
    shaped = composed("model=qwen_moe", f"model.path={tmp_path}", f"method={method}", given)
    assert sizes(shaped)["memory_ratio"] == 0.75, "model=qwen_moe has a shape"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "+model.budgets.methods.cdmoe.num_layer=2",
            "cdmoe.num_layer=2: method=cdmoe has no such setting. Did you mean",
        ),
        ("+model.budgets.methods.cdmoe.average_rank=2", "cdmoe.average_rank=2: method=cdmoe has no such setting."),
        ("+model.budgets.methods.cdmoe.x=null", "cdmoe.x=null: method=cdmoe has no such setting."),
    ],
)
@pytest.mark.parametrize("model", ["qwen_moe", "tiny_moe"])
def test_a_budget_of_unknown_settings_is_refused(setting: str, message: str, model: str) -> None:
    problems: list[Problem] = []
    overrides = [f"model={model}", setting]
    with initialize_hydra("train", Namespace(config_path=None, config_dir=None, overrides=overrides)) as loader:
        compose_run("train", overrides, loader, problems)
    [text] = render(problems)
    assert text.startswith(f"model.budgets.methods.{message}") and "steps" not in text
    problems.clear()
    overrides.append("method=reap")  # which does not use this entry
    with initialize_hydra("train", Namespace(config_path=None, config_dir=None, overrides=overrides)) as loader:
        compose_run("train", overrides, loader, problems)
    assert problems == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods.moei={prune_ratio: 0.5}", "there is no such method. Did you mean moei2?"),
        ("methods.cdmoes={num_layers: 2}", "there is no such method. Did you mean cdmoe_s?"),
        ("method={cdmoe: {num_layers: 2}}", "there is no such setting. Did you mean methods?"),
    ],
)
def test_a_budget_of_an_unknown_method_is_refused(setting: str, message: str) -> None:
    problems: list[Problem] = []
    overrides = ["model=qwen_moe", f"+model.budgets.{setting}"]
    with initialize_hydra("train", Namespace(config_path=None, config_dir=None, overrides=overrides)) as loader:
        compose_run("train", overrides, loader, problems)
    [text] = render(problems)
    assert text.startswith(f"model.budgets.{setting.partition('=')[0]}=") and message in text


def test_a_method_of_the_users_is_known_by_its_name(tmp_path: Path) -> None:
    """Also if its file has another name, and the run another method."""
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "variant.yaml").write_text("defaults: [cdmoe]\nname: my_cdmoe\n")
    problems: list[Problem] = []
    overrides = ["model=qwen_moe", "method=moei2", "+model.budgets.methods.my_cdmoe={memory_ratio: 0.6}"]
    arguments = Namespace(config_path=None, config_dir=str(tmp_path), overrides=overrides)
    with initialize_hydra("train", arguments) as loader:
        compose_run("train", overrides, loader, problems)
    assert problems == []


def test_steps_with_settings_of_their_own_have_no_default_budget() -> None:
    steps = "method.steps=[{_target_:recondense.methods.naee.NAEE,memory_ratio:0.6}]"
    values = composed("model=qwen_moe", "method=moei2", steps)
    assert values["model"]["budgets"].get("from", "") == ""


def test_the_hash_shows_the_values_and_not_their_source() -> None:
    written = composed("model=qwen_moe", "method.num_experts=4", "method.num_layers=9")
    assert from_dict(composed("model=qwen_moe")).run_hash() == from_dict(written).run_hash()
    assert (
        from_dict(composed("model=qwen_moe")).run_hash()
        != from_dict(composed("model=qwen_moe", "method.num_layers=8")).run_hash()
    )


@pytest.mark.parametrize(
    "setting",
    [
        *("model.path=[a,b]", "model.path=3", "model.revision=3", "model.budgets=3", "model.budgets.methods=[cdmoe]"),
        *("model.budgets.default=0.5", "model.budgets.shape_of=nowhere/at_all", "model.budgets.methods.cdmoe=9"),
        *("model.pretrain=3", "model=null", "method=null"),
    ],
)
def test_settings_of_another_type_are_left_to_the_schema(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_json, "_from_hub", lambda *_: None)
    problems: list[Problem] = []
    arguments = Namespace(config_path=None, config_dir=None, overrides=[setting])
    with initialize_hydra("train", arguments) as loader:
        compose_run("train", [setting], loader, problems)
    assert [problem.setting for problem in problems if problem.setting.startswith("method.")] == []


def test_the_budgets_of_the_yamls_are_settings_that_they_fill() -> None:
    for path in sorted((CONFIGS / "model").glob("*.yaml")):
        budgets = yaml.safe_load(path.read_text()).get("model", {}).get("budgets", {})
        for method, entry in budgets.get("methods", {}).items():
            settings = composed(*([] if method == "any" else [f"method={method}"]), f"model={path.stem}")
            assert method == "any" or {**settings["method"], "from": ""} == {**settings["method"], **entry, "from": ""}
