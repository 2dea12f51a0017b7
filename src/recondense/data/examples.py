"""Supervised examples as token ids with labels. Several can share a window without attending to each other.

Legend: N windows, B windows of a batch, S tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.data.arguments import list_texts, require_number
from recondense.data.instruction_records import Record
from recondense.data.labels import MASKED
from recondense.data.prompts import MarkedText, RefusedChat, check_template, mark_answers
from recondense.data.special_tokens import start_of_text
from recondense.data.windows import token_ids
from recondense.errors import UserError
from recondense.progress import track

log = logging.getLogger(__name__)
TEXTS_PER_CALL = 64  # fast tokenizers process the texts of a call in parallel
MANY = 20_000  # with more records than this, a progress bar is shown


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether it is a target of the loss. The first token never is."""

    ids: list[int]
    targets: list[bool]


@dataclass(frozen=True)
class Examples:
    """The examples of some records.

    Args:
        kept: the examples, in the order of their records.
        left_out: number of records without an example: the answer is empty or begins after the window, or the chat
            template rejected the chat.
        cut: number of records that were truncated.
    """

    kept: list[Example]
    left_out: int
    cut: int


def make_examples(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    name: str = "records",
    bos: bool | None = None,
    answer_only: bool = True,
) -> Examples:
    """Tokenize records, each truncated to `length` tokens.

    Args:
        records: the records.
        tokenizer: the model's tokenizer.
        length: maximum number of tokens per example.
        name: a name for the records in messages.
        bos: whether an example begins with BOS; see `start_of_text`. A chat template writes its own.
        answer_only: whether only the answers are targets. Otherwise all tokens are, except those of BOS.

    Raises:
        UserError: no record has an answer within `length` tokens, or a chat template leaves out what was said, or the
            answers of a rendered chat cannot be located.
    """
    lead = start_of_text(tokenizer, bos)
    check_template(records, tokenizer)
    kept, left_out, cut = [], 0, 0
    reasons: dict[str, str] = {}  # the first record of each reason
    for tokenized in _tokenize(records, tokenizer, name, answer_only):
        for ids, targets, complete in tokenized:
            if isinstance(complete, str):
                left_out += 1
                reasons.setdefault(complete.partition(" (")[0], complete)
                continue
            before = [] if complete else lead
            targets = targets if answer_only else [True] * len(ids)
            ids, targets = [*before, *ids], [*([False] * len(before)), *targets]
            long = len(ids) > length
            example = Example(ids[:length], [False, *targets[1:length]])
            if not any(example.targets):
                left_out += 1
                continue
            cut += long
            kept.append(example)
    _report(len(kept), left_out, name, length, answer_only, list(reasons.values()))
    return Examples(kept, left_out, cut)


def _report(kept: int, left_out: int, name: str, length: int, answer_only: bool, reasons: Sequence[str]) -> None:
    """Log how many records are left out and why.

    Raises:
        UserError: all are.
    """
    total = kept + left_out
    if left_out:
        other = "the answer begins after the window" if answer_only else "there is no token to predict"
        log.info("%s: %d of %d are left out: %s", name, left_out, total, ", or ".join([*reasons, other]))
    if not kept:
        what = "an answer" if answer_only else "a token to predict"
        raise UserError(
            f"{name}: none of {total} has {what} within data.sequence_length={length} tokens"
            f"{''.join(f', or {reason}' for reason in reasons)}; raise it or give other records."
        )


def cut_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    name: str = "text",
    bos: bool | None = None,
) -> Examples:
    """Make one example of each text: its first tokens, all of which are predicted. No end-of-text token is added.

    Args:
        texts: documents.
        tokenizer: the model's tokenizer.
        length: maximum number of tokens per example.
        name: a name for the texts in messages.
        bos: whether an example begins with BOS; see `start_of_text`.

    Raises:
        UserError: no text has a token to predict, or `texts` is one text.
    """
    start = start_of_text(tokenizer, bos)
    require_number("sequence_length", length, max(2, len(start) + 1))
    documents = list_texts(texts)
    whole = ([*start, *ids] for ids in token_ids(documents, tokenizer, name))
    unpredicted = max(1, len(start))  # tokens at the beginning of every text
    long_enough = [ids for ids in whole if len(ids) > unpredicted]
    if left_out := len(documents) - len(long_enough):
        log.info("%s: %d of %d texts are left out: they have no token to predict", name, left_out, len(documents))
    if not long_enough:
        raise UserError(f"{name}: none of {len(documents)} texts has a token to predict; give longer texts.")
    kept = [
        Example(ids, [False] * unpredicted + [True] * (len(ids) - unpredicted))
        for ids in (ids[:length] for ids in long_enough)
    ]
    return Examples(kept, left_out, sum(len(ids) > length for ids in long_enough))


