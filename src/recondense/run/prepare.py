"""What a run reads and makes before it loads weights: texts, the tokenizer, all token ids, and its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recondense import processes
from recondense.config.stages import Stage
from recondense.data.loader import num_rows
from recondense.data.texts import Texts, Tokenizing
from recondense.data.tokens import Tokens
from recondense.data.vocabulary import require_rows
from recondense.models.config_checks import read_config
from recondense.models.tokenizers import embedding_rows, load_tokenizer
from recondense.run.load import MakeCallbacks, locate, no_callbacks
from recondense.run.measure import Tasks, make_tasks
from recondense.run.recover import with_steps
from recondense.run.resolved_run import Run


@dataclass(frozen=True)
class Prepared:
    """What a run has before its weights are loaded. It is the same in all processes.

    Args:
        path: the hub id or folder of the model.
        tokenizer: the model's tokenizer.
        tokens: all token ids of the run.
        tasks: the run's lm-eval tasks.
    """

    path: str | Path
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens
    tasks: Tasks


def prepare(run: Run, callbacks: MakeCallbacks = no_callbacks) -> Prepared:
    """Read the texts and the tokenizer of a run, and make everything that follows from them. No weights are read.

    The texts themselves are then no longer needed. The embedded model is trained if the cache does not have it.

    Args:
        run: the resolved run.
        callbacks: returns the callbacks of the embedded model's training.

    Raises:
        UserError: texts or tokenizer cannot be read, a split or a recovery stage has too little text, the model's
            embedding has no row for a token, or the warm-up of a stage is longer than its training.
    """
    config = run.config
    with processes.let_first_go_ahead():
        texts = Texts.read(config, run.stages, calibrates=bool(run.steps))
    path = locate(config, callbacks)
    with processes.let_first_go_ahead():
        tokenizer = load_tokenizer(path, config.model)
    rows = embedding_rows(read_config(path, config.model, any_family=True))
    tokenizing = Tokenizing(texts, tokenizer, rows)
    tokens = tokenizing.tokens(config, run.stages)
    check_steps_of(run.stages, tokens)
    with processes.let_first_go_ahead():
        tasks = make_tasks(config, tokenizing.documents("validation"))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # as in lm-eval
    if tasks.names and first is not None:
        require_rows(first, rows, tokenizer, "evaluation.tasks")
    return Prepared(path, tokenizer, tokens, tasks)


def check_steps_of(stages: Sequence[Stage], tokens: Tokens) -> None:
    """Check that every training, whose length may depend on its windows, is longer than its warm-up.

    Raises:
        UserError: it is not.
    """
    for stage in stages:
        if stage.name in tokens.stages:
            with_steps(stage.recovery, num_rows(tokens.stages[stage.name].train), stage.where)
