"""The Tape agrees with the model's hidden states and with hooks on its modules, and padding changes nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, VOCAB, blocks, deepseek_v2, qwen2_moe, recorded, texts, unchanged
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration import tape as tape_module
from recondense.calibration.tape import Tape
from recondense.models import decoder, moe_blocks
from recondense.models.tensor_store import Disk

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_transformers_hidden_states(family: str) -> None:
    model, ids = FAMILIES[family](), texts()
    tape = recorded(model, ids)
    assert tape.num_layers == 3 and tape.num_tokens == sum(map(len, ids)) and len(tape.texts.local) == 3
    for index, batch in enumerate(tape.texts.local):
        with torch.no_grad():
            output = model(input_ids=batch.input_ids_BS, attention_mask=batch.mask_BS, output_hidden_states=True)
        for layer in range(3):
            torch.testing.assert_close(
                tape.real_tokens(index, tape.states[layer][index]),
                tape.real_tokens(index, output.hidden_states[layer]),
                **CLOSE,
            )
        normed = decoder.final_norm(model)(tape.states[3][index])  # transformers hands out the last one normed
        torch.testing.assert_close(
            tape.real_tokens(index, normed), tape.real_tokens(index, output.hidden_states[-1]), **CLOSE
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_rerun_from_its_taped_input_gives_the_next_state(family: str) -> None:
    model = FAMILIES[family]()
    tape = recorded(model)
    assert tape.layer_runs == 3
    with torch.no_grad():
        for layer in range(3):
            for index in range(len(tape.texts.local)):
                again = tape.run_layer(model, layer, index, tape.states[layer][index])
                assert torch.equal(again, tape.states[layer + 1][index])
    assert tape.layer_runs == pytest.approx(6)
    assert tape.nbytes == 4 * 4 * 32 * sum(batch.mask_BS.numel() for batch in tape.texts.local)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_recorded_as_if_it_were_alone(family: str) -> None:
    """The other texts of a batch, whatever their number and lengths, do not change a text's states."""
    model, ids = FAMILIES[family](), texts()
    together = recorded(model, ids, texts_per_block=5)
    for row, text in enumerate(ids):
        alone = recorded(model, [text])
        for layer in range(4):
            torch.testing.assert_close(together.states[layer][0][row, : len(text)], alone.states[layer][0][0], **CLOSE)


def replace_pads(ids: list[list[int]], pad: int) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for input_ids_BS, mask_BS in blocks(ids):
        batches.append((torch.where(mask_BS, input_ids_BS, torch.full_like(input_ids_BS, pad)), mask_BS))
    return batches


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_never_counts(family: str) -> None:
    """Whatever ids the padding has, the states and traces of real tokens are the same, and no pad is among them."""
    model, ids = FAMILIES[family](), texts()
    tapes = [Tape.record(model, replace_pads(ids, pad)) for pad in (0, 53, VOCAB - 1)]
    traces = [list(tape.trace(model, 2)) for tape in tapes]
    assert sum(len(trace.x_TD) for trace in traces[0]) == sum(map(len, ids))
    for tape, trace in zip(tapes[1:], traces[1:], strict=True):
        for index in range(len(tape.texts.local)):
            for layer in range(4):
                torch.testing.assert_close(
                    tape.real_tokens(index, tape.states[layer][index]),
                    tapes[0].real_tokens(index, tapes[0].states[layer][index]),
                    **CLOSE,
                )
            for name, value in vars(trace[index]).items():
                torch.testing.assert_close(value, getattr(traces[0][index], name), **CLOSE)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_trace_equals_hooks_on_the_model(family: str, layer: int) -> None:
    model, ids = FAMILIES[family](), texts()
    block: Any = moe_blocks.get_block(model, layer)
    seen: dict[str, Any] = {}
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output)),
        block.gate.register_forward_hook(lambda module, args, output: seen.update(router=output)),
    ]
    expected = []
    for text in ids:  # one by one: no padding at all
        with torch.no_grad():
            model(input_ids=torch.tensor([text]))
        expected.append((seen["x"][0], seen["output"][0], seen["router"][2], seen["router"][1]))
    for handle in handles:
        handle.remove()
    tape = recorded(model, ids)
    traced = [[getattr(t, n) for t in tape.trace(model, layer)] for n in
             ("x_TD", "output_TD", "top_k_index_TK", "top_k_weights_TK")]  # fmt: skip
    for batches, texts_alone in zip(traced, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(batches), torch.cat(list(texts_alone)), **CLOSE)
    if family == "deepseek_v2":  # the routed scaling factor is part of the weights
        logits = torch.cat(traced[0]) @ block.gate.weight.T
        top = logits.softmax(-1).topk(2).values * model.config.routed_scaling_factor
        torch.testing.assert_close(torch.cat(traced[3]).sort(-1).values, top.sort(-1).values, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_recording_leaves_the_model_unchanged(family: str, training: bool) -> None:
    model = FAMILIES[family]().train(training)
    with unchanged(model):
        tape = recorded(model)
        list(tape.trace(model, 2))
    assert not any(state.requires_grad for layer in tape.states for state in layer)


def test_dropout_does_not_reach_the_tape() -> None:
    model = qwen2_moe(attention_dropout=0.5).train()
    torch.testing.assert_close(recorded(model).states[3][0], recorded(model.eval()).states[3][0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda model: model.model.embed_tokens.weight[3].fill_(float("nan")), "leaving the embedding"),
        (lambda model: model.model.layers[0].mlp.up_proj.weight.fill_(1e38), "leaving decoder layer 0"),
        (lambda model: model.model.layers[2].self_attn.o_proj.weight.fill_(float("nan")), "leaving decoder layer 2"),
    ],
)
def test_nan_names_the_layer(spoil: Any, where: str) -> None:
    model = deepseek_v2()
    with torch.no_grad():
        spoil(model)
    with unchanged(nn.Module()), pytest.raises(ValueError, match=where):
        recorded(model, [[1, 2, 3, 4]])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder.decoder_layers(model))


