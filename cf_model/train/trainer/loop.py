"""The training loop of every stage: checkpoints, bad steps, samples. A run that was stopped and resumed equals one that never stopped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cf_model.model import checkpoint

from . import ranks
from .observe import StepTimer, measure_peak_memory, read_values, select_progress_values

# Choice: a bad batch or two are survived, a run that has diverged ends.
MOST_BAD_STEPS = 3  # in a row


class Stateful(Protocol):
    """A part of a training's state that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Trainer(Protocol):
    """One stage's training, as `fit` runs it."""

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""

    @property
    def save_every(self) -> int:
        """Steps from one checkpoint to the next."""

    @property
    def state(self) -> Mapping[str, Stateful]:
        """Everything that a step changes, by its name in a checkpoint. Random numbers are no part of it: they follow from the step."""

    @property
    def newest_batch(self) -> Mapping[str, Tensor]:
        """The tensors that the newest step was made of, for the record of a bad step."""

    @property
    def timer(self) -> StepTimer:
        """Measures the laps of a step; `fit` starts and reads it."""

    def step(self, number: int) -> Mapping[str, float | Tensor]:
        """Take step `number`, from 0, and return its values for the log: those of the device stay there until the step is over."""


class TrainingLog(Protocol):
    """Where a loop reports to, and where it hears that it has to stop (tasks/runner/track.py implements it)."""

    work: Path

    def log(self, step: int, **values: float) -> None: ...

    def time(self, step: int, seconds: Mapping[str, float], **memory: float) -> None: ...

    def resumed(self, step: int) -> None: ...

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Any: ...

    def listen(self) -> AbstractContextManager[Callable[[], bool]]:
        """Return a context in which a SIGTERM does not end the process but makes the callable true."""

    def stopped(self, step: int) -> None:
        """End the process, which was asked to stop; `step` is in a checkpoint."""

    def finished(self) -> None:
        """Report that all steps are done. Ranks other than the first end here; the first rank saves the model."""


def fit(trainer: Trainer, log: TrainingLog, sample: Callable[[int], Mapping[str, float]] | None = None) -> None:
    """Run the trainer's steps 0 .. steps - 1, from the newest usable checkpoint in `log.work` on.

    After a SIGTERM the current step is finished, saved, and the last. A step with a value that is not finite is a bad step: its
    batch goes to bad-XXXXXXXX, and `MOST_BAD_STEPS` in a row end the run with ValueError. Every rank calls `sample` after every
    step, before a checkpoint says that the step is done; its values are logged with the step's.
    """
    timer, latest = trainer.timer, dict[str, float]()
    bad, (path, first) = 0, checkpoint.find_newest_checkpoint(log.work)
    # Before loading, because the ranks load some parts together.
    saved = ranks.agree_on_start(first)
    if path:
        checkpoint.load_checkpoint(path, trainer.state)
    if first:
        log.resumed(first)
    bar = log.progress(trainer.steps, "step", first)
    with log.listen() as stop_requested:
        for number in range(first, trainer.steps):
            timer.start()
            values, stop = ranks.average_values(read_values(trainer.step(number)), stop_requested())
            # A value that is not finite on any rank is so in the mean, so all ranks decide alike.
            not_finite = [name for name, value in values.items() if not math.isfinite(value)]
            # Samples come before the checkpoint: a run resumed from it has them, and a run that repeats the step makes them again.
            if sample:
                timer.lap("rest")
                values |= sample(number + 1)
                timer.lap("samples")
            with checkpoint.refuse_full_disk(log.work, "metrics.jsonl"):
                log.log(number + 1, **values)
            latest |= values
            bad = bad + 1 if not_finite else 0
            if not_finite:
                name = not_finite[0]
                report_bad_step(log.work, number + 1, name, values[name], bad, {"batch": {**trainer.newest_batch}})
            # No checkpoint after a bad step, and none after the last: the stage's outs hold the model then.
            elif ((number + 1) % trainer.save_every == 0 and number + 1 < trainer.steps) or stop:
                saved = number + 1
                # Every rank asks for the state, because some of it is split over the ranks; only the first writes.
                state = {name: part.state_dict() for name, part in trainer.state.items()}
                if ranks.is_first_rank():
                    checkpoint.save_checkpoint(log.work, saved, state)
                timer.lap("save")
            log.time(number + 1, timer.read_seconds(), **measure_peak_memory())
            bar.update(1, **select_progress_values(latest))
            if stop:
                log.stopped(saved)
    bar.close()
    log.finished()


def report_bad_step(work: Path, step: int, name: str, value: float, bad: int, record: Mapping[str, Any]) -> None:
    """Write `record`, the bad step's batch, to `work`/bad-XXXXXXXX and warn.

    `bad` counts the bad steps in a row; raises ValueError at the `MOST_BAD_STEPS`-th.
    """
    folder = work if ranks.is_first_rank() else work / f"rank-{ranks.get_rank()}"  # each rank has its own rows of the batch
    folder.mkdir(exist_ok=True)
    path = folder / f"bad-{step:08d}"
    with checkpoint.refuse_full_disk(folder, path.name):
        checkpoint.write_checkpoint(path, step, record)
    message = f"step {step}: {name} is {value}"
    if bad >= MOST_BAD_STEPS:
        last = max((saved.name for saved in work.glob("step-????????")), default="none yet")
        raise ValueError(
            f"{message}, the third bad step in a row; lower the learning rate: the last checkpoint ({last}) is intact, "
            f"the batch is in {path}"
        )
    warnings.warn(f"{message}; what it would have changed was left as it was, its batch is in {path}", stacklevel=3)
