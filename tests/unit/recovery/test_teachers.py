"""Three teachers: the original on the student's backbone, its predictions on disk, and another model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recoveries import QUIET, data, module_of, prepared
from support.small import byte_tokenizer
from support.tiny_models import VOCAB, condense_plan, qwen2_moe, windows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recondense.data.labels import MASKED
from recondense.data.loader import RecoveryData, ShuffledWindows, to_table
from recondense.models import moe_blocks
from recondense.models.parameters import resident_bytes
from recondense.recovery.fit import fit
from recondense.recovery.losses import TopK
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teacher_cache import CachedTeacher, cache_key, keep_predictions
from recondense.recovery.teachers import OtherTeacher, Teacher, require_same_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
K = 8


def store_predictions(
    module: RecoveryModule, table: Any, folder: Path, k: int = K, temperature: float = 1.0
) -> CachedTeacher:
    return keep_predictions(module.student.original, to_table(table), folder, k, temperature, 3, nullcontext(), 4)


def module_with_teacher(teacher: Teacher, module: RecoveryModule) -> RecoveryModule:
    """A module with the same student and settings that learns from another teacher."""
    other = RecoveryModule(module.student, module.settings, teacher)
    other.prepare()
    return other


# ------------------------------------------------------------------------------------------------ the same loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_three_teachers_give_the_same_loss(tmp_path: Path, temperature: float) -> None:
    """The other model equals the original bit for bit; stored predictions lack exactly r·KL(rest ‖ rest)."""
    ids = windows(7, 8)
    module = module_of(temperature=temperature, layers=(1, 2))
    shared = module.losses(ids)["loss"]
    stored = store_predictions(module, ids, tmp_path, temperature=temperature)
    other = module_with_teacher(OtherTeacher(qwen2_moe(), module.model, "the same"), module)
    assert torch.equal(other.losses(ids)["loss"], shared)
    module.student.release_original()
    cached = module_with_teacher(stored, module).losses(ids, window=torch.arange(7))["loss"].double()
    with torch.no_grad():
        logits = [network(input_ids=ids).logits.flatten(0, 1).double() for network in (qwen2_moe(), module.model)]
        rests = [(values / temperature).scatter(-1, logits[0].topk(K).indices, -torch.inf) for values in logits]
        r_T = (rests[0].logsumexp(-1) - (logits[0] / temperature).logsumexp(-1)).exp()
        p, q = (rest.log_softmax(-1) for rest in rests)
        missing = temperature**2 * (r_T * torch.where(p.isinf(), 0, p.exp() * (p - q)).sum(-1)).mean()
    assert missing > 1e-3 and float(cached.detach()) > 1e-3
    torch.testing.assert_close(cached.detach(), shared.detach().double() - missing, rtol=1e-4, atol=1e-5)


def test_positions_that_are_not_predicted_are_left_out_of_stored_predictions(tmp_path: Path) -> None:
    """With labels and positions of packed examples, the loss is that of the teacher on the backbone, up to the rest."""
    ids = windows(5, 8)
    labels = ids.clone()
    labels[:, [0, 1, 2, 4]] = MASKED
    table = {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 5)}
    module = module_of(cross_entropy_share=0.5)
    stored = store_predictions(module, table, tmp_path, k=VOCAB)  # all tokens but one, which is the rest
    some = [3, 0]
    batch = {name: column[some] for name, column in table.items()}
    expected = module.losses(**batch)
    losses = module_with_teacher(stored, module).losses(**batch, window=torch.tensor(some))
    torch.testing.assert_close(losses["kl"], expected["kl"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], expected["loss"], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- on disk


def test_stored_predictions_are_those_of_the_original(tmp_path: Path) -> None:
    ids = windows(7, 8)
    module = module_of()
    stored = store_predictions(module, ids, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "00000-of-00002.safetensors",
        "00001-of-00002.safetensors",
    ]
    predictions = stored.read([6, 2, 2])
    with torch.no_grad():
        logits = qwen2_moe()(input_ids=ids).logits[[6, 2, 2]]
    values, indices = logits.topk(K)
    assert torch.equal(predictions.ids_TK, indices)
    torch.testing.assert_close(
        predictions.logits_TK, values, rtol=1e-6, atol=1e-6
    )  # the head ran on other chunks of tokens
    total = torch.cat([predictions.logits_TK, predictions.rest_T.unsqueeze(-1)], -1).logsumexp(-1)
    torch.testing.assert_close(total, logits.logsumexp(-1), rtol=1e-6, atol=1e-6)
    ids_TK = stored._open(stored.files[0]).get_tensor("ids_TK")
    assert ids_TK.dtype == torch.uint16  # a small vocabulary


def test_logits_in_bf16_are_stored_as_they_are(tmp_path: Path) -> None:
    model = qwen2_moe().bfloat16()
    stored = keep_predictions(
        lambda: nullcontext(model), {"input_ids": windows(2, 8)}, tmp_path, 4, 1.0, 2, nullcontext()
    )
    predictions = stored.read([1])
    assert predictions.logits_TK.dtype == torch.bfloat16 and predictions.rest_T.dtype == torch.float32


def test_an_interrupted_teacher_predicts_only_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ids = module_of(), windows(11, 8)
    uninterrupted = store_predictions(module, ids, tmp_path / "uninterrupted").read(range(11))
    write = CachedTeacher.write

    def write_one(self: CachedTeacher, index: int, predictions: TopK) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, predictions)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CachedTeacher, "write", write_one)
        store_predictions(module, ids, tmp_path / "interrupted")
    assert len(list((tmp_path / "interrupted").glob("*.safetensors"))) == 1
    seen: list[Tensor] = []
    hook = module.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    resumed = store_predictions(module, ids, tmp_path / "interrupted")
    assert torch.equal(torch.cat(seen), ids[4:])
    assert all(
        torch.equal(actual, expected) for actual, expected in zip(resumed.read(range(11)), uninterrupted, strict=True)
    )
    store_predictions(module, ids, tmp_path / "interrupted")
    assert len(torch.cat(seen)) == 7 and not list(tmp_path.rglob("*.partial"))
    hook.remove()


@pytest.mark.parametrize("kind", ["cut", "zeros", "one byte", "empty", "folder", "link"])
def test_damaged_predictions_are_made_again(tmp_path: Path, kind: str) -> None:
    """And no others."""
    module, ids = module_of(), windows(11, 8)
    expected = store_predictions(module, ids, tmp_path).read(range(11))
    paths = sorted(tmp_path.glob("*.safetensors"))
    content, times = paths[1].read_bytes(), [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    if kind == "folder":
        paths[1].mkdir()
    elif kind == "link":
        paths[1].symlink_to("nowhere")
    else:
        damages = {"cut": content[:-5], "zeros": bytes(len(content)), "one byte": content[:-1] + b"\x77", "empty": b""}
        paths[1].write_bytes(damages[kind])
    again = store_predictions(module, ids, tmp_path).read(range(11))
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [True, False, True]


def test_the_cache_key_depends_on_all_that_decides_predictions() -> None:
    table = {"input_ids": windows(3, 8), "labels": windows(3, 8)}
    keys = {
        cache_key("w", table, 8, 1.0, "32-true"),
        cache_key("x", table, 8, 1.0, "32-true"),
        cache_key("w", table, 9, 1.0, "32-true"),
        cache_key("w", table, 8, 2.0, "32-true"),
        cache_key("w", table, 8, 1.0, "bf16-mixed"),
        cache_key("w", {"input_ids": windows(3, 8, seed=1)}, 8, 1.0, "32-true"),
        cache_key("w", {**table, "position_ids": torch.zeros(3, 8)}, 8, 1.0, "32-true"),
    }
    assert len(keys) == 7
    assert cache_key("w", {"input_ids": windows(3, 8)}, 8, 1.0, "32-true") in keys  # labels decide nothing


def test_which_windows_are_trained_on() -> None:
    table = {"input_ids": windows(10, 8)}
    for batches, number in ((2, 6), (3, 9), (4, 10), (9, 10)):
        loader = ShuffledWindows(table, 3, batches, 5, lambda: 0)
        batches_ = torch.cat([loader.batch(position)["input_ids"] for position in range(batches)])
        used = loader.used_windows()
        assert len(used) == number
        assert {tuple(row) for row in table["input_ids"][used].tolist()} == {tuple(row) for row in batches_.tolist()}


def test_a_fit_without_a_teacher_in_memory(tmp_path: Path) -> None:
    """It learns, resumes exactly, and holds only the student; checkpoints hold what trains."""
    finals = []
    for name, stops in (("uninterrupted", False), ("interrupted", True)):
        module = module_of(steps=4)
        with_original = resident_bytes(module)
        dropped = resident_bytes(*module.student.originals.values())
        stored = store_predictions(module, windows(7, 8), tmp_path / "kept")
        module.student.release_original()
        module = module_with_teacher(stored, module)
        assert resident_bytes(module) == with_original - dropped and not module.student.has_original
        table = {"input_ids": windows(7, 8), "window": torch.arange(7)}
        loader = RecoveryData(table, windows(2, 8, seed=5), 2, 4, seed=3)
        if stops:
            step = module.training_step

            def stop_at_step_3(batch: Any, index: int, step: Any = step, module: RecoveryModule = module) -> Tensor:
                if module.trainer.global_step == 3:
                    raise RuntimeError("stopped")
                return step(batch, index)  # type: ignore[no-any-return]

            module.training_step = stop_at_step_3  # type: ignore[method-assign]
            with pytest.raises(RuntimeError, match="stopped"):
                fit(module, loader, tmp_path / name, QUIET, seed=0)
            module = module_of(steps=4)
            module.student.release_original()
            module = module_with_teacher(stored, module)
        final = torch.load(fit(module, loader, tmp_path / name, QUIET, seed=0), weights_only=True)["state_dict"]
        assert set(final) == {
            f"model.model.layers.{layer}.mlp.{part}.weight"
            for layer in (1, 2)
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        finals.append(final)
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    start = module_of().state_dict()
    assert not any(torch.equal(final, start[name]) for name, final in finals[0].items())


# ------------------------------------------------------------------------------------------------ another model


def test_another_model_teaches_and_does_not_change(tmp_path: Path) -> None:
    module = module_of(steps=3)
    teacher = qwen2_moe(seed=5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = module_with_teacher(OtherTeacher(teacher, module.model, "another"), module)
    ids = windows(2, 8)
    losses = module.losses(ids)
    with torch.no_grad():
        p, q = (network(input_ids=ids).logits.log_softmax(-1) for network in (teacher, module.model))
    torch.testing.assert_close(losses["kl"], (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-5, atol=0)
    with module.student.original():  # the original does not predict what another model predicts
        assert module.losses(ids)["kl"] > 0.01
    assert not any(value is parameter for value in module.parameters() for parameter in teacher.parameters())
    final = fit(module, data(module, windows(2, 8)), tmp_path, QUIET, seed=0)
    assert all(".mlp." in name for name in torch.load(final, weights_only=True)["state_dict"])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(value.grad is None for value in teacher.parameters())


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    tokenizer = byte_tokenizer()
    require_same_vocabulary(byte_tokenizer(), tokenizer, "./teacher")
    grown = byte_tokenizer()
    grown.add_tokens(["<|extra|>"])
    with pytest.raises(
        ValueError, match=r"teacher_path=./teacher.*1 tokens.*<\|extra\|>.*student.s id None.*teacher=shared"
    ):
        require_same_vocabulary(grown, tokenizer, "./teacher")
    words = Tokenizer(models.BPE(tokenizer.get_vocab(), []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="it encodes 'Hello world' differently"):
        require_same_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), tokenizer, "./teacher")
    with pytest.raises(ValueError, match="has 101 logits, but the student's has 97"):
        OtherTeacher(qwen2_moe(vocab_size=101), qwen2_moe(), "./teacher")


def test_the_original_is_not_needed_after_its_release() -> None:
    """Adapters are merged without it."""
    model = qwen2_moe()
    module = prepared(model, condense_plan(model, [1]), trainable="lora")
    module.student.release_original()
    module.merge_adapters()
    assert module.adapters is None and not any("lora" in name for name, _ in model.named_parameters())
    assert not isinstance(moe_blocks.get_block(model, 1), type(moe_blocks.get_block(qwen2_moe(), 1)))
