"""What the teacher was trained on and what stage 2 shows it: the same, or nothing, or said to be meant."""

import dataclasses

import pytest

from cf_model.model.view import TeacherView
from cf_model.train.layout import TeacherLayout, read_agreed_view

VIEW = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma="shared", context_pass="joint")
TRAINED = TeacherLayout(VIEW, target=21, longest=99)


def shown(target=21, longest=99, **changes):
    return TeacherLayout(dataclasses.replace(VIEW, **changes), target, longest)


@pytest.fixture
def teacher(tmp_path):
    TRAINED.save(tmp_path)
    return tmp_path


def test_the_same_passes_and_so_does_less_of_it(teacher):
    assert read_agreed_view(teacher, shown(), accept=False) == VIEW
    assert read_agreed_view(teacher, shown(longest=21), accept=False) == VIEW


@pytest.mark.parametrize("folder", ["with", "without"])
def test_no_context_always_passes(teacher, folder):
    if folder == "without":
        (teacher / "layout.json").unlink()
    nothing = shown(context="none", target=9, longest=400, sink=0, context_sigma="zero")
    assert read_agreed_view(teacher, nothing, accept=False) == nothing.view


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": "contiguous"}, "stage2.teacher.context is contiguous, but the teacher was trained on sparse; use that, or none"),
        ({"sink": 1}, "teacher.view.sink is 1, but the teacher was trained with 3"),
        ({"slow": 4}, "teacher.view.slow is 4"),
        ({"fast": 9}, "teacher.view.fast is 9"),
        ({"stride": 3}, "teacher.view.stride is 3"),
        ({"context_sigma": "zero"}, "teacher.view.context_sigma is zero, but the teacher was trained with shared"),
        ({"target": 18}, "stage2.rollout.window is 18, but the teacher was trained on targets of 21"),
        ({"longest": 102}, "whose last target begins at 102, but the teacher's begin at 99 at most"),
    ],
)
def test_anything_else_is_refused_by_name(teacher, changes, words):
    with pytest.raises(ValueError, match=words):
        read_agreed_view(teacher, shown(**changes), accept=False)
    if "context" not in changes:  # the one mismatch that a preset can name
        with pytest.raises(ValueError, match=words):
            read_agreed_view(teacher, shown(**changes), accept=True)


def test_a_mismatch_that_is_meant_is_shown_as_stated(teacher):
    assert read_agreed_view(teacher, shown(context="contiguous"), accept=True).context == "contiguous"
    with pytest.raises(ValueError, match=r"teacher\.view\.slow is 4"):
        read_agreed_view(teacher, shown(context="contiguous", slow=4), accept=True)


@pytest.mark.parametrize("text", ["{}", "nothing", '{"view": {"context": "sparse"}, "target": 21, "longest": 99}'])
def test_a_file_that_is_no_layout(teacher, text):
    (teacher / "layout.json").write_text(text)
    with pytest.raises(ValueError, match=r"layout\.json is no layout of a teacher .*; run the stage teacher again"):
        read_agreed_view(teacher, shown(), accept=False)
    (teacher / "layout.json").unlink()
    with pytest.raises(ValueError, match=r"has no layout\.json, which says what context it was trained on; use stage2"):
        read_agreed_view(teacher, shown(), accept=False)


def test_the_pass_that_reads_the_context_is_part_of_it(tmp_path):
    own = dataclasses.replace(VIEW, context_sigma="zero", context_pass="own")
    TeacherLayout(own, target=21, longest=99).save(tmp_path)
    assert read_agreed_view(tmp_path, TeacherLayout(own, 21, 99), accept=False) == own
    joint = dataclasses.replace(own, context_pass="joint")
    with pytest.raises(ValueError, match=r"teacher.view.context_pass is joint, but the teacher was trained with own; use that"):
        read_agreed_view(tmp_path, TeacherLayout(joint, 21, 99), accept=True)
    nothing = TeacherLayout(dataclasses.replace(joint, context="none"), 21, 99)
    assert read_agreed_view(tmp_path, nothing, accept=False) == nothing.view
