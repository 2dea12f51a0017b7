"""An exported folder: its files, and what it computes where recondense is not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.condensed import condensed_layers
from support.small import byte_tokenizer
from support.tiny_models import bits, condense_plan, deepseek_v2, logits, qwen2_moe, recorded, same_bits, windows

from recondense.config.schema import ExportConfig
from recondense.export.write_folder import write_folder
from recondense.models.parameters import count_parameters
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Operation, Prune
from recondense.plan import History, Plan
from recondense.surgery import execute

IDS = windows(3, 11)
NEW_TOKENS = 6


@dataclass(frozen=True)
class Variant:
    kind: str
    model: Callable[[], Any]
    layers: tuple[int, ...]
    experts: tuple[int, ...] = (1, 4)
    shared_gate: float | None = 0.4
    export: ExportConfig = ExportConfig()  # noqa: RUF009
    operations: tuple[Operation, ...] = ()  # in place of condensing
    added: int = 0  # parameters: zeros of padding, or those of multiplied-out factors


LOST = 3 * sum(32 * 16 - rank * (32 + 16) for rank in (3, 5, 2))  # by RANKS, of one layer
RANKS = {name: (3, 5, None, 2) for name in ("gate_proj", "up_proj", "down_proj")}
PAIRS = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))
FOUR, THREE = (0, 2, 3, 5), (1, 2, 4)


ROOMY = ExportConfig(max_padding=0.5)


def other(kind: str, model: Callable[[], Any], *operations: Operation, **more: Any) -> Variant:
    return Variant(kind, model, (), operations=operations, **more)


VARIANTS = {
    "qwen": Variant("stock", qwen2_moe, (2, 0, 1)),
    "qwen, sparse layers left": Variant("stock", qwen2_moe, (2, 0)),
    "qwen, in shards": Variant("stock", qwen2_moe, (2,), export=ExportConfig(max_shard_size="30KB")),
    "qwen, shared expert alone": Variant("stock", qwen2_moe, (0, 1), experts=()),
    "qwen, dense layers of the same width": Variant(
        "stock", lambda: qwen2_moe(mlp_only_layers=[0], intermediate_size=24 + 2 * 16), (1,)
    ),
    "qwen, dense layers of another width": Variant("stock", lambda: qwen2_moe(mlp_only_layers=[0]), (1,), added=96 * 8),
    "qwen, zeros would cost too much": Variant(
        "bundled", lambda: qwen2_moe(mlp_only_layers=[0]), (1,), export=ExportConfig(max_padding=0.01)
    ),
    "qwen, of several widths": other(
        "stock",
        qwen2_moe,
        Condense(0, (3, 0), (0.4, 0.2), 0.5),
        Condense(1, (3,), (0.4,), 0.5),
        export=ROOMY,
        added=96 * 16,
    ),
    "qwen, block gone, stock": other(
        "stock", qwen2_moe, Drop(0, "moe"), Condense(1, (3,), (0.4,), 0.5), export=ROOMY, added=96 * 40
    ),
    "qwen, factorized, dense": other(
        "bundled", qwen2_moe, Prune(1, FOUR), Factorize(1, RANKS), export=ExportConfig(format="dense"), added=LOST
    ),
    "qwen, factorized alike, dense": other(
        "stock",
        qwen2_moe,
        *(operation for layer in range(3) for operation in (Prune(layer, FOUR), Factorize(layer, RANKS))),
        export=ExportConfig(format="dense"),
        added=3 * LOST,
    ),
    "qwen, bundled though stock could": Variant("bundled", qwen2_moe, (2, 0), export=ExportConfig(format="bundled")),
    "deepseek, condensed behind the dense ones": Variant("stock", deepseek_v2, (1,), export=ROOMY, added=96 * 16),
    "qwen, token gate": Variant("bundled", qwen2_moe, (1, 2), shared_gate=None),
    "qwen, bf16": Variant("stock", lambda: qwen2_moe().bfloat16(), (1, 2)),
    "qwen, token gate, bf16": Variant("bundled", lambda: qwen2_moe().bfloat16(), (1, 2), shared_gate=None),
    "deepseek": Variant("bundled", deepseek_v2, (1, 2), export=ExportConfig(max_padding=0.0)),
    "deepseek, sparse layers left": Variant("bundled", deepseek_v2, (2,), experts=(0, 5, 3)),
    "nothing condensed": Variant("stock", deepseek_v2, ()),
    "qwen, pruned alike": other("stock", qwen2_moe, *(Prune(layer, FOUR) for layer in range(3))),
    "qwen, pruned alike, normalized": other(
        "stock", lambda: qwen2_moe(norm_topk_prob=True), *(Prune(layer, FOUR) for layer in range(3))
    ),
    "deepseek, pruned alike": other("stock", deepseek_v2, *(Prune(layer, THREE) for layer in (1, 2))),
    "qwen, pruned and condensed": other(
        "stock", qwen2_moe, Prune(0, FOUR), Prune(2, FOUR), Condense(1, (3, 0), (0.4, 0.2), 0.5)
    ),
    "qwen, pruned unlike": other("bundled", qwen2_moe, Prune(0, FOUR), Prune(2, THREE)),
    "deepseek, pruned unlike": other("bundled", deepseek_v2, Prune(1, FOUR)),
    "qwen, factorized": other("bundled", qwen2_moe, Prune(1, FOUR), Factorize(1, RANKS)),
    "deepseek, factorized, bf16": other(
        "bundled", lambda: deepseek_v2().bfloat16(), Prune(1, FOUR), Factorize(1, RANKS), Prune(2, THREE)
    ),
    "qwen, constants": other("bundled", qwen2_moe, Constant(1, (4,)), Prune(2, FOUR)),
    "deepseek, constants": other("bundled", deepseek_v2, Constant(2, FOUR)),
    "qwen, merged": other("bundled", qwen2_moe, Merge(1, *PAIRS)),
    "deepseek, merged": other("bundled", deepseek_v2, Merge(2, *PAIRS)),
    "qwen, layer gone": other("stock", qwen2_moe, Drop(1, "layer")),
    "qwen, layer gone, others pruned": other("stock", qwen2_moe, Drop(1, "layer"), Prune(0, FOUR), Prune(2, FOUR)),
    "qwen, layer gone before a dense one": other(
        "stock", lambda: qwen2_moe(mlp_only_layers=[2], num_hidden_layers=4), Drop(1, "layer")
    ),
    "deepseek, layer gone": other("stock", deepseek_v2, Drop(1, "layer")),
    "qwen, block gone": other("bundled", qwen2_moe, Drop(0, "moe"), export=ExportConfig(max_padding=0.0)),
    "qwen, a bit of everything": other(
        "bundled",
        lambda: qwen2_moe(num_hidden_layers=6),
        Drop(0, "moe"),
        Drop(1, "layer"),
        Prune(2, FOUR),
        Factorize(2, RANKS),
        Merge(3, *PAIRS),
        Condense(4, (3, 0), (0.4, 0.2), None),
        Prune(5, THREE),
    ),
}

# Runs where recondense cannot be imported: what every folder computes, or why it does not load.
ELSEWHERE = """
import json, sys
sys.modules["recondense"] = None
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    bundled = (folder / "modeling_recondense.py").exists()
    result = {"bundled": bundled}
    if bundled:
        for name, load in (("refused", AutoModelForCausalLM), ("config refused", AutoConfig)):
            try:
                load.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:
                result[name] = f"{type(error).__name__}: {error}"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **({"trust_remote_code": True} if bundled else {})
    )
    model.eval()
    result["loading"] = {name: sorted(map(str, value)) for name, value in info.items() if value}
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result["dtype"] = str(model.dtype)
    ids = torch.load(sys.argv[2], weights_only=True)
    with torch.no_grad():
        result["logits"] = model(input_ids=ids).logits.float().tolist()
        result["generated"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            use_cache=True,
        ).tolist()
    results[folder.name] = result
