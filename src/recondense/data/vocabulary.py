"""Compare token ids with the rows of a model's embedding: a tokenizer may be longer than it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from recondense.data.tokens import Tokens
from recondense.errors import UserError


def require_rows(highest: int, rows: int | None, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that the embedding has a row for every id of some texts.

    Args:
        highest: the largest id.
        rows: rows of the embedding; None if they are not known.
        tokenizer: the model's tokenizer.
        name: a name for the texts in the message.

    Raises:
        UserError: it has not.
    """
    if rows is None or highest < rows:
        return
    raise UserError(
        f"{name}: the tokenizer's token {tokenizer.convert_ids_to_tokens(highest)!r} has the id {highest}, but the "
        f"model's embedding has only {rows} rows (ids 0 to {rows - 1}); use the tokenizer of this model "
        "(model.tokenizer), take the token out of the texts, or give the model more rows with resize_token_embeddings."
    )


def require_all_rows(tokens: Tokens, rows: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check all token ids of a run, including those of padding.

    Args:
        tokens: the token ids.
        rows: rows of the embedding; None if they are not known.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: an id has no row.
    """
    if tokens.calibration is not None:
        require_rows(tokens.calibration.highest_id(), rows, tokenizer, "the calibration texts")
    if tokens.validation is not None:
        require_rows(int(tokens.validation.max()), rows, tokenizer, "the validation texts")
    for name, windows in tokens.stages.items():
        of_stage = "" if name == "recovery" else f" of stage {name}"
        for split, table in (("training", windows.train), ("validation", windows.validation)):
            if table is not None:
                require_rows(int(table["input_ids"].max()), rows, tokenizer, f"the {split} texts{of_stage}")


def filler(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> int:
    """Return an id for padding, which is masked: the tokenizer's if the embedding has a row for it, else another."""
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in special if token is not None and (rows is None or token < rows)), 0)
