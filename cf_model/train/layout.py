"""The layout of the context that a teacher was trained on: written beside its weights, and checked before it scores a student."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cf_model.model.view import TeacherView

VIEW_FIELDS = ("sink", "slow", "fast", "stride", "chunk", "context_sigma", "context_pass")
# where a memory's layout comes from
MEMORY_FIELDS = {"sink": "stage2.memory.sink", "slow": "stage2.memory.slow", "fast": "stage2.memory.fast"}
MEMORY_FIELDS |= {"stride": "stage2.memory.interval x stage2.rollout.chunk", "chunk": "stage2.rollout.chunk"}


@dataclass(frozen=True)
class TeacherLayout:
    """What a teacher saw in training, or is to see as a score: layout.json."""

    view: TeacherView  # the context's segments, the noise level it is announced with, and the pass that reads it
    target: int  # latent frames after the context
    longest: int  # most latent frames before the target

    def save(self, folder: Path) -> None:
        """Write `folder`/layout.json."""
        (folder / "layout.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check(self, wanted: TeacherLayout, *, accept: bool) -> None:
        """Raise ValueError by name for what a teacher of this layout was not trained for. Every model can score without a context.

        `accept` allows another kind of context on purpose: the released code trains on sparse contexts and scores with contiguous ones.
        """
        # Compare the view first, because it decides whether the rest matters.
        trained, view = self.view, wanted.view
        if view.context == "none":
            return
        if view.context != trained.context and not accept:
            problem = f"stage2.teacher.context is {view.context}, but the teacher was trained on {trained.context}"
            raise ValueError(f"{problem}; use that, or none, or say that it is meant with stage2.teacher.mismatch: accept")
        for name in VIEW_FIELDS:
            if getattr(view, name) != getattr(trained, name):
                stated = f"teacher.view.{name}"
                if view.context == "memory" and name in MEMORY_FIELDS:
                    stated = f"stage2.teacher.context is memory, and {MEMORY_FIELDS[name]}"
                problem = f"{stated} is {getattr(view, name)}, but the teacher was trained with {getattr(trained, name)}"
                raise ValueError(f"{problem}; use that, train it again, or use stage2.teacher.context: none")
        if wanted.target != self.target:
            problem = f"stage2.rollout.window is {wanted.target}, but the teacher was trained on targets of {self.target}"
            raise ValueError(f"{problem}; use the same, or stage2.teacher.context: none")
        if wanted.longest > self.longest:
            horizon, most = wanted.longest + wanted.target, self.longest + self.target
            begin = f"whose last target begins at {wanted.longest}, but the teacher's begin at {self.longest} at most"
            way = f"use whole chunks up to {most}, a teacher trained with a higher teacher.longest, or stage2.teacher.context: none"
            raise ValueError(f"stage2.horizon.longest is {horizon}, {begin}; {way}")


def read_agreed_view(teacher: Path, wanted: TeacherLayout, *, accept: bool) -> TeacherView:
    """Return the view to score with, after comparing it with the layout.json in the folder `teacher`.

    Raises ValueError where the file is missing or damaged, or its layout is another (`TeacherLayout.check`).
    """
    file = teacher / "layout.json"
    if wanted.view.context != "none":
        if not file.is_file():
            way = "use stage2.teacher.context: none, or the stage teacher's own"
            raise ValueError(f"{teacher} has no layout.json, which says what context it was trained on; {way}")
        # A layout written by another version of this project has other keys.
        try:
            layout = json.loads(file.read_text())
            trained = TeacherLayout(TeacherView(**layout["view"]), layout["target"], layout["longest"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no layout of a teacher ({error}); run the stage teacher again") from None
        trained.check(wanted, accept=accept)
    return wanted.view
