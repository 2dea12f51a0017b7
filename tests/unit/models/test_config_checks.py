"""A config.json that describes no model is refused without weights, and every supported family's passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import POINTER, checkpoint, config, content, json_values, remote_code_in, remove
from support.plain_moe import FOUR, PAIRS, RANKS
from support.tiny_models import EVERY, tiny
from transformers import GPTNeoXConfig, LlamaConfig

from recondense.config.schema import ExportConfig, ModelConfig
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models import config_checks
from recondense.models.config_checks import check_config, config_problems, make_outline, run_without_weights
from recondense.models.published_configs import recorded_config, recorded_ids
from recondense.operations import Condense, Drop, Factorize, Merge, Narrow, Prune
from recondense.plan import Plan
from recondense.surgery import execute

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0}


def problems(folder: Path, **settings: Any) -> list[str]:
    try:
        return list(check_config(folder, ModelConfig(**settings)).problems)
    except UserError as error:
        return [str(error)]


# ---------------------------------------------------------------------------------------------- good configs


@pytest.mark.parametrize("family", EVERY)
def test_every_family_computes_without_weights(family: str, tmp_path: Path) -> None:
    """Also condensed, pruned, merged, dropped and factorized."""
    extra: dict[str, Any] = {"layer_types": ["full_attention"] * 7} if family == "gpt_oss" else {}
    model = tiny(family, num_hidden_layers=7, **extra)
    run_without_weights(make_outline(model.config))
    assert config_problems(model.config) == []
    operations = (
        *(Prune(1, FOUR), Factorize(1, {name: (3, None, 4, 5) for name in RANKS}), Merge(2, *PAIRS)),
        Narrow.from_channels(2, ((0, 3, 5, 7), (2,), range(8))),
        Narrow.from_channels(6, (range(12),) * 6),
        *(Condense(3, (3, 0), (0.4, 0.2), None), Drop(4, "moe"), Drop(5, "layer"), Factorize(6, RANKS)),
    )
    plan = Plan("tiny", operations)
    execute.execute(model, plan)
    write_folder(model, None, plan, tmp_path / "out", "", ExportConfig(format="bundled"))
    assert problems(tmp_path / "out") == problems(tmp_path / "out", trust_remote_code=True) == []


@pytest.mark.parametrize("hub_id", recorded_ids())
def test_published_configs_pass(hub_id: str) -> None:
    assert config_problems(recorded_config(hub_id)) == []


def test_checks_leave_a_config_as_it_is() -> None:
    model = tiny("qwen2_moe", output_router_logits=True)
    before = model.config.to_dict()
    assert config_problems(model.config) == [] and model.config.to_dict() == before
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    "values",
    [
        {"pad_token_id": -1},
        {"eos_token_id": [1, 2]},
        {"rope_parameters": None},
        {"auto_map": {"AutoConfig": "absent.Config"}},
        {"quantization_config": {}},
        {"torch_dtype": "bfloat16", "dtype": None},
        {"mlp_only_layers": [9]},
    ],
)
def test_unusual_values_that_work(values: dict[str, Any], tmp_path: Path) -> None:
    assert problems(checkpoint(tmp_path / "model", "qwen2_moe", config(**values))) == []


def test_a_teacher_of_another_family_is_only_made() -> None:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for dense in (GPTNeoXConfig(**sizes, rotary_pct=0.5), LlamaConfig(**sizes, intermediate_size=48)):
        dense.bos_token_id = dense.eos_token_id = dense.pad_token_id = None
        assert config_problems(dense) == []
        dense.hidden_act = "swish2"
        assert config_problems(dense) == [
            "no model can be created from config.json: transformers does not know hidden_act='swish2'; use the "
            "config.json and the files of the same model"
        ]


def test_what_the_meta_device_cannot_do_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    outline = make_outline(tiny("qwen2_moe").config)
    monkeypatch.setattr(type(outline.model), "forward", lambda *_, **__: outline.lm_head.weight.sum().item())
    run_without_weights(outline)


# ---------------------------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "config.json is empty"),
        (POINTER, "config.json is a Git LFS pointer"),
        (b'{"model_type": "qwen2', "config.json is not valid JSON"),
        (b"[]", "config.json holds a list"),
        (b"{}", "config.json has no model_type"),
        (b'{"model_type": 7}', "model_type 7 is not supported"),
        (b'{"model_type": "llama"}', "model_type 'llama' is not supported"),
        (b'{"model_type": "qwen2-moe"}', "did you mean qwen2_moe?"),
        (b'{"model_type": "qwen2_moe", "hidden_size": NaN}', "'hidden_size' expected int, got float"),
    ],
)
def test_a_damaged_config(data: bytes, message: str, tmp_path: Path) -> None:
    content("config.json", data)(tmp_path)
    [problem] = problems(tmp_path)
    assert message in problem


# For each family: values, and a part of the message.
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "qwen2_moe": [
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"hidden_size": -32}, "hidden_size=-32, but it must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0, but it must be at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0, but it must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1, but it must be at least 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, more than any model"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` (2) must be equal to the number of `layer_types` (3)"),
        ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types` (1)"),
        ({"num_attention_heads": 3}, "num_attention_heads=3, num_key_value_heads=2"),
        ({"num_key_value_heads": 3}, "cannot compute; use the config.json and the files of the same model"),
        ({"num_key_value_heads": None}, "no model can be created from config.json"),
        ({"num_experts_per_tok": 12}, "each token selects 12 of the 6 experts of a layer"),
        ({"num_experts_per_tok": 0}, "each token selects 0 of the 6 experts of a layer"),
        ({"num_experts": "6"}, "'num_experts' expected int, got str"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0, but it must be at least 1"),
        ({"pad_token_id": 300}, "pad_token_id=300, but the embedding has 300 rows"),
        ({"eos_token_id": [1, 512]}, "eos_token_id=512, but the embedding has 300 rows"),
        ({"bos_token_id": -7}, "bos_token_id=-7, but the embedding has 300 rows"),
        ({"pad_token_id": "a"}, "'pad_token_id' with value 'a'"),
        ({"dtype": "float33"}, "dtype='float33', but weights are computed in float32"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8', but weights"),
        ({"hidden_act": "swish2"}, "transformers does not know hidden_act='swish2'"),
        ({"rope_parameters": {"rope_type": "su"}}, "transformers does not know rope_parameters.rope_type='su'"),
        ({"rope_parameters": "linear"}, "'rope_parameters'"),
        ({"rope_parameters": LINEAR}, "Missing required keys in `rope_parameters`"),
        ({"rope_parameters": {**LINEAR, "factor": 0}}, "which give frequencies that are not finite"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "frequencies that are not finite"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "no model can be created"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters`"),
        ({"quantization_config": "int4"}, "quantization_config='int4', which is not an object"),
        ({"_attn_implementation": "nope"}, "no model can be created from config.json"),
        ({"model_type": "recondense_qwen2_moe"}, "'CompressedConfig' object has no attribute 'compressed_layers'"),
        (
            {"model_type": "recondense_qwen2_moe", "compressed_layers": {"9": {"kind": "sparse", "num_experts": 4}}},
            "no model can be created from config.json: IndexError",
        ),
        (
            {"model_type": "recondense_qwen2_moe", "compressed_layers": {"1": {"kind": "sparse", "num_experts": 1}}},
            "cannot compute",
        ),
        ({"model_type": "recondense_qwen2_moe", "compressed_layers": [1]}, "'list' object has no attribute 'items'"),
    ],
    "deepseek_v3": [
        ({"n_group": 4}, "selects 1 of 4 groups of the 6 experts of a layer (topk_group and n_group)"),
        ({"n_group": 2, "topk_group": 3}, "selects 3 of 2 groups"),
        ({"n_group": 0}, "selects 1 of 0 groups"),
        ({"n_group": None}, "config.json"),
        ({"n_group": 3, "num_experts_per_tok": 3}, "selects 3 experts, but the 1 groups"),
        ({"qk_rope_head_dim": 7}, "cannot compute"),
        ({"routed_scaling_factor": None}, "'routed_scaling_factor' expected float"),
    ],
    "deepseek": [
        ({"moe_layer_freq": 0}, "moe_layer_freq=0, but it must be at least 1"),
        ({"moe_layer_freq": "x"}, "no model can be created from config.json: TypeError"),
        ({"num_experts_per_tok": 7}, "each token selects 7 of the 6 experts of a layer"),
        ({"hidden_size": 33}, "The hidden size (33) is not a multiple"),
        ({"scoring_func": "sigmoid"}, "supports only softmax"),
    ],
    "ernie4_5_moe": [
        ({"moe_k": 9}, "each token selects 9 of the 6 experts of a layer"),
        ({"moe_layer_interval": 0}, "moe_layer_interval=0, but it must be at least 1"),
    ],
}


@pytest.mark.parametrize(
    ("family", "values", "message"), [(family, *case) for family, cases in BAD.items() for case in cases]
)
def test_values_that_describe_no_model(family: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", family, config(**values))
    [problem] = problems(folder)
    assert message in problem, problem


def test_a_config_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../blobs/absent")
    [problem] = problems(tmp_path)
    assert problem.startswith("config.json is a link to a file that does not exist; download or copy the model again")


def test_several_values_are_reported_together(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "model", "qwen2_moe", config(eos_token_id=999, bos_token_id=999, num_experts_per_tok=7)
    )
    assert len(problems(folder)) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "generation_config.json is not valid JSON"),
        ("", "generation_config.json is empty"),
        ('{"eos_token_id": [1, 999]}', "generation_config.json has eos_token_id=999, but the embedding has 300 rows"),
        ('{"max_new_tokens": -1}', "transformers refuses generation_config.json"),
    ],
)
def test_a_damaged_generation_config(data: str, message: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "qwen2_moe", content("generation_config.json", data))
    [problem] = problems(folder)
    assert message in problem


# ---------------------------------------------------------------------------------------------- remote code


@pytest.mark.parametrize(
    "code",
    [
        "from transformers.utils.import_utils import is_torch_fx_available\n",
        "1 / 0\n",
        "def (\n",
        "import absent_package\n",
    ],
)
def test_only_an_unknown_model_type_runs_remote_code(code: str, tmp_path: Path) -> None:
    mapped = config(auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    folder = checkpoint(tmp_path / "model", "qwen2_moe", mapped, content("mine.py", code))
    with remote_code_in(tmp_path / "modules"):
        assert problems(folder, trust_remote_code=True) == []
        json_values("config.json", model_type="my_own_moe")(folder)
        [problem] = problems(folder, trust_remote_code=True)
        assert problem.startswith("transformers cannot read config.json: ")
        remove("mine.py")(folder)
        [problem] = problems(folder, trust_remote_code=True)
        assert "mine.py" in problem
    [problem] = problems(folder)
    assert "'my_own_moe' is not supported" in problem


def test_a_defect_in_a_check_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "_rows", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        problems(checkpoint(tmp_path / "model"))
