"""Alerts when a night fails, crashes, is refused, or does not happen at all.

An alert is a POST of JSON to the URL in CF_ALERT_URL, whose `text` Slack, Mattermost and others show as it is. CF_HEARTBEAT_URL is
asked for once when a night has ended well, for services that raise the alarm when nothing is heard from a machine. Both are secrets:
they come from the environment only, and no log line holds them.

A night writes down how it ended. Whether the last good end is too long ago is looked up without worker, flow or server, by the watch
that `cf up` starts or by `cf nightly-check` from cron.
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from flows.cli import one_line_errors
from flows.machine import settings
from tasks.files.json_lines import read_json_object, write_json
from tasks.files.options import parse_options
from tasks.params import yaml_file

ALERT_URL, HEARTBEAT_URL = "CF_ALERT_URL", "CF_HEARTBEAT_URL"
TRIES, PAUSE, LIMIT = 3, 2.0, 10.0
STATE_FILE = Path(".runs/nightly.json")  # in the checkout that nights are started in
GOOD_OUTCOMES = ("Promoted", "Refused", "NoNewData", "NoGoodClips", "TheSameAgain", "NotPushed")  # of a night that took place
AGAIN = 24 * 3600.0  # Choice: seconds until an absence that goes on is told again


def send_alert(event: str, text: str, line: Callable[[str], None], **facts: Any) -> bool:
    """Send an alert and return whether it was delivered. No exception leaves, because an alert must not be what ends a night."""
    url = os.environ.get(ALERT_URL)
    if not url:
        line(f"nobody is told ({event}): {ALERT_URL} is not set")
        return False
    body = {"text": f"context-forcing: {text}", "event": event, "time": int(time.time()), **facts}
    for attempt in range(TRIES):
        time.sleep(PAUSE if attempt else 0)
        failure = _request(url, body)
        if failure is None:
            line(f"someone was told: {event}")
            return True
    line(f"nobody could be told ({event}): {failure}; see {ALERT_URL} in the worker's environment")
    return False


def send_heartbeat(line: Callable[[str], None]) -> None:
    """Ask for CF_HEARTBEAT_URL once, if it is set. A failure is only a line of the log, because the night itself was good."""
    if url := os.environ.get(HEARTBEAT_URL):
        failure = _request(url)
        line(f"warning: no heartbeat was sent: {failure}; see {HEARTBEAT_URL}" if failure else "a heartbeat was sent")


def _request(url: str, body: dict[str, Any] | None = None) -> str | None:
    """POST a body of JSON, or GET without one: over https, or to this machine. Return what failed, in words without the URL."""
    try:
        parts = urlsplit(url)
        if parts.scheme != "https" and (parts.scheme != "http" or (body is None and parts.hostname not in settings.LOOPBACK)):
            return "its address is neither https nor on this machine"
        with settings.open_url(url, body, timeout=LIMIT):
            return None
    except HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError) as error:  # the error's text may hold the URL
        return type(error).__name__


def on_failure(flow: Any, flow_run: Any, state: Any, event: str = "failed") -> None:
    """Alert that a night failed, and write that down in the working folder: the checkout that nights are started in. A hook of Prefect."""
    message = " ".join(str(state.message or "").split())[:500]
    send_alert(event, f"nightly {flow_run.name} {event}: {message}", _print, run=str(flow_run.id), name=flow_run.name)
    record_end(Path.cwd(), event, good=False)


def on_crashed(flow: Any, flow_run: Any, state: Any) -> None:
    """Alert that a night crashed; after a kill -9 of the flow it is the worker that calls this hook."""
    on_failure(flow, flow_run, state, "crashed")


def record_end(repo: Path, outcome: str, *, good: bool) -> None:
    """Write down how a night ended. A full disk doesn't change that the night has ended, so it is only a line of the log."""
    now = time.time()
    state = read_json_object(repo / STATE_FILE) | {"outcome": outcome, "ended": now} | ({"good": now} if good else {})
    try:
        write_json(repo / STATE_FILE, state, shared=True)
    except OSError as error:
        _print(f"{STATE_FILE} could not be written: {error.strerror}")


def report_absence(repo: Path, hours: float, line: Callable[[str], None] = lambda _: None) -> str | None:
    """Return a sentence if no night has ended well for so many hours, and alert once a day while that lasts.

    The hours count from the first call where no night has ended yet, and anew where a clock that was ahead wrote a time to come.
    """
    now, state = time.time(), read_json_object(repo / STATE_FILE)
    past = [state[name] for name in ("good", "since") if name in state and state[name] <= now]
    if not past:
        state["since"] = now
        write_json(repo / STATE_FILE, state, shared=True)
    elsewhere = last_good_end_elsewhere()
    since = max([*(past or [now]), elsewhere if elsewhere <= now else 0.0])
    if now - since <= hours * 3600:
        return None
    last = f"the last to end was {state['outcome']}" if "outcome" in state else "none has ever ended"
    sentence = f"no nightly has ended well for {(now - since) / 3600:.1f} hours ({last}); `cf doctor` on its machine says more"
    due = abs(now - state.get("told", 0)) > AGAIN
    if due and send_alert("absent", sentence, line, hours=round((now - since) / 3600, 2)):
        write_json(repo / STATE_FILE, state | {"told": now}, shared=True)
    return sentence


def last_good_end_elsewhere() -> float:
    """Ask the Prefect server in PREFECT_API_URL when a night last ended well on any machine; 0 where there is no answer."""
    if not os.environ.get("PREFECT_API_URL"):
        return 0.0
    nights = {"flows": {"name": {"any_": ["nightly"]}}, "flow_runs": {"state": {"name": {"any_": GOOD_OUTCOMES}}}}
    try:
        runs = settings.post_json(os.environ, "/flow_runs/filter", {**nights, "sort": "END_TIME_DESC", "limit": 1}, LIMIT)
        return max((datetime.fromisoformat(run["end_time"]).timestamp() for run in runs), default=0.0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_absent_hours(repo: Path) -> float:
    return float(yaml_file.read_yaml(repo / "params.yaml")["nightly"]["absent_hours"])


def watch_nights(repo: Path, every: float, hours: float | None) -> None:
    """Look for missing nights for ever; a params.yaml that is being edited doesn't end the watch."""
    while True:
        try:
            if sentence := report_absence(repo, hours or read_absent_hours(repo), _print):
                _print(sentence)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _print(f"not looked for missing nights: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        time.sleep(every)


@one_line_errors
def main(argv: list[str]) -> None:
    repo, options = Path.cwd(), parse_options("nightly-check", argv)
    if options.every is not None:
        watch_nights(repo, options.every, options.hours)
    if sentence := report_absence(repo, read_absent_hours(repo) if options.hours is None else options.hours, _print):
        sys.exit(sentence)


if __name__ == "__main__":
    main(sys.argv[1:])
