"""Local recovery against a plain loop on transformers' layers; streamed, on two processes, and resumed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpus import documents
from support.forks import Forks
from support.recoveries import QUIET, prepared, recovery
from support.recoveries import data as recovery_data
from support.runs import model_folder
from support.small import byte_tokenizer
from support.tiny_models import EVERY, FAMILIES, bits, condense_plan, qwen2_moe, recorded, same_bits, windows
from torch import Tensor, nn

from recondense.config.schema import ModelConfig
from recondense.data.labels import MASKED
from recondense.data.loader import RecoveryData
from recondense.errors import UserError
from recondense.models import decoder, loading, moe_blocks
from recondense.models.layer_store import layer_store
from recondense.models.streaming import Streamed
from recondense.operations import Condense, Drop, Factorize, Operation, Prune
from recondense.plan import Plan
from recondense.recovery.fit import fit
from recondense.recovery.local import LocalRecovery, training_bytes
from recondense.recovery.local_tape import LocalTape
from recondense.recovery.recover import recover
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

SUPPORT = Path(__file__).resolve().parents[2] / "support"
STEPS = 4
RATE = 3e-3
CHANGES: tuple[Operation, ...] = (Condense(1, (3, 0), (0.4, 0.2), 0.5), Prune(2, (0, 2, 3, 5)))
RANKS = {name: (6, 9, None, 4, 5, 6) for name in ("gate_proj", "up_proj", "down_proj")}


def student_of(model: Any, *operations: Operation) -> Student:
    return apply(model, Plan("tiny", operations or CHANGES), lambda: recorded(model))


def local(student: Student, folder: Path, table: Any = None, loggers: Any = (), **changes: Any) -> LocalRecovery:
    settings = recovery(objective="local", name="local", schedule="linear", warmup_steps=0, **changes)
    batches = settings.steps * settings.accumulate_grad_batches
    data = RecoveryData(windows(7, 8) if table is None else table, None, settings.batch_size, batches, seed=3)
    storage = layer_store(student.model).tensor_storage()
    return LocalRecovery(student, settings, data, folder, QUIET, storage, loggers=loggers)


@contextmanager
def captured(model: nn.Module, layer: int) -> Any:
    """The input and output of a layer's block, and the output of the layer, of each call."""
    calls: dict[str, list[Tensor]] = {"x": [], "y": [], "leaving": []}
    module: Any = decoder.decoder_layers(model)[layer]  # type: ignore[arg-type]

    def block(_: Any, args: Any, output: Any) -> None:
        calls["x"].append(args[0].detach())
        calls["y"].append(moe_blocks.block_output(output).detach())

    def whole(_: Any, args: Any, output: Any) -> None:
        calls["leaving"].append(moe_blocks.block_output(output).detach())

    handles = [module.mlp.register_forward_hook(block), module.register_forward_hook(whole)]
    yield calls
    for handle in handles:
        handle.remove()


