"""The splits of a run: local files, hub data sets in a local folder, and calibration sets of several sources."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from recondense import offline
from recondense.config.problems import render
from recondense.config.schema import CalibrationConfig, DataConfig, SourceConfig, SplitConfig, SplitNames
from recondense.data.calibration_mixture import interleave, shares
from recondense.data.corpora import check_paths as problems_of
from recondense.data.corpora import load_corpora
from recondense.data.corpus import Corpora
from recondense.data.instruction_records import Record, read_record
from recondense.errors import UserError


def check_paths(data: DataConfig, where: str = "data") -> list[str]:
    """The messages of the problems."""
    return render(problems_of(data, where))


def texts_config(**paths: Path | str) -> DataConfig:
    splits = {split: SplitConfig(path=str(path)) for split, path in paths.items() if split != "calibration"}
    calibration = CalibrationConfig(path=str(paths["calibration"]) if "calibration" in paths else None, num_samples=2)
    return DataConfig(name="texts", source="texts", calibration=calibration, **splits)


def write_jsonl(path: Path, texts: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- splits


def test_only_the_splits_that_are_asked_for_are_loaded() -> None:
    corpora = load_corpora(DataConfig(train=SplitConfig(num_texts=3)), ["train"])
    assert corpora.train is not None and len(corpora.train) == 3
    assert corpora.validation is None and corpora.calibration is None and set(corpora.sha256()) == {"train"}


def test_the_hash_depends_on_where_documents_end() -> None:
    assert Corpora(train=["ab", "c"]).sha256() != Corpora(train=["a", "bc"]).sha256()


# --------------------------------------------------------------------------------------------------- local files


def test_training_texts_leave_out_the_other_splits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", ["one", "two", "three", "", "four"])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["four", "five"])
    corpora = load_corpora(texts_config(calibration=path, train=path, validation=held_out))
    assert corpora.calibration == ["one", "two", "three", "", "four"]
    assert corpora.train == ["three"]  # num_samples = 2
    assert corpora.validation == ["four", "five"]
    assert load_corpora(texts_config(calibration=path, train=path, validation=held_out), ["train"]).train == ["three"]
    assert load_corpora(texts_config(calibration=path, train=path), ["train"]).train == ["three", "four"]
    assert load_corpora(texts_config(calibration=path)).train is None
    all_taken = write_jsonl(tmp_path / "two.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match="all of its texts are also calibration or validation texts"):
        load_corpora(texts_config(calibration=path, train=all_taken))


def test_problems_of_files_are_all_reported(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    missing = tmp_path / "missing.txt"
    problems = check_paths(texts_config(calibration=empty, train=folder, validation=missing))
    assert problems == [
        f"data.train.path={folder}: is a folder; give a file.",
        f"data.validation.path={missing}: there is no such file.",
        f"data.calibration.path={empty}: the file has no text; give a file with at least one document.",
    ]
    assert check_paths(DataConfig()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"body": "b"}\n', r"line 2 has no text in 'text' \(its keys: body\); set data.text_field"),
        (b'{"text": "a"}\n\n[1]\n', "line 3 has no text in 'text' .a list."),
        (b'{"text": 1}\n', "line 1 has no text"),
        (b'{"text": "a"}\noops\n', "line 2 is not JSON .*; write one object per line"),
        (b'{"text": "\xff"}\n', "is not UTF-8 text .byte 10"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    config = texts_config(calibration=path)
    with pytest.raises(ValueError, match=rf"^data.calibration.path={path}: {message}"):
        load_corpora(config)
    assert len(check_paths(config)) == 1


def test_calibration_files_that_are_too_short(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", [""])
    problems = check_paths(texts_config(calibration=path))
    assert len(problems) == 2
    assert "has 1 texts, but data.calibration.num_samples=2; lower num_samples" in problems[0]
    assert "the text of line 1 is empty; remove it" in problems[1]
    with pytest.raises(ValueError, match="the file has no text"):
        load_corpora(texts_config(validation=path))
    with pytest.raises(ValueError, match="there is no such file"):
        load_corpora(texts_config(validation=tmp_path / "missing.jsonl"))


def test_another_text_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["a", "b"], field="content")
    assert load_corpora(replace(texts_config(calibration=path), text_field="content")).calibration == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the hub stores it, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["", *(f"train {number}" for number in range(6)), "train 0"])
    write_jsonl(folder / "validation.jsonl", ["validation 0", "validation 1"])
    return folder


def hub_config(folder: Path | str, *, streaming: bool = True, train: int | None = 3, **names: str) -> DataConfig:
    splits = SplitNames(**{"train": "train", "validation": "validation", "calibration": "train", **names})
    return DataConfig(
        name="c4",
        source="hub",
        dataset=str(folder),
        splits=splits,
        streaming=streaming,
        calibration=CalibrationConfig(num_samples=2),
        train=SplitConfig(num_texts=train),
        validation=SplitConfig(num_texts=1),
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_splits_do_not_overlap(dataset: Path, streaming: bool) -> None:
    config = hub_config(dataset, streaming=streaming)
    corpora = load_corpora(config)
    assert corpora.calibration == ["train 0", "train 1"]
    assert corpora.train == ["train 2", "train 3", "train 4"]
    assert corpora.validation == ["validation 0"]
    # The same training texts when they are loaded alone; others when the calibration set has a split of its own.
    assert load_corpora(config, ["train"]) == Corpora(train=corpora.train)
    everything = load_corpora(hub_config(dataset, streaming=streaming, train=None), ["train"]).train
    assert everything == ["train 2", "train 3", "train 4", "train 5"]
    shared = load_corpora(hub_config(dataset, streaming=streaming, validation="train"))
    assert (shared.validation, shared.train) == (["train 2"], ["train 3", "train 4", "train 5"])
    apart = load_corpora(hub_config(dataset, streaming=streaming, calibration="validation"), ["train"])
    assert apart.train == ["train 0", "train 1", "train 2"]


def test_hub_lines_of_wikitext_become_articles(dataset: Path) -> None:
    write_jsonl(
        dataset / "train.jsonl", ["", " = One = \n", "", " text \n", " = Two = \n", " more \n", " = Three = \n"]
    )
    corpora = load_corpora(hub_config(dataset))
    assert corpora.calibration == [" = One = \n\n text", " = Two = \n more"]
    assert corpora.train == [" = Three ="]


def test_mistakes_in_hub_settings_are_explained(dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'tran': .*data\.splits"):
        load_corpora(replace(hub_config(dataset), splits=SplitNames(train="tran")))
    with pytest.raises(ValueError, match=r"no field 'body' \(fields: text\); set data.text_field"):
        load_corpora(replace(hub_config(dataset), text_field="body"))
    with pytest.raises(ValueError, match="no more texts for it"):
        load_corpora(replace(hub_config(dataset), calibration=CalibrationConfig(num_samples=10)))
    with pytest.raises(ValueError, match=r"BuilderConfig 'xx' not found.*data\.subset"):
        load_corpora(replace(hub_config(dataset), subset="xx"))
    assert "would read the entire split" in check_paths(hub_config(dataset, train=None))[0]
    assert "name the dataset" in check_paths(replace(hub_config(dataset), dataset=None))[0]


def test_a_missing_network_is_reported_in_one_sentence_and_soon(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(offline.socket, "create_connection", refuse)
    monkeypatch.setattr(offline.urllib.request, "getproxies", dict)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    offline.hub_reachable.cache_clear()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^data\.dataset=owner/set: the hub cannot be reached") as caught:
        load_corpora(hub_config("owner/set"))
    offline.hub_reachable.cache_clear()
    assert "\n" not in str(caught.value) and time.monotonic() - started < 5
    assert datasets.config.HF_HUB_OFFLINE is False and huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_messages_name_settings_as_the_config_does(dataset: Path, tmp_path: Path) -> None:
    """So do those of a recovery stage and of a calibration source; a path is shown as it is, whatever its name."""
    path = tmp_path / "of data.form and data.text_field.jsonl"
    write_jsonl(path, ["a"], field="body")
    where = "recovery.stages[1].data"
    expected = f"{where}.train.path={path}: line 1 has no text in 'text' (its keys: body); set {where}.text_field."
    config = texts_config(train=path)
    assert check_paths(config, where) == [expected]
    with pytest.raises(UserError) as caught:
        load_corpora(config, ["train"], where)
    assert str(caught.value) == expected
    with pytest.raises(
        UserError, match=r"^recovery.stages\[1\].data.dataset=.*and recovery.stages\[1\].data.splits.train"
    ):
        load_corpora(replace(hub_config(dataset), splits=SplitNames(train="tran")), ["train"], where)
    assert check_paths(replace(hub_config(dataset), dataset=None), where)[0].startswith(f"{where}.dataset=null: ")
    source = CalibrationConfig(num_samples=1, sources=(SourceConfig(path=str(path)),))
    name = "data.calibration.sources[0]"
    expected = f"{name}.path={path}: line 1 has no text in 'text' (its keys: body); set {name}.text_field."
    assert check_paths(DataConfig(calibration=source)) == [expected]
    with pytest.raises(UserError) as caught:
        load_corpora(DataConfig(calibration=source), ["calibration"])
    assert str(caught.value) == expected


# ------------------------------------------------------------------------------------------------------- records

QUESTION = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B", "id": "x"}
ALPACA = [{"instruction": f"Do {number}.", "input": "", "output": "done"} for number in range(6)]


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_are_documents(tmp_path: Path) -> None:
    """They are counted, and left out of other splits, as texts are."""
    path = write_records(tmp_path / "train.jsonl", [*ALPACA, ALPACA[0]])
    config = replace(texts_config(calibration=path, train=path), form="auto")
    assert check_paths(config) == []
    corpora = load_corpora(config)
    expected = [read_record(values, "alpaca") for values in ALPACA]
    assert corpora.train == expected[2:] and corpora.calibration == [*expected, expected[0]]
    assert all(isinstance(text, Record) for text in corpora.train)
    write_records(path, [{"body": "x"}])
    [problem] = check_paths(replace(config, calibration=CalibrationConfig()))
    assert problem.startswith(f"data.train.path={path}: line 1 has no known form")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("streaming", [True, False])
def test_records_of_the_hub(dataset: Path, streaming: bool, inside: bool) -> None:
    rows = [{**QUESTION, "question": f"Which of {number}?"} for number in range(6)]
    write_records(dataset / "train.jsonl", [{"train": row} for row in rows] if inside else rows)
    write_records(dataset / "validation.jsonl", [{"train": QUESTION}] if inside else [QUESTION])
    config = replace(hub_config(dataset, streaming=streaming), form="auto")
    corpora = load_corpora(config)
    assert corpora.train is not None and corpora.calibration is not None
    assert [text.values["instruction"].partition("\n")[0][-2:] for text in corpora.train] == ["2?", "3?", "4?"]  # type: ignore[attr-defined]
    assert corpora.validation == [read_record(QUESTION, "commonsense")]
    with pytest.raises(
        ValueError, match=r"split 'train': row 0 \(from 0\) is not a record of form alpaca.*form=alpaca"
    ):
        load_corpora(replace(config, form="alpaca"))


# ------------------------------------------------------------------------------------------- several sources, mixed


def test_shares_add_up_and_are_in_proportion() -> None:
    assert shares(2048, [1, 1]) == [1024, 1024]
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(10, [0.3, 0.7]) == [3, 7]
    assert shares(7, [5, 1, 1]) == [5, 1, 1]
    assert shares(1, [1, 3]) == [0, 1]
    for total in range(1, 30):
        counts = shares(total, [0.2, 1.7, 3.1])
        assert sum(counts) == total
        assert all(abs(count - total * weight / 5) < 1 for count, weight in zip(counts, [0.2, 1.7, 3.1], strict=True))


def test_sources_are_interleaved_evenly() -> None:
    assert interleave(["abcd", "xy"]) == ["a", "x", "b", "c", "y", "d"]
    assert interleave(["ab", "", "xy"]) == ["a", "x", "b", "y"]


def mixed_config(tmp_path: Path, dataset: Path, num_samples: int = 6, **more: Any) -> DataConfig:
    texts = write_jsonl(tmp_path / "texts.jsonl", [f"text {number}" for number in range(9)], field="body")
    records = write_records(tmp_path / "records.jsonl", ALPACA)
    sources = (
        SourceConfig(path=str(texts), text_field="body", weight=3),
        SourceConfig(dataset=str(dataset), streaming=True, weight=2),
        SourceConfig(path=str(records), form="auto", weight=1),
    )
    calibration = CalibrationConfig(num_samples=num_samples, sources=sources)
    return DataConfig(**{"source": "texts", "calibration": calibration, "train": SplitConfig(str(texts)), **more})


def test_a_calibration_set_of_several_sources(tmp_path: Path, dataset: Path) -> None:
    config = mixed_config(tmp_path, dataset, text_field="body")
    assert check_paths(config) == []
    corpora = load_corpora(config)
    record = read_record(ALPACA[0], "alpaca")
    assert corpora.calibration == ["text 0", "train 0", "text 1", record, "train 1", "text 2"]
    assert isinstance(corpora.calibration[3], Record)
    assert corpora.train == [f"text {number}" for number in range(3, 9)], "training leaves them out"
    assert (
        load_corpora(config, ["train"]).train == corpora.train and load_corpora(config, ["validation"]).sha256() == {}
    )
    assert load_corpora(config, ["calibration"]).calibration == corpora.calibration
    other = replace(
        mixed_config(tmp_path, dataset), source="hub", dataset=str(dataset), splits=SplitNames(train="train")
    )
    assert load_corpora(replace(other, train=SplitConfig())).train == ["train 2", "train 3", "train 4", "train 5"]


@pytest.mark.parametrize("source", ["texts", "hub", "stdlib"])
def test_calibration_sources_are_left_out_of_training_only(
    tmp_path: Path, dataset: Path, source: Literal["texts", "hub", "stdlib"]
) -> None:
    """Wherever the run's other texts come from; the validation texts are not changed."""
    config = DataConfig(
        source=source, dataset=str(dataset), train=SplitConfig(), splits=SplitNames("train", "validation")
    )
    if source == "texts":
        files = {split: str(dataset / f"{split}.jsonl") for split in ("train", "validation")}
        config = replace(config, train=SplitConfig(files["train"]), validation=SplitConfig(files["validation"]))
    before = load_corpora(config)
    assert before.train is not None and before.validation is not None
    used = [before.train[1], before.validation[0]]
    path = write_jsonl(tmp_path / "source.jsonl", used)
    calibration = CalibrationConfig(num_samples=2, sources=(SourceConfig(path=str(path)),))
    after = load_corpora(replace(config, calibration=calibration))
    assert after.calibration == used
    assert after.train == [text for text in before.train if text not in used]
    assert after.validation == before.validation