# Token ids, targets, and whether the ids include special tokens, or the reason why the chat was rejected.
Tokenized = tuple[list[int], list[bool], bool | str]


def _tokenize(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, name: str, answer_only: bool
) -> Iterator[list[Tokenized]]:
    starts: Any = range(0, len(records), TEXTS_PER_CALL)
    if len(records) > MANY:
        starts = track(starts, f"tokenizing {name}")
    for start in starts:
        texts: list[MarkedText] = []
        rejected: list[Tokenized] = []
        for record in records[start : start + TEXTS_PER_CALL]:
            if answer_only and not record.has_answer():
                rejected.append(([], [], f"the answer is empty ({record.place})"))
                continue
            try:
                texts.append(mark_answers(record, tokenizer))
            except RefusedChat as error:
                rejected.append(([], [], f"the chat template rejects the chat ({error})"))
        yield [*(_by_offsets if tokenizer.is_fast else _by_pieces)(texts, tokenizer), *rejected]


def _by_offsets(texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase) -> list[Tokenized]:
    """Tokenize complete texts. A token is a target if it begins within an answer, ignoring leading spaces."""
    if not texts:
        return []
    encoded = tokenizer(
        [text.text for text in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
        return_attention_mask=False,
    )
    tokenized: list[Tokenized] = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        targets = [_is_target(text.text, start, end, text.answers) for start, end in offsets]
        tokenized.append((list(ids), targets, text.complete))
    return tokenized


def _is_target(text: str, start: int, end: int, answers: Sequence[tuple[int, int]]) -> bool:
    # Many tokenizers join a space and the following word into one token, which then counts as part of the word.
    while start < end - 1 and text[start] == " ":
        start += 1
    return any(first <= start < last for first, last in answers)


def _by_pieces(texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase) -> list[Tokenized]:
    """Tokenize prompts and answers separately, for tokenizers that do not return character offsets."""
    tokenized: list[Tokenized] = []
    for text in texts:
        ids: list[int] = []
        targets: list[bool] = []
        edges = [0, *(edge for answer in text.answers for edge in answer), len(text.text)]
        for index, (start, end) in enumerate(pairwise(edges)):
            piece = tokenizer(text.text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            ids += piece
            targets += [index % 2 == 1] * len(piece)
        tokenized.append((ids, targets, text.complete))
    return tokenized


def make_windows(examples: Sequence[Example], length: int, filler: int, together: bool = True) -> dict[str, Tensor]:
    """Pack examples into padded windows without splitting them.

    Args:
        examples: the examples.
        length: tokens per window.
        filler: the padding id. Padding comes after all examples, so that none attends to it.
        together: put several examples into a window if they fit (best fit, longest first); otherwise one per window, in
            order.

    Returns:
        input_ids and labels (N, length), int64; a label is an id or MASKED. With `together` also position_ids, which
        restart at 0 for each example; transformers' masks then separate the examples.
    """
    groups = _best_fit(examples, length) if together else [[example] for example in examples]
    input_ids_NS = torch.full((len(groups), length), filler, dtype=torch.long)
    labels_NS = torch.full((len(groups), length), MASKED, dtype=torch.long)
    positions_NS = torch.zeros(len(groups), length, dtype=torch.long)
    for row, group in enumerate(groups):
        start = 0
        for example in group:
            end = start + len(example.ids)
            ids = torch.tensor(example.ids)
            input_ids_NS[row, start:end] = ids
            labels_NS[row, start:end] = ids.where(torch.tensor(example.targets), MASKED)
            # The last example's positions continue through the padding, which would otherwise be another sequence.
            positions_NS[row, start:] = torch.arange(length - start)
            start = end
    windows = {"input_ids": input_ids_NS, "labels": labels_NS}
    return {**windows, "position_ids": positions_NS} if together else windows


def _best_fit(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Group examples into windows: longest first, each into the window in which it leaves the least free space."""
    groups: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, window), ascending
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        at = bisect_left(rooms, (size, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(groups))
        if row == len(groups):
            groups.append([])
        groups[row].append(example)
        if room > size:
            insort(rooms, (room - size, row))
    return groups
