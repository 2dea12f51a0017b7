"""Render records as text and mark their answers, with the tokenizer's chat template or Alpaca's prompts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from recondense.data.instruction_records import Record
from recondense.errors import UserError

# As in github.com/tatsu-lab/stanford_alpaca and in the text field of its dataset on the hub: an answer begins a line.
TASK = "Below is an instruction that describes a task"
COMPLETES = "Write a response that appropriately completes the request."
PROMPT = f"{TASK}. {COMPLETES}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
PROMPT_WITH_INPUT = (
    f"{TASK}, paired with an input that provides further context. {COMPLETES}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
log = logging.getLogger(__name__)
SAMPLE = 8  # documents on which a template is checked
# Between lines, at the tags of reasoning, at switches such as /no_think, and at what JSON escapes.
PARTS = re.compile(r'\n|</?\w+>|\[/?\w+\]|<\|\w*\|>|◁/?\w+▷|(?<!\S)/\w+|["\\]')
FEW_WORDS = 2  # blanks in a part that tells a message from others
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a chat template's own mark of the assistant's messages


class RefusedChat(UserError):
    """Raised for a chat that the tokenizer's template rejects, such as one that begins with the assistant."""


class UnknownAnswers(UserError):
    """Raised for a rendered chat in which the answers cannot be located."""


@dataclass(frozen=True)
class MarkedText:
    """A text and the positions of its answers.

    Args:
        text: the text.
        answers: character ranges, ascending. An answer includes the token that ends its turn.
        complete: whether the text already has its special tokens, because a chat template has written them.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    complete: bool = False


def render_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: str = "documents"
) -> list[str]:
    """Return documents as plain text; a record becomes the text that the model would be trained on.

    Chats that the tokenizer's template rejects are left out, and counted in the log.

    Args:
        documents: texts or records.
        tokenizer: the model's tokenizer.
        name: a name for the documents in messages.

    Raises:
        UserError: the template rejects all documents, leaves out what was said, or cannot be read.
    """
    check_template(documents, tokenizer)
    rendered, refused = [], []
    for document in documents:
        try:
            rendered.append(_render_document(document, tokenizer))
        except RefusedChat as error:
            refused.append(str(error))
    if refused and not rendered:
        raise UserError(
            f"{name}: the tokenizer's chat template rejects all of {len(refused)} chats ({refused[0]}); give other "
            "records, or a tokenizer with another template (model.tokenizer)."
        )
    if refused:
        text = "%s: %d of %d are left out: the chat template rejects the chat (%s)"
        log.info(text, name, len(refused), len(documents), refused[0])
    return rendered


def check_template(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check on the first chats that the tokenizer's template writes what was said; a system message is only warned of.

    Earlier answers and the reasoning in an answer may be left out, as many templates do.

    Args:
        documents: texts or records.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: the template leaves out a user's message, or the last answer.
    """
    said: set[str] = set()  # roles whose messages are all there in one of the chats
    silent: dict[str, Record] = {}  # for the others, the first chat without one of their messages
    for record in documents[:SAMPLE] if tokenizer.chat_template is not None else ():
        if not isinstance(record, Record) or not (messages := record.values.get("messages", [])):
            continue
        try:
            text = _one_line(_render_document(record, tokenizer))
        except RefusedChat:  # which is counted elsewhere
            continue
        missing = {turn["role"] for turn in messages if turn["role"] == "system" and _end(turn, text) is None}
        position, last = 0, messages[-1:]
        for turn in [*(turn for turn in messages if turn["role"] == "user"), *last]:
            if (end := _end(turn, text, position)) is None:
                missing.add(turn["role"])
            else:
                position = end
        said |= {turn["role"] for turn in messages if turn["content"].strip()} - missing
        silent |= {role: record for role in missing if role not in silent}
    if roles := sorted(silent.keys() - said - {"system"}):
        place = silent[roles[0]].place
        where = f"{place}: " if place else ""
        raise UserError(
            f"{where}{_name_of(tokenizer)} leaves out the messages of the {' and the '.join(roles)}; mend it, or give "
            "a tokenizer with another template (model.tokenizer)."
        )
    for role in sorted(silent):
        _warn_once(f"{_name_of(tokenizer)} leaves out {'some ' if role in said else ''}{role} messages")


