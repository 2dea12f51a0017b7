"""The texts of a run and their windows, each made once."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recondense.config.schema import Config
from recondense.config.stages import Stage, renamed, stages_of
from recondense.data.corpora import load_corpora
from recondense.data.corpus import Corpora
from recondense.data.examples import examples_of, windows_of
from recondense.data.loader import Table, require_samples
from recondense.data.prompts import as_texts
from recondense.data.records import Record
from recondense.data.windows import pack
from recondense.errors import UserError


@dataclass
class Texts:
    """The corpora of a run, and their token windows, each made once.

    Args:
        own: corpora of the stages that train on others than the run's, by the stage's name.
        counts: what was cut and left out of supervised examples, by stage and split.
    """

    corpora: Corpora
    own: dict[str, Corpora] = field(default_factory=dict)
    counts: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    _windows: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)
    _training: dict[tuple[str, str], Table | None] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, calibrates: bool) -> Texts:
        """Read the splits that this run needs.

        Raises:
            UserError: texts that cannot be read, or too few of them.
        """
        stages = stages_of(config) if config.recovery.objective != "none" else []
        shared = [stage for stage in stages if not stage.own_texts]
        validates = any(stage.recovery.validate_every for stage in shared)
        wanted = ["validation"] if config.evaluation.name != "none" or validates else []
        wanted += ["calibration"] if calibrates else []
        wanted += ["train"] if shared else []
        own = {stage.name: _corpora_of(stage) for stage in stages if stage.own_texts}
        corpora = load_corpora(config.data, wanted)
        if calibrates:
            require_samples(corpora.calibration or [], config.data.calibration.num_samples)
        return cls(corpora, own)

    def sha256(self) -> dict[str, str]:
        """The hash of every split, those of stages as <stage>/<split>."""
        own = {f"{name}/{split}": sha for name, corpora in self.own.items() for split, sha in corpora.sha256().items()}
        return {**self.corpora.sha256(), **own}

    def documents(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
        """The run's documents of a split as plain texts; None if it has none."""
        found = getattr(self.corpora, split)
        return None if found is None else as_texts(found, tokenizer)

    def windows(self, split: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor | None:
        """Packed windows (N, length) of a split; None if the run has no such text."""
        if (split, length) not in self._windows:
            texts = self.documents(split, tokenizer)
            found = None if texts is None else pack(texts, tokenizer, length, f"the {split} text")
            self._windows[split, length] = found
        return self._windows[split, length]

    def training(self, stage: Stage, split: str, tokenizer: PreTrainedTokenizerBase | None) -> Table | None:
        """Windows of a stage's split: of records with the labels of their answers, of texts as they are packed."""
        assert tokenizer is not None
        if (stage.name, split) not in self._training:
            self._training[stage.name, split] = self._windows_of(stage, split, tokenizer)
        return self._training[stage.name, split]

    def _windows_of(self, stage: Stage, split: str, tokenizer: PreTrainedTokenizerBase) -> Table | None:
        found = getattr(self.own.get(stage.name, self.corpora), split)
        length, name = stage.data.sequence_length, f"the {split} text"
        records = [document for document in found or () if isinstance(document, Record)]
        if found is None or not records:
            if not stage.own_texts:
                windows = self.windows(split, tokenizer, length)
            else:
                windows = None if found is None else pack(found, tokenizer, length, f"{name} of stage {stage.name}")
            return None if windows is None else {"input_ids": windows}
        examples = examples_of(records, tokenizer, length, f"{stage.where}, the {split} records")
        self.counts[stage.name, split] = {
            "examples": len(examples.kept), "left_out": examples.left_out, "cut": examples.cut
        }  # fmt: skip
        filler = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        return windows_of(examples.kept, length, filler, stage.data.packing)


def _corpora_of(stage: Stage) -> Corpora:
    """The texts that a stage has of its own."""
    wanted = ["train", "validation"] if stage.recovery.validate_every else ["train"]
    try:
        return load_corpora(stage.data, wanted)
    except UserError as error:
        raise UserError(renamed(str(error), f"{stage.where}.data")) from error
