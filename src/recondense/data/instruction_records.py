"""Records of supervised fine-tuning, converted from their published forms into one of two.

A record becomes an instruction with its answer (Alpaca's three fields) or a chat (`messages`). It is kept as JSON, so
that it is a document like any other. This module does not import torch, so files are checked before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recondense.data.valid_text import is_empty, repair
from recondense.errors import UserError

FORMS = ("alpaca", "chat", "commonsense")
# The role of each speaker's name in ShareGPT and in chat templates.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}


class Record(str):
    """A record as JSON. It is a `str`, so that corpora hash, compare and count it like any other document.

    Args:
        text: the JSON.
        place: where it was read, for messages; empty if that is not known.
    """

    __slots__ = ("place",)
    place: str

    def __new__(cls, text: str, place: str = "") -> Record:
        record = super().__new__(cls, text)
        record.place = place
        return record

    def repaired(self) -> Record:
        """Return the record with U+FFFD for lone surrogates; see `repair`."""
        raw = str(self)
        text = repair(raw)
        return self if text is raw else Record(text, self.place)

    def has_answer(self) -> bool:
        """Return whether an answer has a visible character."""
        values = self.values
        messages = values.get("messages", [{"role": "assistant", "content": values.get("output", "")}])
        return any(not is_empty(turn["content"]) for turn in messages if turn["role"] == "assistant")

    @property
    def values(self) -> dict[str, Any]:
        """{"instruction", "input", "output"}, or {"messages": [{"role", "content"}, ...]}."""
        values: dict[str, Any] = json.loads(self)
        return values


def read_record(values: Any, form: str, place: str = "") -> Record:
    """Convert a published record into an instruction with its answer, or a chat.

    Args:
        values: the record's fields.
        form: one of FORMS, or "auto" to detect the form from the fields.
        place: where the record was read, for later messages.

    Raises:
        UserError: the record does not have this form, or has no answer. The message is a clause without a subject; the
            caller adds the record's position in its file.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"is of type {type(values).__name__}, not an object with fields")
    values = _unwrap(values)
    form = detect_form(values) if form == "auto" else form
    try:
        record = {"alpaca": _alpaca, "chat": _chat, "commonsense": _commonsense}[form](values)
    except KeyError as error:
        raise UserError(f"is not a record of form {form}: it has no {error.args[0]!r} ({_fields(values)})") from None
    return Record(json.dumps(record, ensure_ascii=False), place)


def detect_form(values: Mapping[str, Any]) -> str:
    """Detect the form of a record from its fields.

    Raises:
        UserError: no known form has these fields.
    """
    values = _unwrap(values)
    if "messages" in values or "conversations" in values:
        return "chat"
    if {"instruction", "output"} <= values.keys():
        return "alpaca"
    if any(fields <= values.keys() for fields, _ in QUESTIONS):
        return "commonsense"
    raise UserError(f"has no known form ({_fields(values)}); the forms are {', '.join(FORMS)}")


