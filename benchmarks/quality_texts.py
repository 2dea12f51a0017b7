"""The texts and the task of the quality benchmark, from a folder with WikiText-2, C4 texts and PIQA.

    c4_calibration.jsonl       the calibration set, also trained on
    wikitext2_valid.txt        its first three quarters are trained on; settings are chosen on the last quarter
    wikitext2_test.txt         read only with --split test
    piqa_valid.jsonl, piqa_valid_labels.lst    read only with --split test; nothing is trained or chosen on them

Trained on too: the topics of Python's own documentation, which every Python has (pydoc_data).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]

from recondense.data.text_files import TextFile
from recondense.files import write_aside

TRAINED_SHARE = 0.75  # of the articles of WikiText-2's validation split
TASK = "piqa_local"
PIQA = """\
# lm-eval's piqa, on a local file.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class Texts:
    """The files of the benchmark, and the folder of its task. `test` and `tasks` are only for the final figures."""

    calibration: Path
    train: Path
    validation: Path
    test: Path
    tasks: Path

    def overrides(self) -> list[str]:
        """The overrides of a command that trains on these files, and on which settings are chosen."""
        return [
            f"data.calibration.path={self.calibration}",
            f"data.train.path={self.train}",
            f"data.validation.path={self.validation}",
        ]


def write_texts(data: Path, folder: Path) -> Texts:
    """Write the files that are derived, and return all of them.

    Args:
        data: the folder of the source files.
        folder: the folder to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wikitext = TextFile(str(data / "wikitext2_valid.txt"), "text", None, "data", "data.train.path")
    articles = [text for _, text in wikitext.read()]
    cut = round(TRAINED_SHARE * len(articles))
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    c4 = [json.loads(line)["text"] for line in (data / "c4_calibration.jsonl").read_text().splitlines()]
    _write_lines(train, [*articles[:cut], *c4, *(topics[name] for name in sorted(topics))])
    _write_lines(validation, articles[cut:])
    calibration = data / "c4_calibration.jsonl"
    return Texts(calibration, train, validation, data / "wikitext2_test.txt", _write_piqa(data, folder / "tasks"))


def _write_piqa(data: Path, folder: Path) -> Path:
    """Write the task and its questions, and return their folder."""
    folder.mkdir(exist_ok=True)
    questions = (data / "piqa_valid.jsonl").read_text().splitlines()
    labels = (data / "piqa_valid_labels.lst").read_text().split()
    assert len(questions) == len(labels) == 1838, (len(questions), len(labels))
    path = folder / "piqa.jsonl"
    rows = [{**json.loads(line), "label": int(label)} for line, label in zip(questions, labels, strict=True)]
    write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))
    write_aside(folder / "piqa.yaml", PIQA.format(task=TASK, path=path))
    return folder


def _write_lines(path: Path, texts: list[str]) -> None:
    write_aside(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
