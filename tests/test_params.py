"""Every value is stated, and what is stated wrongly is said in one sentence: key, value, rule, way out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from flows.run import config
from tasks.params import load, schema, yaml_file
from tasks.params.yaml_file import Refused

ROOT = Path(__file__).parent.parent
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
ODE = yaml_file.read_yaml(ROOT / "profiles/tiny.yaml")["causal_init"] | {"method": "ode"}
FREE = ("generate.systems", "generate.continuations")  # the user names what is in them


def leaves(tree: dict[str, Any], at: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield at + name
        if isinstance(value, dict):
            yield from leaves(value, f"{at}{name}.")


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    tree = json.loads(json.dumps(tree))  # and not a deep copy: sections that YAML aliases to one another must part
    *parents, last = key.split(".")
    inner = tree
    for part in parents:
        inner = inner[part]
    del inner[last]
    return tree


def changed(key: str, value: Any) -> dict[str, Any]:
    tree = json.loads(json.dumps(yaml_file.read_yaml(ROOT / "profiles/tiny.yaml")))
    inner = tree
    *parents, last = key.split(".")
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return tree


def refusal(tree: dict[str, Any], folder: Path) -> str:
    file = folder / "params.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    with pytest.raises(Refused) as caught:
        load.load_params(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said.removeprefix(f"{file}: ")


def test_there_are_profiles() -> None:
    assert {"tiny", "smoke", "wan-1.3b"} <= {file.stem for file in PROFILES}


def test_the_run_form_offers_all_profiles_and_no_other() -> None:
    assert set(get_args(config.Profile)) - {"params.yaml"} == {file.stem for file in PROFILES}


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_a_profile_states_every_value(file: Path) -> None:
    stated = yaml_file.read_yaml(file)
    assert load.load_params(file).profile == file.stem
    for key in leaves(stated):
        if key.rpartition(".")[0] not in FREE:
            with pytest.raises(ValidationError) as caught:
                schema.Params.model_validate(without(stated, key))
            assert f"{key} is missing; every value is stated" in load.explain_first_error(caught.value, schema.Params, file)


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_no_section_is_an_alias_of_another(file: Path) -> None:
    """`dvc exp run -S stage2.teacher.context=none` would change stage1 too."""
    assert not re.search(r"[:\[,-]\s*[&*]\w", file.read_text())


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_profiles_have_the_same_keys(file: Path) -> None:
    def names(file: Path) -> list[str]:
        return [key for key in leaves(yaml_file.read_yaml(file)) if not key.startswith(FREE)]

    assert names(file) == names(PROFILES[0])


def test_the_committed_params_are_a_profile() -> None:
    stated = yaml_file.read_yaml(ROOT / "params.yaml")
    assert stated == yaml_file.read_yaml(ROOT / "profiles" / f"{stated['profile']}.yaml")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", -1, ["seed is -1; it must be greater than or equal to 0"]),
        ("seed", "one", ["seed is 'one'; it must be"]),
        ("threads", 0, ["threads is 0; it must be greater than 0"]),
        ("filter.max_clipped", 1.5, ["filter.max_clipped is 1.5; it must be less than or equal to 1"]),
        ("base.steps", 2.5, ["base.steps is 2.5; it must be"]),
        ("stage2.teacher.context", "nothing", ["stage2.teacher.context is 'nothing'; it must be 'none', "]),
        ("stage2.memory.fast", 0, ["stage2.memory.", "fast"]),
        ("stage2.memory", 3, ["stage2.memory is 3; it must be"]),
        ("stage1.student_optimizer.lr", 0, ["stage1.student_optimizer.lr is 0"]),
        ("model", None, ["model is None; it must be"]),
        ("tracking.wandb", {"mode": "off"}, ["it must be 'off', 'offline' or 'online'"]),
        ("seed", {"first": 1}, ["seed is a section of 1 key; it must be"]),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(key: str, value: Any, words: list[str], tmp_path: Path) -> None:
    said = refusal(changed(key, value), tmp_path)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sede", "did you mean seed?"),
        ("base.step", "did you mean base.steps?"),
        ("stage2.memory.sinks", "did you mean stage2.memory.sink?"),
        ("stage2.horizon.longst", "did you mean stage2.horizon.longest?"),
        ("tracking.xxxx", "known there: wandb, project"),
    ],
)
def test_an_unknown_key_gets_its_nearest_neighbour(key: str, hint: str, tmp_path: Path) -> None:
    assert refusal(changed(key, 1), tmp_path) == f"{key} is not a parameter; {hint}"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("codec.kind", "wan", "codec.weights is null, but codec.kind is wan; name a folder"),
        ("text.kind", "umt5", "text.weights is null, but text.kind is umt5; name a folder"),
        ("base.init", "wan", "base.weights is null, but base.init is wan; name a folder"),
        ("base.weights", "some/folder", "base.weights is some/folder, but base.init is scratch"),
        ("stage2.teacher.context", "contiguous", "the teacher was trained on memory; use that, or none, or say that it is meant with"),
        ("stage2.rollout.window", 18, "stage2.rollout.window is 18, but the teacher was trained on targets of 21; use the same"),
        ("stage2.horizon.longest", 123, "stage2.horizon.longest is 123, whose last target begins at 102, but the teacher's begin at 100"),
        ("causal_init", ODE | {"frames": 24, "longest": 63}, "frames is 24, but base.window is 21, and by method ode the base model makes"),
        ("causal_init.ode.keep", [0, 16], "causal_init.ode.keep is [0, 16]; name steps in rising order, from 0 to 15"),
        ("causal_init.ode.context", "own", "causal_init.ode.context is 'own'; it must be 'noisy' or 'clean'"),
        ("teacher.view.context_pass", "own", "generate's teacher_fast has view.context_pass joint, but teacher.view.context_pass is own"),
        ("stage1.teacher.guidance_passes", "both", "stage1.teacher.guidance_passes is 'both'; it must be 'apart' or 'together'"),
        ("teacher.weight", "wan", "teacher.weight is 'wan'; it must be 'uniform' or 'bell'"),
        ("stage2.memory.fill", "early_raw", "when is evict; use when: enqueue"),
        ("stage1.rollout.persist", "stream", "place is last and skip_first 0, but persist is stream"),
        ("stage2.rollout.cache_noise", -0.1, "stage2.rollout.cache_noise is -0.1, but it is a standard deviation; use 0 or more"),
        ("stage2.rollout.skip_first", 7, "use 0 <= skip_first <= full_first"),
        ("stage2.horizon.mode", "exponential", "stage2.horizon.mode is 'exponential'; it must be 'linear', 'exp' or 'const'"),
        ("model.head_dim", 31, "model.head_dim is 31, but RoPE turns pairs of channels along three axes; use an even number of 6 or more"),
        ("model.freq", 63, "model.freq is 63, but each frequency has a cosine and a sine; use an even number"),
        ("compute.attention", "flash2", "compute.attention is flash2, which computes in bfloat16, but dtype is float32"),
        ("compute.attention", "flash", "compute.attention is 'flash'; it must be 'auto', 'native', 'cudnn', 'flash2' or 'flash3'"),
    ],
)
def test_settings_that_contradict_each_other(key: str, value: Any, words: str, tmp_path: Path) -> None:
    said = refusal(changed(key, value), tmp_path)
    assert words in said, said


def test_one_latent_frame_less_than_the_paper_needs_is_refused_with_what_would_do(tmp_path: Path) -> None:
    """wan-1.3b's teacher sees 99 frames, where the last target of 120 begins; with 98 it is told what to change, and that is enough."""
    tree = yaml_file.read_yaml(ROOT / "profiles/wan-1.3b.yaml")
    assert tree["teacher"]["longest"] == tree["stage2"]["horizon"]["longest"] - tree["stage2"]["rollout"]["window"] == 99
    tree["teacher"]["longest"] = 98
    said = refusal(tree, tmp_path)
    assert said.startswith("stage2.horizon.longest is 120, whose last target begins at 99, but the teacher's begin at 98 at most;")
    assert "whole chunks up to 119, a teacher trained with a higher teacher.longest, or stage2.teacher.context: none" in said
    tree["stage2"]["horizon"]["longest"] = 117
    (tmp_path / "params.yaml").write_text(json.dumps(tree))
    load.load_params(tmp_path / "params.yaml")


