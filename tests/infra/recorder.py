"""A server on loopback in the place of Docker's and Kubernetes': it answers every request with what it was sent, and keeps that."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def recorder() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Answers every request with what it was sent."""
    seen: list[tuple[str, Any]] = []

    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            self._say(body | {"Id": "0" * 64})

        def do_GET(self) -> None:
            self._say({"Id": "0" * 64, "Name": "x", "Config": {}, "State": {}, "ApiVersion": "1.50", "Version": "28.2.2"})

        def _say(self, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
