"""Someone is told: when a night fails, crashes, is refused, or does not happen at all.

A message is a POST of JSON to the URL in CF_ALERT_URL, whose `text` Slack, Mattermost and others show as it is. The URL is a secret:
it comes from the environment only, and no log line holds it. A night writes down how it ended; who looks there whether the last good
end is too long ago needs neither worker nor flow, nor the server: the watch that `cf up` starts, or `cf nightly-check` from cron.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from flows.cli import in_a_sentence
from flows.machine import settings
from flows.project import overrides

URL = "CF_ALERT_URL"
TRIES, PAUSE, LIMIT = 3, 2.0, 10.0
LAST = Path(".runs/nightly.json")  # in the checkout that nights are started in
GOOD = ("Promoted", "Refused", "NoNewData", "NoGoodClips", "TheSameAgain", "NotPushed")  # a night that took place
AGAIN = 24 * 3600.0  # Choice: seconds until an absence that goes on is told again


def send(event: str, text: str, line: Callable[[str], None], **facts: Any) -> bool:
    """Whether it was delivered. It never raises: an alert must not be what ends a night."""
    url = os.environ.get(URL)
    if not url:
        line(f"nobody is told ({event}): {URL} is not set")
        return False
    body = json.dumps({"text": f"context-forcing: {text}", "event": event, "time": int(time.time()), **facts}).encode()
    why = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
            if not url.startswith(("http://", "https://")):
                raise ValueError
            with urllib.request.urlopen(request, timeout=LIMIT):
                line(f"someone was told: {event}")
                return True
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}"
        except (OSError, ValueError, http.client.HTTPException) as error:  # its text may hold the URL
            why = type(error).__name__
    line(f"nobody could be told ({event}): {why}; see {URL} in the worker's environment")
    return False


def on_failure(flow: Any, flow_run: Any, state: Any) -> None:
    """Prefect calls these; after a kill -9 of the flow it is the worker that does."""
    _of_a_run("failed", flow_run, state)


def on_crashed(flow: Any, flow_run: Any, state: Any) -> None:
    _of_a_run("crashed", flow_run, state)


def _of_a_run(event: str, run: Any, state: Any) -> None:
    """In the checkout that nights are started in."""
    said = " ".join(str(state.message or "").split())[:500]
    send(event, f"nightly {run.name} {event}: {said}", _print, run=str(run.id), name=run.name)
    ended(Path.cwd(), event, good=False)


def ended(repo: Path, outcome: str, *, good: bool) -> None:
    """Writes down how a night ended. Where it can't (a full disk), the night has ended all the same."""
    now = time.time()
    state = _last(repo) | {"outcome": outcome, "ended": now} | ({"good": now} if good else {})
    try:
        _write(repo, state)
    except OSError as error:
        _print(f"{LAST} could not be written: {error.strerror}")


def absent(repo: Path, hours: float, line: Callable[[str], None] = lambda _: None) -> str | None:
    """What is wrong, if no night has ended well for so long; it was then told. Time begins with the first time anyone asks, and anew
    where a clock that was ahead wrote down what is still to come."""
    now, state = time.time(), _last(repo)
    past = [state[name] for name in ("good", "since") if name in state and state[name] <= now]
    if not past:
        state["since"] = now
        _write(repo, state)
    there = elsewhere()
    since = max([*(past or [now]), there if there <= now else 0.0])
    if now - since <= hours * 3600:
        return None
    last = f"the last to end was {state['outcome']}" if "outcome" in state else "none has ever ended"
    said = f"no nightly has ended well for {(now - since) / 3600:.1f} hours ({last}); `cf doctor` on its machine says more"
    if abs(now - state.get("told", 0)) > AGAIN and send("absent", said, line, hours=round((now - since) / 3600, 2)):
        _write(repo, state | {"told": now})
    return said


def elsewhere() -> float:
    """When a night last ended well on any machine, by the Prefect server in PREFECT_API_URL; 0 where it doesn't say."""
    if not os.environ.get("PREFECT_API_URL"):
        return 0.0
    nights = {"flows": {"name": {"any_": ["nightly"]}}, "flow_runs": {"state": {"name": {"any_": GOOD}}}}
    try:
        found = settings.ask(os.environ, "/flow_runs/filter", {**nights, "sort": "END_TIME_DESC", "limit": 1}, LIMIT)
        return max((datetime.fromisoformat(run["end_time"]).timestamp() for run in found), default=0.0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _last(repo: Path) -> dict[str, Any]:
    try:
        found = json.loads((repo / LAST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(repo: Path, state: dict[str, Any]) -> None:
    path = repo / LAST
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(state, sort_keys=True) + "\n")
    partial.replace(path)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def hours_of(repo: Path) -> float:
    return float(overrides.read((repo / "params.yaml").read_text())["nightly"]["absent_hours"])


def watch(repo: Path, every: float, hours: float | None) -> None:
    """For ever. A params.yaml that is being edited doesn't end it."""
    while True:
        try:
            if said := absent(repo, hours or hours_of(repo), _print):
                _print(said)
        except (OSError, ValueError, KeyError, TypeError, YAMLError) as error:
            _print(f"not looked for missing nights: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        time.sleep(every)


@in_a_sentence
def main(argv: list[str]) -> None:
    about = "Exit code 1, and an alert, when no nightly has ended well for nightly.absent_hours. It needs no server."
    parser = argparse.ArgumentParser("cf nightly-check", description=about)
    parser.add_argument("--hours", type=float, help="default: nightly.absent_hours in params.yaml")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="look again and again, as `cf up` does; without it once, for cron")
    repo, asked = Path.cwd(), parser.parse_args(argv)
    if asked.every is not None:
        watch(repo, asked.every, asked.hours)
    if said := absent(repo, hours_of(repo) if asked.hours is None else asked.hours, _print):
        sys.exit(said)


if __name__ == "__main__":
    main(sys.argv[1:])
