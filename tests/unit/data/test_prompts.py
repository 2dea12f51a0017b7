"""Where the answers are in Alpaca's prompt and in chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from support.small import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from recondense.data.examples import make_examples
from recondense.data.instruction_records import Record, read_record
from recondense.data.prompts import RefusedChat, mark_answers, render_documents

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks the assistant's messages, as newer templates do.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# As DeepSeek's and Mixtral's: they write special tokens themselves, and allow only pairs of turns.
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "{{ message['role'] + ':' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def chat_tokenizer(template: str, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], **tokens})
    tokenizer.chat_template = template
    return tokenizer


def answers(record: Record, tokenizer: Any) -> list[str]:
    marked = mark_answers(record, tokenizer)
    return [marked.text[start:end] for start, end in marked.answers]


def test_alpacas_prompt() -> None:
    tokenizer = byte_tokenizer()
    record = read_record({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca")
    assert mark_answers(record, tokenizer).text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3<|endoftext|>"
    )
    assert answers(record, tokenizer) == ["3<|endoftext|>"]
    braces = read_record({"instruction": "Fill {in} {0}.", "output": "{x}"}, "alpaca")
    assert mark_answers(braces, tokenizer).text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nFill {in} {0}.\n\n### Response:\n{x}<|endoftext|>"
    )
    assert render_documents(["plain", record], tokenizer) == ["plain", mark_answers(record, tokenizer).text]


def test_a_chat_without_a_template_is_instructions() -> None:
    tokenizer = byte_tokenizer()
    record = read_record({"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, "chat")
    marked = mark_answers(record, tokenizer)
    assert marked.text == (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello.<|endoftext|>\n\n### Instruction:\nBye\n\n"
        "### Response:\nSee you.<|endoftext|>"
    )
    assert answers(record, tokenizer) == ["Hello.<|endoftext|>", "See you.<|endoftext|>"]
    alone = mark_answers(read_record({"messages": CHAT[:2]}, "chat"), tokenizer)
    assert alone.text == mark_answers(read_record({"instruction": "Hi", "output": "Hello."}, "alpaca"), tokenizer).text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hello.<|im_end|>\n", "See you.<|im_end|>\n<|endoftext|>"]),
        (MARKED, ["Hello.<|im_end|>", "See you.<|im_end|>\n<|endoftext|>"]),
        (STRICT, [" Hello.<|endoftext|>", " See you.<|endoftext|>"]),
    ],
)
def test_a_chat_in_the_template_of_its_tokenizer(template: str, expected: list[str]) -> None:
    """Every turn of the assistant is predicted together with its end, and nothing else."""
    tokenizer = chat_tokenizer(template, bos_token="<s>")
    record = read_record({"messages": CHAT}, "chat")
    assert answers(record, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    text = mark_answers(record, tokenizer).text
    assert text.removesuffix("<|endoftext|>") == rendered.removesuffix("<|endoftext|>")
    [example] = make_examples([record], tokenizer, 500).kept
    predicted = [token for token, target in zip(example.ids, example.targets, strict=True) if target]
    assert predicted == tokenizer("".join(expected), add_special_tokens=False)["input_ids"]
    assert example.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.ids.count(tokenizer.bos_token_id) == (template == STRICT)


def test_no_end_of_text_is_added_where_it_is_the_end_of_turn() -> None:
    tokenizer = chat_tokenizer(CHATML, eos_token="<|im_end|>")
    assert answers(read_record({"messages": CHAT[:2]}, "chat"), tokenizer) == ["Hello.<|im_end|>\n"]


def test_chats_that_the_template_refuses_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer(STRICT, bos_token="<s>")
    answer_first = read_record({"messages": CHAT[1:]}, "chat")
    with pytest.raises(RefusedChat, match="turns must alternate"):
        mark_answers(answer_first, tokenizer)
    with caplog.at_level("INFO", logger="recondense"):
        examples = make_examples([answer_first, read_record({"messages": CHAT}, "chat")], tokenizer, 500)
    assert (len(examples.kept), examples.left_out) == (1, 1)
    assert "turns must alternate" in caplog.text
    with pytest.raises(ValueError, match="turns must alternate"):
        make_examples([answer_first], tokenizer, 500)


def test_a_template_that_forgets_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="changes earlier turns of a chat"):
        mark_answers(read_record({"messages": CHAT}, "chat"), chat_tokenizer(FORGETFUL))
