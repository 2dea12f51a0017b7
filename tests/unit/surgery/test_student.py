"""A student and its original on one backbone: what they share, and what the original keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, bits, condense_plan, logits, qwen2_moe, recorded, same_bits, windows
from torch import nn

from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.models.parameters import resident_bytes
from recondense.operations import Drop, Prune, Refit
from recondense.plan import Plan
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

IDS = windows(2, 9)


def test_without_changes_the_model_is_its_own_original() -> None:
    model = qwen2_moe()
    student = apply(model, Plan("tiny"))
    assert not student.has_original and student.originals == {}
    with student.original() as original:
        assert original is model
    student.give_own_copies([0, 1, 2])
    assert student.originals == {}


def test_copies_are_made_once_and_only_of_what_is_shared() -> None:
    model = qwen2_moe()
    before = logits(model, IDS)
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3, 5)), Drop(2, "layer"))))
    experts = moe_blocks.expert_modules(model, 1)["experts"]
    student.give_own_copies([0, 1])
    modules = list(model.modules())
    student.give_own_copies([0, 1])
    assert list(model.modules()) == modules and moe_blocks.expert_modules(model, 1)["experts"] is experts
    assert student.originals.keys() == {0, 1, 2}  # all experts of layer 0 were shared
    trained = [part for layer in (0, 1) for part in moe_blocks.expert_modules(model, layer).values()]
    for parameter in (parameter for part in trained for parameter in part.parameters()):
        parameter.data.zero_()
    with student.original():
        assert torch.equal(logits(model, IDS), before)


def replace_all(student: Student, layer: int) -> None:
    attention: Any = student.model.model.layers[layer].self_attn  # type: ignore[union-attr,index]
    block = moe_blocks.get_block(student.model, 1)
    parts = [attention.q_proj, block.down_proj]
    student.replace_weights((part, "weight", nn.Parameter(torch.zeros_like(part.weight))) for part in parts)


def replace_all_of(student: Student, layer: int) -> None:
    """Replace weights that the student shares with its original, also one of a shared expert."""
    block: Any = moe_blocks.get_block(student.model, layer)
    attention: Any = student.model.model.layers[layer].self_attn  # type: ignore[union-attr,index]
    parts = [attention.q_proj, block.shared_expert.up_proj]
    student.replace_weights((part, "weight", nn.Parameter(1.1 * part.weight.data)) for part in parts)


def test_the_original_keeps_replaced_weights_that_it_uses() -> None:
    model = qwen2_moe()
    before = logits(model, IDS)
    student = apply(model, condense_plan(model, [1]))
    assert student.changed_layers() == {1}
    for _ in range(2):  # the second time nothing of the original is replaced
        replace_all(student, 2)
        assert student.changed_layers() == {1, 2} and len(student.kept_weights()) == 1
        with student.original():
            assert torch.equal(logits(model, IDS), before)
        assert not model.model.layers[2].self_attn.q_proj.weight.any()


def test_a_refit_does_not_depend_on_what_will_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made before it. How many columns are solved together depends on the original's block alone."""
    monkeypatch.setattr("recondense.surgery.refit.LEAST_COLUMNS", 1)
    monkeypatch.setattr("recondense.surgery.refit.NORMAL_BYTES", 44)  # between those of the block and of the layer
    plan = Plan("tiny", (Prune(1, (0, 2, 3)), Refit(1, "down_proj", 0.01), Drop(2, "layer")))
    weights, errors = [], []
    for separates in (False, True):
        model = qwen2_moe()
        student = apply(model, plan, refit=False)
        if separates:
            student.separate(model.parameters())
        errors.append(student.refit(lambda model=model: recorded(model)))
        weights.append(bits(model))
    assert errors[0] == errors[1] and 0 < errors[0][1]["error_after"] < errors[0][1]["error_before"]
    assert same_bits(*weights)


def test_a_released_original_cannot_be_used() -> None:
    model = qwen2_moe()
    student = apply(model, condense_plan(model, [1]))
    student.release_original()
    assert not student.has_original
    with pytest.raises(AssertionError, match="released"):
        student.original()
    replace_all(student, 2)
    assert student.kept_weights() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_original_is_loaded_back(tmp_path: Path, family: str) -> None:
    """Training the student meanwhile does not change it."""
    model = FAMILIES[family]()
    before = logits(model, IDS)
    student = apply(model, condense_plan(model, [1, 2]))
    path, original = tmp_path / "new" / "original.safetensors", sum(map(resident_bytes, student.originals.values()))
    with student.offload_original(path):
        assert not student.has_original and path.stat().st_size >= 0.9 * original
        with pytest.raises(AssertionError, match="released"):
            student.original()
        replace_all(student, 0)
    assert not path.exists() and student.changed_layers() == {0, 1, 2}
    with student.original():
        assert torch.equal(logits(model, IDS), before)


