"""Find out whether the Hugging Face hub can be reached, and make the libraries use their caches if it cannot."""

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
    """Make the Hugging Face libraries use only their caches inside the context if the hub cannot be reached.

    A request to an unreachable hub is retried for 20 s; a cache answers at once. The libraries read the environment
    variable HF_HUB_OFFLINE only when they are imported, into `huggingface_hub.constants.HF_HUB_OFFLINE` (which
    transformers uses too) and `datasets.config.HF_HUB_OFFLINE`. This context sets both for the entire process and
    restores them at the end. If the user has set HF_HUB_OFFLINE=1, the libraries stay offline.

    Args:
        offline: True stays offline even if the hub is reachable; None tests whether it is.

    Yields:
        whether the hub may be used.
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
    """Return whether the hub's host accepts a connection within PROBE_SECONDS. Behind a proxy, return True untested."""
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

    # In a thread, because the DNS lookup has no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]
