"""infra/Dockerfile, read by hadolint and line by line (no engine builds it here), and its entrypoint, which really runs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/Dockerfile"
ENTRYPOINT = ROOT / "infra/entrypoint.sh"


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, with continued lines joined. What stands before the first FROM is stage "" ."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            found[stage] = []
        found[stage].append((word, " ".join(rest.split())))
    return found


STAGES = instructions()


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", "--no-fail", "--format", "tty", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert done.stdout + done.stderr == ""


def test_hadolint_would_say_something() -> None:
    done = subprocess.run(["hadolint", "-"], input="FROM debian:latest\nRUN cd /tmp\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "DL3007" in done.stdout


def test_both_targets_stand_on_a_pinned_image() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in STAGES[""] if word == "ARG")
    assert list(STAGES)[1:] == ["cpu", "cuda"]
    for stage in ("cpu", "cuda"):
        [base] = [rest.split()[0] for word, rest in STAGES[stage] if word == "FROM"]
        name, tag = arguments[base.strip("${}")].rsplit(":", 1)
        assert name and re.match(r"\d+\.\d+\.\d+-", tag), "a tag with three numbers"
    assert "devel" in arguments["CUDA_IMAGE"], "flash-attn is compiled"


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_runs_as_nobody_in_particular(stage: str) -> None:
    words = [word for word, _ in STAGES[stage]]
    users = [rest for word, rest in STAGES[stage] if word == "USER"]
    assert users == ["1000:1000"], "by number: Kubernetes' runAsNonRoot can't read names"
    assert "RUN" not in words[words.index("USER") :] and "COPY" not in words[words.index("USER") :]
    assert ("ENTRYPOINT", '["in-checkout"]') in STAGES[stage]
    assert not any(word == "ADD" for word in words)


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_holds_no_secret_and_nothing_of_the_project_but_its_requirements(stage: str) -> None:
    copied = [rest for word, rest in STAGES[stage] if word == "COPY"]
    assert copied == ["requirements/ /opt/requirements/", "--chmod=0755 infra/entrypoint.sh /usr/local/bin/in-checkout"]
    assert (ROOT / "infra/Dockerfile.dockerignore").read_text().split() == ["*", "!requirements/", "!infra/entrypoint.sh"]
    named = [rest for word, rest in STAGES[stage] if word in ("ENV", "ARG")]
    assert not re.search(r"(?i)secret|password|token|api_?key", " ".join(named))


def pinned(name: str) -> dict[str, str]:
    """Package -> version, with what the file includes; anything else in it fails."""
    found: dict[str, str] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= pinned(line[3:])
        elif line:
            package, equals, version = line.partition("==")
            assert equals and version, f"{name}: {line} is not pinned"
            found[package.lower()] = version
    return found


@pytest.mark.parametrize(("stage", "needed"), [("cpu", ["prefect-docker", "dvc-s3"]), ("cuda", ["flash-attn", "deepspeed", "dvc-s3"])])
def test_what_is_installed_is_pinned(stage: str, needed: list[str]) -> None:
    commands = " ".join(rest for word, rest in STAGES[stage] if word == "RUN")
    files = re.findall(r"--requirement /opt/requirements/(\S+)", commands)
    assert len(re.findall(r"pip install", commands)) == len(files), "nothing is installed by name"
    known: dict[str, str] = {}
    for file in files:
        known |= pinned(file)
    assert set(needed) <= set(known)


def test_flash_attn_is_built_here_and_finds_what_its_setup_imports() -> None:
    """Without isolation, so all of that must be there before it; and not taken from GitHub, where its setup.py looks first."""
    [*before, last] = [rest for word, rest in STAGES["cuda"] if word == "RUN" and "pip install" in rest]
    there: dict[str, str] = {}
    for file in re.findall(r"--requirement /opt/requirements/(\S+)", " ".join(before)):
        there |= pinned(file)
    assert {"torch", "setuptools", "wheel", "packaging", "psutil", "ninja"} <= set(there)
    assert "flash-attn" not in there and "flash-attn" in pinned("gpu.txt")
    assert last.startswith("FLASH_ATTENTION_FORCE_BUILD=TRUE ") and "--no-build-isolation" in last


# ----------------------------------------------------------------------------------------------------------- entrypoint


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    for words in (["init", "--quiet", "--initial-branch", "main"], ["add", "."], ["commit", "--quiet", "--message", "."]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *words], cwd=folder, check=True)
    return folder


def enter(tmp_path: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **env}
    return subprocess.run([str(ENTRYPOINT), *command], env=whole, cwd=tmp_path, capture_output=True, text=True, timeout=60)


def test_a_container_works_in_a_checkout_of_its_own(tmp_path: Path, repository: Path) -> None:
    done = enter(tmp_path, "sh", "-c", "pwd; git rev-parse --abbrev-ref HEAD; echo $PYTHONPATH", CF_REPOSITORY=str(repository))
    home = str(tmp_path / "context-forcing")
    assert done.stdout.split() == [home, "main", home], done.stderr
    (tmp_path / "context-forcing/work").write_text("a checkpoint")
    again = enter(tmp_path, "cat", "work")
    assert again.stdout == "a checkpoint", "started again, it goes on with what is there, and needs no repository"


def test_a_container_that_starts_again_takes_what_was_committed_since(tmp_path: Path, repository: Path) -> None:
    def committed(text: str) -> None:
        (repository / "dvc.yaml").write_text(text)
        names = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", *names, "commit", "--quiet", "--all", "--message", text], cwd=repository, check=True)

    def found() -> tuple[str, str]:
        done = enter(tmp_path, "cat", "dvc.yaml", CF_REPOSITORY=str(repository))
        assert done.returncode == 0
        return done.stdout, done.stderr

    assert found() == ("stages: {}\n", "")
    committed("the second")
    assert found() == ("the second", "")
    checkout = tmp_path / "context-forcing"
    (checkout / "dvc.yaml").write_text("by hand")
    committed("the third")
    text, said = found()
    assert text == "by hand" and "has changes, so it stays at " in said
    subprocess.run(["git", "checkout", "--quiet", "dvc.yaml"], cwd=checkout, check=True)
    repository.rename(tmp_path / "away")
    text, said = found()
    assert text == "the second" and "could not be brought up to date, so it stays at " in said
    (tmp_path / "away").rename(repository)
    assert found() == ("the third", "")


def test_what_the_environment_does_not_bring_stands_in_the_volume(tmp_path: Path, repository: Path) -> None:
    """As in a container of Prefect's docker worker."""
    (tmp_path / "cf.env").write_text(f"CF_REPOSITORY='{repository}'\nAWS_SECRET_ACCESS_KEY='a b$c'\n")
    done = enter(tmp_path, "sh", "-c", 'cat dvc.yaml; echo "$AWS_SECRET_ACCESS_KEY"')
    assert done.stdout == "stages: {}\na b$c\n", done.stderr


