"""Whether the Hugging Face hub can be reached, and a context in which the libraries use their caches if not."""

from __future__ import annotations

import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

PROBE_SECONDS = 4.0


@contextmanager
def hub_access(*, offline: bool | None = None) -> Iterator[bool]:
    """Inside, the Hugging Face libraries look nothing up on the hub if it is out of reach, but use their caches.

    A look-up of an unreachable hub retries for 20 s; a cache answers at once. The libraries read the environment
    variable HF_HUB_OFFLINE only when they are imported, into `huggingface_hub.constants.HF_HUB_OFFLINE` (which
    transformers asks too) and `datasets.config.HF_HUB_OFFLINE`. This sets both, for the whole process, and restores
    them at the end. A user's HF_HUB_OFFLINE=1 stays in force.

    Args:
        offline: True looks nothing up even if the hub is reachable; None finds out whether it is.

    Yields:
        whether the hub may be asked.
    """
    import datasets.config
    import huggingface_hub.constants

    libraries: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [library.HF_HUB_OFFLINE for library in libraries]
    if any(before):
        offline = True
    elif offline is None:
        offline = not hub_reachable(huggingface_hub.constants.ENDPOINT)
    try:
        for library in libraries:
            library.HF_HUB_OFFLINE = offline
        yield not offline
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = value


@cache
def hub_reachable(endpoint: str) -> bool:
    """Whether the hub's host accepts a connection within PROBE_SECONDS; behind a proxy the answer is yes, unasked."""
    url = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    if proxies.get(url.scheme) or proxies.get("all"):
        return True
    answers: list[bool] = []

    def probe() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname or "", port), timeout=PROBE_SECONDS).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # A thread, because looking a name up has no time limit of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]
