"""Restore loggers: a run and Hydra add handlers, which would write to a stream that pytest has closed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restore_loggers() -> Iterator[None]:
    """Restore handlers, levels and propagation of the root logger and of ours when the context ends."""
    loggers = [logging.getLogger(name) for name in (None, "recondense", "callbacks")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
