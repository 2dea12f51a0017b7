"""What the verbs refuse, because it would lose files or give figures of something else."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from support.hub_cache import in_hub_cache
from support.runs import model_folder
from support.tiny_models import bits, same_bits

import recondense as rc
from recondense import offline
from recondense.methods.search.budget import Budget
from recondense.operations import Prune, Refit

TEXTS = [f"{number}: some words and {number} more words, " * 4 for number in range(16)]
SETTINGS: dict[str, Any] = {"steps": 2, "sequence_length": 16, "learning_rate": 1e-2, "batch_size": 2}
PLAN = rc.Plan("tiny", (Prune(1, (0, 2, 3, 5)),))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("source") / "model")


def calibrate(model: Any, tokenizer: Any) -> rc.Tape:
    return rc.calibrate(model, tokenizer, TEXTS, num_samples=8, max_length=16)


def test_a_tape_belongs_to_one_model(source: Path) -> None:
    (first, tokenizer), (second, _) = rc.load(source), rc.load(source)
    tape = calibrate(first, tokenizer)
    refitted = rc.Plan("tiny", (*PLAN.operations, Refit(1, "down_proj", 1e-2)))
    before = bits(second)
    with pytest.raises(rc.UserError, match="tape is of another model"):
        rc.apply(second, refitted, tape)
    assert same_bits(bits(second), before)


def test_a_compressed_model_is_not_compressed_again_in_memory(source: Path) -> None:
    """Its tape has the states of the original, and neither student would have the original."""
    model, tokenizer = rc.load(source)
    tape = calibrate(model, tokenizer)
    student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=1, num_layers=[0])), tape)
    after = bits(model)
    for again in (tape, calibrate(model, tokenizer)):
        with pytest.raises(rc.UserError, match="has been compressed since it was loaded"):
            rc.search(again, rc.CDMoE(num_experts=2, num_layers=[2]))
    with pytest.raises(rc.UserError, match="export the student and load"):
        rc.apply(model, PLAN)
    assert same_bits(bits(model), after) and student.plan.layers == (0,)


def test_a_compressed_model_is_compressed_again_from_its_folder(source: Path, tmp_path: Path) -> None:
    """Exported into the folder that it came from, twice: the history counts each compression once."""
    folder = tmp_path / "model"
    model, tokenizer = rc.load(source)
    rc.export(rc.apply(model, PLAN), tokenizer, folder)
    model, tokenizer = rc.load(folder)
    student = rc.apply(model, rc.Plan("tiny", (Prune(2, (0, 1, 4)),)))
    for _ in range(2):
        rc.export(student, tokenizer, folder)
        assert rc.Plan.load(folder / "plan.json").history.operations == (*PLAN.operations, Prune(2, (0, 1, 4)))


def test_a_compressed_model_of_the_hub_brings_its_history(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, while the hub cannot be reached: no look-up is tried again for long."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(offline, "hub_reachable", lambda endpoint: False)
    model, tokenizer = rc.load(source)
    rc.export(rc.apply(model, PLAN), tokenizer, tmp_path / "first")
    in_hub_cache(tmp_path / "hub", tmp_path / "first", "me/first", "second-revision")
    started = time.monotonic()
    model, tokenizer = rc.load("me/first", revision="second-revision")
    rc.export(rc.apply(model, rc.Plan("tiny", (Prune(2, (0, 1, 4)),))), tokenizer, tmp_path / "second")
    assert rc.Plan.load(tmp_path / "second" / "plan.json").history.operations[:1] == PLAN.operations
    with pytest.raises(rc.UserError, match="there is no such folder"):
        rc.load("nobody/no-such-model")
    assert time.monotonic() - started < 60, "a look-up of an unreachable hub is tried again for 20 s"


@pytest.mark.parametrize("refit", [Refit(2, "down_proj", 1e-2), Refit(1, "coefficients", 1e-2)])
def test_a_refit_that_cannot_be_leaves_the_model_as_it_was(source: Path, refit: Refit) -> None:
    """Of a layer that nothing else changes, whose weights are the original's; of coefficients that a layer lacks."""
    model, tokenizer = rc.load(source)
    tape, before = calibrate(model, tokenizer), bits(model)
    with pytest.raises(rc.UserError, match=f"(refit|layer) .*{refit.layer}"):
        rc.apply(model, rc.Plan("tiny", (*PLAN.operations, refit)), tape)
    assert same_bits(bits(model), before)
    assert rc.apply(model, PLAN, tape).plan is PLAN


