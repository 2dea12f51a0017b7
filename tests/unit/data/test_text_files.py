"""Documents in local files."""

from __future__ import annotations

from pathlib import Path

from recondense.data.text_files import read_texts


def test_plain_text_is_read_by_blocks_or_by_articles(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("\nfirst\nblock\n\n\n  second block\n")
    assert list(read_texts(path)) == [(2, "first\nblock"), (6, "  second block")]
    path.write_text(" \n = One = \n \n text \n = = Part = = \n more \n \n = Two = \n \n x = y \n")
    assert list(read_texts(path)) == [(2, " = One = \n \n text \n = = Part = = \n more"), (8, " = Two = \n \n x = y")]
