"""Python's standard library as a corpus."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recondense.data import stdlib
from recondense.data.corpus import SPLITS
from recondense.data.stdlib import stdlib_corpora


def test_stdlib_is_split_by_module_and_always_the_same() -> None:
    first, second = stdlib_corpora(), stdlib_corpora()
    assert first.sha256() == second.sha256() and set(first.sha256()) == set(SPLITS)
    assert first.train and first.validation and first.calibration
    assert len(first.calibration) >= 100
    modules = dict(stdlib._modules(Path(os.__file__).parent))
    splits = [stdlib._split_of(name) for name in modules]
    assert 0.8 < splits.count("train") / len(splits) < 0.97
    assert min(splits.count("validation"), splits.count("calibration")) > 0.02 * len(splits)
    # All of a module is in one split.
    assert sorted(first.train) == sorted(text for name, text in modules.items() if stdlib._split_of(name) == "train")
    calibration = [text for name, text in modules.items() if stdlib._split_of(name) == "calibration"]
    assert all(any(piece in text for text in calibration) for piece in first.calibration[:20])


def test_stdlib_leaves_out_tests_tables_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "os.py",
        "test/t.py",
        "json/tests/t.py",
        "site-packages/x.py",
        "encodings/cp1.py",
        "_sysconfigdata_x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"\xe4 = 1\n")
    (tmp_path / "json" / "empty.py").write_text("\n")
    assert list(stdlib._modules(tmp_path)) == [("os", "x = 1\n")]
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"too few Python sources \(train 1, validation 0.*data=texts"):
        stdlib_corpora()


def test_the_split_of_a_module_never_changes() -> None:
    names = ("tempfile", "hashlib", "argparse", "tarfile", "email.policy")
    expected = ["validation", "calibration", "train", "validation", "calibration"]
    assert [stdlib._split_of(name) for name in names] == expected


def test_calibration_pieces_are_disjoint_and_taken_in_turns() -> None:
    text = "".join(f"line {number:04d} of a long module\n" for number in range(300))
    pieces = stdlib._pieces(text)
    assert len(pieces) > 2 and text.startswith("".join(pieces))
    assert all(stdlib.CHUNK_CHARACTERS <= len(piece) < stdlib.CHUNK_CHARACTERS + 100 for piece in pieces)
    assert stdlib._pieces("short\n") == ["short\n"]
    assert stdlib._take_turns([["a1", "a2", "a3"], ["b1"], ["c1", "c2"]]) == ["a1", "b1", "c1", "a2", "c2", "a3"]