def test_a_student_without_an_original_has_no_divergence_from_it(source: Path) -> None:
    model, tokenizer = rc.load(source)
    student = rc.apply(model, rc.Plan("tiny"))
    rc.recover(student, tokenizer, TEXTS, objective="finetune", **SETTINGS)
    assert rc.evaluate(student, tokenizer, TEXTS, sequence_length=16).keys() == {"loss", "perplexity"}
    model, tokenizer = rc.load(source)
    student = rc.apply(model, PLAN)
    assert rc.evaluate(student, tokenizer, TEXTS, sequence_length=16)["kl_to_original"] > 0
    student.release_original()
    assert rc.evaluate(student, tokenizer, TEXTS, sequence_length=16).keys() == {"loss", "perplexity"}


def test_an_export_replaces_nothing_but_an_export(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = rc.load(source)
    student = rc.apply(model, PLAN)
    folder = tmp_path / "precious"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "thesis.txt").write_text("years")
    file = tmp_path / "file"
    file.write_text("years")
    for place in (folder, file, source):
        with pytest.raises(rc.UserError, match="holds other files than an export"):
            rc.export(student, tokenizer, place)
    assert (folder / "inner" / "thesis.txt").read_text() == file.read_text() == "years"
    monkeypatch.chdir(tmp_path / "precious" / "inner")
    with pytest.raises(rc.UserError, match="holds other files"):
        rc.export(student, tokenizer, ".")
    for _ in range(2):
        rc.export(student, tokenizer, tmp_path / "new")
    rc.export(student, tokenizer, folder, overwrite=True)
    assert rc.Plan.load(folder / "plan.json").operations == PLAN.operations and not (folder / "inner").exists()
    for name in ("config.yaml", "inputs.json"):
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / name).write_text("years")
    for overwrite in (False, True):
        with pytest.raises(rc.UserError, match=f"would delete the run in {folder / 'run'}; choose another folder"):
            rc.export(student, tokenizer, folder, overwrite=overwrite)


def test_a_streamed_model_is_not_exported_over_itself(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, tokenizer = rc.load(source)
    rc.export(rc.apply(model, PLAN), tokenizer, folder)
    model, tokenizer = rc.load(folder, offload_folder=tmp_path / "work")
    student = rc.apply(model, rc.Plan("tiny", (Prune(2, (0, 1, 4)),)))
    with pytest.raises(rc.UserError, match="streamed from this folder"):
        rc.export(student, tokenizer, folder, overwrite=True)
    rc.export(student, tokenizer, tmp_path / "other")
    with pytest.raises(rc.UserError, match="streamed model is not in memory"):
        rc.recover(student, tokenizer, TEXTS, **SETTINGS)
    before = rc.evaluate(student, tokenizer, TEXTS, sequence_length=16)
    rc.recover(student, tokenizer, TEXTS, objective="finetune", **SETTINGS)
    assert rc.evaluate(student, tokenizer, TEXTS, sequence_length=16)["loss"] < before["loss"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"objective": "finetune"}, "settings"), ({"steps": 4}, "settings"), ({"trainable": "lora"}, "settings"),
        ({"seed": 1}, "seed"), ({"sequence_length": 8}, "sequence_length"), ({"texts": TEXTS[:8]}, "texts"),
        ({"plan": rc.Plan("tiny", (Prune(1, (0, 2)),))}, "plan"), ({"weights": 1}, "model"),
    ],
)  # fmt: skip
def test_a_folder_of_checkpoints_is_of_one_call(
    source: Path, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    def recover(plan: rc.Plan = PLAN, texts: list[str] = TEXTS, weights: float = 0, **changed: Any) -> rc.Student:
        model, tokenizer = rc.load(source)
        if weights:
            model.get_output_embeddings().weight.data.mul_(1 + weights)
        student = rc.apply(model, plan)
        return rc.recover(student, tokenizer, texts, folder=tmp_path / "checkpoints", **{**SETTINGS, **changed})

    first = bits(recover().model)
    assert same_bits(bits(recover().model), first), "it resumes, here at the end"
    with pytest.raises(rc.UserError, match=rf"another {name}.*\. Use another folder"):
        recover(**changes)
    assert same_bits(bits(recover().model), first)


def test_a_method_may_be_given_by_its_name(source: Path) -> None:
    model, tokenizer = rc.load(source)
    tape = calibrate(model, tokenizer)
    by_name = rc.search(tape, "cdmoe_s")
    default = rc.CDMoE(num_experts=0, budget=Budget(memory_ratio=0.75))  # a model without a published row
    assert by_name == rc.search(tape, default) and len(by_name.operations) == 2
    assert [operation.kind for operation in rc.search(tape, "moei2").operations][-1] == "factorize"
    assert rc.plan_only(source, "cdmoe_s").after == rc.plan_only(source, default).after
    for call in (rc.search, lambda _, name: rc.plan_only(source, name)):
        with pytest.raises(rc.UserError, match=r"method=cdmoes: there is no such method\. Did you mean cdmoe"):
            call(tape, "cdmoes")
    with pytest.raises(rc.UserError, match="no step to search"):
        rc.search(tape, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "none"}, "there is nothing to train"), ({"warmup_steps": 2}, r"warmup_steps=2: must be below"),
        ({"cross_entropy_share": 0.8, "hidden_share": 0.8}, r"hidden_share=0\.8.* the sum is 1\.6"),
        ({"trainable": "lora", "lora": {"dropout": 0.1}}, r"lora\.dropout=0\.1"), ({"steps": 0}, "steps=0"),
        ({"teacher_path": "somewhere"}, "teacher_path=somewhere: `recover` does not support"),
    ],
)  # fmt: skip
def test_settings_of_a_recovery_that_contradict_each_other(
    source: Path, settings: dict[str, Any], message: str
) -> None:
    model, tokenizer = rc.load(source)
    student = rc.apply(model, PLAN)
    with pytest.raises(rc.UserError, match=message):
        rc.recover(student, tokenizer, TEXTS, **{**SETTINGS, **settings})