def plain_loop(original: Any, student: Any, ids_NS: Tensor, order: list[Tensor], inputs: str, steps: int) -> None:
    """Train layers 1 and 2 of the student with torch alone: AdamW, a linear schedule, two batches a step, clipping."""
    for layer in (1, 2):
        with torch.no_grad(), captured(original, layer) as of_original, captured(student, layer) as of_student:
            original(input_ids=ids_NS)
            student(input_ids=ids_NS)
        x_NSD, target_NSD = of_original["x"][0], of_original["y"][0]
        if inputs == "student":
            x_NSD = of_student["x"][0]
            target_NSD = of_original["leaving"][0] - (of_student["leaving"][0] - of_student["y"][0])
        block = student.model.layers[layer].mlp
        trained = ("experts.", "shared_expert.", "shared_experts.", "gate_proj.", "up_proj.", "down_proj.")
        named = {name: value for name, value in block.named_parameters() if name.startswith(trained)}
        parameters = list(named.values())
        groups = [
            {
                "params": [value for name, value in named.items() if name.endswith("bias") == biases],
                "weight_decay": decay,
            }
            for biases, decay in ((False, 0.1), (True, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (steps - step) / steps
            for rows in order[2 * step : 2 * step + 2]:
                difference = moe_blocks.block_output(block(x_NSD[rows])) - target_NSD[rows]
                (difference.square().mean() / target_NSD.square().mean() / 2).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        for parameter in parameters:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("inputs", ["student", "original"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_local_recovery_is_a_plain_loop(family: str, inputs: str, tmp_path: Path) -> None:
    original, ids_NS = EVERY[family](), windows(7, 8)
    gate = 0.5 if family == "qwen2_moe" else None
    student = student_of(EVERY[family](), Condense(1, (3, 0), (0.4, 0.2), gate), CHANGES[1])
    expected = copy.deepcopy(student.model)
    settings: dict[str, Any] = {"local_inputs": inputs, "accumulate_grad_batches": 2, "gradient_clip": 0.5}
    run = local(student, tmp_path, **settings)
    order = [batch["input_ids"] for batch in run.data.train_dataloader()]
    rows = [torch.tensor([int((ids_NS == row).all(dim=1).nonzero()) for row in ids]) for ids in order]
    plain_loop(original, expected, ids_NS, rows, inputs, STEPS)
    before = bits(student.model)
    errors = run.run()
    after = bits(student.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".1.mlp." in name or ".2.mlp." in name for name in changed)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert sorted(errors) == [1, 2] and all(e["error_after"] < e["error_before"] for e in errors.values())
    with student.original() as model:
        assert same_bits(bits(model), bits(original)), "the original is as it was"


def test_padding_is_neither_seen_nor_learned(tmp_path: Path) -> None:
    """Behind the last target of a window, any token may stand; prompts, which are no targets, count."""
    ids_NS = windows(7, 8)
    labels_NS = ids_NS.clone()
    labels_NS[:, :2] = MASKED
    labels_NS[1::2, 5:] = MASKED
    results = []
    for filler in (0, 5):
        table = {"input_ids": ids_NS.clone(), "labels": labels_NS}
        table["input_ids"][1::2, 5:] = filler
        student = student_of(qwen2_moe())
        errors = local(student, tmp_path / str(filler), table).run()
        results.append((bits(student.model), errors))
    (one, errors), (other, other_errors) = results
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert errors[1] == pytest.approx(other_errors[1])
    plain = student_of(qwen2_moe())
    local(plain, tmp_path / "plain").run()
    name = "model.layers.1.mlp.down_proj.weight"
    assert (bits(plain.model)[name] - one[name]).abs().max() > 1e-3


def saved(folder: Path) -> Path:
    qwen2_moe(max_position_embeddings=64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, pages: Path | None) -> Any:
    return loading.load(folder, ModelConfig(device="cpu"), pages)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


PLANS = {
    "condense, prune and factorize": (*CHANGES, Factorize(0, RANKS)),
    "a removed layer and a removed block": (Drop(0, "moe"), Condense(1, (3, 0), (0.4, 0.2), 0.5), Drop(2, "layer")),
    "nothing left in the changed layer": (Drop(1, "moe"),),
}


@pytest.mark.parametrize("inputs", ["student", "original"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_streamed_model_trains_the_same_one_layer_at_a_time(
    plan: str, inputs: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for pages in (None, tmp_path / "pages"):
        model = load(folder, pages)
        student = student_of(model, *PLANS[plan])
        most, resident = 0, Streamed.resident

        def spied(self: Any, layer: int, model: Any = model, resident: Any = resident) -> Any:
            nonlocal most
            layers = decoder.decoder_layers(model)
            most = max(most, sum(any(not p.is_meta for p in module.parameters()) for module in layers))
            return resident(self, layer)

        with monkeypatch.context() as patch:
            patch.setattr(Streamed, "resident", spied)
            errors = local(student, tmp_path / f"run-{pages is None}", local_inputs=inputs, learning_rate=1e-3).run()
        assert most == (0 if pages is None else 1)
        assert layer_store(model).streamed == (pages is not None)
        with student.original() as original:
            fingerprint = loading.weights_fingerprint(original)
        student.load_into_memory()
        results.append((errors, bits(model), fingerprint))
    (errors, in_memory, fingerprint), (streamed_errors, streamed, streamed_fingerprint) = results
    assert errors == streamed_errors and same_bits(in_memory, streamed) and fingerprint == streamed_fingerprint


class Killed(Exception):
    pass


class KillAt(logging.Handler):
    """A logger for metrics that kills the training at a step of a layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.metrics: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)
            if name == f"local/{self.layer}/loss":
                raise Killed


@pytest.mark.parametrize("inputs", ["student", "original"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_killed_recovery_resumes_at_its_layer(
    streamed: bool, inputs: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str, logger: KillAt) -> tuple[Any, Any]:
        student = student_of(load(folder, tmp_path / f"pages-{name}" if streamed else None))
        errors = local(student, tmp_path / name, loggers=[logger], local_inputs=inputs).run()
        student.load_into_memory()
        return bits(student.model), errors

    whole = KillAt(99)
    expected, expected_errors = start("whole", whole)
    assert whole.metrics["local/1/error_after"] == [expected_errors[1]["error_after"]]
    with pytest.raises(Killed):
        start("killed", KillAt(2))
    again = KillAt(99)
    state, errors = start("killed", again)
    assert same_bits(state, expected) and errors == expected_errors
    assert "local/1/loss" not in again.metrics and "local/2/loss" in again.metrics, "layer 1 was finished"
    with monkeypatch.context() as patch:  # nothing is computed when all layers are finished
        patch.setattr(LocalTape, "record", None)
        state, errors = start("killed", again)
    assert same_bits(state, expected) and errors == expected_errors


def test_a_damaged_layer_is_named(tmp_path: Path) -> None:
    local(student_of(qwen2_moe()), tmp_path).run()
    path = tmp_path / "layer-001.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"layer-001.ckpt is damaged"):
        local(student_of(qwen2_moe()), tmp_path).run()
    with pytest.raises(UserError, match="another plan"):
        local(student_of(qwen2_moe(), Prune(2, (0, 1, 2))), tmp_path).run()


def test_a_layer_that_does_not_get_better_keeps_its_weights(tmp_path: Path) -> None:
    student = student_of(qwen2_moe())
    before = bits(student.model)
    errors = local(student, tmp_path, learning_rate=3.0).run()
    assert same_bits(before, bits(student.model))
    assert all(error["error_before"] == error["error_after"] for error in errors.values())
    with pytest.raises(UserError, match=r"local, layer 1: the loss of step \d is (inf|nan), so the training diverges"):
        local(student_of(qwen2_moe()), tmp_path / "new", learning_rate=1e30).run()


def test_steps_too_small_for_bf16_add_up(tmp_path: Path) -> None:
    student = student_of(qwen2_moe().bfloat16())
    before = bits(student.model)
    local(student, tmp_path, steps=20, learning_rate=2e-4).run()
    after = bits(student.model)
    name = "model.layers.1.mlp.down_proj.weight"
    assert after[name].dtype == torch.bfloat16
    changed = (after[name] != before[name]).float().mean()
    assert changed > 0.5, "AdamW moves each weight by 1e-5 to 2e-4 a step, less than the distance of weights of 0.3"


def test_two_processes_train_like_one(forks: Forks, tmp_path: Path) -> None:
    for inputs in ("student", "original"):
        for streamed in (False, True):
            name = f"{inputs}-{streamed}"
            ended = forks.run(
                SUPPORT / "local_processes.py", str(tmp_path / name), inputs, str(streamed), folder=tmp_path
            )
            assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("streamed", [False, True])
def test_recover_in_a_notebook(streamed: bool, tmp_path: Path) -> None:
    """A second call only loads the folder, and other settings are refused. A streamed model stays streamed."""
    settings: dict[str, Any] = {"steps": 2, "sequence_length": 16, "batch_size": 2, "learning_rate": 1e-2}
    model_folder(tmp_path / "model")

    def call(**changes: Any) -> Any:
        student = student_of(load(tmp_path / "model", tmp_path / "pages" if streamed else None))
        arguments = {**settings, "folder": tmp_path / "recovery", **changes}
        return recover(student, byte_tokenizer(), documents(4, 300), objective="local", **arguments)

    students = [call(), call()]
    assert all(layer_store(student.model).streamed == streamed for student in students)
    for student in students:
        student.load_into_memory()
    assert same_bits(*(bits(student.model) for student in students))
    if not streamed:
        with pytest.raises(UserError, match="a call with another settings"):
            call(learning_rate=1e-3)


def test_without_an_original_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    student = student_of(qwen2_moe())
    student.release_original()
    with pytest.raises(UserError, match="the student has no original"):
        local(student, tmp_path).run()


def test_bytes_to_train_a_layer() -> None:
    student = student_of(qwen2_moe(), *condense_plan(qwen2_moe(), [1]).operations)
    block = moe_blocks.get_block(student.model, 1)
    assert training_bytes(student, recovery(objective="local")) == 20 * sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("inputs", ["student", "original"])
def test_an_earlier_training_of_the_embedding_does_not_change_the_targets(inputs: str, tmp_path: Path) -> None:
    """The original's states come from its own embedding, the student's from the one that was trained."""
    module = prepared(qwen2_moe(), Plan("tiny", CHANGES), trainable="all", learning_rate=1e-1)
    fit(module, recovery_data(module), tmp_path, QUIET, seed=0)
    student, original, ids_NS = module.student, qwen2_moe(), windows(4, 8)
    storage = layer_store(student.model).tensor_storage()
    tape = LocalTape(student, [1], {"input_ids": ids_NS}, 4, storage, inputs == "student")
    tape.move_to(1)
    recorded_data = tape.record()
    with torch.no_grad(), captured(original, 1) as of_original, captured(student.model, 1) as of_student:
        original(ids_NS)
        student.model(ids_NS)
    x_NSD, target_NSD = of_original["x"][0], of_original["y"][0]
    if inputs == "student":
        residual_NSD = of_student["leaving"][0] - of_student["y"][0]
        x_NSD, target_NSD = of_student["x"][0], of_original["leaving"][0] - residual_NSD
    for index in range(4):
        torch.testing.assert_close(recorded_data.inputs[index], x_NSD[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recorded_data.targets[index], target_NSD[index], rtol=1e-4, atol=1e-5)
