"""The training loop every stage shares: optimisers, averaged weights, checkpoints; stopped and resumed = never stopped."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cf_model.model import checkpoint
from cf_model.model.flow import uniform

from . import ranks
from .engine import PLAIN as PLAIN
from .engine import EngineSpec as EngineSpec
from .engine import Optimizer as Optimizer
from .engine import OptimizerSpec as OptimizerSpec
from .observe import Clock, peak_memory, shown
from .ranks import Random as Random

# Choice: a bad batch or two are survived, a run that has diverged ends.
BAD_STEPS = 3  # in a row


def at_least(lowest: float, **values: float) -> None:
    for name, value in values.items():
        if value < lowest:
            raise ValueError(f"{name} is {value}; use {lowest} or more")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """Exponential moving average of a model's weights: what is generated with; rollouts use the raw weights."""

    def __init__(self, model: M, decay: float, start: int = 0) -> None:
        self.source, self.decay, self.start, self.done = model, decay, start, 0
        self.model: M = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> float:
        """Returns how far it then is from the raw weights, over their norm. What does not learn is left out."""
        # Choice: a rising decay in the first updates, so that a short run's average is not its starting point.
        decay = min(self.decay, (1 + self.done) / (10 + self.done)) if self.done >= self.start else 0.0
        norms = []
        for mean, raw in zip(self.model.parameters(), gather_weights(self.source), strict=True):
            mean.lerp_(raw, 1 - decay)
            if raw.requires_grad:
                norms.append(torch.stack([(mean - raw).norm(), raw.norm()]).float())
        self.done += 1
        apart, size = torch.stack(norms).norm(dim=0)
        return float(apart / size)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.model.load_state_dict(state["model"])


class Clips(Protocol):
    """The training clips, already encoded (cf_model/data/latents.py)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""

    def rows(self, split: Literal["train", "heldout"], at_least: int = 1) -> list[int]:
        """Clips of a split with at least so many latent frames; refuses an empty answer."""

    def frames(self, row: int) -> int: ...

    def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
        """[B, F, C, H, W] float32."""

    def text(self, rows: list[int]) -> Tensor:
        """[B, T, E] float32."""

    @property
    def empty_text(self) -> Tensor:
        """[T, E]: no prompt at all."""


class Log(Protocol):
    """What a loop tells the world, and hears of it; tasks/runner/track.py has the one implementation."""

    work: Path

    def log(self, step: int, **values: float) -> None: ...

    def time(self, step: int, seconds: Mapping[str, float], **memory: float) -> None: ...

    def resumed(self, step: int) -> None: ...

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Any: ...

    def listen(self) -> AbstractContextManager[Callable[[], bool]]:
        """While it lasts a SIGTERM does not end the process but makes the callable true."""

    def stopped(self, step: int) -> None:
        """Ends the process: it was asked to, and `step` is in a checkpoint."""

    def finished(self) -> None:
        """All steps are done. A rank that only follows ends here; the first one saves the model."""


def fit(
    step: Callable[[int], Mapping[str, float]],
    *,
    steps: int,
    state: Mapping[str, Stateful],
    log: Log,
    save_every: int,
    seen: Mapping[str, Tensor] | None = None,
    clock: Clock | None = None,
    sample: Callable[[int], None] | None = None,
) -> None:
    """Runs `step` for 0 .. steps - 1, from the newest usable checkpoint in `log.work` on.

    `state` names everything that a step changes; all of it is in each checkpoint. After a SIGTERM the step that runs is
    finished, saved, and the last. A value of `step` that is not finite is a bad step: what it was made of (`seen`, and the
    random state before it) goes to bad-XXXXXXXX, and `BAD_STEPS` of them in a row end the run. `clock` is the one that
    `step` tells its laps; `sample` is called after every step, by every rank, before a checkpoint says that the step is done.
    """
    clock, latest = clock or Clock(), dict[str, float]()
    bad, (path, first) = 0, checkpoint.newest(log.work)
    saved = ranks.agree_on_start(first)  # before it is read: some of reading is done together
    if path:
        checkpoint.load(path, state)
    if first:
        log.resumed(first)
    bar = log.progress(steps, "step", first)
    with log.listen() as asked:
        for number in range(first, steps):
            before = state["random"].state_dict() if "random" in state else {}
            clock.start()
            values, stop = ranks.mean_values(step(number), asked())
            wrong = [name for name, value in values.items() if not math.isfinite(value)]
            with checkpoint.room(log.work, "metrics.jsonl"):
                log.log(number + 1, **values)
            latest |= values
            if sample:
                clock.lap("rest")
                sample(number + 1)
                clock.lap("samples")
            bad = bad + 1 if wrong else 0
            if wrong:
                report(log.work, number + 1, wrong[0], values[wrong[0]], bad, {"random": before, "batch": dict(seen or {})})
            elif ((number + 1) % save_every == 0 and number + 1 < steps) or stop:
                saved = number + 1
                held = {part: whole.state_dict() for part, whole in state.items()}  # every rank: some of it is spread over them
                if ranks.is_first():
                    checkpoint.save(log.work, saved, held)
                clock.lap("save")
            log.time(number + 1, clock.taken(), **peak_memory())
            bar.update(1, **shown(latest))
            if stop:
                log.stopped(saved)
    bar.close()
    log.finished()


def report(work: Path, step: int, name: str, value: float, bad: int, made_of: Mapping[str, Any]) -> None:
    """Keeps what a bad step was made of; ends the run at the `BAD_STEPS`-th in a row."""
    own = work if ranks.is_first() else work / f"rank-{ranks.rank()}"  # each has its rows of the batch
    own.mkdir(exist_ok=True)
    path = own / f"bad-{step:08d}"
    with checkpoint.room(own, path.name):
        checkpoint.write(path, step, made_of)
    stated = f"step {step}: {name} is {value}"
    if bad >= BAD_STEPS:
        last = max((found.name for found in work.glob("step-????????")), default="none yet")
        raise ValueError(
            f"{stated}, the third bad step in a row; lower the learning rate: the last checkpoint ({last}) is intact, "
            f"the batch and the random state are in {path}"
        )
    warnings.warn(f"{stated}; what it would have changed was left as it was, its batch and random state are in {path}", stacklevel=3)


def mean(values: Sequence[float]) -> float:
    """Of what the groups of a batch say."""
    return sum(values) / len(values)


def batches(rows: Iterable[int], count: int, rng: Random) -> list[int]:
    """`count` of the rows, drawn with replacement."""
    rows = list(rows)
    return [rows[i] for i in rng.integers(0, len(rows) - 1, count)]


def drop_prompts(text: Float[Tensor, "B T E"], empty: Float[Tensor, "T E"], share: float, rng: Random) -> Float[Tensor, "B T E"]:
    """The empty prompt in place of a share of the prompts: what guidance needs."""
    keep = uniform((len(text),), rng.rng) >= share
    return torch.where(keep[:, None, None], text, empty.to(text))


def build_optimizer(model: nn.Module, spec: OptimizerSpec, steps: int, engine: EngineSpec) -> Optimizer:
    """Of plain torch, or of DeepSpeed, which is imported only here. Copies of the model are made before: it may be split."""
    if not engine.is_deepspeed:
        return Optimizer(model, spec, steps)
    from .zero import make

    return make(model, spec, steps, engine)


def gather_weights(model: nn.Module) -> Iterator[Tensor]:
    """A model's weights, one after the other, each gathered from the ranks where ZeRO 3 has split it."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            from .zero import gathered

            with gathered(parameter):
                yield parameter
        else:
            yield parameter
