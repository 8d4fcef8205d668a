"""As much of a W&B server, on loopback, as W&B's own client needs to send a run: it takes everything and keeps it.

What this shows is what the client sends. What the real server makes of it, it does not show.
"""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.calls: list[tuple[str, dict[str, Any]]] = []  # GraphQL operation, its variables
        self.history: dict[str, list[dict[str, Any]]] = {}  # run -> its rows
        self.said: list[bytes] = []  # all bodies

    def named(self, operation: str) -> list[dict[str, Any]]:
        return [values for name, values in self.calls if name == operation]

    def file(self, name: str) -> dict[str, Any]:
        return {"id": "F", "name": name, "displayName": name, "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any] | None:
        entity = {"id": "E", "name": "me"}
        artifact = given.get("input", {}).get("digest", given.get("artifactID"))
        manifest = {"artifactManifest": {"id": "M", "file": self.file("manifest")}}
        sequence = {"id": "S", "latestArtifact": None}
        files = [self.file(file) for file in given.get("files", [])]
        bucket = {
            "id": "B", "name": given.get("name"), "displayName": given.get("displayName"), "description": None, "config": "{}",
            "sweepName": None, "project": {"id": "P", "name": given.get("project"), "entity": entity}, "historyLineCount": 0,
        }  # fmt: skip
        answers: dict[str, dict[str, Any]] = {
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "Viewer": {"viewer": {"id": "U", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "CreateArtifact": {"createArtifact": {"artifact": {"id": artifact, "state": "PENDING", "artifactSequence": sequence}}},
            "CreateArtifactManifest": {"createArtifactManifest": manifest},
            "UpdateArtifactManifest": {"updateArtifactManifest": manifest},
            "CommitArtifact": {"commitArtifact": {"artifact": {"id": artifact, "digest": artifact}}},
            "UseArtifact": {"useArtifact": {"artifact": {"id": artifact}}},
            "CreateRunFiles": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}},
        }
        return answers.get(name)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        self.server.said.append(self.path.encode() + body)
        out: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            name = re.match(r"\s*(?:query|mutation)\s+(\w+)", asked["query"])
            operation, given = name[1] if name else "", asked.get("variables") or {}
            self.server.calls.append((operation, given))
            data = self.server.answer(operation, given)
            out = {"data": data} if data else {"errors": [{"message": f"{operation} is not known here"}]}
        elif self.path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            rows = self.server.history.setdefault(self.path.split("/")[-2], [])
            rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        text = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET = do_POST


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
