"""The texts of a run, and how they become its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.config.schema import Config, DataConfig
from recondense.config.stages import Stage
from recondense.data.calibration_set import make_calibration_set, require_samples
from recondense.data.corpora import load_corpora
from recondense.data.corpus import Corpora
from recondense.data.examples import Examples, cut_texts, make_examples, make_windows
from recondense.data.instruction_records import Record
from recondense.data.loader import Table
from recondense.data.prompts import render_documents
from recondense.data.special_tokens import start_of_window
from recondense.data.tokens import StageTokens, Tokens
from recondense.data.vocabulary import filler, require_all_rows
from recondense.data.windows import Ids, cut_windows, join_texts


@dataclass(frozen=True)
class Texts:
    """The documents of a run.

    Args:
        corpora: the run's documents.
        stage_corpora: the documents of recovery stages that do not train on the run's documents, by the stage's name.
    """

    corpora: Corpora
    stage_corpora: dict[str, Corpora] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, stages: Sequence[Stage], calibrates: bool) -> Texts:
        """Read the splits that a run needs. Nothing is tokenized.

        Args:
            config: the config of the run.
            stages: the stages of the recovery; stages without an objective read nothing.
            calibrates: whether the run needs its calibration set.

        Raises:
            UserError: texts cannot be read, or there are too few of them.
        """
        stages = _training(stages)
        shared = [stage for stage in stages if not stage.own_texts]
        validates = any(stage.recovery.validate_every for stage in shared)
        splits = ["validation"] if config.evaluation.reads_validation or validates else []
        splits += ["calibration"] if calibrates else []
        splits += ["train"] if shared else []
        stage_corpora = {stage.name: _read_stage(stage) for stage in stages if stage.own_texts}
        corpora = load_corpora(config.data, splits)
        if calibrates:
            require_samples(corpora.calibration or [], config.data.calibration.num_samples)
        return cls(corpora, stage_corpora)

    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of every split; the splits of a recovery stage are named <stage>/<split>."""
        hashes = self.corpora.sha256()
        for name, corpora in self.stage_corpora.items():
            hashes |= {f"{name}/{split}": sha for split, sha in corpora.sha256().items()}
        return hashes


@dataclass
class Tokenizing:
    """Makes the token ids of a run. Nothing is rendered or tokenized twice.

    Args:
        texts: the documents.
        tokenizer: the model's tokenizer.
        rows: rows of the model's embedding; None if they are not known.
    """

    texts: Texts
    tokenizer: PreTrainedTokenizerBase
    rows: int | None = None
    _documents: dict[str, list[str] | None] = field(default_factory=dict)
    _ids: dict[str, Ids] = field(default_factory=dict)
    _windows: dict[tuple[str, int, bool | None], Tensor | None] = field(default_factory=dict)

    def tokens(self, config: Config, stages: Sequence[Stage]) -> Tokens:
        """Make all token ids of a run.

        Args:
            config: the config of the run.
            stages: the stages of the recovery.

        Raises:
            UserError: there is too little text, a calibration text has no token, records have no answers, or the
                model's embedding has no row for a token.
        """
        settings, evaluation = config.data.calibration, config.evaluation
        calibration = None
        if (documents := self.documents("calibration", settings.num_samples)) is not None:
            calibration = make_calibration_set(documents, self.tokenizer, len(documents), settings.max_length)
        validation = None
        if evaluation.perplexity_windows != 0:
            validation = self._packed("validation", config.data)
        if validation is not None:
            validation = validation[: evaluation.perplexity_windows]
        windows = {stage.name: self._stage(stage) for stage in _training(stages)}
        tokens = Tokens(calibration, validation, windows, self.texts.sha256())
        require_all_rows(tokens, self.rows, self.tokenizer)
        return tokens

    def documents(self, split: str, count: int | None = None) -> list[str] | None:
        """Return the run's documents of a split as plain texts; None if there is no such split.

        Args:
            split: the name of the split.
            count: number of documents; None for all. There are fewer if the chat template rejects some.
        """
        if split not in self._documents:
            texts = getattr(self.texts.corpora, split)
            name = f"the {split} texts"
            self._documents[split] = None if texts is None else render_documents(texts[:count], self.tokenizer, name)
        return self._documents[split]

    def _packed(self, split: str, data: DataConfig) -> Tensor | None:
        """Return the packed windows of one of the run's splits, ids (N, length); None if there is no such split."""
        key = split, data.sequence_length, data.bos
        if key not in self._windows:
            texts = self.documents(split)
            self._windows[key] = None if texts is None else self._pack(texts, data, f"the {split} text", split)
        return self._windows[key]

    def _pack(self, texts: Sequence[str], data: DataConfig, name: str, key: str) -> Tensor:
        """Pack texts; `key` is their name among those whose ids are kept for windows of other lengths."""
        if key not in self._ids:
            self._ids[key] = join_texts(texts, self.tokenizer, name)
        start = start_of_window(self.tokenizer, data.bos)
        return cut_windows(self._ids[key], len(texts), data.sequence_length, name, start)

    def _stage(self, stage: Stage) -> StageTokens:
        train, counts = self._table(stage, "train")
        assert train is not None
        validation, _ = self._table(stage, "validation") if stage.recovery.validate_every else (None, {})
        return StageTokens(train, validation, counts)

    def _table(self, stage: Stage, split: str) -> tuple[Table | None, dict[str, int]]:
        """Return windows of a recovery stage, with labels unless they are packed texts; and counts of those with."""
        documents = getattr(self.texts.stage_corpora.get(stage.name, self.texts.corpora), split)
        if documents is None:
            return None, {}
        data, tokenizer = stage.data, self.tokenizer
        if records := [document for document in documents if isinstance(document, Record)]:
            name = f"{stage.where}, the {split} records"
            settings = data.sequence_length, name, data.bos, data.answer_only
            return self._padded(make_examples(records, tokenizer, *settings), data)
        name = f"the {split} text of stage {stage.name}" if stage.own_texts else f"the {split} text"
        if not data.packing:
            return self._padded(cut_texts(documents, tokenizer, data.sequence_length, name, data.bos), data)
        if stage.own_texts:
            return {"input_ids": self._pack(documents, data, name, f"{stage.name}/{split}")}, {}
        windows = self._packed(split, data)
        assert windows is not None
        return {"input_ids": windows}, {}

    def _padded(self, examples: Examples, data: DataConfig) -> tuple[Table, dict[str, int]]:
        """Return padded windows of examples, and how many examples there are."""
        counts = {"examples": len(examples.kept), "left_out": examples.left_out, "cut": examples.cut}
        padding = filler(self.tokenizer, self.rows)
        return make_windows(examples.kept, data.sequence_length, padding, data.packing), counts


def _training(stages: Sequence[Stage]) -> list[Stage]:
    return [stage for stage in stages if stage.recovery.objective != "none"]


def _read_stage(stage: Stage) -> Corpora:
    """Read the documents of a recovery stage that does not train on the run's documents."""
    splits = ["train", "validation"] if stage.recovery.validate_every else ["train"]
    return load_corpora(stage.data, splits, where=f"{stage.where}.data")
