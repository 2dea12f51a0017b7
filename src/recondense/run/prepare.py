"""What a run reads and makes before it loads weights: texts, the tokenizer, all token ids, and its tasks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recondense import processes
from recondense.config.problems import render
from recondense.config.rounds import check_share, rounds_of
from recondense.config.schema import Config
from recondense.config.stages import Stage
from recondense.data.loader import num_rows
from recondense.data.texts import Texts, Tokenizing
from recondense.data.tokens import Tokens
from recondense.data.vocabulary import require_rows
from recondense.errors import UserError
from recondense.full_disk import explain_writing
from recondense.models import reload
from recondense.models.compressed_classes import PREFIX
from recondense.models.config_checks import read_config
from recondense.models.library_errors import library_calls, without_warnings
from recondense.models.tokenizers import embedding_rows, load_tokenizer, tokenizer_setting, warn_of_other_ids
from recondense.run.load import MakeCallbacks, locate, no_callbacks
from recondense.run.measure import Tasks, make_tasks
from recondense.run.recover import with_steps
from recondense.run.resolved_run import Run

SPLITS, TEXTS, LENGTH = ("calibration", "validation"), 4, 2000  # the texts on which the tokenizer is tried


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
            embedding has no row for a token, the tokenizer is another one after it was saved, or the warm-up of a
            stage is longer than its training.
    """
    config = run.config
    with processes.let_first_go_ahead():
        texts = Texts.read(config, run.stages, calibrates=bool(run.steps))
    path = locate(config, callbacks)
    with processes.let_first_go_ahead():
        tokenizer = load_tokenizer(path, config.model)
    model_config = read_config(path, config.model, any_family=True)
    rows = embedding_rows(model_config)
    tokenizing = Tokenizing(texts, tokenizer, rows)
    tokens = tokenizing.tokens(config, run.stages)
    check_steps_of(run.stages, tokens, rounds_of(config.method))
    with processes.let_first_go_ahead():
        tasks = make_tasks(config, tokenizing.documents("validation"))
    sample = [text[:LENGTH] for split in SPLITS for text in (tokenizing.documents(split) or ())[:TEXTS]]
    warn_of_other_ids(tokenizer, path, config.model, sample)
    if _exports(run) and config.export.verify != "shapes":
        _check_saved(config, path, tokenizer, str(model_config.model_type), sample)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # as in lm-eval
    if tasks.names and first is not None:
        require_rows(first, rows, tokenizer, "evaluation.tasks")
    return Prepared(path, tokenizer, tokens, tasks)


def _exports(run: Run) -> bool:
    changes = bool(run.steps) or any(stage.recovery.objective != "none" for stage in run.stages)
    return changes if run.config.export.enabled == "auto" else run.config.export.enabled


def _check_saved(
    config: Config, path: str | Path, tokenizer: PreTrainedTokenizerBase, model_type: str, texts: Sequence[str]
) -> None:
    """Check that a tokenizer gives the same ids after transformers has saved and loaded it, as it is in an export.

    Transformers chooses a tokenizer's class also by the model_type beside it, which is another one in a bundled export.

    Args:
        config: settings of the run.
        path: the model's hub id or folder.
        tokenizer: its tokenizer.
        model_type: that of its config.
        texts: some texts of the run.

    Raises:
        UserError: transformers saves the tokenizer and loads it as another one.
    """
    name, value = tokenizer_setting(path, config.model)
    family = model_type.removeprefix(PREFIX)
    kinds = {"stock": [family], "bundled": [PREFIX + family]}.get(config.export.format, [family, PREFIX + family])
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with library_calls(f"{name}={value}: transformers cannot save the tokenizer"), explain_writing(Path(folder)):
            tokenizer.save_pretrained(folder)
        while kinds and all(problems):
            (Path(folder) / "config.json").write_text(json.dumps({"model_type": kinds.pop(0)}))
            with without_warnings():
                problems.append(reload.tokenizer_problem(tokenizer, Path(folder), texts))
    if all(problems):
        raise UserError(f"{name}={value}: {problems[0]}.")


def check_steps_of(stages: Sequence[Stage], tokens: Tokens, rounds: int = 1) -> None:
    """Check that every training, whose length may depend on its windows, is longer than its warm-up in each round.

    Raises:
        UserError: it is not.
    """
    for stage in stages:
        if stage.name in tokens.stages:
            settings = with_steps(stage.recovery, num_rows(tokens.stages[stage.name].train), stage.where)
            if problems := [*check_share(stage.where, settings.steps, settings.warmup_steps, rounds)]:
                raise UserError("\n".join(render(problems)))
