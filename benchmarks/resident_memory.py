"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path


def resident_bytes() -> int:
    """What is resident now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since the last `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Return the unused memory of malloc's heap, and let the peak start at what is resident then."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