def test_sources_that_are_refused(tmp_path: Path, dataset: Path) -> None:
    def problems(*sources: SourceConfig, **more: Any) -> list[str]:
        return check_paths(DataConfig(calibration=CalibrationConfig(num_samples=4, sources=sources, **more)))

    path = str(write_jsonl(tmp_path / "x.jsonl", ["a", "b"]))
    name = "data.calibration.sources"
    assert problems() == [f"{name}=[]: name at least one source, or set it to null."]
    assert problems(SourceConfig(path="/nowhere")) == [f"{name}[0].path=/nowhere: there is no such file."]
    assert f"{name}[0]: set either path" in problems(SourceConfig())[0]
    assert f"{name}[0]: set either path" in problems(SourceConfig(path=path, dataset="x"))[0]
    assert (
        f"{name}[1].weight=0.01: no text of" in problems(SourceConfig(dataset="x"), SourceConfig(path, weight=0.01))[0]
    )
    assert "has 2 texts, but its share is 4; lower its weight" in problems(SourceConfig(path))[0]
    assert f"set {name}[0].text_field." in problems(SourceConfig(path, text_field="body"))[0]
    assert "set one of them to null" in problems(SourceConfig(dataset="x"), path=path)[0]
    short = CalibrationConfig(num_samples=50, sources=(SourceConfig(dataset=str(dataset)),))
    with pytest.raises(ValueError, match=r"sources\[0\] has 7 texts, but its share is 50"):
        load_corpora(DataConfig(calibration=short), ["calibration"])
    missing = CalibrationConfig(num_samples=5, sources=(SourceConfig(dataset=str(dataset), split="tran"),))
    with pytest.raises(ValueError, match=r"^data.calibration.sources\[0\].dataset=.*Check data.calibration.sources"):
        load_corpora(DataConfig(calibration=missing), ["calibration"])