def test_an_offloaded_original_with_weights_of_its_own_is_loaded_back(tmp_path: Path) -> None:
    """All of them, once each: embedding and head are tied, and a removed layer is among them."""
    model = qwen2_moe(tie_word_embeddings=True)
    before, size = logits(model, IDS), resident_bytes(model)
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3)), Drop(2, "layer"))))
    student.separate(model.parameters())
    assert student.changed_layers() == {0, 1, 2}
    path = tmp_path / "original.safetensors"
    with student.offload_original(path):
        assert size - 10_000 < path.stat().st_size < size + 10_000
        for parameter in model.parameters():
            parameter.data.zero_()
    with student.original():
        assert torch.equal(logits(model, IDS), before)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.any() and model.lm_head.weight is model.model.embed_tokens.weight
    student.release_original()
    assert student.own_originals() == {} and student.changed_layers() == set()


def test_an_offloaded_original_is_loaded_back_after_an_error(tmp_path: Path) -> None:
    model = qwen2_moe()
    before = logits(model, IDS)
    student = apply(model, condense_plan(model, [1]))
    with pytest.raises(KeyError), student.offload_original(tmp_path / "original"):
        raise KeyError
    with student.original():
        assert torch.equal(logits(model, IDS), before)


def test_the_original_is_released_where_the_weights_are_gone(tmp_path: Path) -> None:
    """An engine has taken the weights of this process."""
    model = qwen2_moe()
    student = apply(model, condense_plan(model, [1]))
    with student.offload_original(tmp_path / "original"):
        model.to("meta")
    assert not student.has_original and not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_footprint(family: str) -> None:
    model = FAMILIES[family]()
    original_bytes = resident_bytes(model)
    student = apply(model, condense_plan(model, [1, 2]))
    footprint = student.footprint()
    assert (
        footprint.student == resident_bytes(model) < original_bytes
        and footprint.apart == footprint.student + original_bytes
    )
    blocks = sum(resident_bytes(block) for block in student.originals.values())
    assert footprint.student < footprint.with_original <= footprint.student + blocks < footprint.apart


def test_a_student_is_compressed_further_and_keeps_its_first_original() -> None:
    """After training everything: pruned again, condensed, dropped, and refitted toward the original."""
    model = qwen2_moe(num_hidden_layers=4)
    before, weights = logits(model, IDS), bits(model)
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3, 5)), Prune(3, (1, 2, 3, 4)))))
    student.separate([*model.model.layers[0].parameters(), *moe_blocks.get_block(model, 1).parameters()])
    replace_all_of(student, 2)
    for parameter in (*model.model.layers[0].parameters(), *moe_blocks.get_block(model, 1).parameters()):
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    trained = moe_blocks.sparse_blocks(model)[1].weights.down_EDF[[1, 3]].clone()
    operations = Prune(1, (1, 3)), *condense_plan(model, [2]).operations, Drop(3, "layer"), Refit(1, "down_proj", 0.01)
    student.extend(Plan("tiny", operations))
    assert torch.equal(moe_blocks.sparse_blocks(model)[1].weights.down_EDF, trained), "the trained experts are pruned"
    assert student.plan.layers == (1, 2, 3) and len(student.plan.operations) == 6
    [errors] = student.refit(lambda: recorded(model)).values()
    assert errors["error_after"] < errors["error_before"]
    assert not torch.equal(moe_blocks.sparse_blocks(model)[1].weights.down_EDF, trained)
    with student.original():
        assert torch.equal(logits(model, IDS), before) and same_bits(bits(model), weights)


def test_an_extension_that_fails_leaves_the_student_as_it_was() -> None:
    model = qwen2_moe()
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3, 5)),)))
    plan, before = student.plan, logits(model, IDS)
    with pytest.raises(UserError, match="layer 1"):
        student.extend(Plan("tiny", (Drop(1, "layer"), Prune(1, (0, 1)))))
    assert student.plan == plan and torch.equal(logits(model, IDS), before)
    with pytest.raises(UserError, match=r"prune, layer 99: the sparse MoE layers are \[0, 2\]"):
        student.extend(Plan("tiny", (Drop(1, "moe"), Prune(99, (0, 1)))))
    assert student.plan == plan and torch.equal(logits(model, IDS), before)
    student.release_original()
    with pytest.raises(UserError, match="released its original"):
        student.extend(plan)
