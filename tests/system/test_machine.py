"""Up, down, deploy and doctor on a real machine; what has a cron gets runs; a checkpoint is measured."""

from __future__ import annotations

import json
import time
from datetime import datetime

from tests.flows import project
from tests.system.driver import Machine, until


def test_what_has_a_cron_gets_runs_within_ninety_seconds(machine: Machine) -> None:
    """Two combinations of versions break this without a word (requirements/cpu.txt: fastapi, SQLAlchemy)."""
    nightly = machine.deployment("nightly")
    wanted = {"deployments": {"id": {"any_": [nightly["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}

    def ahead() -> list[dict[str, str]]:
        return [run for run in machine.call("/flow_runs/filter", wanted) if run["auto_scheduled"]]

    until(ahead, "the scheduler has made a run", 90)
    first = ahead()[0]
    assert datetime.fromisoformat(first["created"]).timestamp() - machine.deployed < 90
    assert datetime.fromisoformat(first["expected_start_time"]).minute == 30
    assert first["state_name"] == "Scheduled"


def test_up_again_changes_nothing(machine: Machine) -> None:
    before = [machine.process(name).pid for name in ("server", "worker", "watch", "reports")]
    said = machine.up()
    assert said.count("is up already") == 3 and "reports are up already" in said
    assert [machine.process(name).pid for name in ("server", "worker", "watch", "reports")] == before
    assert "CF_PORT is 1; `cf down` first" in machine.command("flows.machine.up", "up", code=1, CF_PORT="1")


def test_a_port_that_another_has(machine: Machine) -> None:
    other = machine.root.parent / "other"
    if not other.exists():
        project.make(other)
        for name in ("flows", "infra"):
            (other / name).symlink_to(machine.root / name)
    neighbour = Machine(other)
    said = neighbour.command("flows.machine.up", "up", code=1, CF_PORT=str(machine.port))
    assert f"port {machine.port} is taken by process {machine.process('server').pid} (" in said
    assert f"CF_PORT={machine.port + 1} make up" in said
    assert not neighbour.marked()
    assert "no Prefect server answers" in neighbour.command("flows.machine.deploy", code=1)


def test_the_doctor_of_a_machine_that_is_well(machine: Machine) -> None:
    said = machine.command("flows.doctor.command", "--json", CF_GPUS="0")
    found = json.loads(said[: said.rindex("]") + 1])
    assert not [line for line in found if line["level"] == "fail"]
    levels = {(line["name"], line["said"].split(":")[0]): line["level"] for line in found}
    assert levels["deployments", "nightly"] == levels["deployments", "pipeline"] == levels["deployments", "evaluate"] == "ok"
    assert levels["worker", f"process {machine.process('worker').pid}, pool cf"] == "ok"
    assert [line["level"] for line in found if line["name"] == "alerts"] == ["ok", "ok"]
    assert {line["name"] for line in found} >= {"python", "versions", "port", "server", "disk", "cache", "locks", "GPU", "remote", "W&B"}


def test_a_night_that_fails_and_one_that_never_comes_are_told(machine: Machine) -> None:
    """The project states no gate, so a night can't begin. The watch looks when it starts, and then every quarter of an hour."""
    run = machine.start_night()
    assert machine.finish(run) == "Failed"
    until(lambda: [one for one in machine.told.heard if one["event"] == "failed" and one["run"] == run], "someone is told of the failure")
    (machine.root / ".runs/nightly.json").write_text(json.dumps({"since": time.time() - 27 * 3600}))
    watch = machine.process("watch")
    watch.kill()
    watch.wait(10)
    until(lambda: machine.process("watch").pid != watch.pid, "supervisor has started it again")
    until(lambda: [one for one in machine.told.heard if one["event"] == "absent"], "someone is told of the absence")
    assert "no nightly has ended well for 27.0 hours" in machine.told.heard[-1]["text"]
    assert machine.told.url not in (machine.root / ".machine/watch.log").read_text() + (machine.root / ".machine/worker.log").read_text()


def test_a_given_checkpoint_is_measured(machine: Machine) -> None:
    """A folder, and then the same bytes by the commit that holds them; the branch repeats it and the stage doesn't run there."""
    run = machine.start(profile="smoke")
    assert machine.finish(run) == "Completed"
    folder = machine.root / "out/student"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("a student from elsewhere")
    given = machine.start("evaluate", checkpoint="out/student", stage="slow", measured=["last"])
    assert machine.finish(given) == "Completed", machine.run(given)["state"]
    place = machine.worktree(given)
    assert (place / "models/slow/weights").read_text() == "a student from elsewhere"
    states = machine.tasks(given)
    assert states["last"] == "Completed" and "slow" not in states
    assert "Running stage" not in project.dvc(place, "repro") and "frozen: true" in (place / "dvc.yaml").read_text()

    again = machine.start("evaluate", checkpoint=f"run/{place.name}", stage="slow", measured=["last"])
    assert machine.finish(again) == "Completed", machine.run(again)["state"]
    assert (machine.worktree(again) / "models/slow/weights").read_text() == "a student from elsewhere"
    assert machine.tasks(again)["last"] == "Restored"

    nowhere = machine.start("evaluate", checkpoint="student@v9.9.9", stage="slow", measured=["last"])
    assert machine.finish(nowhere) == "Failed"
    assert "student@v9.9.9 is neither a folder in" in machine.run(nowhere)["state"]["message"]
