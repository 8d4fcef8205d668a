"""The reports of this checkout's runs over HTTP, for the links in Prefect's UI, from where no browser opens a file://.

Nothing else is served, and to this machine only. Started by `cf up`.
"""

import re
import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flows.machine.settings import LOOPBACK

PAGE = re.compile(r"/([A-Za-z0-9][A-Za-z0-9._-]{0,120})/report\.html")
NO_REPORT = "This run has no report here, or its worktree was removed. Its branch stays: `cf runs open NAME DIR` in the checkout."


class ReportHandler(BaseHTTPRequestHandler):
    """Answers GET /RUN/report.html with the report in that run's worktree."""

    def do_GET(self) -> None:
        # a page of another site, under a name that resolves to this machine, sends its own name as the host
        if self.headers.get("Host", "").rpartition(":")[0] not in LOOPBACK:
            self.send_error(403, "Ask for 127.0.0.1")
            return
        match = PAGE.fullmatch(self.path)
        page = Path(".runs") / match[1] / "reports/report.html" if match else None
        if page is None or not page.is_file():
            self.send_error(404, "No report", NO_REPORT)
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
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), ReportHandler).serve_forever()
