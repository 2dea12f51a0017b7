"""A model that is read layer by layer gives the same results, bit for bit, as one that is in memory."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checks import config_messages
from support.recoveries import recovery
from support.searched import METHODS, PROPAGATED, overrides_of, plan_of
from support.small import byte_tokenizer
from support.tiny_models import EVERY, blocks, qwen2_moe, recorded, texts, windows
from torch import nn

from recondense.calibration.tape import Tape
from recondense.config.schema import ExportConfig, ModelConfig, from_dict
from recondense.evaluation.perplexity import perplexity
from recondense.evaluation.profiling import peak_tensor_bytes
from recondense.export.write_folder import write_folder
from recondense.methods.search.importance import expert_importance
from recondense.models import decoder, loading, moe_blocks
from recondense.models.layer_store import layer_store
from recondense.models.parameters import largest_layer_bytes
from recondense.models.streaming import Streamed
from recondense.models.tensor_store import Disk
from recondense.operations import Condense, Drop, Factorize, Prune, Refit
from recondense.plan import Plan
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teacher_cache import keep_predictions
from recondense.surgery import execute, refit
from recondense.surgery.apply import apply

RANKS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (6,) * 6)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="40KB")  # several shards: the weights of a layer are in two of them
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, pages: Path | None, family: str = "qwen2_moe") -> Any:
    attention: Any = "eager" if family == "gpt_oss" else "sdpa"
    return loading.load(folder, ModelConfig(attention=attention, device="cpu"), pages)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(qwen2_moe(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def in_memory(folder: Path) -> Any:
    return load(folder, None)


@pytest.fixture
def streamed(folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Never more than one of its layers is in memory."""
    model = load(folder, tmp_path / "pages")
    resident = Streamed.resident
    most = 0

    def spied(self: Any, layer: int) -> Any:
        nonlocal most
        most = max(most, len(layers_in_memory(model)))
        return resident(self, layer)

    Streamed.resident = spied  # type: ignore[assignment,method-assign]
    yield model
    Streamed.resident = resident  # type: ignore[method-assign]
    assert most <= 1


