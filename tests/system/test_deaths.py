"""What is left when something dies in the middle of a run: the table in docs/operating.md, each line with kill -9."""

from __future__ import annotations

from tests.system.driver import Machine, until, words

LONG = {"overrides": ["slow.seconds=300", "stubborn.seconds=300"]}
SHORT = {"overrides": ["slow.seconds=12", "stubborn.seconds=12"]}


def test_the_flow_process(machine: Machine) -> None:
    run = machine.start(**LONG)
    machine.begun(run)
    machine.engine(run).kill()
    until(lambda: machine.state(run) == "Crashed", "the run says Crashed")
    until(lambda: not machine.living(run), f"all of it is dead: {machine.living(run)}")
    assert not machine.gpu_is_held()
    until(lambda: machine.tasks(run)["slow"] == "Crashed", "no task says Running")
    done = {"prepare": "Completed", "slow": "Crashed", "stubborn": "Crashed", "last": "Skipped"}
    assert machine.tasks(run) == done
    again(machine)


def test_the_worker(machine: Machine) -> None:
    run = machine.start(**LONG)
    machine.begun(run)
    machine.process("worker").kill()
    until(lambda: not machine.living(run), f"all of it is dead: {machine.living(run)}")
    until(lambda: machine.state(run) == "Crashed", "the next worker has closed it")
    until(lambda: not {"Running", "Pending", "NotReady"} & set(machine.tasks(run).values()), "its tasks are closed too", 60)
    again(machine)


def test_the_server(machine: Machine) -> None:
    """Prefect's default keeps the slots of concurrency limits in the server's memory: the next run would wait for ever."""
    run = machine.start(**SHORT)
    machine.begun(run)
    killed = machine.process("server")
    killed.kill()
    until(lambda: machine.process("server").pid != killed.pid, "supervisor has started it again", 10)
    assert machine.living(run), "the run goes on without it"
    assert "the worker is up already" in machine.up()
    assert machine.finish(run) == "Completed"
    assert set(machine.tasks(run).values()) <= {"Completed", "Restored"}
    lines = machine.logs(run)
    assert any(line.startswith("Beginning flow run") for line in lines), "the run's first batch of lines was lost"
    missing = [step for step in range(1, 121) if not any(f"slow: {step} of 120 steps" in line for line in lines)]
    assert not missing, "lines of the log were lost"
    again(machine)


def test_a_stage(machine: Machine) -> None:
    """The one that has the GPU. It fails as if it had failed by itself; what doesn't need it goes on, what needs it is skipped."""
    run = machine.start(overrides=["slow.seconds=300", "stubborn.seconds=8"])
    stage = next(process for process in machine.begun(run) if words(process)[-2:] == ["work.py", "slow"])
    assert machine.gpu_is_held() and stage.environ()["CUDA_VISIBLE_DEVICES"] == "0"
    stage.kill()
    until(lambda: not machine.gpu_is_held(), "the kernel has freed the GPU")
    assert machine.finish(run) == "Failed"
    assert machine.tasks(run) | {"slow": "Failed", "stubborn": "Completed", "last": "Skipped"} == machine.tasks(run)
    assert "slow failed" in machine.run(run)["state"]["message"]
    until(lambda: not machine.living(run), f"all of it is dead: {machine.living(run)}")  # the flow ends when its log is delivered
    again(machine)


def test_the_whole_machine_is_taken_down(machine: Machine) -> None:
    run = machine.start(**LONG)
    machine.begun(run)
    assert machine.down().startswith("stopped: ")
    assert not machine.marked() and not machine.living(run)
    assert "nothing of this checkout is up" in machine.down()
    machine.up()
    assert machine.state(run) == "Crashed"
    assert not {"Running", "Pending", "NotReady"} & set(machine.tasks(run).values())
    again(machine)


def again(machine: Machine) -> None:
    """No slot is lost: the next run of the same deployment, whose limit is one, is taken and ends well."""
    run = machine.start()
    assert machine.finish(run) == "Completed", machine.run(run)["state"]
