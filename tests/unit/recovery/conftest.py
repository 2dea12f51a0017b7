"""What all tests of a recovery share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Lightning tells of its hardware and its epochs at every fit."""
    caplog.set_level("ERROR", logger="lightning.pytorch")
