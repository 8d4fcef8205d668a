"""`cf export --to diffusers`: two commands from what `dvc repro` made to a video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tasks.__main__ as cf
from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.data import video_reader
from cf_model.model import wan
from cf_model.pipeline import ContextForcingPipeline
from tasks.params import load

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What profile smoke leaves of stage2 and codec, with weights that nobody trained."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes((ROOT / "profiles/smoke.yaml").read_bytes())
    p = load.load_params()
    transformer = wan.build_transformer(p.model, channels=p.codec.linear.channels, text_channels=p.text.channels, seed=0)
    wan.save_transformer(transformer, Path("models/stage2"))
    save_codec(LinearCodec(p.codec.linear.channels, p.codec.linear.width), Path("models/codec"))
    return tmp_path


def export(*words: str) -> None:
    cf.main(["export", "--to", "diffusers", *words])


def test_export_then_generate(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("--model", "models/stage2", "--out", "out/student")
    assert "memory and rollout of stage2 in params.yaml; now `cf video --model out/student" in capsys.readouterr().out
    p, recipe = load.load_params(), ContextForcingPipeline.from_pretrained("out/student").recipe
    assert recipe.memory == p.stage2.memory and recipe.levels == p.stage2.rollout.levels and recipe.flow == p.flow
    assert (recipe.chunk, recipe.fps, recipe.height, recipe.width) == (3, p.video.fps, p.video.height, p.video.width)
    assert "stage `stage2`" in Path("out/student/README.md").read_text() and recipe.licence == "Apache-2.0"
    cf.main(["video", "--model", "out/student", "--prompt", "a red disc", "--seconds", "1", "--out", "a.mp4"])
    assert video_reader.probe_video(Path("a.mp4")).frames == p.video.fps


def test_imported_weights_run_with_a_system_of_a_params_file(project: Path) -> None:
    """The card says where they came from, and their licence is not ours to state."""
    Path("models/stage2").rename("models/theirs")
    Path("models/theirs/import.json").write_text(json.dumps({"source": "theirs.pt", "layout": "Self-Forcing"}))
    Path("params.yaml").rename("other.yaml")
    with pytest.raises(ValueError, match="'theirs' is none of causal_init, stage1, stage2, stage2_without_slow; say with --system"):
        export("--model", "models/theirs", "--params", "other.yaml", "--out", "out")
    export("--model", "models/theirs", "--system", "stage2_without_slow", "--params", "other.yaml", "--out", "out")
    recipe = ContextForcingPipeline.from_pretrained("out").recipe
    assert recipe.memory == load.load_params(Path("other.yaml")).generate.systems["stage2_without_slow"].memory
    assert "imported from theirs.pt (Self-Forcing)" in recipe.made and recipe.licence == "other"


def test_what_can_not_be_exported_is_one_sentence(project: Path) -> None:
    Path("there").mkdir()
    for words, said in (
        (["--model", "models/stage2", "--out", "there"], "--out is there, which is there; name a new folder"),
        (["--model", "models/none", "--out", "out"], "--model is models/none, which holds no transformer"),
        (["--model", "models/stage2", "--codec", "there", "--out", "out"], "there holds no "),
        (["--model", "models/stage2", "--params", "no.yaml", "--out", "out"], "no.yaml isn't there"),
    ):
        with pytest.raises(ValueError, match=said):
            export(*words)
    save_codec(LinearCodec(5, 8), Path("models/five"))
    with pytest.raises(ValueError, match="the codec has 5 channels, but the transformer's in_channels is"):
        export("--model", "models/stage2", "--codec", "models/five", "--out", "out")
    Path("models/codec").rename("models/gone")
    with pytest.raises(ValueError, match="models/codec is not there; run the stage codec, or name a codec's folder with --codec"):
        export("--model", "models/stage2", "--out", "out")
    assert not Path("out").exists()