def layers_in_memory(model: Any) -> list[int]:
    layers = enumerate(decoder.decoder_layers(model))
    return [
        layer for layer, module in layers if any(parameter.device.type != "meta" for parameter in module.parameters())
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def all_states(tape: Tape) -> list[torch.Tensor]:
    return [state for layer in tape.states for state in layer]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", EVERY)
def test_a_layer_has_its_weights_while_it_is_used(family: str, tmp_path: Path) -> None:
    folder = save(EVERY[family](), tmp_path / "model")
    in_memory, model = load(folder, None, family), load(folder, tmp_path / "pages", family)
    assert layers_in_memory(model) == []
    outside = {name: value for name, value in in_memory.state_dict().items() if not name.startswith("model.layers.")}
    assert same(outside, {name: model.state_dict()[name] for name in outside})
    for layer, expected in enumerate(decoder.decoder_layers(in_memory)):
        with layer_store(model).resident(layer):
            assert layers_in_memory(model) == [layer]
            state = decoder.decoder_layers(model)[layer].state_dict()
            assert same(state, expected.state_dict())
            assert [value.dtype for value in state.values()] == [
                value.dtype for value in expected.state_dict().values()
            ]
    assert loading.weights_fingerprint(model) == loading.weights_fingerprint(in_memory)
    tapes = [recorded(other) for other in (in_memory, model)]
    assert all(map(torch.equal, *map(all_states, tapes)))


@pytest.mark.parametrize(("method", "kind"), [*((method, "") for method in METHODS), ("reap", PROPAGATED)])
def test_every_method_gives_the_same_plan_and_weights(
    method: str, kind: str, in_memory: Any, streamed: Any, tmp_path: Path
) -> None:
    results = []
    for name, model in (("in_memory", in_memory), ("streamed", streamed)):
        storage = Disk(tmp_path / name, keeps=False) if name == "streamed" else None
        plan = plan_of(model, method, tmp_path / f"{name}-cache", *overrides_of(method, kind), storage=storage)
        execute.execute(model, plan, lambda model=model, storage=storage: recorded(model, storage=storage))
        write_folder(
            model, None, plan, tmp_path / f"{name}-out", "", ExportConfig(format="bundled", max_shard_size="60KB")
        )
        results.append((plan.to_json(), tensors(tmp_path / f"{name}-out")))
        assert name == "in_memory" or not plan.operations or len(layers_in_memory(model)) <= 1
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_importance_by_the_loss(in_memory: Any, streamed: Any, tmp_path: Path) -> None:
    values = []
    for model, storage in ((in_memory, None), (streamed, Disk(tmp_path / "tape"))):
        block = moe_blocks.sparse_blocks(model)[1]
        values.append(expert_importance(model, recorded(model, storage=storage), block, "lm_loss", True, 1 << 30))
    assert values[0] == values[1] and max(values[0]) > 0


def compress(model: Any, storage: Disk | None) -> tuple[Plan, dict[int, nn.Module], Any]:
    """Condense, prune and factorize layers, and refit them."""
    plan = Plan(
        "tiny",
        (
            Condense(0, (1, 4), (0.3, 0.4), 0.5), Prune(1, (0, 2, 3)), Factorize(2, RANKS, whitening=True),
            Refit(0, "coefficients", 1e-2), Refit(1, "down_proj", 1e-2), Refit(2, "down_proj", 1e-2),
        ),
    )  # fmt: skip
    record = lambda: recorded(model, storage=storage)  # noqa: E731
    originals = execute.execute(model, plan, record)
    execute.refit(model, plan, originals, record)
    return plan, originals, record


def test_evaluation_of_student_and_original(in_memory: Any, streamed: Any, tmp_path: Path) -> None:
    """Perplexity and divergence from the original, after whitening and refits."""
    ids, metrics = windows(5, 12), []
    for model, storage in ((in_memory, None), (streamed, Disk(tmp_path / "scratch", keeps=False))):
        _, originals, _ = compress(model, storage)
        metrics.append(perplexity(model, ids, 2, lambda m=model, o=originals: moe_blocks.swap_blocks(m, o)))
    assert metrics[0] == metrics[1] and metrics[0]["kl_to_original"] > 0


def test_a_streamed_teacher_gives_the_same_predictions(in_memory: Any, streamed: Any, tmp_path: Path) -> None:
    ids = {"input_ids": windows(70, 6)}  # two files
    predictions = []
    for index, model in enumerate((in_memory, streamed)):
        teacher = keep_predictions(
            lambda m=model: moe_blocks.swap_blocks(m, {}),
            ids,
            tmp_path / str(index),
            5,
            1.0,
            4,
            torch.autocast("cpu", enabled=False),
        )
        predictions.append(teacher.read(range(70)))
    assert all(map(torch.equal, *predictions))


def test_a_killed_run_resumes_at_its_layer(folder: Path, tmp_path: Path) -> None:
    """States and blocks on the disk are not computed again."""
    ids = blocks(texts())

    class Killed(Exception):
        pass

    def at_second() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    calls: list[int] = []
    first = load(folder, tmp_path / "pages")
    with pytest.raises(Killed):
        Tape.record(first, ids, at_second, Disk(tmp_path / "tape"))
    again = load(folder, tmp_path / "pages")
    tape = Tape.record(again, ids, storage=Disk(tmp_path / "tape"))
    assert tape.layer_runs == 1  # of three
    assert all(map(torch.equal, all_states(tape), all_states(recorded(again))))
    plan = Plan("tiny", (Condense(0, (1, 4), (0.3, 0.4), 0.5), Prune(1, (0, 2, 3))))
    execute.execute(first, Plan("tiny", plan.operations[:1]))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pages").iterdir()}
    execute.execute(again, plan)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pages").iterdir()}
    assert len(before) == 1 and len(after) == 2 and before.items() <= after.items()
    expected = load(folder, None)
    execute.execute(expected, plan)
    for layer, module in enumerate(decoder.decoder_layers(expected)):
        with layer_store(again).resident(layer):
            assert same(decoder.decoder_layers(again)[layer].state_dict(), module.state_dict())


def test_a_killed_run_is_whitened_and_refitted_like_an_undisturbed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are those of the model before any factorization; refitted layers are not solved again."""
    plan = Plan(
        "tiny",
        (
            *(Factorize(layer, RANKS, whitening=True) for layer in range(3)),
            *(Refit(layer, "down_proj", 1e-2) for layer in range(3)),
        ),
    )
    monkeypatch.setattr(refit, "LEAST_COLUMNS", 1)  # so that these layers are solved in parts
    expected = load(folder, None)
    block = moe_blocks.get_block(expected, 0)
    assert refit.most_columns(block) < sum(u.weight_Dn.shape[1] for u in refit.units_of(expected, 0))
    record = lambda: recorded(expected)  # noqa: E731
    execute.refit(expected, plan, execute.execute(expected, plan, record), record)
    solved: list[int] = []
    solve = refit._refit_layer
    offload, writes = Streamed.offload, [2]

    def record_layer(model: Any, tape: Any, operation: Refit, *args: Any) -> Any:
        solved.append(operation.layer)
        return solve(model, tape, operation, *args)

    def kill(self: Any, block: nn.Module, *args: Any) -> nn.Module:
        writes[0] -= 1
        if writes[0] < 0:
            raise KeyboardInterrupt
        return offload(self, block, *args)

    monkeypatch.setattr(refit, "_refit_layer", record_layer)
    for more in (2, 3, None):  # two layers, then one and two refits, then the rest
        model = load(folder, tmp_path / "pages")
        writes[0] = 100 if more is None else more
        monkeypatch.setattr(Streamed, "offload", kill)
        again = partial(recorded, model, storage=Disk(tmp_path / "tape", keeps=False))
        with pytest.raises(KeyboardInterrupt) if more is not None else nullcontext():
            execute.refit(model, plan, execute.execute(model, plan, again), again)
    assert solved == [0, 1, 2, 2]  # the last one was killed before it was on the disk
    for layer, module in enumerate(decoder.decoder_layers(expected)):
        with layer_store(model).resident(layer):
            assert same(decoder.decoder_layers(model)[layer].state_dict(), module.state_dict())


def test_offloaded_blocks_are_stored_by_context_and_their_files_are_deleted(folder: Path, tmp_path: Path) -> None:
    model = load(folder, tmp_path / "pages")
    condense = Condense(0, (1, 4), (0.3, 0.4), 0.5)
    for key in ("one", "other"):
        layer_store(model).context = key
        originals = execute.execute(model, Plan("tiny", (condense,)))
        with layer_store(model).resident(0):
            pass
        moe_blocks.set_block(model, 0, originals[0])
    assert len(list((tmp_path / "pages").iterdir())) == 2  # another context: another file
    with layer_store(model).resident(1):
        block = layer_store(model).offload(moe_blocks.get_block(model, 1))
    with moe_blocks.swap_blocks(model, {1: block}), layer_store(model).resident(1):
        pass
    with layer_store(model).resident(2):
        assert len(list((tmp_path / "pages").iterdir())) == 3
    del block
    gc.collect()
    assert len(list((tmp_path / "pages").iterdir())) == 2


def test_a_checkpoint_that_lacks_a_weight_of_a_layer_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    files = (tmp_path / "model").glob("*.safetensors")
    lacking = next(path for path in files if any("model.layers.1.mlp" in name for name in load_file(path)))
    others = {name: value for name, value in load_file(lacking).items() if "model.layers.1.mlp" not in name}
    save_file(others, lacking, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.path=.*: the checkpoint lacks \d+ weights .*\(model\.layers\.1\.mlp"):
        load(tmp_path / "model", tmp_path / "pages")


def test_export_holds_few_copies_of_a_layer(tmp_path: Path) -> None:
    """In memory at a time: the layer, the parts of one of its weights, and less than half its size for a shard."""
    model = qwen2_moe(hidden_size=256, moe_intermediate_size=128, num_experts=16)
    folder = save(model, tmp_path / "model")
    page = largest_layer_bytes(model)
    del model
    streamed = load(folder, tmp_path / "pages")
    peak = peak_tensor_bytes(lambda: write_folder(streamed, None, Plan("tiny"), tmp_path / "out", ""), "cpu")
    assert page < peak < 2.5 * page
    assert same(tensors(tmp_path / "out"), tensors(folder))


def test_a_compressed_model_is_loaded_back(folder: Path, tmp_path: Path) -> None:
    """It can be trained like any other; the scales of condensed layers are still separate."""
    model, expected = load(folder, tmp_path / "pages"), load(folder, None)
    for other in (model, expected):
        execute.execute(other, Plan("tiny", (Condense(0, (1, 4), (0.3, 0.4), 0.5),)))
    assert layer_store(model).streamed
    layer_store(model).load_all()
    assert not layer_store(model).streamed and same(model.state_dict(), expected.state_dict())
    ids = windows(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_streamed_model_is_not_copied(streamed: Any) -> None:
    """A copy would have no weights, and its store would read into the original."""
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(streamed)


@pytest.mark.parametrize(
    ("operations", "trainable"),
    [
        ((Condense(0, (1, 4), (0.3, 0.4), 0.5), Prune(1, (0, 2, 3))), "experts"),
        ((Condense(0, (1, 4), (0.3, 0.4), 0.5), Prune(1, (0, 2, 3))), ("routers", "norms", "attention")),
        ((Drop(1, "moe"),), "experts"),  # those of layers that the plan does not change
    ],
)
def test_a_recovery_of_a_streamed_model_trains_the_same(
    folder: Path, tmp_path: Path, operations: Any, trainable: Any
) -> None:
    gradients = []
    for pages in (None, tmp_path / "pages"):
        plan = Plan("tiny", operations)
        model = load(folder, pages)
        with layer_store(model).resident(1):  # a layer may be in memory while all is frozen
            student = apply(model, plan)
            student.give_own_copies([0, 1])
            student.separate(model.parameters())
        if pages is not None:
            student.release_original()
            layer_store(model).load_all()
        module = RecoveryModule(student, recovery(objective="finetune", trainable=trainable))
        module.prepare()
        module.losses(windows(2, 9))["loss"].backward()
        gradients.append({name: p.grad for name, p in module.model.named_parameters() if p.requires_grad})
    in_memory, streamed = gradients
    assert in_memory.keys() == streamed.keys() and all(
        torch.equal(in_memory[name], streamed[name]) for name in in_memory
    )


def test_bf16_on_disk_is_the_rounded_state(folder: Path, tmp_path: Path) -> None:
    model = load(folder, None)
    exact, rounded = recorded(model), recorded(model, storage=Disk(tmp_path, torch.bfloat16))
    assert rounded.nbytes * 2 == exact.nbytes
    for index in range(len(exact.texts.local)):
        assert torch.equal(rounded.states[0][index], exact.states[0][index].bfloat16().float())
        assert rounded.states[3][index].dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recovery": {"objective": "distill"}}, "recovery.teacher=shared: with model.streaming=true the original is"),
        ({"recovery": {"objective": "finetune", "control": True}}, "recovery.control=true: trains the original"),
    ],
)
def test_what_streaming_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    config = from_dict({"model": {"streaming": True, "pretrain": {}}, **values})
    assert [problem for problem in config_messages(config) if message in problem]
    plain = from_dict({"model": {"pretrain": {}}, **values})
    assert not [problem for problem in config_messages(plain) if message in problem]
