"""The recovery stages of a run, one after another on the same student."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recoveries import QUIET, data, recovery
from support.tiny_models import bits, condense_plan, logits, qwen2_moe, same_bits, windows

from recondense.config.schema import Config, LoraSettings, RecoveryConfig
from recondense.config.stages import Stage, control_settings, require_stages
from recondense.operations import Drop, Merge
from recondense.plan import Plan
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teachers import OtherTeacher
from recondense.run.recover import Recovery, prepare_student
from recondense.run.run_record import RunRecord
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

STAGES = [
    recovery(),
    recovery(trainable="lora", objective="finetune", learning_rate=3e-2),
    recovery(objective="finetune"),
]


def stage(settings: RecoveryConfig) -> Stage:
    return replace(require_stages(Config())[0], recovery=settings)


def run_stages(stages: list[RecoveryConfig], folder: Path) -> Student:
    model = qwen2_moe()
    student = apply(model, condense_plan(model, [1, 2]))
    prepare_student(student, [stage(settings) for settings in stages])
    for index, settings in enumerate(stages):
        module = RecoveryModule(student, settings, stage=f"stage{index}")
        fit(module, data(module), folder / str(index), QUIET, seed=index)
    return student


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_stages_continue_from_each_other(tmp_path: Path) -> None:
    """Every stage trains the result of the one before; the original does not change; a second run loads all stages."""
    ids = windows(2, 8)
    original = logits(qwen2_moe(), ids)
    after = [bits(run_stages(STAGES[: count + 1], tmp_path / str(count)).model) for count in range(3)]
    assert not any(same_bits(one, other) for one, other in pairwise(after))
    student = run_stages(STAGES, tmp_path / "2")
    assert same_bits(bits(student.model), after[2])
    assert student.additions is None and not any("lora" in name for name in bits(student.model))
    with student.original():
        assert torch.equal(logits(student.model, ids), original)


def test_a_stage_of_experts_after_adapters_does_not_change_the_original(tmp_path: Path) -> None:
    """The experts train last, although the first stage needs no copies of them."""
    model = qwen2_moe()
    ids = windows(2, 8)
    original = logits(model, ids)
    stages = [recovery(trainable="lora", objective="finetune"), recovery(objective="finetune", learning_rate=0.1)]
    student = run_stages(stages, tmp_path)
    with student.original():
        assert torch.equal(logits(student.model, ids), original)
    assert not torch.equal(logits(student.model, ids), original)


@pytest.mark.parametrize("changes", [{}, {"trainable": "lora", "lora": LoraSettings(target="experts")}])
def test_a_stage_without_anything_to_train_is_refused(changes: dict[str, Any]) -> None:
    plan = Plan("qwen2_moe", tuple(Drop(layer, "moe") for layer in range(3)))
    student = apply(qwen2_moe(), plan)
    with pytest.raises(ValueError, match="there are no experts to train"):
        prepare_student(student, [stage(recovery()), stage(recovery(**changes))])
    prepare_student(student, [stage(recovery(objective="none"))])


MERGE = Merge(1, ((0, 1), (2, 3), (4, 5)), ((0.5, 0.5),) * 3)
MERGED = Plan("tiny", (MERGE, *condense_plan(qwen2_moe(), [2]).operations))


@pytest.mark.parametrize(
    ("settings", "changed"), [({}, {1, 2}), ({"router_layers": "all"}, {0, 1, 2}), ({"trainable": "lora"}, {1, 2})]
)
def test_the_control_shares_nothing_that_it_trains(settings: dict[str, Any], changed: set[int]) -> None:
    """The router of a merged layer is that of the original, and condensed layers have one only in the original."""
    model, ids = qwen2_moe(), windows(2, 8)
    student = apply(model, MERGED)
    recoveries = [recovery(**{"trainable": "routers", "control": True, **settings})]
    prepare_student(student, [stage(settings) for settings in recoveries])
    before, names = logits(model, ids), set()
    with student.original():
        control = RecoveryModule(Student(model, Plan("tiny")), control_settings(recoveries[0]), layers=MERGED.layers)
        control.prepare()
        for name, parameter in control.named_parameters():
            if parameter.requires_grad:
                names.add(name)
                parameter.data.add_(1.0)
    kinds = ("experts", "shared_expert.") if settings.get("trainable") == "lora" else ("gate.", "shared_expert_gate.")
    assert {int(name.split(".")[3]) for name in names} == changed and all(kind in " ".join(names) for kind in kinds)
    assert torch.equal(logits(model, ids), before)


def test_stages_with_other_parts_separate_them_all(tmp_path: Path) -> None:
    """Also in a layer from which an earlier stage separated others, with tied weights and a refit in between."""
    model, ids = qwen2_moe(tie_word_embeddings=True), windows(2, 8)
    original = logits(model, ids)
    student = apply(model, MERGED)
    parts: list[Any] = ["norms", ("experts", "routers"), "attention", "all", "experts"]
    for part in parts:
        prepare_student(student, [stage(recovery(trainable=part))])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert student.outer_originals.keys() == {"embed_tokens", "norm", "lm_head"}
    before = {name: value.clone() for name, value in model.named_parameters()}
    for index, part in enumerate(parts):
        module = RecoveryModule(student, recovery(trainable=part), stage=f"stage{index}")
        fit(module, data(module), tmp_path / str(index), QUIET, seed=index)
        with student.original():
            assert torch.equal(logits(model, ids), original)
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]


def test_a_teacher_is_freed_before_the_next_one_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two teachers that are other models are never in memory together."""
    model = qwen2_moe()
    student = apply(model, condense_plan(model, [1]))
    teachers: list[weakref.ref[Any]] = []

    def load_teacher(self: Recovery, stage: Stage, student: Student) -> OtherTeacher:
        assert not any(reference() for reference in teachers)
        other = qwen2_moe(seed=len(teachers) + 5)
        teachers.append(weakref.ref(other))
        return OtherTeacher(other, student.model, "other")

    def load_data(self: Recovery, stage: Stage) -> Any:
        return data(RecoveryModule(student, stage.recovery)), stage.recovery

    monkeypatch.setattr(Recovery, "_load_teacher", load_teacher)
    monkeypatch.setattr(Recovery, "_load_data", load_data)
    monkeypatch.setattr(Recovery, "_describe", lambda *_: {})
    settings = recovery(teacher="model", teacher_path="other")
    stages = [replace(stage(settings), name=name, folder=name) for name in ("one", "two")]
    unused: Any = None
    run = Recovery(
        replace(Config(), trainer=QUIET), stages, None, tmp_path, unused, unused, model.device,
        RunRecord(tmp_path, {}), lambda *_, **__: [], [],
    )  # fmt: skip
    run.recover(student, {})
    assert len(teachers) == 2
