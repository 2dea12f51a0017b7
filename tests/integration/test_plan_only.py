"""`train.py plan_only=true`: for every model of conf/model, without weights, texts, a tokenizer or the hub."""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import one_command
from support.tiny_models import qwen2_moe

from recondense import offline
from recondense.models import families, loading
from recondense.models.published_configs import recorded_values
from recondense.run.model_checks import planned_config

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    for path in sorted((ROOT / "conf" / "model").glob("[!_]*.yaml"))
    if path.stem != "general"
}
RANK_2048 = ("method.average_rank=2048",)
Sizes = Callable[..., tuple[int, str, str, dict[str, Any]]]


def model_type(name: str) -> str:
    path = MODELS[name]["path"]
    return str(recorded_values(path)["model_type"]) if path else "qwen2_moe"


def supported(name: str) -> Any:
    """A mark that skips, with the reason, if a model's family is not supported."""
    missing = model_type(name) not in families.FAMILIES
    return pytest.mark.skipif(missing, reason=f"model_type {model_type(name)} is not supported")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Sizes:
    """Runs a command with plan_only=true and without network; returns its exit code, stdout, stderr and summary."""
    import train

    def refused(*arguments: object, **settings: object) -> None:
        pytest.fail("the command used the network or loaded a model")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(offline, "hub_access", refused)
    monkeypatch.setattr(loading, "load", refused)

    def run(*arguments: str) -> tuple[int, str, str, dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["train.py", *arguments, "plan_only=true", f"output_dir={tmp_path}/out"])
        code = 0
        try:
            with one_command():
                train.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        output = capsys.readouterr()
        summaries = list(tmp_path.glob("out/default/*-plan_only/summary.json"))
        return code, output.out, output.err, json.loads(summaries[0].read_text()) if summaries else {}

    return run


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, sizes: Sizes, tmp_path: Path) -> None:
    """A model of a family that is not supported is refused with the reason."""
    experts = ["method.num_experts=2", "method.num_layers=all"]
    code, output, errors, summary = sizes(f"model={name}", "method=cdmoe", *experts)
    if model_type(name) not in families.FAMILIES:
        assert code == 2 and f"{model_type(name)!r} is not supported" in errors
        return
    assert code == 0, errors
    assert (summary["schema"], summary["model"], summary["method"]) == (1, name, "cdmoe")
    assert summary["plan_only"] and summary["stages"] == {}
    total, bytes_of = summary["parameters"]["total"], summary["weights_bytes"]
    assert total["compressed"] < total["original"]
    assert summary["ratios"]["memory"] == bytes_of["compressed"] / bytes_of["original"]
    layers = len(families.facts(_planned(name)).moe_layers)
    assert summary["operations"]["condense"] | {"of": 0} == {"layers": layers, "retained": 2 * layers, "of": 0}
    assert f"{total['compressed']:,}" in output and "always active" in output and "decided by the search" in output
    [folder] = tmp_path.glob("out/default/*")
    assert {path.name for path in folder.iterdir()} <= {".lock", "config.yaml", "summary.json"}


def _planned(name: str) -> Any:
    from recondense.config.schema import from_dict

    return planned_config(from_dict({"model": MODELS[name]}).model, plan_only=True)


@pytest.mark.parametrize(
    ("name", "experts", "computed", "published"),
    [
        pytest.param("deepseek_moe", 6, 0.7242, "0.725", marks=supported("deepseek_moe")),
        ("qwen_moe", 4, 0.6954, "0.697"),
    ],
)
def test_the_published_memory_of_nine_layers(
    name: str, experts: int, computed: float, published: str, sizes: Sizes
) -> None:
    """CD-MoE's E(2+6) of DeepSeekMoE-16B and E(4+4) of Qwen1.5-MoE are the default of their models."""
    code, output, errors, summary = sizes(f"model={name}", "method=cdmoe")
    assert code == 0, errors
    assert round(summary["ratios"]["memory"], 4) == computed
    assert summary["operations"]["condense"]["layers"] == 9
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert lines[0].startswith(
        f"budget: 9 layers with {experts} experts, memory {computed} (published, arXiv 2412.00069"
    )
    [row] = [line for line in lines if line.startswith(f"cdmoe: shared+{experts}, 9 layers {computed} {published}")]
    assert row.endswith("as this run") and f"this run {computed}" in lines
    assert sum(line.endswith("as this run") for line in lines) == 1
    assert sum(line.startswith("cdmoe: shared+") for line in lines) >= 10  # E(2+6), E(2+0): 3, 6, 9, 12, 15 layers