def test_flash_attention_is_refused_for_batches_whose_videos_decide(tmp_path: Path) -> None:
    """Before any training, not in the step in which two videos first differ."""
    tree = yaml_file.read_yaml(ROOT / "profiles/wan-1.3b.yaml")
    tree["compute"]["attention"] = "flash3"
    (tmp_path / "params.yaml").write_text(json.dumps(tree))
    load.load_params(tmp_path / "params.yaml")  # one video at once everywhere
    tree["generate"]["batch"] = 2
    assert "remember different frames, but generate.batch is 2; use generate.batch: 1, or attention: native" in refusal(tree, tmp_path)
    tree["generate"]["batch"], tree["engine"]["micro_batch"] = 1, None
    said = "compute.attention is flash3, which can't be told that the videos of a batch remember different frames, but "
    assert refusal(tree, tmp_path).startswith(said + "engine.micro_batch is None and causal_init.batch 64; use engine.micro_batch: 1")
    for stage in ("causal_init", "stage1", "stage2"):
        tree[stage]["memory"]["promote"] = "uniform"  # all videos alike
    (tmp_path / "params.yaml").write_text(json.dumps(tree))
    load.load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("value", ["some.json", "data", "two words.txt", "clips.jsonl"])
def test_prompts_are_captions_or_a_file_of_prompts(value: str, tmp_path: Path) -> None:
    said = refusal(changed("start.prompts", value), tmp_path)
    assert re.match(r"start(\.|: )prompts is ", said)
    assert ("which dvc.yaml puts into a command" if " " in value else "which is neither captions nor a file of prompts; use data/") in said
    (tmp_path / "params.yaml").write_text(json.dumps(changed("start.prompts", "prompts/vidprom.csv")))
    assert load.load_params(tmp_path / "params.yaml").start.prompts == Path("prompts/vidprom.csv")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cron", "at two", "nightly.cron is 'at two': not five fields of digits, letters and * / , -; write minute, hour"),
        ("cron", "99 2 * * *", "nightly.cron is '99 2 * * *': bad minute; write minute, hour"),
        ("cron", "0 2 31 2 *", "nightly.cron is '0 2 31 2 *': bad day-of-month; write minute, hour"),
        ("timezone", "Mars/Olympus", "nightly.timezone is 'Mars/Olympus', unknown to this system"),
        ("branch", "a..b", "nightly.branch is 'a..b'; use letters"),
        ("branch", "-f", "nightly.branch is '-f'; use letters"),
        ("weekly", "someday", "nightly.weekly is 'someday'; it must be 'monday', "),
        ("rules", [{"metric": "a", "better": "higher", "margin": -1.0, "bound": None}], "nightly.rules has no margin of 0 or more"),
        ("seeds", [], "nightly.seeds is []; it must "),
        ("inbox", "new", "nightly.inbox is new, but clips.folder is None; name a folder of the project"),
        (
            "prompts_file",
            "data/prompts/heldout.txt",
            "nightly.prompts_file is data/prompts/heldout.txt, but start.prompts is",
        ),
    ],
)
def test_what_every_night_does_is_checked_by_day(key: str, value: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(changed(f"nightly.{key}", value), tmp_path)


def test_dvc_is_told_where_clips_come_from(tmp_path: Path) -> None:
    tree = changed("clips.source", "folder")
    tree["clips"]["folder"] = "raw"
    assert "but clips.source is folder and clips.folder raw; set start.clips to raw" in refusal(tree, tmp_path)
    assert "but clips.source is worlds; set start.clips to cf_model" in refusal(changed("start.clips", "raw"), tmp_path)
    tree["start"]["clips"] = "raw"
    (tmp_path / "params.yaml").write_text(json.dumps(tree))
    assert load.load_params(tmp_path / "params.yaml").start.clips == Path("raw")


def test_several_errors_are_one_sentence(tmp_path: Path) -> None:
    tree = changed("seed", -1)
    tree["threads"] = 0
    assert refusal(tree, tmp_path).endswith("(1 more after this one)")


def test_numbers_and_words_are_what_dvc_reads(tmp_path: Path) -> None:
    """PyYAML would make text of 2e-6 and False of off; DVC, which writes `dvc exp run -S` values, does neither."""
    file = tmp_path / "some.yaml"
    file.write_text("a: 2e-6\nb: 2.0e-06\nc: off\nd: 1e3\n")
    assert yaml_file.read_yaml(file) == {"a": 2e-6, "b": 2e-6, "c": "off", "d": 1000.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: a is stated a second time"),
        ("a: [1\nb: 2\n", "line 2 is not YAML"),
        ("- 1\n", "holds no keys"),
        ("", "holds no keys"),
    ],
)
def test_a_file_that_is_not_parameters(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(Refused) as caught:
        yaml_file.read_yaml(file)
    assert words in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cf profile use tiny"):
        yaml_file.read_yaml(tmp_path / "params.yaml")
