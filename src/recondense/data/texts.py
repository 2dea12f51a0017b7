"""The texts of a run and their token windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.config.schema import Config
from recondense.config.stages import Stage
from recondense.data.calibration_set import require_samples
from recondense.data.corpora import load_corpora
from recondense.data.corpus import Corpora
from recondense.data.examples import make_examples, make_windows
from recondense.data.instruction_records import Record
from recondense.data.loader import Table
from recondense.data.prompts import render_documents
from recondense.data.windows import pack


@dataclass
class Texts:
    """The corpora of a run, and their token windows, which are made on first use and kept.

    Args:
        corpora: the run's documents.
        stage_corpora: the documents of recovery stages that do not train on the run's documents, by the stage's name.
        counts: the numbers of supervised examples that were kept, left out and truncated, by stage and split;
            `training_windows` fills it.
    """

    corpora: Corpora
    stage_corpora: dict[str, Corpora] = field(default_factory=dict)
    counts: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    _windows: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)
    _training: dict[tuple[str, str], Table | None] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, stages: Sequence[Stage], calibrates: bool) -> Texts:
        """Read the splits that a run needs. Nothing is tokenized, so this is done before weights are loaded.

        Args:
            config: the config of the run.
            stages: the stages of the recovery; stages without an objective read nothing.
            calibrates: whether the run needs its calibration set.

        Raises:
            UserError: texts cannot be read, or there are too few of them.
        """
        stages = [stage for stage in stages if stage.recovery.objective != "none"]
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

    def documents(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
        """Return the run's documents of a split as plain texts; None if there is no such split."""
        texts = getattr(self.corpora, split)
        return None if texts is None else render_documents(texts, tokenizer)

    def windows(self, split: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor | None:
        """Return the packed windows of one of the run's splits.

        Args:
            split: the name of the split.
            tokenizer: the model's tokenizer.
            length: tokens per window.

        Returns:
            ids (N, length), int64; None if the run has no such split.
        """
        if (split, length) not in self._windows:
            texts = self.documents(split, tokenizer)
            windows = None if texts is None else pack(texts, tokenizer, length, f"the {split} text")
            self._windows[split, length] = windows
        return self._windows[split, length]

    def training_windows(self, stage: Stage, split: str, tokenizer: PreTrainedTokenizerBase | None) -> Table | None:
        """Return the windows of a recovery stage: records with the labels of their answers, or packed texts.

        Returns:
            A table of windows; None if the stage has no such split.
        """
        assert tokenizer is not None
        if (stage.name, split) not in self._training:
            self._training[stage.name, split] = self._make_windows(stage, split, tokenizer)
        return self._training[stage.name, split]

    def _make_windows(self, stage: Stage, split: str, tokenizer: PreTrainedTokenizerBase) -> Table | None:
        documents = getattr(self.stage_corpora.get(stage.name, self.corpora), split)
        if documents is None:
            return None
        length = stage.data.sequence_length
        records = [document for document in documents if isinstance(document, Record)]
        if records:
            return self._make_examples(stage, split, records, tokenizer)
        if stage.own_texts:
            return {"input_ids": pack(documents, tokenizer, length, f"the {split} text of stage {stage.name}")}
        windows = self.windows(split, tokenizer, length)
        assert windows is not None
        return {"input_ids": windows}

    def _make_examples(
        self, stage: Stage, split: str, records: list[Record], tokenizer: PreTrainedTokenizerBase
    ) -> Table:
        length = stage.data.sequence_length
        examples = make_examples(records, tokenizer, length, f"{stage.where}, the {split} records")
        self.counts[stage.name, split] = {
            "examples": len(examples.kept),
            "left_out": examples.left_out,
            "cut": examples.cut,
        }
        filler = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        return make_windows(examples.kept, length, filler, stage.data.packing)


def _read_stage(stage: Stage) -> Corpora:
    """Read the documents of a recovery stage that does not train on the run's documents."""
    splits = ["train", "validation"] if stage.recovery.validate_every else ["train"]
    return load_corpora(stage.data, splits, where=f"{stage.where}.data")