@pytest.mark.parametrize(
    ("name", "settings", "cut", "gibibytes"),
    [
        ("deepseek_v2_lite", (), "53.98% 53.98%", "14.78"),
        pytest.param("mixtral", RANK_2048, "51.79% 50.00%", "43.49", marks=supported("mixtral")),
    ],
)
def test_the_published_cuts_of_moei2(
    name: str, settings: tuple[str, ...], cut: str, gibibytes: str, sizes: Sizes
) -> None:
    code, output, errors, summary = sizes(f"model={name}", "method=moei2", *settings)
    assert code == 0, errors
    removed_ratio = 1 - summary["ratios"]["routed_expert_parameters"]
    assert f"{removed_ratio:.2%}" == cut.split()[0]
    assert f"{summary['weights_bytes']['compressed'] / 2**30:.2f}" == gibibytes
    assert any(f"{cut} {gibibytes}" in " ".join(line.split()) for line in output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        (["model=qwen_moe", "method=cdmoe_s"], "cdmoe: shared+0, 6 layers 0.7824 0.783 62.6 as this run"),
        (["model=deepseek_moe", "method=cdmoe_s"], "cdmoe: shared+0, 8 layers 0.7295 0.731 55.1 59.1 as this run"),
        (["model=qwen_moe", "method.num_layers=8"], "cdmoe: shared+4, 9 layers 0.6954 0.697 60.2 nearest"),
        (["model=deepseek_moe", "method=layer_drop"], "layer_drop: 8 layers 0.722 49.4 as this run"),
        (["model=deepseek_moe", "method=block_drop"], "block_drop: 8 layers 0.713 52.2 as this run"),
        (
            ["model=mixtral", "method=moei2"],
            "moei2: 50% of the experts' parameters cut 51.79% 50.00% 43.49 64.55 as this run",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_published_row_of_a_default_budget(arguments: list[str], row: str, sizes: Sizes) -> None:
    code, output, errors, _ = sizes(*arguments)
    assert code == 0, errors
    assert row in [" ".join(line.split()) for line in output.splitlines()]


@pytest.fixture(scope="module")
def budgets() -> Any:
    spec = importlib.util.spec_from_file_location("budgets", ROOT / "docs" / "budgets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["tiny_moe", "qwen_moe", "gpt_oss"])
def test_rows_of_the_table_of_default_budgets(budgets: Any, model: str) -> None:
    """docs/methods.md has what the commands do; `python docs/budgets.py` writes it."""
    text = budgets.PAGE.read_text(encoding="utf-8")
    for method in budgets.METHODS if model == "tiny_moe" else ("cdmoe", "moei2"):
        assert f"| {' | '.join(budgets.row(model, method))} |" in text


@pytest.mark.slow
def test_the_table_of_default_budgets(budgets: Any) -> None:
    text = budgets.PAGE.read_text(encoding="utf-8")
    assert text == budgets.written(text)
    assert text.count("| `cdmoe_moei2` |") == len(MODELS) + 1 and "| 0.7242 | 0.6979 | 9 | 6 of 64 |" in text


def test_a_folder_needs_only_its_config(sizes: Sizes, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(qwen2_moe().config.to_dict()))
    code, output, errors, summary = sizes("method=moei2", "method.average_rank=5", f"model.path={folder}")
    assert code == 0, errors
    assert summary["operations"]["factorize"]["mean"] == 5
    assert "how many experts each layer loses" in output


def test_texts_are_not_needed(sizes: Sizes) -> None:
    code, _, errors, summary = sizes("data=texts", "method=layer_drop", "evaluation.tasks=[no_such_task]")
    assert code == 0, errors
    assert summary["operations"]["drop_moe"]["layers"] == 2


def test_none_changes_nothing(sizes: Sizes) -> None:
    code, output, errors, summary = sizes("method=none", "recovery=none")
    assert code == 0, errors
    assert summary["ratios"] == {"memory": 1.0, "routed_expert_parameters": 1.0}
    assert "nothing changed" in output and "decided by the search" not in output


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("method=cdmoe", "method.num_layers=2"), "which layers and experts: decided by the search"),
        (("method=cdmoe", "method.num_layers=[0,2]"), "which experts: decided by the search"),
        (("method=reap",), "which experts: decided by the search"),
        (("method=layer_drop",), "which layers: decided by the search"),
        (("method=cdmoe_s",), ""),
    ],
)
def test_what_calibration_decides(sizes: Sizes, settings: tuple[str, ...], expected: str) -> None:
    code, output, errors, _ = sizes(*settings)
    assert code == 0, errors
    lines = [line.partition(";")[0] for line in output.splitlines() if "decided by the search" in line]
    assert lines == [expected] * bool(expected)


def test_the_same_command_again(sizes: Sizes, tmp_path: Path) -> None:
    """The run itself would have another folder, which does not exist."""
    first = sizes("method=reap")
    assert sizes("method=reap") == first
    assert [path.name.endswith("-plan_only") for path in tmp_path.glob("out/default/*")] == [True]


def test_sizes_of_one_model_are_composed_once(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra would compose again, which takes a part of a second."""
    monkeypatch.setattr("hydra.main", lambda **_: pytest.fail("Hydra is asked again"))
    code, output, errors, _ = sizes("model=tiny_moe")
    assert code == 0 and "sizes: " in output, errors


def test_the_sizes_of_several_rounds_are_those_after_the_last(sizes: Sizes) -> None:
    arguments = "model=qwen_moe", "method=reap", "method.memory_ratio=0.6"
    once, thrice = (sizes(*arguments, f"method.rounds={count}") for count in (1, 3))
    assert once[0] == thrice[0] == 0
    assert thrice[3]["parameters"] == once[3]["parameters"] and thrice[3]["operations"] == once[3]["operations"]
    assert "rounds: 3; these are the sizes after the last one" in thrice[1] and "rounds:" not in once[1]