def _unwrap(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a record, which may be nested in a single field, as in cais/mmlu's auxiliary_train."""
    inner = next(iter(values.values())) if len(values) == 1 else None
    return inner if isinstance(inner, Mapping) else values


def _fields(values: Mapping[str, Any]) -> str:
    return f"its fields: {', '.join(map(str, values)) or 'none'}"


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise UserError(f"has a field {name!r} that is of type {type(value).__name__}, not a string")
    return value


def _texts(values: Any, what: str) -> list[str]:
    """Return options, which may be numbers, as strings."""
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    if not listed or not all(isinstance(value, str | int | float) for value in values):
        raise UserError(f"has {what} that are not a list of strings")
    return [str(value) for value in values]


# ------------------------------------------------------------------------------------------------ Alpaca, chats


def _alpaca(values: Mapping[str, Any]) -> dict[str, Any]:
    context = _text(values, "input") if values.get("input") is not None else ""
    return _prompted(_text(values, "instruction"), _text(values, "output"), context)


def _prompted(instruction: str, output: str, context: str = "") -> dict[str, Any]:
    return {"instruction": instruction, "input": context, "output": output}


def _chat(values: Mapping[str, Any]) -> dict[str, Any]:
    turns = values["messages" if values.get("messages") is not None else "conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise UserError("has messages that are not a list")
    messages = [_turn(turn) for turn in turns]
    system = values.get("system")
    if isinstance(system, str) and system and not any(turn["role"] == "system" for turn in messages):
        messages.insert(0, {"role": "system", "content": system})
    last = max((index for index, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        raise UserError("has no message of an assistant")
    return {"messages": messages[: last + 1]}  # messages after the last answer are not needed


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise UserError(f"has a message of type {type(turn).__name__}, not an object with role and content")
    names = ("role", "content") if "role" in turn else ("from", "value")
    role, content = turn[names[0]], turn[names[1]]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"has the unknown role {role!r}; the roles are {', '.join(ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts of several types; keep the texts
        texts = [part["text"] for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        content = "".join(_texts(texts, "parts"))
    if not isinstance(content, str):
        raise UserError(f"has a message of {role!r} that is of type {type(content).__name__}, not a string")
    return {"role": ROLES[role], "content": content}


# --------------------------------------------------------------------------------------- commonsense questions
#
# The instructions are copied verbatim from commonsense_170k (LLM-Adapters, arXiv 2304.01933), with their quirks: a
# question of ARC from the hub gives the same record as in that dataset.

CHOOSE = "Please choose the correct answer to the question: {}"


def _commonsense(values: Mapping[str, Any]) -> dict[str, Any]:
    for fields, read in QUESTIONS:
        if fields <= values.keys():
            return read(values)
    raise UserError(f"is not a commonsense question ({_fields(values)})")


def _listed(head: str, word: str, options: Sequence[str], correct: int, between: str = " ", end: str = "\n\n") -> Any:
    """Return an instruction with numbered options, and the number of the correct one as its answer.

    Args:
        head: the question.
        word: what an option is called, such as "answer".
        options: the texts of the options.
        correct: the index of the correct option, from 0.
        between: the text between two options.
        end: the text after the options.
    """
    if not 0 <= correct < len(options):
        raise UserError(f"has no correct answer among its {len(options)} options")
    shown = between.join(f"{word.capitalize()}{number}: {option}" for number, option in enumerate(options, 1))
    names = "/".join(f"{word}{number}" for number in range(1, len(options) + 1))
    instruction = f"{head}\n\n{shown}{end}Answer format: {names}"
    return _prompted(instruction, f"the correct answer is {word}{correct + 1}")


def _number(values: Mapping[str, Any], name: str) -> int:
    """Return a label as an int, from a number or digits; -1 for anything else, as in test sets without labels."""
    value = values[name]
    if isinstance(value, float) and not value.is_integer():
        return -1
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1


def _piqa(values: Mapping[str, Any]) -> dict[str, Any]:
    head = f"Please choose the correct solution to the question: {_text(values, 'goal')}"
    options = [_text(values, "sol1"), _text(values, "sol2")]
    return _listed(head, "solution", options, _number(values, "label"), between="\n\n")


def _hellaswag(values: Mapping[str, Any]) -> dict[str, Any]:
    activity = f"{values['activity_label']}: " if values.get("activity_label") else ""
    head = f"Please choose the correct ending to complete the given sentence: {activity}{_text(values, 'ctx')}"
    return _listed(head, "ending", _texts(values["endings"], "endings"), _number(values, "label"))


def _winogrande(values: Mapping[str, Any]) -> dict[str, Any]:
    sentence = _text(values, "sentence")
    head = f"Please choose the correct answer to fill in the blank to complete the given sentence: {sentence}"
    options = [_text(values, "option1"), _text(values, "option2")]
    return _listed(head, "option", options, _number(values, "answer") - 1, end=" ")


def _siqa(values: Mapping[str, Any]) -> dict[str, Any]:
    head = CHOOSE.format(f"{_text(values, 'context')} {_text(values, 'question')}")
    options = [_text(values, f"answer{letter}") for letter in "ABC"]
    return _listed(head, "answer", options, _number(values, "label") - 1)


def _boolq(values: Mapping[str, Any]) -> dict[str, Any]:
    answer = values["answer"] if "answer" in values else values["label"]
    if answer not in (True, False):
        raise UserError("has an answer that is neither true nor false")
    question = _text(values, "question").removesuffix("?")
    head = f"Please answer the following question with true or false, question: {question}?"
    return _prompted(f"{head}\n\nAnswer format: true/false", f"the correct answer is {str(bool(answer)).lower()}")


def _multiple_choice(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a question of ARC, OpenBookQA, CommonsenseQA, MMLU, or a dataset with the same fields."""
    question: Any = values["question_stem" if "question_stem" in values else "question"]
    options: Any = values.get("choices", values.get("options"))
    if isinstance(question, Mapping):  # as in AI2's own release of ARC
        question, options = question["stem"], question["choices"]
    question = _text({"question": question}, "question")
    labels, texts = _options(options)
    answer = values["answerKey"] if "answerKey" in values else values["answer"]
    if isinstance(answer, str):
        matches = [names.index(answer) for names in (labels, texts) if answer in names]
        correct = matches[0] if matches else _number({"answer": answer}, "answer")
    else:
        correct = _number({"answer": answer}, "answer")
    return _listed(CHOOSE.format(question), "answer", texts, correct)


def _options(options: Any) -> tuple[list[str], list[str]]:
    """Return the labels and texts of options, given as two lists, a list of pairs, a mapping, or texts (A, B, ...)."""
    if isinstance(options, Mapping) and {"text", "label"} <= options.keys():
        return _texts(options["label"], "labels"), _texts(options["text"], "options")
    if isinstance(options, Mapping):
        return list(options), _texts(list(options.values()), "options")
    if isinstance(options, Sequence) and options and all(isinstance(option, Mapping) for option in options):
        texts = _texts([option["text"] for option in options], "options")
        return _texts([option["label"] for option in options], "labels"), texts
    texts = _texts(options, "options")
    return [chr(ord("A") + index) for index in range(len(texts))], texts


def _question(values: Mapping[str, Any]) -> dict[str, Any]:
    return _prompted(_text(values, "question"), _text(values, "answer"))


# The fields that identify a dataset; the more specific sets of fields come first.
QUESTIONS = (
    (frozenset({"goal", "sol1", "sol2", "label"}), _piqa),
    (frozenset({"ctx", "endings", "label"}), _hellaswag),
    (frozenset({"sentence", "option1", "option2", "answer"}), _winogrande),
    (frozenset({"context", "question", "answerA", "answerB", "answerC", "label"}), _siqa),
    (frozenset({"question", "passage", "answer"}), _boolq),
    (frozenset({"question", "passage", "label"}), _boolq),
    (frozenset({"question_stem", "choices", "answerKey"}), _multiple_choice),
    (frozenset({"question", "answerKey"}), _multiple_choice),
    (frozenset({"question", "choices", "answer"}), _multiple_choice),
    (frozenset({"question", "options", "answer"}), _multiple_choice),
    (frozenset({"question", "answer"}), _question),
)
