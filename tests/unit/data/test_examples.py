"""Supervised examples: what is predicted, how windows are filled, and that no example attends to another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.losses import cross_entropy, forward_kl
from support.recoveries import module_of
from support.small import beginning_with, byte_tokenizer
from support.tiny_models import EVERY, FAMILIES, VOCAB, condense_plan, qwen2_moe
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from recondense.data.examples import Example, make_examples, make_windows
from recondense.data.examples import _by_pieces as by_pieces
from recondense.data.instruction_records import Record, read_record
from recondense.data.labels import MASKED, target_mask
from recondense.data.prompts import mark_answers
from recondense.export.write_folder import write_folder
from recondense.models import model_classes
from recondense.models.forward import model_inputs
from recondense.recovery.auxiliary_losses import feature_matching
from recondense.surgery import execute

LENGTHS = (5, 17, 9, 20, 12, 1, 3)


def random_example(length: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    return Example(ids, [index > length // 3 for index in range(length)])


def random_examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    return [random_example(length, seed) for seed, length in enumerate(lengths)]


def alpaca(instruction: str, output: str, context: str = "") -> Record:
    return read_record({"instruction": instruction, "input": context, "output": output}, "alpaca")


def spans(windows: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """(row, start, end) of every example; filler belongs to the last example of its row."""
    bounds = []
    for row, positions in enumerate(windows["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        bounds += [(row, start, end) for start, end in pairwise(starts)]
    return bounds


# ------------------------------------------------------------------------------------------------------- windows


def test_every_example_is_complete_in_one_window() -> None:
    examples = random_examples()
    windows = make_windows(examples, 24, filler=7)
    assert windows["input_ids"].shape == (3, 24)  # 67 tokens: the fewest windows that hold them
    seen = []
    for row, start, end in spans(windows):
        ids, labels = (windows[name][row, start:end].tolist() for name in ("input_ids", "labels"))
        example = next(
            candidate for candidate in examples if ids[: len(candidate.ids)] == candidate.ids and candidate not in seen
        )
        seen.append(example)
        size = len(example.ids)
        assert labels[:size] == [
            token if target else MASKED for token, target in zip(example.ids, example.targets, strict=True)
        ]
        assert ids[size:] == [7] * (end - start - size) and labels[size:] == [MASKED] * (end - start - size)
    assert len(seen) == len(examples)
    again = make_windows(examples, 24, filler=7)
    assert all(torch.equal(windows[name], again[name]) for name in windows)


def test_one_example_per_window() -> None:
    examples = random_examples()
    windows = make_windows(examples, 24, filler=7, together=False)
    assert set(windows) == {"input_ids", "labels"}  # the filler stands last, so nothing needs a mask
    assert [row[: len(example.ids)] for row, example in zip(windows["input_ids"].tolist(), examples, strict=True)] == [
        example.ids for example in examples
    ]


# ----------------------------------------------------------------------------------- nothing attends across examples


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EVERY)
def test_logits_are_those_of_every_example_alone(family: str, attention: str) -> None:
    """Batches of several windows, with examples of one token among them."""
    model: Any = EVERY[family]()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for this family")
    model.set_attn_implementation(attention)
    examples = random_examples()
    windows = make_windows(examples, 24, filler=3)
    assert len(windows["input_ids"]) > 1
    with torch.no_grad():
        packed = model(**model_inputs(model, windows["input_ids"], windows["position_ids"]), use_cache=False).logits
        unaware = model(input_ids=windows["input_ids"], use_cache=False).logits
        compared = 0
        for row, start, _ in spans(windows):
            ids = windows["input_ids"][row].tolist()
            alone = max(
                (example for example in examples if ids[start : start + len(example.ids)] == example.ids),
                key=lambda e: len(e.ids),
            )
            size = len(alone.ids)
            expected = model(input_ids=torch.tensor([alone.ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, start : start + size], expected, rtol=5e-5, atol=5e-5)
            if start:
                compared += 1
                assert (unaware[row, start : start + size] - expected).abs().max() > 1e-2, (
                    "the examples do not attend to each other anyway"
                )
    assert compared > 2


def test_an_exported_model_keeps_examples_apart_too(tmp_path: Path) -> None:
    """gpt_oss is given finished masks, whatever its model_type is called."""
    model: Any = EVERY["gpt_oss"]()
    model.set_attn_implementation("eager")
    plan = condense_plan(model, [1])
    execute.execute(model, plan)
    write_folder(model, None, plan, tmp_path / "out", "")
    model_classes.register_model_type("recondense_gpt_oss")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    windows = make_windows(random_examples(), 24, filler=3)
    arguments = [model_inputs(variant, windows["input_ids"], windows["position_ids"]) for variant in (model, loaded)]
    assert set(arguments[1]) == {"input_ids", "position_ids", "attention_mask"}
    with torch.no_grad():
        live, again = (
            variant(**inputs, use_cache=False).logits
            for variant, inputs in zip((model, loaded), arguments, strict=True)
        )
    torch.testing.assert_close(again, live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_joined_into_one_give_the_same_logits(family: str) -> None:
    """Flash attention gets a batch as one row, in which positions start again with every example."""
    model: Any = FAMILIES[family]()
    windows = make_windows(random_examples(), 24, filler=3)
    ids, positions = windows["input_ids"], windows["position_ids"]
    with torch.no_grad():
        rows = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        model.config._attn_implementation_internal = "flash_attention_2"
        inputs = model_inputs(model, ids, positions)
        model.config._attn_implementation_internal = "sdpa"
        one = model(**inputs, use_cache=False).logits
    assert inputs["input_ids"].shape == (1, ids.numel())
    torch.testing.assert_close(one.view(rows.shape), rows, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("objective", ["finetune", "distill"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_targets_of_examples_alone(family: str, objective: str) -> None:
    """Computed from the definition, example by example; prompts, filler and other examples do not contribute."""
    shares = {"cross_entropy_share": 0.25, "hidden_share": 0.25, "temperature": 2.0} if objective == "distill" else {}
    module = module_of(family, objective=objective, **shares)
    module.eval()
    examples = random_examples()
    windows = make_windows(examples, 24, filler=3)
    sums = {"cross_entropy": 0.0, "kl": 0.0}
    count = 0
    with torch.no_grad():
        losses = module.losses(**windows)
        for example in examples:
            ids = torch.tensor([example.ids])
            student_logits = module(ids)[0]
            with module.student.original():
                teacher_logits = module(ids)[0]
            for position in range(len(example.ids) - 1):
                if not example.targets[position + 1]:
                    continue
                count += 1
                sums["cross_entropy"] -= float(student_logits[position].log_softmax(-1)[example.ids[position + 1]])
                p, q = (teacher_logits[position] / 2).log_softmax(-1), (student_logits[position] / 2).log_softmax(-1)
                sums["kl"] += 4 * float((p.exp() * (p - q)).sum())
    assert losses["cross_entropy"].item() == pytest.approx(sums["cross_entropy"] / count, rel=1e-4)
    if objective == "distill":
        assert losses["kl"].item() == pytest.approx(sums["kl"] / count, rel=1e-4)
        parts = 0.5 * losses["kl"] + 0.25 * losses["cross_entropy"] + 0.25 * losses["hidden"]
        assert losses["loss"].item() == pytest.approx(parts.item(), rel=1e-6)
    else:
        assert losses["loss"] is losses["cross_entropy"]


def test_masks_select_positions() -> None:
    labels = torch.tensor([[MASKED, 4, MASKED, 2], [1, MASKED, MASKED, 3]])
    mask = target_mask(labels)
    assert mask.tolist() == [[True, False, True, False], [False, False, True, False]]
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    expected = forward_kl(student[mask][None], teacher[mask][None])
    torch.testing.assert_close(forward_kl(student, teacher, mask_BS=mask), expected)
    expected = F.cross_entropy(student[mask], torch.tensor([4, 2, 3]))
    torch.testing.assert_close(cross_entropy(student, labels), expected)
    states = [torch.randn(2, 4, 5)], [torch.randn(2, 4, 5)]
    expected = feature_matching([states[0][0][mask][None]], [states[1][0][mask][None]])
    torch.testing.assert_close(feature_matching(*states, mask), expected)
    rows = [[h.view(1, 8, 5) for h in hidden_states] for hidden_states in states]
    torch.testing.assert_close(feature_matching(*rows, mask), expected)


# ------------------------------------------------------------------------------------------------ token by token


def test_the_answer_and_its_end_are_predicted() -> None:
    tokenizer = byte_tokenizer()
    examples = make_examples([alpaca("Add 1 and 2.", "It is 3.")], tokenizer, 500)
    [example] = examples.kept
    assert (examples.left_out, examples.cut) == (0, 0)
    predicted = [token for token, target in zip(example.ids, example.targets, strict=True) if target]
    assert tokenizer.decode(predicted) == "It is 3.<|endoftext|>"
    prompt = [token for token, target in zip(example.ids, example.targets, strict=True) if not target]
    assert tokenizer.decode(prompt).endswith("### Instruction:\nAdd 1 and 2.\n\n### Response:\n")
    assert example.ids == prompt + predicted and example.ids[-1] == tokenizer.eos_token_id


def test_long_examples_are_cut_and_those_without_an_answer_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    size = len(mark_answers(alpaca("Go.", ""), tokenizer).text.removesuffix(tokenizer.eos_token or ""))
    records = [alpaca("Go.", "one"), alpaca("Go.", "a long answer"), alpaca("Go. " * 20, "no")]
    with caplog.at_level(logging.INFO, logger="recondense"):
        examples = make_examples(records, tokenizer, size + 4, "the records")
    assert [sum(example.targets) for example in examples.kept] == [4, 4]
    assert (examples.left_out, examples.cut) == (1, 1)
    assert "the records: 1 of 3 are left out" in caplog.text
    with pytest.raises(ValueError, match=r"none of 3 has an answer within data.sequence_length=20"):
        make_examples(records, tokenizer, 20)


def test_special_tokens_before_a_text_are_kept() -> None:
    tokenizer = beginning_with("<s>", bos=True, end=True)
    bos = tokenizer.bos_token_id
    [example] = make_examples([alpaca("Go.", "ok")], tokenizer, 500).kept
    assert example.ids[0] == bos and example.ids.count(bos) == 1 and not example.targets[0]
    assert example.ids.count(0) == 1 and example.ids[-1] == 0


def test_answers_are_found_without_offsets_too() -> None:
    tokenizer = byte_tokenizer()
    records = [alpaca("Go.", "yes", "here"), alpaca("Stop.", "no")]
    expected = [(example.ids, example.targets) for example in make_examples(records, tokenizer, 500).kept]
    tokenized = by_pieces([mark_answers(record, tokenizer) for record in records], tokenizer)
    assert [(ids, targets) for ids, targets, _ in tokenized] == expected


def test_a_token_that_begins_in_the_prompt_is_no_target() -> None:
    """A tokenizer that joins the prompt's end and the answer's beginning."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "[UNK]": 1, "\nyes": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\nyes", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    [example] = make_examples([alpaca("Go.", "yes")], fast, 50).kept
    assert example.ids[-2:] == [2, 0] and example.targets[-2:] == [False, True]


