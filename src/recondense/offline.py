"""Whether the Hugging Face hub can be reached; while it cannot, libraries are told to use their caches."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

PROBE_SECONDS = 4.0


@contextmanager
def reachable_or_offline(*, offline: bool | None = None) -> Iterator[bool]:
    """Look nothing up on the hub while it is out of reach: caches answer at once; a look-up would retry for 20 s.

    Args:
        offline: True: look nothing up, whether the hub is reachable or not. None: find out.

    Yields:
        whether the hub may be asked.
    """
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    silent = any(before) or (not hub_reachable(huggingface_hub.constants.ENDPOINT) if offline is None else offline)
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = silent
        yield not silent
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


@cache
def hub_reachable(endpoint: str) -> bool:
    """Whether the hub's host takes a connection within some seconds; a proxy is believed without asking."""
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
