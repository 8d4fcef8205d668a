"""How the context teacher was shown the past: written beside its weights, and checked before it scores a student."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cf_model.model.view import TeacherView

VIEW_FIELDS = ("sink", "slow", "fast", "stride", "context_sigma", "context_pass")


@dataclass(frozen=True)
class TeacherLayout:
    view: TeacherView  # its segments, the level that context is announced with, and the pass that reads it
    target: int  # latent frames that are scored
    longest: int  # latent frames before them, at most

    def save(self, folder: Path) -> None:
        (folder / "layout.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check(self, shown: TeacherLayout, *, accept: bool) -> None:
        """Refuses by name what a teacher of this layout wasn't trained for. No context is what every model knows.

        `accept`: another kind of context is meant, as in the released code, which trains on sparse and shows contiguous.
        """
        ours, theirs = self.view, shown.view
        if theirs.context == "none":
            return
        if theirs.context != ours.context and not accept:
            stated = f"stage2.teacher.context is {theirs.context}, but the teacher was trained on {ours.context}"
            raise ValueError(f"{stated}; use that, or none, or say that it is meant with stage2.teacher.mismatch: accept")
        for name in VIEW_FIELDS:
            if getattr(theirs, name) != getattr(ours, name):
                stated = f"teacher.view.{name} is {getattr(theirs, name)}, but the teacher was trained with {getattr(ours, name)}"
                raise ValueError(f"{stated}; use that, train it again, or use stage2.teacher.context: none")
        if shown.target != self.target:
            stated = f"stage2.rollout.window is {shown.target}, but the teacher was trained on targets of {self.target}"
            raise ValueError(f"{stated}; use the same, or stage2.teacher.context: none")
        if shown.longest > self.longest:
            stated = f"stage2.horizon.longest has targets that begin at {shown.longest}, but the teacher's begin at {self.longest} at most"
            raise ValueError(f"{stated}; use less, or stage2.teacher.context: none")


def read_agreed_view(teacher: Path, shown: TeacherLayout, *, accept: bool) -> TeacherView:
    """The view to score with, after what the stage teacher wrote was compared with it."""
    file = teacher / "layout.json"
    if shown.view.context != "none":
        if not file.is_file():
            way = "use stage2.teacher.context: none, or the stage teacher's own"
            raise ValueError(f"{teacher} has no layout.json, which says what context it was trained on; {way}")
        try:
            stated = json.loads(file.read_text())
            trained = TeacherLayout(TeacherView(**stated["view"]), stated["target"], stated["longest"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no layout of a teacher ({error}); run the stage teacher again") from None
        trained.check(shown, accept=accept)
    return shown.view
