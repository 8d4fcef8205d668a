"""The reports of this checkout's runs, for the links in Prefect's UI: no browser opens a file:// from there. Started by `cf up`.

Nothing else is served, and to this machine only.
"""

from __future__ import annotations

import re
import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flows.machine.settings import LOOPBACK

PAGE = re.compile(r"/([A-Za-z0-9][A-Za-z0-9._-]{0,120})/report\.html")
GONE = "This run has no report here, or its worktree was removed. Its branch stays: `git worktree add DIR run/NAME`, `dvc pull` there."


class Reports(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        # a page elsewhere whose name is made to mean this machine would send its own name
        if self.headers.get("Host", "").rpartition(":")[0] not in LOOPBACK:
            self.send_error(403, "Ask for 127.0.0.1")
            return
        found = PAGE.fullmatch(self.path)
        page = Path(".runs") / found[1] / "reports/report.html" if found else None
        if page is None or not page.is_file():
            self.send_error(404, "No report", GONE)
            return
        with page.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Length", str(page.stat().st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Reports).serve_forever()
