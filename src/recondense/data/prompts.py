"""From records to text with the answers marked: a tokenizer's chat template, or Alpaca's prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from recondense.data.records import Record
from recondense.errors import UserError

# github.com/tatsu-lab/stanford_alpaca, and the text field of its data set on the hub: an answer begins a line.
TASK = "Below is an instruction that describes a task"
COMPLETES = "Write a response that appropriately completes the request."
PROMPT = f"{TASK}. {COMPLETES}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
PROMPT_WITH_INPUT = (
    f"{TASK}, paired with an input that provides further context. {COMPLETES}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # how a chat template itself marks what assistants say


class Refused(UserError):
    """A chat that the tokenizer's template does not take, such as one that an assistant opens."""


@dataclass(frozen=True)
class Marked:
    """A text, and where its answers are.

    Args:
        answers: ranges of characters, ascending; the end of each turn is part of it.
        complete: the text has its special tokens (a chat template's), so that none are to be put before it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    complete: bool = False


def as_texts(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Documents as plain text: records in the words in which a model would be trained on them."""
    return [marked(document, tokenizer).text if isinstance(document, Record) else document for document in documents]


def marked(record: Record, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """A record as text, each answer with the token that ends it.

    Raises:
        Refused: the tokenizer's chat template refuses the chat.
        UserError: the chat template gives no way to tell what the assistant says.
    """
    values = record.values
    if "messages" not in values:
        template = PROMPT_WITH_INPUT if values["input"] else PROMPT
        return _joined([(template.format_map(values), values["output"])], tokenizer)
    if tokenizer.chat_template is None:
        return _joined(_as_instructions(values["messages"]), tokenizer)
    return _by_template(values["messages"], tokenizer)


def _joined(turns: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Marked:
    """Prompts and answers in turns, each answer with the end-of-text token (none if the tokenizer has none)."""
    text, answers = "", []
    for prompt, answer in turns:
        start = len(text) + len(prompt)
        text += prompt + answer + (tokenizer.eos_token or "")
        answers.append((start, len(text)))
    return Marked(text, tuple(answers))


def _as_instructions(messages: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """A chat in Alpaca's words: a system message takes the place of the first sentences, a turn is an instruction."""
    turns: list[tuple[str, str]] = []
    prompt = "" if messages[0]["role"] == "system" else f"{TASK}. {COMPLETES}\n\n"
    for message in messages:
        role, said = message["role"], message["content"]
        if role == "assistant":
            turns.append((f"{prompt}### Response:\n", said))
            prompt = "\n\n"
        else:
            head = {"system": "", "tool": "### Input:\n"}.get(role, "### Instruction:\n")
            prompt += f"{head}{said}\n\n"
    return turns


def _by_template(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Marked:
    try:
        if GENERATION.search(str(tokenizer.chat_template)):
            text, answers = _generated(messages, tokenizer)
        else:
            text = _render(messages, tokenizer)
            answers = _by_prefixes(messages, text, tokenizer)
    except TemplateError as error:
        raise Refused(str(error)) from None
    end = tokenizer.eos_token or ""
    if end not in text[answers[-1][0] :]:
        text += end
        answers[-1] = (answers[-1][0], len(text))
    return Marked(text, tuple(answers), complete=True)


def _render(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def _generated(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """What a template with generation blocks renders, and their ranges."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        [list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokens,
    )
    text, ranges = rendered[0][0], [(start, end) for start, end in rendered[1][0] if end > start]
    if not ranges:
        raise UserError("the tokenizer's chat template marks nothing that the assistant says; use another one")
    return text, ranges


def _by_prefixes(
    messages: Sequence[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """An assistant's turn is what rendering it adds to the chat before it, with the prompt to answer.

    Raises:
        UserError: the template writes earlier turns in another way once there are later ones.
    """
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        prompts = [_render(before, tokenizer, prompt) for prompt in (True, False)] if before else [""]
        start = next((len(prompt) for prompt in prompts if text.startswith(prompt)), None)
        whole = text if index == len(messages) - 1 else _render(messages[: index + 1], tokenizer)
        if start is None or not text.startswith(whole):
            raise UserError(
                "the tokenizer's chat template rewrites earlier turns of a chat, so that what the assistant says "
                "cannot be told apart; give the tokenizer a template with {% generation %} blocks"
            )
        answers.append((start, len(whole)))
    return answers
