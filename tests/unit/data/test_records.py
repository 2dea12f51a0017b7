"""Records as they are published, and the words in which they are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.small import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from recondense.data.examples import make_examples
from recondense.data.prompts import RefusedChat, mark_answers, render_documents
from recondense.data.records import Record, detect_form, read_record
from recondense.data.text_files import read_texts

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks what the assistant says, as newer templates do.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# As DeepSeek and Mixtral write: their own special tokens, and no more than turns in pairs.
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


def chatting(template: str, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], **tokens})
    tokenizer.chat_template = template
    return tokenizer


def answers(record: Record, tokenizer: Any) -> list[str]:
    found = mark_answers(record, tokenizer)
    return [found.text[start:end] for start, end in found.answers]


# -------------------------------------------------------------------------------------------------- published forms

# Word for word as in commonsense_170k.
CHOOSE = "Please choose the correct answer to the question:"
QUESTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "arc": (
        {
            "id": "x", "question": "Which is cold?", "answerKey": "B",
            "choices": {"text": ["fire", "ice", "sun", "oven"], "label": ["A", "B", "C", "D"]},
        },
        f"{CHOOSE} Which is cold?\n\nAnswer1: fire Answer2: ice Answer3: sun "
        "Answer4: oven\n\nAnswer format: answer1/answer2/answer3/answer4",
        "the correct answer is answer2",
    ),
    "arc with numbers": (
        {"question": "Which?", "answerKey": "3", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}},
        f"{CHOOSE} Which?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: "
        "answer1/answer2/answer3",
        "the correct answer is answer3",
    ),
    "arc as ai2 has it": (
        {
            "question": {"stem": "Which?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
            "answerKey": "A",
        },
        f"{CHOOSE} Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "the correct answer is answer1",
    ),
    "openbookqa": (
        {
            "question_stem": "The sun is", "answerKey": "D",
            "choices": {"text": ["a", "b", "c", "a star"], "label": ["A", "B", "C", "D"]},
        },
        f"{CHOOSE} The sun is\n\nAnswer1: a Answer2: b Answer3: c Answer4: a star"
        "\n\nAnswer format: answer1/answer2/answer3/answer4",
        "the correct answer is answer4",
    ),
    "mmlu": (
        {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "x"},
        f"{CHOOSE} 1 + 1?\n\nAnswer1: 1 Answer2: 2 Answer3: 3 Answer4: 4\n\nAnswer "
        "format: answer1/answer2/answer3/answer4",
        "the correct answer is answer2",
    ),
    "options by letter": (
        {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "B"},
        f"{CHOOSE} Which?\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
        "the correct answer is answer2",
    ),
    "answer in words": (
        {"question": "Which?", "options": ["x", "y"], "answer": "x"},
        f"{CHOOSE} Which?\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
        "the correct answer is answer1",
    ),
    "piqa": (
        {"goal": "Warm hands.", "sol1": "Use gloves.", "sol2": "Use ice.", "label": 0},
        "Please choose the correct solution to the question: Warm hands.\n\nSolution1: Use gloves.\n\n"
        "Solution2: Use ice.\n\n"
        "Answer format: solution1/solution2",
        "the correct answer is solution1",
    ),
    "hellaswag": (
        {"activity_label": "Playing", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "3", "ctx_a": "A man"},
        "Please choose the correct ending to complete the given sentence: Playing: A man\n\n"
        "Ending1: a Ending2: b Ending3: c "
        "Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "the correct answer is ending4",
    ),
    "winogrande": (
        {
            "sentence": "The jeans fit worse than the shirt because I tried the _ on.", "option1": "jeans",
            "option2": "shirt", "answer": "2",
        },
        "Please choose the correct answer to fill in the blank to complete the given sentence: The jeans fit worse "
        "than the shirt because I tried the _ on.\n\nOption1: jeans Option2: shirt Answer format: option1/option2",
        "the correct answer is option2",
    ),
    "boolq": (
        {"question": "is the sun a star", "passage": "The Sun is a star.", "answer": True},
        "Please answer the following question with true or false, question: is the sun a star?\n\n"
        "Answer format: true/false",
        "the correct answer is true",
    ),
    "boolq of super glue": (
        {"question": "is the sun cold?", "passage": "No.", "label": 0, "idx": 3},
        "Please answer the following question with true or false, question: is the sun cold?\n\n"
        "Answer format: true/false",
        "the correct answer is false",
    ),
    "social iqa": (
        {"context": "Ann left.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        f"{CHOOSE} Ann left. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: "
        "answer1/answer2/answer3",
        "the correct answer is answer3",
    ),
    "plain": ({"question": "What is 1 + 1?", "answer": "Two."}, "What is 1 + 1?", "Two."),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_become_instructions(kind: str) -> None:
    values, instruction, output = QUESTIONS[kind]
    assert detect_form(values) == "commonsense"
    assert read_record(values, "auto").values == {"instruction": instruction, "input": "", "output": output}
    assert read_record({"train": values}, "auto") == read_record(values, "commonsense")


def test_alpaca_and_commonsense_170k() -> None:
    values = {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3", "text": "whatever"}
    assert read_record(values, "auto").values == {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read_record({"instruction": "Add.", "output": "3"}, "alpaca").values["input"] == ""


def test_chats_in_both_words() -> None:
    shared = {
        "system": "Be kind.",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
    }
    messages = [{"role": "system", "content": "Be kind."}, *CHAT[:2]]
    assert read_record(shared, "auto").values == {"messages": messages}
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        CHAT[1],
        CHAT[2],
    ]
    assert read_record({"messages": parts}, "chat").values == {"messages": CHAT[:2]}, "nobody answers the last turn"


@pytest.mark.parametrize(
    ("values", "form", "message"),
    [
        ([1], "auto", "is a list, not an object"),
        ({"body": "x"}, "auto", r"has no known form \(its fields: body\); the forms are alpaca, chat, commonsense"),
        ({"body": "x"}, "alpaca", r"is no alpaca record: it has no 'instruction' \(its fields: body\)"),
        ({"instruction": "x", "output": 3}, "auto", "its 'output' is a int, not a text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "auto", "has no message of an assistant"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "auto", "nobody is called 'narrator'"),
        ({"messages": "x"}, "auto", "its messages are no list"),
        ({"goal": "x", "sol1": "a", "sol2": "b", "label": -1}, "auto", "has no answer among its 2 options"),
        ({**QUESTIONS["hellaswag"][0], "label": ""}, "auto", "has no answer among its 4 options"),
        ({**QUESTIONS["boolq"][0], "answer": -1}, "auto", "neither true nor false"),
        ({"question": "x", "choices": "ab", "answer": "a"}, "auto", "its options are no list"),
        ({"question": "x", "choices": ["a", None], "answer": "a"}, "auto", "its options are no list"),
        ({"question": None, "choices": ["a", "b"], "answer": "a"}, "auto", "its 'question' is a NoneType, not a text"),
        ({"question": "q", "choices": {"text": None, "label": None}, "answerKey": "A"}, "auto", "its labels are no"),
        ({"ctx": "a", "endings": None, "label": "1"}, "auto", "its endings are no list of texts"),
        ({"ctx": "a", "endings": "abc", "label": "1"}, "auto", "its endings are no list of texts"),
        ({"messages": [{"role": ["x"], "content": "c"}]}, "auto", r"nobody is called \['x'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1.5}]}]}, "auto", "no message of an"),
    ],
)
def test_other_records_are_refused(values: Any, form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_record(values, form)


# ----------------------------------------------------------------------------------------------------------- words


def test_alpacas_words() -> None:
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
    found = mark_answers(record, tokenizer)
    assert found.text == (
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
    """Every turn of the assistant is predicted, with what ends it, and nothing else."""
    tokenizer = chatting(template, bos_token="<s>")
    record = read_record({"messages": CHAT}, "chat")
    assert answers(record, tokenizer) == expected
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    text = mark_answers(record, tokenizer).text
    assert text.removesuffix("<|endoftext|>") == whole.removesuffix("<|endoftext|>")
    [example] = make_examples([record], tokenizer, 500).kept
    predicted = [token for token, target in zip(example.ids, example.targets, strict=True) if target]
    assert predicted == tokenizer("".join(expected), add_special_tokens=False)["input_ids"]
    assert example.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.ids.count(tokenizer.bos_token_id) == (template == STRICT)


def test_an_end_of_turn_that_is_the_end_of_text_is_enough() -> None:
    tokenizer = chatting(CHATML, eos_token="<|im_end|>")
    assert answers(read_record({"messages": CHAT[:2]}, "chat"), tokenizer) == ["Hello.<|im_end|>\n"]


def test_chats_that_the_template_refuses_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chatting(STRICT, bos_token="<s>")
    opened = read_record({"messages": CHAT[1:]}, "chat")
    with pytest.raises(RefusedChat, match="turns must alternate"):
        mark_answers(opened, tokenizer)
    with caplog.at_level("INFO", logger="recondense"):
        found = make_examples([opened, read_record({"messages": CHAT}, "chat")], tokenizer, 500)
    assert (len(found.kept), found.left_out) == (1, 1)
    assert "turns must alternate" in caplog.text
    with pytest.raises(ValueError, match="turns must alternate"):
        make_examples([opened], tokenizer, 500)


def test_a_template_that_forgets_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="rewrites earlier turns of a chat"):
        mark_answers(read_record({"messages": CHAT}, "chat"), chatting(FORGETFUL))


# ----------------------------------------------------------------------------------------------------------- files

ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "output": "ok"}]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("form", ["auto", "alpaca"])
def test_files_hold_a_list_or_lines(tmp_path: Path, listed: bool, form: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(ALPACA, indent=1) if listed else "".join(f"{json.dumps(each)}\n\n" for each in ALPACA))
    found = list(read_texts(path, form=form))
    assert [text for _, text in found] == [read_record(each, "alpaca") for each in ALPACA]
    assert all(isinstance(text, Record) for _, text in found)
    assert [number for number, _ in found] == ([1, 2] if listed else [1, 3])


def test_a_mark_at_the_head_and_a_field_around_all_are_read(tmp_path: Path) -> None:
    """The first as Windows writes it, the second as in cais/mmlu's auxiliary_train."""
    question = {"question": "Q?", "choices": ["a", "b", "c"], "answer": 1, "subject": ""}
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"train": question}) + "\n", encoding="utf-8-sig")
    [(number, text)] = read_texts(path, form="auto")
    assert (number, text) == (1, read_record(question, "commonsense"))
    path.write_text("a text", encoding="utf-8-sig")
    assert list(read_texts(path.rename(tmp_path / "plain.txt"))) == [(1, "a text")]


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ('{"body": 1}', "auto", "line 1 has no known form .*; mend it, or set data.form"),
        (f"{json.dumps(ALPACA[0])}\n[1]", "auto", "line 2 is a list"),
        (json.dumps([ALPACA[0], {"messages": CHAT}]), "auto", "record 2 is no alpaca record: it has no 'instruction'"),
        ("[1", "auto", r"is not JSON \(line 1: "),
        ("{", "alpaca", "line 1 is not JSON"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, content: str, form: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(path, form=form))