def _end(message: dict[str, str], text: str, start: int = 0) -> int | None:
    """Return where a message ends in a text, from `start` on; None if it is not there.

    Its longest part is looked for, or else any part of some words; for an answer also the last part, which comes after
    its reasoning.
    """
    parts = [part for part in map(_one_line, PARTS.split(message["content"])) if part]
    if not parts:
        return start
    sought = [max(parts, key=len), *(part for part in parts if part.count(" ") >= FEW_WORDS)]
    sought += parts[-1:] if message["role"] == "assistant" else []
    return next((text.index(part, start) + len(part) for part in sought if text.find(part, start) >= 0), None)


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _render_document(document: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(document, Record):
        return document
    try:
        return mark_answers(document, tokenizer).text
    except UnknownAnswers:  # only the text is needed
        text, end = _render(document.values["messages"], tokenizer), tokenizer.eos_token or ""
        return text if text.rstrip().endswith(end) else text + end


def mark_answers(record: Record, tokenizer: PreTrainedTokenizerBase) -> MarkedText:
    """Render a record as text and mark each answer, including the token that ends it.

    Raises:
        RefusedChat: the tokenizer's chat template rejects the chat.
        UserError: the answers cannot be located in the rendered chat, or the template cannot be read.
    """
    values = record.values
    if "messages" not in values:
        template = PROMPT_WITH_INPUT if values["input"] else PROMPT
        return _join_turns([(template.format_map(values), values["output"])], tokenizer)
    if tokenizer.chat_template is None:
        return _join_turns(_chat_to_turns(values["messages"]), tokenizer)
    try:
        return _render_chat(values["messages"], tokenizer)
    except (RefusedChat, UnknownAnswers) as error:
        raise type(error)(f"{record.place}: {error}" if record.place else str(error)) from None


def _join_turns(turns: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> MarkedText:
    """Join prompts and answers; each answer ends with the end-of-text token, if the tokenizer has one."""
    text, answers = "", []
    for prompt, answer in turns:
        start = len(text) + len(prompt)
        text += prompt + answer + (tokenizer.eos_token or "")
        answers.append((start, len(text)))
    return MarkedText(text, tuple(answers))


def _chat_to_turns(messages: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """Return the prompts and answers of a chat in Alpaca's format.

    A system message replaces Alpaca's opening sentences; a user's message becomes an instruction.
    """
    turns: list[tuple[str, str]] = []
    prompt = "" if messages[0]["role"] == "system" else f"{TASK}. {COMPLETES}\n\n"
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            turns.append((f"{prompt}### Response:\n", content))
            prompt = "\n\n"
        else:
            head = {"system": "", "tool": "### Input:\n"}.get(role, "### Instruction:\n")
            prompt += f"{head}{content}\n\n"
    return turns


def _render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> MarkedText:
    if GENERATION.search(str(tokenizer.chat_template)):
        text, answers = _generation_blocks(messages, tokenizer)
    else:
        text = _render(messages, tokenizer)
        answers = _answers_by_prefixes(messages, text, tokenizer)
    spoken = any(message["content"].strip() for message in messages if message["role"] == "assistant")
    if spoken and not any(text[start:end].strip() for start, end in answers):
        raise RefusedChat("it leaves out the assistant's messages")
    end = tokenizer.eos_token or ""
    if end not in text[answers[-1][0] :]:
        text += end
        answers[-1] = (answers[-1][0], len(text))
    return MarkedText(text, tuple(answers), complete=True)


def _render(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    with _explained(tokenizer):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


@contextmanager
def _explained(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn whatever a template raises into an error for the user: of the chat, or of the template itself."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise UserError(
            f"{_name_of(tokenizer)} cannot be read (line {error.lineno}: {error.message}); mend it, or give a "
            "tokenizer with another template (model.tokenizer)."
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedChat(f"{_name_of(tokenizer)} says: {reason}") from error


def _name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"


def _generation_blocks(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat with a template that has generation blocks.

    Returns:
        The text, and the character ranges of the blocks.

    Raises:
        UnknownAnswers: no block was rendered.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    with _explained(tokenizer):
        rendered: Any = render_jinja_template(
            [list(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokens,
        )
    text, ranges = rendered[0][0], [(start, end) for start, end in rendered[1][0] if end > start]
    if not ranges:
        raise UnknownAnswers("the tokenizer's chat template does not mark the assistant's messages; use another one")
    return text, ranges


def _answers_by_prefixes(
    messages: Sequence[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Return the character ranges of the answers.

    An answer is the text that its message adds to the chat rendered up to it, including the generation prompt.

    Raises:
        UnknownAnswers: the template changes earlier turns when later ones are added.
    """
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        prompts = [_render(before, tokenizer, prompt) for prompt in (True, False)] if before else [""]
        start = next((len(prompt) for prompt in prompts if text.startswith(prompt)), None)
        until = text if index == len(messages) - 1 else _render(messages[: index + 1], tokenizer)
        if start is None or not text.startswith(until):
            raise UnknownAnswers(
                "the tokenizer's chat template changes earlier turns of a chat, so the assistant's messages cannot be "
                "located; give the tokenizer a template with {% generation %} blocks"
            )
        answers.append((start, len(until)))
    return answers
