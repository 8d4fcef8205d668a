"""How long the past is that the context teacher learns from, where clips differ in length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cf_model.train.teacher import DrawnStarts, TeacherTrainer
from tests.small import FLOW, denoiser
from tests.train import ranked


class ClipsOfManyLengths(ranked.Clips):
    """Forty clips of 42 to 104 latent frames, 10.5 to 26 s, as a collection of "longer than 10 s" has them; half of them short."""

    lengths = tuple(42 + n // 2 for n in range(20)) + tuple(60 + 2 * n for n in range(20)) + (104,)

    def rows(self, split: str, at_least: int = 1) -> list[int]:
        return [row for row, length in enumerate(self.lengths) if length >= at_least]

    def frames(self, row: int) -> int:
        return self.lengths[row]

    def window(self, rows: list[int], starts: list[int], length: int) -> torch.Tensor:
        assert all(start + length <= self.lengths[row] for row, start in zip(rows, starts, strict=True)), "beyond a clip's end"
        return torch.zeros(len(rows), length, *self.shape)


@pytest.mark.slow
def test_short_clips_do_not_shorten_the_past_of_the_others():
    """The paper: uniform in 5 to 20 s. With one start a batch, bounded by its shortest clip, one step in a hundred saw 10 s."""
    trainer = ranked.teacher()[0]
    spec = replace(trainer.spec, target=21, shortest=20, longest=80, no_context=0.0, fast_only=0.0, batch=8, steps=80)
    trainer = TeacherTrainer(spec, model=denoiser(), latents=ClipsOfManyLengths(), flow=FLOW, seed=1)
    starts = torch.tensor([trainer.step(number)["start"] for number in range(80)])
    assert 20 <= float(starts.min()) < 26 and 74 < float(starts.max()) <= 80
    assert float(starts.mean()) == pytest.approx(50, abs=5) and float((starts >= 40).double().mean()) > 0.55
    assert trainer.starts.longest == int(starts.max())


def test_the_longest_start_goes_through_a_checkpoint():
    drawn, again = DrawnStarts(), DrawnStarts()
    drawn.longest = 17
    again.load_state_dict(drawn.state_dict())
    assert again.longest == 17


def test_no_start_is_longer_than_the_clips_allow():
    trainer = ranked.teacher()[0]
    spec = replace(trainer.spec, target=21, shortest=20, longest=500)
    assert TeacherTrainer(spec, model=denoiser(), latents=ClipsOfManyLengths(), flow=FLOW, seed=1).allowed[-1] == 81
