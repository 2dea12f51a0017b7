"""The files on which the results of a run depend."""

from __future__ import annotations

from pathlib import Path

from recondense.run import input_files


def test_the_files_of_a_folder_that_decide_results(tmp_path: Path) -> None:
    for name in ("a.yaml", "deep/b.jsonl", "utils.py", "cache/json/info.json", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = [str(path.relative_to(tmp_path)) for path in input_files.deciding_files(tmp_path)]
    assert paths == ["a.yaml", "deep/b.jsonl", "utils.py"]