def test_plain_windows_have_neither_labels_nor_positions() -> None:
    """The model gets token ids only."""
    model = qwen2_moe()
    assert set(model_inputs(model, torch.zeros(1, 2, dtype=torch.long), None)) == {"input_ids"}


@pytest.mark.parametrize("empty", ["", "  \n", "\u200b"])
def test_empty_answers_are_left_out_and_counted(empty: str, caplog: pytest.LogCaptureFixture) -> None:
    chat = read_record({"messages": [{"role": "assistant", "content": empty}]}, "chat", "c.jsonl, line 2")
    records = [
        alpaca("Go.", "one"),
        read_record({"instruction": "a", "output": empty}, "alpaca", "a.jsonl, line 7"),
        chat,
    ]
    with caplog.at_level(logging.INFO, logger="recondense"):
        examples = make_examples(records, byte_tokenizer(), 500, "the records")
    assert (len(examples.kept), examples.left_out) == (1, 2)
    assert "the records: 2 of 3 are left out: the answer is empty (a.jsonl, line 7), or the answer beg" in caplog.text
    with pytest.raises(
        ValueError, match=r"none of 1 has an answer within .*, or the answer is empty \(c.jsonl, line 2\)"
    ):
        make_examples([chat], byte_tokenizer(), 500)
    assert len(make_examples(records, byte_tokenizer(), 500, answer_only=False).kept) == 3
