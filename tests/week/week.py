"""A week of nights, each started by a schedule a few seconds ahead, on a project whose night takes seconds: `make test-week`.

Everything but the models is real: git with an origin, DVC with an S3 endpoint (moto's server, on loopback), a Prefect server and a
worker started by `cf up`, deployments by `cf deploy`, and someone who listens for alerts. What happens each night is told on stdout
and kept in a log; what must hold at the end is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.week import project
from tests.week.end import at_origin, at_the_end, kept, lock, promoted
from tests.week.machine import Forwarder, Machine, Receiver, Store, until

SETTLED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Week:
    """The project, what surrounds it, and the log."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.began, self.log, self.text = time.monotonic(), log, list[str]()
        self.folder, self.alerts, self.store = folder, Receiver(), Store()
        self.door = Forwarder(self.store.port)
        self.root = project.make(folder / "project")
        self.qualities: dict[str, float] = {}
        secrets = {"AWS_ACCESS_KEY_ID": "week", "AWS_SECRET_ACCESS_KEY": "weekweek", "CF_ALERT_URL": self.alerts.url}
        os.environ.update({name: value for name, value in secrets.items() if name.startswith("AWS")})
        self.machine = Machine(self.root, secrets)
        tree = project.git(project.ROOT, "describe", "--always", "--dirty", "--exclude=*").strip()
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        self.say(f"of {tree}: a project, an origin, an S3 server, a receiver of alerts; {load}")

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:6.0f} s  {text}"
        self.text.append(line)
        print(line, flush=True)

    def set_up(self) -> None:
        add = "import sys; from flows.project.dvc_remote import main; main(sys.argv[1:])"
        project.ran(self.root, sys.executable, "-c", add, "add", "store", "s3://week/project", "--endpoint", self.door.url)
        origin = self.folder / "origin.git"
        project.git(self.folder, "init", "-q", "--bare", "-b", "main", str(origin))
        project.git(self.root, "remote", "add", "origin", str(origin))
        self.commit("the remote")
        self.say(self.machine.up())
        self.machine.command("flows.machine.deploy")

    def commit(self, message: str, **changed: str) -> None:
        """On the tracked branch, as a person does it: values of params.yaml replaced, committed, pushed."""
        file = self.root / "params.yaml"
        for key, value in changed.items():
            text, count = re.subn(rf"\b{key}: [^,}}\n]+", f"{key}: {value}", file.read_text())
            assert count == 1
            file.write_text(text)
        project.git(self.root, "add", "-A")
        project.git(self.root, "commit", "-qm", message)
        project.git(self.root, "push", "-q", "origin", "main")

    def night(self, date: str, about: str, during: Callable[[str], None] = lambda run: None) -> str:
        """Started by its schedule; its state's name."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 3))
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": at}}
        wanted = {"parameters": {"date": date}, "state": state, "idempotency_key": f"{date} {at}"}
        run = str(self.machine.call(f"/deployments/{self.machine.deployment('nightly')}/create_flow_run", wanted)["id"])
        self.say(f"--- {time.strftime('%A', time.strptime(date, '%Y-%m-%d'))} {date}: {about}")
        heard = len(self.alerts.heard)
        during(run)
        until(lambda: self.state(run)["type"] in SETTLED, f"the night of {date} ends", 600)
        state = self.state(run)
        if state["type"] in ("FAILED", "CRASHED"):  # who tells of a crash is the worker, after it has said so to the server
            until(lambda: len(self.alerts.heard) > heard, "someone is told", 120)
        self.say(f"    {state['name']}: {' '.join(str(state['message']).split())[:400]}")
        for alert in self.alerts.heard[heard:]:
            self.say(f"    alert {alert['event']}: {' '.join(str(alert['text']).split())[:300]}")
        return str(state["name"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.machine.call(f"/flow_runs/{run}")["state"])

    def logs(self, run: str) -> str:
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(one["message"] for one in self.machine.call("/logs/filter", wanted))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.alerts.heard if one["event"] == event]

    def git(self, *words: str) -> str:
        return project.git(self.root, *words).strip()

    def holds(self, claim: str, true: bool) -> None:
        self.say(f"    {'holds' if true else 'DOES NOT HOLD'}: {claim}")
        assert true, claim

    def close(self) -> None:
        self.machine.down()
        self.door.down()
        self.store.stop()
        self.alerts.stop()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("".join(line.replace(str(self.folder), "WEEK") + "\n" for line in self.text))


# ----------------------------------------------------------------------------------------------------------- nights


def monday(week: Week) -> None:
    project.clips(week.root, *(f"mon{i}" for i in range(6)))
    state = week.night("2026-01-05", "the first one, with six clips")
    week.holds("the first student is promoted", state == "Promoted" and promoted(week) == "v0.0.1")


def tuesday(week: Week) -> None:
    project.clips(week.root, "tue1", "tue2")
    (week.root / "inbox").rename(week.root / "elsewhere")
    state = week.night("2026-01-06", "the inbox is gone, as after a failed mount")
    (week.root / "elsewhere").rename(week.root / "inbox")
    week.holds("the night failed, and someone was told why", state == "Failed" and "nightly.inbox" in week.told("failed")[-1]["text"])
    before = kept(week, "filter")
    state = week.night("2026-01-06", "once more, with two new clips")
    week.holds("the warm student is better, and promoted", state == "Promoted" and promoted(week) == "v0.0.2")
    week.holds("two clips were measured, eight were not measured again", len(kept(week, "filter") - before) == 2 and len(before) == 6)
    said = json.loads(week.git("show", "student@v0.0.2:nightly/record.json"))
    start = [dep for dep in lock(week, "student@v0.0.2")["stage2"]["deps"] if dep["path"] == "promoted/student"]
    first = [out for out in lock(week, "student@v0.0.1")["stage2"]["outs"] if out["path"] == "models/stage2"]
    week.holds("it began as v0.0.1, by its dvc.lock", said["kind"] == "warm" and start[0]["md5"] == first[0]["md5"])


def wednesday(week: Week) -> None:
    project.clips(week.root, "wed1", "bad1", "bad2")
    state = week.night("2026-01-07", "three new clips, two of them corrupt")
    record = json.loads(week.git("show", "nightly/2026-01-07:nightly/record.json"))
    week.holds("the corrupt ones were rejected, the good one was used", state == "Promoted" and record["rejected"] == {"unreadable": 2})


def thursday(week: Week) -> None:
    project.clips(week.root, "thu1")
    week.commit("a mistake that spoils the weights", damage="0.3")
    state = week.night("2026-01-08", "the candidate's weights are damaged on purpose")
    gate = json.loads(week.git("show", "nightly/2026-01-08:nightly/gate.json"))
    refused = [one["metric"] for one in gate["findings"] if not one["passed"]]
    week.holds("the gate refused it by prompts.student.quality", state == "Refused" and refused == ["prompts.student.quality"])
    week.holds("the promoted student is Wednesday's still", promoted(week) == "v0.0.3" and bool(week.told("refused")))


def friday(week: Week) -> None:
    week.commit("the mistake taken back", damage="0.0")
    project.clips(week.root, "fri1")
    week.door.down()
    state = week.night("2026-01-09", "the remote is down")
    week.holds("the night says that it was not pushed", state == "NotPushed" and bool(week.told("not pushed")))
    week.holds("its student is promoted here, and not yet at origin", promoted(week) == "v0.0.4" and not at_origin(week, "v0.0.4"))
    week.door.up()


def saturday(week: Week) -> None:
    week.commit("longer training", seconds="6.0")
    project.clips(week.root, "sat1")

    def restart(run: str) -> None:
        until(lambda: "stage2: 5" in week.logs(run), "stage 2 trains", 200)
        week.machine.server().send_signal(signal.SIGKILL)
        week.say("    the server is killed (-9) while stage 2 trains")
        time.sleep(3)
        week.say("    " + week.machine.up().splitlines()[0])

    state = week.night("2026-01-10", "the server is restarted in the middle", restart)
    week.holds("the night did not mind", state == "Promoted" and promoted(week) == "v0.0.5")
    week.holds("it handed over Friday's results too", at_origin(week, "v0.0.4") and at_origin(week, "v0.0.5"))


def sunday(week: Week) -> None:
    project.clips(week.root, "sun1", "sun2")

    def kill(run: str) -> None:
        until(lambda: "stage2: 5" in week.logs(run), "stage 2 trains", 200)
        week.machine.flow(run).send_signal(signal.SIGKILL)
        week.say("    the flow's process is killed (-9) while stage 2 trains")

    state = week.night("2026-01-11", "the weekly full run; it is killed", kill)
    week.holds("the night crashed, and someone was told", state == "Crashed" and bool(week.told("crashed")))
    state = week.night("2026-01-11", "the weekly full run again")
    record = json.loads(week.git("show", "nightly/2026-01-11:nightly/record.json"))
    week.holds("it was a full run, judged by the same gate", record["kind"] == "full" and state in ("Promoted", "Refused"))
    state = week.night("2026-01-12", "nothing new")
    week.holds("nothing new is a night without work", state == "NoNewData")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.week.week", description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("tests/week/log.txt"))
    parser.add_argument("--keep", action="store_true", help="the folder, to look at")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="week-"))
    week = Week(folder, args.log)
    try:
        week.set_up()
        for night in (monday, tuesday, wednesday, thursday, friday, saturday, sunday):
            night(week)
        at_the_end(week)
        week.say("the week is over, and all of it holds")
    finally:
        week.close()
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
