"""Columns of datasets that hold no text, rows without one, and datasets that cannot be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recondense.config.schema import CalibrationConfig, DataConfig, SplitConfig, SplitNames
from recondense.data.corpora import load_corpora
from recondense.errors import UserError

Load = Callable[..., list[str] | None]


@pytest.fixture(params=["parquet", "jsonl"])
def load(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(rows, **settings)`: the training texts of a dataset with these rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(rows: list[dict[str, Any]], streaming: bool = True, **settings: Any) -> list[str] | None:
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if request.param == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        else:
            (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(
            **{
                **{"name": "c4", "source": "hub", "dataset": str(folder), "streaming": streaming},
                **{"splits": SplitNames(train="train", validation=None, calibration=None)},
                **{"train": SplitConfig(num_texts=9), "calibration": CalibrationConfig(num_samples=1)},
                **settings,
            }
        )
        return load_corpora(data, ["train"]).train

    return load


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "a number"), (0.5, "a number"), (True, "true"), (["a"], "a list"), ({"a": "b"}, "an object")],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_column_that_holds_no_text_is_named(load: Load, value: Any, kind: str, streaming: bool) -> None:
    rows = [{"label": value, "body": "one", "title": "two"}] * 2
    expected = (
        rf"split 'train': row 0 \(from 0\) has {kind} in 'label', not a text \(fields with text: body, title\); set"
    )
    with pytest.raises(UserError, match=expected + r" data\.text_field\.") as caught:
        load(rows, streaming, text_field="label")
    assert "\n" not in str(caught.value)


def test_rows_with_null_are_left_out_and_counted(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text} for text in (None, "one", None, "", "\u200b", "two", None)]
    with caplog.at_level(logging.INFO, "recondense.data"):
        assert load(rows) == ["one", "two"]
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("recondense.data")]
    assert line.endswith("split 'train': 3 rows with null in 'text' are left out")
    with pytest.raises(UserError, match="has no more texts for it"):
        load([{"text": None, "id": 1}, {"text": None, "id": 2}])


def test_fields_of_fields(load: Load) -> None:
    assert load([{"meta": {"text": "one"}}, {"meta": {"text": "two"}}], text_field="meta.text") == ["one", "two"]
    with pytest.raises(UserError, match=r"row 0 \(from 0\) has no field 'meta.body' \(fields: meta\)"):
        load([{"meta": {"text": "one"}}], text_field="meta.body")


def test_records_name_their_row(load: Load) -> None:
    good = {"instruction": "a", "input": "", "output": "b"}
    with pytest.raises(UserError, match=r"split 'train': row 1 \(from 0\) .*; data.form=alpaca"):
        load([good, {**good, "output": None}], form="auto")
    with pytest.raises(UserError, match=r"row 0 \(from 0\) has no known form"):
        load([{"body": "one"}], form="auto")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.parquet", b"PAR1 and no more"),
        ("train.jsonl", b'{"text": "one"\n'),
        ("train.jsonl", b"\x1f\x8b\x00 damaged"),
        ("train.csv", b"\xff\xfe\x00\x00"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_dataset_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, streaming: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_bytes(content)
    data = DataConfig(
        name="c4",
        source="hub",
        dataset=str(folder),
        streaming=streaming,
        splits=SplitNames(train="train", validation=None, calibration=None),
        train=SplitConfig(num_texts=2),
    )
    with pytest.raises(
        UserError, match=r"^data\.dataset=.*Check data\.dataset, data\.subset and data\.splits\.train\.$"
    ):
        load_corpora(data, ["train"])