assert sys.modules["recondense"] is None
Path(sys.argv[3]).write_text(json.dumps(results))
""".replace("NEW", str(NEW_TOKENS))


def student(variant: Variant) -> tuple[Any, Plan]:
    model = variant.model()
    plan = condense_plan(model, variant.layers, variant.experts, variant.shared_gate)
    if variant.operations:
        plan = Plan("tiny", variant.operations)
    execute.execute(model, plan, lambda: recorded(model))
    return model.eval(), plan


def settings(model: Any) -> dict[str, Any]:
    """The config, without what transformers adds to it when it saves."""
    return {name: value for name, value in model.config.to_dict().items() if name not in ("architectures", "dtype")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant, exported; exporting must not change the live model."""
    root = tmp_path_factory.mktemp("exports") / "all"
    for name, variant in VARIANTS.items():
        model, plan = student(variant)
        before, config, blocks = bits(model), settings(model), list(model.modules())
        kind = write_folder(model, None, plan, root / name, f"# {name}\n", variant.export)
        assert kind == variant.kind, name
        assert same_bits(before, bits(model)) and settings(model) == config and list(model.modules()) == blocks
    return root


@pytest.fixture(scope="module")
def elsewhere(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without recondense computes from the folders."""
    work = tmp_path_factory.mktemp("elsewhere")
    torch.save(IDS, work / "ids.pt")
    environment = {**os.environ, "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folders), str(work / "ids.pt"), str(work / "results.json")],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=work,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads((work / "results.json").read_text())
    return results


@pytest.mark.parametrize("name", VARIANTS)
def test_computes_the_same_elsewhere(name: str, elsewhere: dict[str, Any]) -> None:
    variant, result = VARIANTS[name], elsewhere[name]
    model, _ = student(variant)
    expected = logits(model, IDS).float()
    actual = torch.tensor(result["logits"])
    if "bf16" in name:  # folding rounds once more
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert result["loading"] == {}  # no missing, unexpected or mismatched keys
    assert result["dtype"] == str(model.dtype)
    assert result["parameters"] == count_parameters(model) + variant.added
    assert result["parameters"] < count_parameters(variant.model()) or not variant.layers


@pytest.mark.parametrize("name", [name for name in VARIANTS if "bf16" not in name])
def test_generates_the_same_with_a_key_value_cache(name: str, elsewhere: dict[str, Any]) -> None:
    model, _ = student(VARIANTS[name])
    ids = IDS
    for _ in range(NEW_TOKENS):  # without a cache, one whole forward a token
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert elsewhere[name]["generated"] == ids.tolist()
    with torch.no_grad():
        live = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    assert elsewhere[name]["generated"] == live.tolist()


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.kind == "bundled"])
def test_a_bundled_folder_does_not_load_by_mistake(name: str, elsewhere: dict[str, Any], folders: Path) -> None:
    """Without trust_remote_code there is an error, and not the stock class with random weights."""
    for what in ("refused", "config refused"):
        assert "trust_remote_code" in elsewhere[name][what]
    source = (folders / name / "modeling_recondense.py").read_text()
    assert "import recondense" not in source and "from recondense" not in source
    config = json.loads((folders / name / "config.json").read_text())
    assert config["model_type"].startswith("recondense_") and config["architectures"] == ["CompressedForCausalLM"]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_folder_holds(name: str, folders: Path) -> None:
    variant, folder = VARIANTS[name], folders / name
    model, plan = student(variant)
    written = Plan.load(folder / "plan.json")
    assert replace(written, history=History()) == plan
    dropped = [
        operation.layer for operation in plan.operations if isinstance(operation, Drop) and operation.part == "layer"
    ]
    moved = [layer for layer in range(model.config.num_hidden_layers) if layer not in dropped]
    if variant.kind == "stock" and moved != list(range(len(moved))):
        assert written.history == History(plan.operations, tuple(moved))
    else:
        assert written.history == History()
    card = (folder / "README.md").read_text()
    assert card.startswith(f"# {name}\n\n## Load it\n")
    assert ("trust_remote_code=True" in card) == (folder / "modeling_recondense.py").exists()
    assert (folder / "generation_config.json").exists() and list(folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) > 1 or variant.export.max_shard_size == ExportConfig().max_shard_size
    assert not list(folder.glob("*.bin")) and not list(folder.glob(".*"))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 1.2 * model.get_memory_footprint() + 4e4
    if variant.kind == "stock":
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == model.config.model_type and "auto_map" not in config
        if variant.layers and "mlp_only_layers" in config:
            assert set(variant.layers) <= set(config["mlp_only_layers"])
            condensed = condensed_layers(model)
            (width,) = {block.down_proj.in_features for block in condensed.values()}
            assert config["intermediate_size"] == width
        elif variant.layers:
            assert config["first_k_dense_replace"] == 2 and config["intermediate_size"] == 32 + 2 * 16


def test_trained_scales_are_folded_not_lost(tmp_path: Path) -> None:
    """A stock folder has no place for scales: it stores the product, computed in fp32 and then rounded."""
    from safetensors.torch import load_file

    model, plan = student(VARIANTS["qwen, bf16"])
    write_folder(model, None, plan, tmp_path / "out", "")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    block = condensed_layers(model)[1]
    assert block.scale is not None
    expected = (block.down_proj.weight.double() * block.scale.double()).bfloat16()
    assert torch.equal(stored["model.layers.1.mlp.down_proj.weight"], expected)
    assert not any("scale" in name for name in stored)


def test_a_list_that_happens_to_be_as_long_as_the_model_is_deep_is_kept(tmp_path: Path) -> None:
    """Only lists with an entry for every layer lose those of dropped layers: two end tokens are not two layers."""
    model = qwen2_moe(num_hidden_layers=2, eos_token_id=[5, 6])
    plan = Plan("tiny", (Drop(1, "layer"),))
    execute.execute(model, plan)
    assert write_folder(model, None, plan, tmp_path / "out", "") == "stock"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [5, 6]
    assert config["num_hidden_layers"] == 1 and config["layer_types"] == ["full_attention"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [5, 6]


def test_the_model_card_may_depend_on_the_written_folder(tmp_path: Path) -> None:
    """It is written once, after the weights; the code that loads the folder follows it."""
    model, plan = student(VARIANTS["qwen"])
    sizes = []

    def card(folder: Path) -> str:
        assert not (folder / "README.md").exists()
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        return f"# {sizes[-1]} bytes\n"

    write_folder(model, None, plan, tmp_path / "out", card)
    assert sizes == [(tmp_path / "out" / "model.safetensors").stat().st_size]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme.startswith(f"# {sizes[0]} bytes\n\n## Load it\n") and "trust_remote_code" not in readme


TOKENIZER = """
import sys, time
sys.modules["recondense"] = None
from transformers import AutoTokenizer
started = time.perf_counter()
for line in sys.stdin:
    print(eval(line)("a b").input_ids)
assert time.perf_counter() - started < 10  # transformers waits 15 seconds for an answer
"""


def test_the_tokenizer_of_a_bundle_loads_without_a_question(tmp_path: Path) -> None:
    """By the line in the folder's README, and by trust_remote_code=False without running code of the folder."""
    tokenizer, lines = byte_tokenizer(), []
    for name in ("qwen, token gate", "qwen"):
        model, plan = student(VARIANTS[name])
        write_folder(model, tokenizer, plan, tmp_path / name, "")
        (line,) = re.findall(r"^tokenizer = (.*)", (tmp_path / name / "README.md").read_text(), re.MULTILINE)
        assert ("trust_remote_code=True" in line) is (name == "qwen, token gate")
        lines.append(line.replace("FOLDER", repr(str(tmp_path / name))))
    shutil.copytree(tmp_path / "qwen, token gate", tmp_path / "not run")
    (tmp_path / "not run" / "modeling_recondense.py").write_text("raise SystemExit('the code runs')")
    lines.append(f"AutoTokenizer.from_pretrained({str(tmp_path / 'not run')!r}, trust_remote_code=False)")
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZER], input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout == 3 * f"{tokenizer('a b').input_ids}\n" and "Do you wish to run" not in done.stdout + done.stderr
    )
