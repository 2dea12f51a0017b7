"""Records in the formats in which data sets are published."""

from __future__ import annotations

from typing import Any

import pytest

from recondense.data.instruction_records import detect_form, read_record
from recondense.errors import UserError

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


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


def test_chats_in_both_formats() -> None:
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
        ([1], "auto", "is of type list, not an object"),
        ({"body": "x"}, "auto", r"has no known form \(its fields: body\); the forms are alpaca, chat, commonsense"),
        ({"body": "x"}, "alpaca", r"is not a record of form alpaca: it has no 'instruction' \(its fields: body\)"),
        ({"instruction": "x", "output": 3}, "auto", "has a field 'output' that is of type int, not a string"),
        ({"messages": [{"role": "user", "content": "x"}]}, "auto", "has no message of an assistant"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "auto", "has the unknown role 'narrator'"),
        ({"messages": "x"}, "auto", "has messages that are not a list"),
        ({"goal": "x", "sol1": "a", "sol2": "b", "label": -1}, "auto", "has no correct answer among its 2 options"),
        ({**QUESTIONS["hellaswag"][0], "label": ""}, "auto", "has no correct answer among its 4 options"),
        ({**QUESTIONS["boolq"][0], "answer": -1}, "auto", "neither true nor false"),
        ({"question": "x", "choices": "ab", "answer": "a"}, "auto", "has options that are not a list"),
        ({"question": "x", "choices": ["a", None], "answer": "a"}, "auto", "has options that are not a list"),
        (
            {"question": None, "choices": ["a", "b"], "answer": "a"},
            "auto",
            "'question' that is of type NoneType, not a string",
        ),
        (
            {"question": "q", "choices": {"text": None, "label": None}, "answerKey": "A"},
            "auto",
            "has labels that are not",
        ),
        ({"ctx": "a", "endings": None, "label": "1"}, "auto", "has endings that are not a list of strings"),
        ({"ctx": "a", "endings": "abc", "label": "1"}, "auto", "has endings that are not a list of strings"),
        ({"messages": [{"role": ["x"], "content": "c"}]}, "auto", r"has the unknown role \['x'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1.5}]}]}, "auto", "no message of an"),
    ],
)
def test_other_records_are_refused(values: Any, form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_record(values, form)


@pytest.mark.parametrize(
    "label", [2, -1, 1.5, 1e999, float("nan"), None, "", "x", "1.0", [1], {"a": 1}, "\u0661\u0662"]
)
def test_labels_that_name_no_option_are_refused(label: Any) -> None:
    with pytest.raises(UserError, match="has no correct answer among its 2 options"):
        read_record({"goal": "x", "sol1": "a", "sol2": "b", "label": label}, "auto")


@pytest.mark.parametrize("label", [1, 1.0, "1", True])
def test_labels_may_be_numbers_or_digits(label: Any) -> None:
    record = read_record({"goal": "x", "sol1": "a", "sol2": "b", "label": label}, "auto")
    assert record.values["output"] == "the correct answer is solution2"


@pytest.mark.parametrize("answer", [None, 3, 1.5, True, ["a"], {"text": "a"}])
def test_answers_are_texts(answer: Any) -> None:
    for values in ({"instruction": "a", "output": answer}, {"question": "a", "answer": answer}):
        with pytest.raises(UserError, match=f"that is of type {type(answer).__name__}, not a string"):
            read_record(values, "auto")
    for content in (answer,) if not isinstance(answer, list) else ():
        with pytest.raises(UserError, match="has a message of 'assistant' that is of type"):
            read_record({"messages": [{"role": "assistant", "content": content}]}, "auto")
