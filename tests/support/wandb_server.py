"""Servers on this machine that stand in for W&B's: they answer with a code, never, or as W&B does until they end."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

BUCKET = {
    "id": "aWQ=", "name": "run", "displayName": "run", "description": None, "config": None, "sweepName": None,
    "historyLineCount": 0, "project": {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "e"}},
}  # fmt: skip


@contextmanager
def server(get: int, post: int | None) -> Iterator[str]:
    """Yield the address of a server with these answers to GET and POST.

    Args:
        get: the code of an answer to GET.
        post: the code of an answer to POST; 0 answers as W&B does, None never.
    """
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code: int | None) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if code is None:
                ended.wait(60)
                return
            data = _data(body) if code == 0 else {}
            content = json.dumps({"data": data}).encode()
            self.send_response(404 if data is None else code or 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(get)

        def do_POST(self) -> None:
            self.answer(post)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        ended.set()
        running.shutdown()


def _data(body: bytes) -> dict[str, Any] | None:
    """Return what W&B answers to the requests that start a run; None to others."""
    query = json.loads(body).get("query", "") if body[:1] == b"{" else ""
    if "upsertBucket" in query:
        return {"upsertBucket": {"bucket": BUCKET, "inserted": True}}
    return {"model": {"bucket": None}} if "RunResumeStatus" in query else None


@contextmanager
def silent_server() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=50)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def closed_port() -> str:
    """Return an address at which nobody listens."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"
