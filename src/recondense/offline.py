"""Find out whether a server can be reached, and make the Hugging Face libraries use their caches if the hub cannot."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
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

    def connects() -> bool:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=PROBE_SECONDS).close()
        return True

    return _within(PROBE_SECONDS, connects)


def server_answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Return whether a server answers a request in time, with anything but a failure of its own (HTTP 5xx).

    Proxies of the environment are used. A certificate that Python does not know counts as an answer.

    Args:
        url: the address to ask.
        seconds: how long to wait.
    """

    def answers() -> bool:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code < 500
        except urllib.error.URLError as error:
            return isinstance(error.reason, ssl.SSLError)
        return True

    return _within(seconds, answers)


def _within(seconds: float, test: Callable[[], bool]) -> bool:
    """Return the result of a test of the network; False if it fails or does not end in time."""
    results: list[bool] = []

    def probe() -> None:
        try:
            results.append(test())
        except (OSError, ValueError, http.client.HTTPException):
            results.append(False)

    # In a thread, because the DNS lookup has no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return results == [True]
