"""An export is checked before it gets its name: what transformers loads from it is the model that was exported."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_moe import EVEN, UNEVEN
from support.small import byte_tokenizer
from support.tiny_models import EVERY, condense_plan, recorded, unchanged
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    Qwen2TokenizerFast,
    dynamic_module_utils,
)

import recondense as rc
from recondense.config.schema import ExportConfig
from recondense.errors import UserError, WrongExport
from recondense.export import verify
from recondense.export import write_folder as export_module
from recondense.export.write_folder import write_folder
from recondense.models import families, reload
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute
from recondense.surgery.student import Student

State = dict[str, Tensor]
Change = Callable[[str, Tensor], tuple[str, Tensor]]
FOUR = (0, 2, 3, 5)
RANKS = {name: (4, 4, None, 4) for name in ("gate_proj", "up_proj", "down_proj")}
EQUAL = dict.fromkeys(RANKS, (4,) * 6)
PAIRS = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))
SIX = ("qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "mixtral", "gpt_oss")
FORMATS = ("auto", "stock", "bundled", "dense")


def operations_of(family: str) -> dict[str, tuple[Operation, ...]]:
    layers = families.facts(EVERY[family]().config).moe_layers
    last = layers[-1]
    return {
        "unchanged": (),
        "pruned": tuple(Prune(layer, FOUR) for layer in layers),
        "condensed": condense_plan(EVERY[family](), layers[:1]).operations,
        "merged": (Merge(last, *PAIRS),),
        "constants": (Constant(last, FOUR),),
        "factorized": (Prune(last, FOUR), Factorize(last, RANKS)),
        "narrowed": tuple(Narrow.from_channels(layer, EVEN) for layer in layers),
        "narrowed unlike": (Prune(last, FOUR), Narrow.from_channels(last, UNEVEN[:4])),
        "block dropped": (Drop(last, "moe"),),
        "layer dropped": (Drop(1 if family == "gpt_oss" else last, "layer"),),
    }


def student(family: str, *operations: Operation, dtype: torch.dtype = torch.float32) -> Any:
    model = EVERY[family]().to(dtype)
    execute.execute(model, Plan("tiny", operations), lambda: recorded(model))
    return model


def write(model: Any, folder: Path, tokenizer: Any = None, card: str = "", **settings: Any) -> str:
    return write_folder(model, tokenizer, Plan("tiny"), folder, card, ExportConfig(**settings))


def compared(caplog: pytest.LogCaptureFixture) -> int:
    """How many folders were loaded again."""
    return sum("loaded again and computes the same" in record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("form", ["stock", "bundled"])
@pytest.mark.parametrize("family", SIX)
def test_families_pass(family: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Six families, each as its own class and as a bundle; the student is untouched."""
    caplog.set_level(logging.INFO)
    model = student(family, *operations_of(family)["pruned"])
    with unchanged(model):
        assert write(model, tmp_path / "out", format=form, verify="logits") == form
    assert compared(caplog) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_every_operation_passes_in_every_format(
    family: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kinds = set()
    for operations in operations_of(family).values():
        for form in FORMATS:
            caplog.clear()
            try:
                kinds.add(write(student(family, *operations, dtype=dtype), tmp_path / "out", format=form))
            except UserError:
                assert form == "stock"
                continue
            assert compared(caplog) == 1
    assert kinds == {"stock", "bundled"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_difference(dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scales are folded into half-precision weights, and factors multiplied out."""
    caplog.set_level(logging.INFO)
    condensed = condense_plan(EVERY["qwen2_moe"](), (0, 1)).operations
    write(student("qwen2_moe", *condensed, dtype=dtype), tmp_path / "condensed")
    write(student("qwen2_moe", Factorize(0, EQUAL), dtype=dtype), tmp_path / "dense", format="dense")
    assert compared(caplog) == 2


def test_a_model_that_gives_no_numbers_is_exported_as_it_is(tmp_path: Path) -> None:
    model = student("qwen2_moe")
    model.model.layers[1].mlp.experts.down_proj.data[2] = torch.nan
    assert write(model, tmp_path / "out", verify="logits") == "stock"


# ------------------------------------------------------------------------------------------------- what is wrong

NAMES: dict[str, tuple[Change, str]] = {
    "names": (lambda name, value: (name.replace("q_proj", "q_proj.base_layer"), value), r"missing.*unexpected.*base_"),
    "shapes": (lambda name, value: (name, value[:, :16].clone() if "o_proj" in name else value), "3 other shapes: .*"),
    "one": (lambda name, value: (name.replace("lm_head", "head"), value), "1 missing: lm_head.weight; 1 unexp"),
    "prefix": (lambda name, value: (f"_orig_mod.{name}", value), "missing.*unexpected: _orig_mod"),
    "dtype": (lambda name, value: (name, value.half() if "o_proj" in name else value), "as F16, but its config says"),
}


def changing_pieces(monkeypatch: pytest.MonkeyPatch, change: Callable[[State], State]) -> None:
    """Let exports write other weights than those of the student."""
    pieces = export_module.pieces

    def changed(*args: Any) -> Iterator[State]:
        return (change(dict(piece)) for piece in pieces(*args))

    monkeypatch.setattr(export_module, "pieces", changed)


def refused(model: Any, folder: Path, message: str, tokenizer: Any = None, **settings: Any) -> None:
    """Writing fails. An earlier export stays as it is, and without one nothing is left."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("before")
    for _ in range(2):
        before = [path.name for path in folder.iterdir()] if folder.exists() else None
        with pytest.raises(WrongExport, match=message) as error:
            write(model, folder, tokenizer, "after", **settings)
        assert str(error.value).startswith(f"{folder} was not written, because ")
        assert "report it" in str(error.value) and "export.verify=shapes" in str(error.value)
        assert (before is None) == (not folder.exists())
        assert before is None or [path.name for path in folder.iterdir()] == before
        assert before is None or (folder / "README.md").read_text() == "before"
        assert list(folder.parent.iterdir()) == ([] if before is None else [folder])
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("form", ["stock", "bundled", "dense"])
@pytest.mark.parametrize("kind", NAMES)
def test_an_export_that_would_not_load_gets_no_name(
    form: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its names, shapes and dtypes alone."""
    change, message = NAMES[kind]
    operations: dict[str, Operation] = {"bundled": Prune(0, FOUR), "dense": Factorize(0, EQUAL)}
    model = student("qwen2_moe", *([operations[form]] if form in operations else []))
    changing_pieces(monkeypatch, lambda piece: dict(change(*item) for item in piece.items()))
    refused(model, tmp_path / "out", f"its files do not match .*{message}|{message}", format=form, verify="shapes")


def swap_experts(piece: State) -> State:
    one, other = "layers.1.mlp.experts.2.", "layers.1.mlp.experts.4."
    return {
        name.replace(one, other) if one in name else name.replace(other, one): value for name, value in piece.items()
    }


def change_one(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    """Change the tensors with a part of a name."""
    return lambda piece: {name: change(value) if part in name else value for name, value in piece.items()}


def zero(part: str) -> Callable[[State], State]:
    return change_one(part, torch.zeros_like)


WEIGHTS: dict[str, tuple[str, Callable[[State], State], str]] = {
    "two experts swapped": ("qwen2_moe", swap_experts, "of decoder layer 1 differ"),
    "two experts swapped, v3": ("deepseek_v3", swap_experts, "of decoder layer 1 differ"),
    "attention without biases": ("qwen2_moe", zero("layers.2.self_attn.q_proj.bias"), "decoder layer 2"),
    "experts without biases": ("gpt_oss", zero("layers.1.mlp.experts.down_proj_bias"), "decoder layer 1"),
    "without correction": ("deepseek_v3", zero("layers.1.mlp.gate.e_score_correction_bias"), "decoder layer 1"),
    "router forgotten": ("olmoe", zero("layers.0.mlp.gate."), "decoder layer 0"),
    "one norm forgotten": ("mixtral", zero("layers.2.input_layernorm"), "decoder layer 2"),
    "square weight transposed": (
        "qwen2_moe", change_one("layers.0.self_attn.o_proj", lambda value: value.T.contiguous()), "decoder layer 0",
    ),
    "other head": ("qwen2_moe", change_one("lm_head", lambda value: value.flip(0)), "head"),
    "other embedding": ("ernie4_5_moe", change_one("embed_tokens", lambda value: value.roll(1, 0)), "decoder layer 0"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_export_of_another_model_gets_no_name(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes are right, but transformers computes something else from it."""
    family, change, part = WEIGHTS[kind]
    model = student(family, dtype=dtype)
    if kind == "attention without biases":
        model.model.layers[2].self_attn.q_proj.bias.data.normal_()
    changing_pieces(monkeypatch, change)
    refused(model, tmp_path / "out", f"transformers computes something else from it: .*{part}", verify="logits")
    write(model, tmp_path / "unseen", verify="shapes")
    assert (tmp_path / "unseen" / "config.json").exists()


DIFFERS = "transformers computes something else"
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fewer experts per token": ("qwen2_moe", {"num_experts_per_tok": 1}, DIFFERS),
    "normalized": ("qwen2_moe", {"norm_topk_prob": True}, DIFFERS),
    "not normalized": ("qwen3_moe", {"norm_topk_prob": False}, DIFFERS),
    "not scaled": ("deepseek_v2", {"routed_scaling_factor": 1.0}, DIFFERS),
    "other positions": ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, DIFFERS),
    "other window": ("gpt_oss", {"sliding_window": 3}, DIFFERS),
    "untied": ("ernie4_5_moe", {"tie_word_embeddings": False}, "1 missing: lm_head.weight"),
    "no layer": ("olmoe", {"num_hidden_layers": 2}, "unexpected: model.layers.2"),
}


@pytest.mark.parametrize("form", ["stock", "bundled"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_config_gets_no_name(kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, values, message = CONFIGS[kind]
    write_config = export_module._write_config

    def changed(model: Any, shapes: Any, stock: Any, folder: Path) -> None:
        write_config(model, shapes, stock, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    monkeypatch.setattr(export_module, "_write_config", changed)
    refused(student(family), tmp_path / "out", message, format=form, verify="logits")


def test_a_bundle_is_checked_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modeling file decides, not the classes that recondense has registered under the same name."""
    model = student("qwen2_moe", Condense(1, (1, 4), (0.3, 0.4), None), Merge(0, *PAIRS))
    write(model, tmp_path / "right")
    rc.load(tmp_path / "right", tokenizer=_tokenizer_folder(tmp_path))  # registers the class
    source = export_module._bundle_source
    for right, wrong in (
        ("token_gate * shared", "shared"),
        ("self.table[top_k_index]", "self.table[top_k_index * 0]"),
        ("RemappedRouter(router, torch.zeros(router_rows", "RemappedRouter(router, torch.zeros(1 + router_rows"),
        ("def reshape(", "def reshaped("),
        ("return (output, None) if self.pair else output", "return self.missing"),
    ):
        monkeypatch.setattr(
            export_module, "_bundle_source", lambda *args, old=right, new=wrong: source(*args).replace(old, new)
        )
        with pytest.raises(WrongExport):
            write(model, tmp_path / "wrong", verify="logits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "tokenizer"]


def _tokenizer_folder(folder: Path) -> str:
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def test_a_tokenizer_that_loads_as_another_one_is_refused(tmp_path: Path) -> None:
    """The user can mend it: the class of the tokenizer does not fit its files."""
    model, right = student("qwen2_moe"), byte_tokenizer()
    write(model, tmp_path / "out", right, "before", verify="logits")
    wrong = Qwen2TokenizerFast(tokenizer_object=right.backend_tokenizer, unk_token=None)
    wrong.backend_tokenizer.pre_tokenizer = Whitespace()
    for form in ("stock", "bundled"):
        with pytest.raises(UserError, match=r"out was not written, because .* a Qwen2Tokenizer.*export\.verify=shapes"):
            write(model, tmp_path / "out", wrong, "after", format=form)
    assert (tmp_path / "out" / "README.md").read_text().startswith("before")
    write(model, tmp_path / "out", wrong, verify="shapes")


@pytest.mark.parametrize(
    "values",
    [{"pad_token_id": -1}, {"temperature": 0.7, "do_sample": False}, {"early_stopping": True}],
    ids=str,
)
def test_generation_settings_are_written_as_they_were_read(values: dict[str, Any], tmp_path: Path) -> None:
    """Published models have settings that transformers reads but does not save."""
    model = student("qwen2_moe")
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    write(model, tmp_path / "out", format="bundled", verify="logits")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written.get(name, False) for name in values} == values


# ------------------------------------------------------------------------------------------- how much is compared


def test_auto_compares_where_the_model_fits_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = student("qwen2_moe")
    write(model, tmp_path / "out")
    assert compared(caplog) == 1
    caplog.clear()
    monkeypatch.setattr(verify, "free_bytes", lambda device: 1000)
    write(model, tmp_path / "out")
    (line,) = [record.getMessage() for record in caplog.records if "export.verify" in record.getMessage()]
    assert line.startswith("export.verify=auto: only names and shapes") and compared(caplog) == 0
    caplog.clear()
    write(model, tmp_path / "out", verify="logits")  # the user knows better
    assert compared(caplog) == 1


def test_auto_does_without_the_comparison_where_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_much(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(reload, "load_like", too_much)
    model = student("qwen2_moe")
    write(model, tmp_path / "out")
    assert any("did not fit beside the model" in record.getMessage() for record in caplog.records)
    with pytest.raises(torch.OutOfMemoryError):
        write(model, tmp_path / "other", verify="logits")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_streamed_models_are_compared_by_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(student("qwen2_moe"), tmp_path / "plain", byte_tokenizer())
    caplog.clear()
    model, tokenizer = rc.load(tmp_path / "plain", offload_folder=tmp_path / "offload")
    rc.export(Student(model, Plan("tiny")), tokenizer, tmp_path / "out", verify="logits")
    assert any("the model is streamed" in record.getMessage() for record in caplog.records) and compared(caplog) == 0


def test_the_setting_is_an_argument_of_the_api(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = Student(student("qwen2_moe"), Plan("tiny"))
    rc.export(model, None, tmp_path / "out", verify="shapes")
    assert compared(caplog) == 0
    rc.export(model, None, tmp_path / "out", ExportConfig(format="bundled", verify="shapes"), verify="logits")
    assert compared(caplog) == 1 and (tmp_path / "out" / "modeling_recondense.py").exists()
    with pytest.raises(UserError, match=r"export\.verify.*logit"):
        rc.export(model, None, tmp_path / "out", verify="logit")


# ------------------------------------------------------------------------------------------------------ no traces


@pytest.mark.parametrize("fails", [False, True])
def test_a_check_leaves_no_trace(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder's code registers or imports is forgotten, and what was there before is there again."""
    mappings: tuple[Any, ...] = (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    model, bundled = student("deepseek", Prune(1, FOUR)), {"format": "bundled", "verify": "logits"}
    write(model, tmp_path / "first", **bundled)
    sys.modules["transformers_modules.mine"] = sys
    before = [dict(mapping._extra_content) for mapping in mappings]
    cache, paths, modules = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), set(sys.modules)
    try:
        if fails:
            monkeypatch.setattr(reload, "load_like", lambda *args: 1 / 0)
            with pytest.raises(WrongExport, match="transformers does not load it: ZeroDivisionError"):
                write(model, tmp_path / "out", **bundled)
        else:
            write(model, tmp_path / "out", **bundled)
        assert [dict(mapping._extra_content) for mapping in mappings] == before
        assert cache == dynamic_module_utils.HF_MODULES_CACHE and sys.path == paths
        assert {name for name in sys.modules if name.startswith("transformers_modules")} == {
            "transformers_modules.mine"
        }
        assert set(sys.modules) - modules == set()
    finally:
        del sys.modules["transformers_modules.mine"]
    assert (tmp_path / "out").exists() is not fails
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))
