"""What the differences between a checkpoint and its config say."""

from __future__ import annotations

import pytest

from recondense.models import differences
from recondense.models.differences import Comparison, foreign_weights

LAYER = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "self_attn.q_proj.weight")
STATE = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"model.layers.{layer}.{end}" for layer in (0, 1) for end in LAYER),
]  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "unexpected", "expected"),
    [
        (("model.a.weight", "model.b.weight"), ("a.weight", "b.weight"), ("", "model.")),
        (("a.weight",), ("x.y.a.weight",), ("x.y.", "")),
        (("a.weight", "b.weight", "c.weight"), ("x.a.weight",), None),  # too few weights
        (("layers.3.a.weight",), ("layers.4.a.weight", "mtp.layers.0.a.weight"), None),  # other layers
        (("a.weight",), (), None),
    ],
)
def test_prefixes(missing: tuple[str, ...], unexpected: tuple[str, ...], expected: tuple[str, str] | None) -> None:
    assert differences._prefixes(missing, unexpected) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_expert.up_proj.weight",  # of qwen2_moe, with a config of qwen3_moe
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "lm_head.bias",
        "model.norm.bias",
    ],
)
def test_weights_of_parts_that_both_have_show_another_model(name: str) -> None:
    assert foreign_weights([name], STATE) == (name,)
    [problem] = Comparison(unexpected=(name,), foreign=(name,)).problems
    assert problem.startswith(f"the checkpoint has 1 weight that the model of its config lacks ({name})")


def test_a_complete_further_layer_shows_another_model() -> None:
    layer = [f"model.layers.2.{end}" for end in LAYER]
    assert foreign_weights(layer, STATE) == tuple(layer)
    assert foreign_weights(layer[:2], STATE) == ()
    assert foreign_weights([*layer, "model.layers.2.eh_proj.weight"], STATE) == ()  # for multi-token prediction


def test_complete_layers_with_a_prefix_of_their_own_are_ignored_unless_they_are_a_whole_model() -> None:
    layer = [f"mtp.layers.0.{end}" for end in LAYER]
    assert foreign_weights([*layer, "mtp.fc.weight", "mtp.norm.weight"], STATE) == ()
    whole = [f"teacher.{name}" for name in STATE]
    assert set(foreign_weights(whole, STATE)) == {name for name in whole if ".layers." in name}
    assert foreign_weights(["mtp.norm.weight", *layer, *whole], STATE) == foreign_weights(whole, STATE)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",  # buffers of older versions of transformers
        "model.layers.0.attn.masked_bias",
        "visual.blocks.0.attn.qkv.weight",  # a part for pictures
        "model.mtp_block.0.mlp.up_proj.weight",
        "score.weight",  # the head of a classifier
    ],
)
def test_other_weights_are_ignored(name: str) -> None:
    assert foreign_weights([name], STATE) == () and Comparison(unexpected=(name,)).problems == []


def test_all_reasons_are_given_together() -> None:
    shape = ("a", (3,), (4,))
    comparison = Comparison(("b",), (), (shape, shape), (), (("c", "I8"), ("d", "I8"), ("e", "U8")))
    lacking, misshapen, integers = comparison.problems
    assert lacking.startswith("the checkpoint lacks 1 weight")
    assert misshapen.startswith("a has the shape (3,) in the checkpoint and (4,) by its config, and 1 weight more diff")
    assert integers.startswith("c is stored as I8, and 2 weights more are, but config.json has no quantization_config")