def test_the_same_call_in_one_session_changes_nothing(source: Path, tmp_path: Path) -> None:
    """Adapters are not merged twice, and a released original does not make it another call."""
    for name, changes in (("experts", {}), ("lora", {"trainable": "lora"})):
        model, tokenizer = rc.load(source)
        student = rc.apply(model, PLAN)
        rc.recover(student, tokenizer, TEXTS, folder=tmp_path / name, **SETTINGS, **changes)
        trained = bits(model)
        student.release_original()
        rc.recover(student, tokenizer, TEXTS, folder=tmp_path / name, **SETTINGS, **changes)
        assert same_bits(bits(model), trained)
        with pytest.raises(rc.UserError, match="another seed"):
            rc.recover(student, tokenizer, TEXTS, folder=tmp_path / name, seed=1, **SETTINGS, **changes)


def test_a_call_that_has_saved_nothing_may_be_corrected(source: Path, tmp_path: Path) -> None:
    for settings in ({"learning_rate": 1e30}, {"trainable": ["routers", "experts"]}):
        model, tokenizer = rc.load(source)
        student, before = rc.apply(model, PLAN), bits(model)
        with pytest.raises(rc.UserError, match="diverges") if "learning_rate" in settings else nullcontext():
            rc.recover(student, tokenizer, TEXTS, folder=tmp_path / "new", **{**SETTINGS, **settings})
    changed = {name for name, value in bits(model).items() if not torch.equal(value, before[name])}
    assert {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"} <= changed
    assert all(name.startswith("model.layers.1.mlp.") for name in changed)


def test_models_without_a_change_are_told_apart(source: Path, tmp_path: Path) -> None:
    for scale in (1.0, 0.5):
        model, tokenizer = rc.load(source)
        model.get_output_embeddings().weight.data.mul_(scale)
        student = rc.apply(model, rc.Plan("tiny"))
        call = {"objective": "finetune", "folder": tmp_path / "new", **SETTINGS}
        if scale == 1:
            rc.recover(student, tokenizer, TEXTS, **call)
        else:
            with pytest.raises(rc.UserError, match="another model"):
                rc.recover(student, tokenizer, TEXTS, **call)


def test_the_original_may_be_searched_inside_its_context(source: Path) -> None:
    model, tokenizer = rc.load(source)
    tape = calibrate(model, tokenizer)
    rc.search(tape, rc.CDMoE(num_experts=2, num_layers=[2]))
    assert rc.apply(model, rc.Plan("tiny")).model is model
    plan = rc.search(tape, rc.CDMoE(num_experts=2, num_layers=[2]))
    student = rc.apply(model, PLAN)
    with student.original():
        assert rc.search(tape, rc.CDMoE(num_experts=2, num_layers=[2])) == plan
    with pytest.raises(rc.UserError, match="has been compressed"):
        rc.search(tape, rc.CDMoE(num_experts=2, num_layers=[2]))


def test_a_method_is_found_by_its_name_within_another_program_of_hydra(source: Path, tmp_path: Path) -> None:
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        sizes = rc.plan_only(source, "cdmoe_s")
        assert sizes.after.total <= 0.75 * sizes.before.total
        assert GlobalHydra.instance().is_initialized()