def by_hand(values: list[list[float]]) -> float:
    return sum(sum(text) / len(text) for text in values) / len(values)


def test_mean_over_texts() -> None:
    """Each text weighs the same, whatever its length and batch."""
    model: PreTrainedModel = qwen2_moe()
    tape = recorded(model, [[1, 2], [3, 4, 5, 6], [7]])
    per_text = [[1.0, 3.0], [10.0, 20.0, 30.0, 0.0], [5.0]]
    first = torch.tensor([[*per_text[0], *per_text[1]], [1.0] * 6])
    second = torch.tensor([per_text[2], [4.0]])
    means = tape.texts.mean_over_texts([first, second])
    assert means.dtype == torch.float64
    assert means.tolist() == [by_hand(per_text), 2.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_stored_while_taping_are_those_of_a_rerun(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces that do not fit are computed again when they are needed, bit for bit the same."""
    model = FAMILIES[family]()
    size = sum(trace.nbytes for traces in recorded(model).traces.values() for trace in traces)
    tapes = []
    for room in (0, size - 1, size):
        monkeypatch.setattr(tape_module, "TRACE_BYTES", room)
        tapes.append(recorded(model))
    rerun, stored = tapes[1:]
    assert [tape.traced for tape in tapes] == [False, False, True] and not tapes[0].traces
    assert stored.traces.keys() == moe_blocks.sparse_blocks(model).keys() and not rerun.traces
    for layer in stored.traces:
        for trace, again in zip(stored.trace(model, layer), rerun.trace(model, layer), strict=True):
            assert all(torch.equal(getattr(trace, name), getattr(again, name)) for name in vars(trace))


class Together:
    """Threads in place of processes: each has a rank, and they wait for each other where processes would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number = number
        self._local = threading.local()
        self._barrier = threading.Barrier(number, timeout=20)  # seconds: by then the others have failed
        self._values: list[Any] = [None] * number
        monkeypatch.setattr(processes, "world_size", lambda: number)
        monkeypatch.setattr(processes, "rank", lambda: self._local.rank)
        monkeypatch.setattr(processes, "gather", self._gather)

    def _gather(self, value: Any) -> list[Any]:
        self._values[self._local.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def record(self, models: list[Any], folder: Path) -> list[Tape]:
        """The tape of each process, or the error that it raised; all write into one folder."""
        results: list[Any] = [None] * self.number

        def work(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = recorded(models[rank], split=True, storage=Disk(folder))
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("number", [2, 4])
def test_a_split_tape_that_was_killed_between_two_processes_is_resumed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three text batches, a fourth process has none. What the last process lacks, all compute again."""
    unsplit = recorded(qwen2_moe())
    together = Together(monkeypatch, number)
    models = [qwen2_moe() for _ in range(number)]
    last = f"{number - 1}-of-{number}"
    for gone, again in (((), 0), ((2, 3), 2), ((3,), 1)):
        for layer in gone:
            (tmp_path / f"states-{layer:03d}-{last}.json").unlink()
        tapes = together.record(models, tmp_path)
        for rank, tape in enumerate(tapes):
            assert isinstance(tape, Tape), tape
            assert tape.layer_runs == pytest.approx((again if gone else 3) if tape.texts.local else 0)
            for layer, states in enumerate(tape.states):
                assert all(map(torch.equal, states, list(unsplit.states[layer])[rank::number]))
                assert len(states) == len(tape.texts.local)
    tapes = together.record(models, tmp_path)
    assert [tape.layer_runs for tape in tapes] == [0] * number, "nothing was missing"
