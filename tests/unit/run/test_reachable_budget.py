"""A default budget is never out of a method's reach, and a run says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.composed import composed
from support.tiny_models import FAMILIES, qwen2_moe

import recondense as rc
from recondense.config.schema import Config, from_dict
from recondense.run.build_steps import build_steps
from recondense.run.model_and_machine_checks import preflight
from recondense.run.reachable_budget import lines, reachable
from recondense.run.resolved_run import Run
from recondense.run.search_path import CONFIGS

BUDGETED = sorted(path.stem for path in (CONFIGS / "method").glob("[!_]*.yaml") if path.stem != "none")
SMALL_EXPERTS = {"vocab_size": 4000, "moe_intermediate_size": 8}  # most of the model are its embeddings


def config(folder: Path, *overrides: str, family: Any = qwen2_moe, **settings: Any) -> Config:
    """The config of a command for a tiny model."""
    (folder / "config.json").write_text(json.dumps(family(**settings).config.to_dict()))
    return from_dict(composed(f"model.path={folder}", "plan_only=true", *overrides))


def problems(config: Config) -> list[str]:
    return [f"{problem}" for problem in preflight(Run(config, (), build_steps(config.method)))]


@pytest.mark.parametrize("method", BUDGETED)
def test_every_method_reaches_its_default(method: str, tmp_path: Path) -> None:
    """Also where 0.75 is out of reach, because the experts are a small part of the model."""
    narrowable = {"moe_intermediate_size": 16} if method == "narrow" else {}  # eight channels cannot become fewer
    before = config(tmp_path, f"method={method}", **{**SMALL_EXPERTS, **narrowable})
    after = reachable(before)
    assert problems(after) == []
    ratio = after.method["memory_ratio"]
    assert ratio > before.method["memory_ratio"] == 0.75
    line = lines(after)[-1]
    assert f"memory_ratio={ratio}, the nearest to 0.75 that {method} reaches on this model, memory 0." in line
    sizes = rc.plan_only(tmp_path, build_steps(after.method))
    assert sizes.after.total <= ratio * sizes.before.total
    with pytest.raises(rc.UserError):  # the next smaller ratio
        rc.plan_only(tmp_path, build_steps({**after.method, "memory_ratio": round(ratio - 1e-4, 4)}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["cdmoe", "reap", "svd_llm", "block_drop"])
def test_every_family_has_a_default(family: str, method: str, tmp_path: Path) -> None:
    after = reachable(config(tmp_path, f"method={method}", family=FAMILIES[family]))
    assert problems(after) == []


@pytest.mark.parametrize(
    ("experts", "top_k", "method", "expected"),
    [
        (3, 2, "cdmoe", {"num_experts": 1}),
        (4, 2, "cdmoe", {"num_experts": 2}),
        (8, 2, "cdmoe", {"num_experts": 4}),
        (8, 7, "moei2", {"prune_ratio": 0.125}),
        (8, 2, "moei2", {"prune_ratio": 0.25}),
    ],
)
def test_numbers_of_experts_fit_the_model(
    experts: int, top_k: int, method: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"num_experts": experts, "num_experts_per_tok": top_k}
    after = reachable(config(tmp_path, f"method={method}", **settings))
    assert {name: after.method[name] for name in expected} == expected
    assert problems(after) == []


@pytest.mark.parametrize("setting", ["method.memory_ratio=0.1", "method.num_experts=7", "method.num_layers=9"])
def test_a_value_of_the_user_stays_and_is_refused(setting: str, tmp_path: Path) -> None:
    after = reachable(config(tmp_path, setting, "method=cdmoe"))
    name, _, value = setting.removeprefix("method.").partition("=")
    assert str(after.method[name]) == value and problems(after) != []


def test_a_reachable_default_and_the_embedded_model_stay(tmp_path: Path) -> None:
    settled = config(tmp_path, "method=reap")
    assert reachable(settled) == settled
    embedded = from_dict(composed())
    assert reachable(embedded) is embedded


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"num_hidden_layers": "many"}, {"hidden_size": 7}])
def test_a_model_that_cannot_be_read_is_left_to_the_checks(change: dict[str, Any], tmp_path: Path) -> None:
    values = qwen2_moe().config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    unread = from_dict(composed(f"model.path={tmp_path}", "method=cdmoe"))
    assert reachable(unread).method["memory_ratio"] == 0.75


def test_the_lines_of_a_run(tmp_path: Path) -> None:
    family, budget = lines(reachable(config(tmp_path, "method=reap")))
    chosen = f"model: {tmp_path} is a qwen2_moe, so model=qwen_moe is used (model=... to choose another); "
    assert family == f"{chosen}data=c4; recovery: distill, 1250 steps of 8, learning rate 1e-05"
    assert budget.startswith("budget: memory_ratio=0.75, memory 0.7")
    assert budget.endswith("(no published row for qwen_moe and reap; to change it: method.memory_ratio)")
    other = lines(reachable(config(tmp_path, "method=cdmoe", "model=qwen_moe")))
    assert "(the budget of model=qwen_moe for cdmoe is for a model of another shape; to change it: " in other[0]
    assert lines(from_dict(composed("model=qwen_moe"))) == [
        "budget: 9 layers with 4 experts, memory 0.6954 (published, arXiv 2412.00069, E(4+4); "
        "to change it: method.num_experts, method.num_layers)"
    ]
    assert lines(from_dict(composed("model=qwen_moe", "method.memory_ratio=0.7"))) == []
    assert lines(from_dict(composed("method=none"))) == []
    assert lines(from_dict(composed("experiment=demo"))) == []


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("olmoe", ["recovery=none"], "is an olmoe, so model=olmoe is used (*); data=c4; recovery: none"),
        ("mixtral", ["data=texts"], "is a mixtral, so model=mixtral is used (*); data=texts; recovery: distill, 1250"),
        ("dots1", ["recovery=finetune", "recovery.epochs=2"], "is a dots1, so model=general is used (*); data=c4; "
         "recovery: finetune, 2 epochs of 8, learning rate 1e-05"),
        ("qwen2_moe", ["recovery.stages=[{steps: 3}, {steps: 4}]"], "is a qwen2_moe, so model=qwen_moe is used (*); "
         "data=c4; recovery: 2 stages"),
    ],
)  # fmt: skip
def test_the_line_of_a_family(family: str, settings: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 32, "num_hidden_layers": 1}))
    [line, *_] = lines(from_dict(composed(f"model.path={tmp_path}", "plan_only=true", *settings)))
    assert line.startswith(f"model: {tmp_path} {expected.replace('*', 'model=... to choose another')}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "method.num_layers=all",
            "4 experts (published, arXiv 2412.00069, E(4+4)); with your num_layers=all: memory 0.18",
        ),
        ("method.num_experts=2", "9 layers (published, arXiv 2412.00069, E(4+4)); with your num_experts=2: memory 0.6"),
        (
            "method=moei2 method.ratio=0.5",
            "prune_ratio=0.25 (experiment=paper/moei2_qwen); with your ratio=0.5: memory",
        ),
        ("method.num_layers=6 method.num_experts=2", None),
    ],
)
def test_a_row_of_which_the_user_replaces_a_part(arguments: str, expected: str | None) -> None:
    """The memory is not that of the row."""
    texts = lines(from_dict(composed("model=qwen_moe", *arguments.split())))
    assert [text.startswith(f"budget: {expected}") for text in texts] == [True] * (expected is not None)


def test_the_name_of_a_method_in_python_means_the_same(tmp_path: Path) -> None:
    sizes = rc.plan_only("deepseek-ai/deepseek-moe-16b-base", "cdmoe")
    assert round(sizes.after.total / sizes.before.total, 4) == 0.7242
    config(tmp_path, **SMALL_EXPERTS)
    assert rc.plan_only(tmp_path, "reap").after.total < rc.plan_only(tmp_path, "reap").before.total
    embedded = composed()["model"]["pretrain"]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_moe", "vocab_size": 2048, **embedded["config"]})
    )
    assert len(rc.plan_only(tmp_path, "cdmoe").operations) == 6
