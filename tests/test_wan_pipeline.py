"""The column wan-1.3b in small: every stage on random weights in Wan's published folders, and a video of what they made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from cf_model.data.video_reader import probe_video
from cf_model.pipeline import ContextForcingPipeline
from tests import pretrained
from tests.preloaded import python_folder
from tests.test_pipeline import ENVIRONMENT, STAGES, dvc, lay_out, ran, replace_all

# what the profile wan-1.3b has and smoke has not, but for its precision: a CPU computes in float32
REAL = {
    "kind: linear\n  weights: null": "kind: wan\n  weights: weights",
    'text: {kind: words, weights: null, tokens: 16, channels: 64, negative: ""}': (
        f"text: {{kind: umt5, weights: weights, tokens: 16, channels: {pretrained.WIDTH}, negative: a sea}}"
    ),
    "init: scratch\n  weights: null": "init: wan\n  weights: weights",
    "method: teacher_forcing": "method: ode",
    "checkpointing: false": "checkpointing: true",
}
SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "freq_dim": 64, "num_layers": 2, "rope_max_seq_len": 1024}


def cf(project: Path, *words: str) -> str:
    done = subprocess.run([python_folder() / "python", "-m", "tasks", *words], cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_from_wans_folders_to_a_video(tmp_path: Path) -> None:
    project = lay_out(tmp_path / "project")
    pretrained.save(project / "weights")
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=pretrained.WIDTH, **SIZES)
    transformer.save_pretrained(project / "weights/transformer")
    replace_all(project / "params.yaml", REAL)

    assert ran(dvc(project, "repro")) == STAGES
    facts = json.loads((project / "models/base/import.json").read_text())
    assert facts["layout"] == "diffusers" and facts["model"]["layers"] == 2
    assert json.loads((project / "models/codec/codec.json").read_text())["kind"] == "wan"

    cf(project, "export", "--to", "diffusers", "--model", "models/stage2", "--out", "out/student")
    pipe = ContextForcingPipeline.from_pretrained(project / "out/student")
    assert type(pipe.codec).__name__ == "WanCodec" and type(pipe.text).__name__ == "UMT5Encoder"
    cf(project, "generate", "--model", "out/student", "--prompt", "a red disc", "--seconds", "2", "--out", "video.mp4")
    found = probe_video(project / "video.mp4")
    assert (found.width, found.height) == (32, 32) and found.frames == 32