def test_a_clone_that_was_cut_off_is_made_again(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "context-forcing.partial/.git").mkdir(parents=True)
    done = enter(tmp_path, "cat", "dvc.yaml", CF_REPOSITORY=str(repository))
    assert done.stdout == "stages: {}\n", done.stderr


LEAKY = ("https://user:hush@127.0.0.1:9/a.git", "https://hush@127.0.0.1:9/a.git", "http://:hush@127.0.0.1:9", "ssh://me:hush@127.0.0.1:9/a")


@pytest.mark.parametrize("url", ["ssh://git@127.0.0.1:9/a@b.git", "git@127.0.0.1:lab/a.git", "https://127.0.0.1:9/a:b@c.git", "/srv/a@b"])
def test_an_address_without_a_password_is_tried(tmp_path: Path, url: str) -> None:
    done = enter(tmp_path, "true", CF_REPOSITORY=url, GIT_SSH_COMMAND="false")
    assert done.returncode == 128 and "credentials" not in done.stderr, "git's own failure: nobody is there"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "CF_REPOSITORY: is not set"),
        ({"CF_REPOSITORY": "--upload-pack=touch planted"}, "begins with a dash"),
        ({"CF_REPOSITORY": "origin", "CF_BRANCH": "-b"}, "no name of a branch"),
        ({"CF_REPOSITORY": "origin", "CF_BRANCH": "main; touch planted"}, "no name of a branch"),
        *(({"CF_REPOSITORY": url}, "CF_REPOSITORY holds credentials") for url in LEAKY),
        ({"CF_REPOSITORY": "ext::sh -c touch% planted"}, "not allowed"),
    ],
    ids=str,
)
def test_what_is_no_repository(tmp_path: Path, repository: Path, env: dict[str, str], said: str) -> None:
    done = enter(tmp_path, "true", **env)
    assert done.returncode != 0 and said in done.stderr and "hush" not in done.stderr
    assert not list(tmp_path.rglob("planted"))
