"""Deliberate breaks of the method and of its operation, each of which some test must notice.

  python -m tests.breaks [NUMBER ...]       about fifteen minutes of one core; not part of `make test`

Each break is one replacement in a copy of the checkout. Each of its test files must pass there without any break, which is tried once a
file; then they run with the break and must fail. A break whose text is no longer in its file is an error: rewrite the break with the
code. A break that survives asks for a test.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.once import SHARED
from tests.preloaded import python_folder

ROOT = Path(__file__).parent.parent
MEMORY, SLOW, ROLLOUT, FLOW, VIEW = (f"cf_model/model/{name}.py" for name in ("memory", "slow_part", "rollout", "flow", "view"))
DISTILL, STUDENT, ERFT = (f"cf_model/train/{name}.py" for name in ("distill", "student", "erft"))
# file, what stands there once, what stands there then, tests that must notice
BREAKS = [
    (MEMORY, "keepdim=True)) < spec.tau", "keepdim=True)) > spec.tau", "tests/model/test_memory.py"),
    (MEMORY, "similarity.mean(dim=1, keepdim=True)", "similarity.mean(dim=1, keepdim=True)[:1]", "tests/model/test_batch_memory.py"),
    (SLOW, "moved = torch.where(is_full,", "moved = torch.where(~is_full,", "tests/model/test_batch_memory.py"),
    (SLOW, "moved.scatter(-1, place, number), before)", "moved.scatter(-1, place, number), moved)", "tests/model/test_batch_memory.py"),
    ("cf_model/model/store.py", "return keys, values, None if mask is None else mask[..., :used]", "return keys, values, None",
     "tests/model/test_store.py"),
    ("cf_model/model/store.py", "if before is not frame or held[slot][1] is None or held[slot] != was:", "if before is not frame:",
     "tests/model/test_store.py"),
    ("cf_model/model/block.py", "prompt.versions != versions", "False", "tests/model/test_store.py"),
    (MEMORY, "beyond_sink[:1]", "beyond_sink[-1:]", "tests/model/test_memory.py"),
    (MEMORY, "list(range(query[0] - fast, query[0]))", "list(range(query[0] - fast - 1, query[0] - 1))", "tests/model/test_memory.py"),
    (MEMORY, "first = min(self.frame_count, spec.size - frames)", "first = spec.size - frames", "tests/model/test_memory.py"),
    (MEMORY, "split_newest(self.fast + rest, max(spec.fast - length, 0))", "split_newest(self.fast + rest, spec.fast)",
     "tests/model/test_memory.py"),
    (MEMORY, "chunk % self.interval == 0", "chunk % self.interval != 0", "tests/model/test_memory.py"),
    (ROLLOUT, '{"shared": shared,', '{"shared": len(sigmas) - 1,', "tests/model/test_rollout.py tests/train/test_distill.py"),
    (ROLLOUT, "progress = min(1.0, step / self.decay)", "progress = step / self.decay", "tests/model/test_rollout.py"),
    (ROLLOUT, "x_t = add_noise(x_0, draw_gaussian(x_0.shape, rng), x_t.new_full((len(x_t),), sigma))",
     "x_t = add_noise(x_t, draw_gaussian(x_0.shape, rng), x_t.new_full((len(x_t),), sigma))", "tests/model/test_rollout.py"),
    (ROLLOUT, "last = (frames - spec.window) // spec.chunk", "last = (frames - spec.window) // spec.chunk - 1",
     "tests/model/test_rollout.py"),
    (FLOW, "self.shift * u / (1 + (self.shift - 1) * u)", "self.shift * u / (1 + self.shift * u)", "tests/model/test_flow.py"),
    (FLOW, ".clamp(self.sigma_min, self.sigma_max)", "", "tests/train/test_roles.py tests/model/test_flow.py"),
    (FLOW, "return (1 - s) * x_0 + s * noise", "return x_0 + s * noise", "tests/model/test_flow.py"),
    (VIEW, "levels, text)[:, context_frames:]", "levels, text)[:, : x_t.shape[1]]",
     "tests/train/test_context_pass.py tests/train/test_roles.py"),
    (VIEW, "uncond + guidance * (cond - uncond)", "cond + guidance * (cond - uncond)", "tests/train/test_roles.py"),
    (VIEW, "self.fast - self.slow * self.stride)", "self.fast - self.slow * self.stride + 1)", "tests/train/test_distill.py"),
    (DISTILL, "gradient = (fake_x0 - real_x0)", "gradient = (real_x0 - fake_x0)", "tests/train/test_distill.py"),
    (DISTILL, "(x - real_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)", "(x - fake_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)",
     "tests/train/test_distill.py"),
    (DISTILL, "error = (velocity - (noise - x))", "error = (velocity - (x - noise))", "tests/train/test_distill.py"),
    (DISTILL, "x_0 = student(target.x_t, sigma, text, target.memory)", "x_0 = student(target.x_t, sigma, text, generated.memory)",
     "tests/train/test_distill.py"),
    (STUDENT, "return (step + 1) % self.critic_updates == 0", "return step % self.critic_updates == 0",
     "tests/train/test_roles.py tests/test_presets.py"),
    (ERFT, "self.add(sigma, -sigma * residual,", "self.add(sigma, sigma * residual,", "tests/train/test_erft.py"),
    (ERFT, "target = bad_noise - x", "target = bad_noise - bad_x", "tests/train/test_erft.py"),
    ("cf_model/train/trainer/ema.py", "mean.lerp_(raw, 1 - decay)", "mean.lerp_(raw, decay)", "tests/train/test_ema.py"),
    ("cf_model/model/weights.py", 'torch.bfloat16 if device.type == "cuda" and', 'torch.bfloat16 if device.type == "cpu" or',
     "tests/train/test_muon.py"),
    ("cf_model/evaluate/report.py", "autoescape=True", "autoescape=False", "tests/evaluate/test_report.py"),
    ("cf_model/data/subprocess_reader.py", "elif time.monotonic() > self.deadline:", "elif False:", "tests/data/test_apart.py"),
    ("flows/night/gate.py", "and gain < rule.margin:", "and gain < -rule.margin - 1:", "tests/flows/test_gate.py"),
    ("flows/project/registry.py", "else past[first - 1]", "else past[-2]", "tests/flows/test_registry.py"),
    ("flows/project/dvc_lock.py", "return None if md5 == recorded else", "return None if md5 else",
     "tests/flows/test_registry.py tests/flows/test_judging.py"),
]  # fmt: skip


def run_break(number: int, copy: Path) -> str:
    """Break the copy, run the tests, mend the copy; return "caught", "SURVIVED", or what is wrong with the break or its tests."""
    name, text, broken, tests = BREAKS[number]
    file = copy / name
    source = file.read_text()
    if source.count(text) != 1:
        return f"NOT THERE: {text!r} stands {source.count(text)} times in {name}"
    if failing := [said for test in tests.split() if (said := fail_unbroken(test, copy))]:
        return f"NOT TRIED: without any break, {failing[0]}"
    file.write_text(source.replace(text, broken))
    done = run_tests(copy, tests.split())
    file.write_text(source)
    if done.returncode not in (0, 1):
        return f"NOT RUN: {(done.stdout + done.stderr)[-300:]}"
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    return f"caught by {failed.split(' - ')[0].removeprefix('FAILED ')}" if done.returncode else "SURVIVED"


@functools.cache
def fail_unbroken(test: str, copy: Path) -> str:
    """Run a test file in the copy as it is; return what is wrong, or nothing."""
    done = run_tests(copy, [test])
    return f"{test} ends with {done.returncode}: {(done.stdout + done.stderr)[-300:]}" if done.returncode else ""


def run_tests(copy: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Run them by a python that has torch loaded; what they make for each other, a broken copy must not find."""
    words = [python_folder() / "python", "-m", "pytest", "-x", "-q", "-rfE", "-n0", "-p", "no:cacheprovider", *tests]
    environment = {key: value for key, value in os.environ.items() if key != SHARED}
    return subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)


def main(argv: list[str]) -> None:
    numbers = [int(word) for word in argv] or list(range(len(BREAKS)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        made_by_runs = (".venv", ".git", ".dvc", "data", "models", "samples", "work", "runtime", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=lambda at, names: [n for n in names if n in made_by_runs and (Path(at) == ROOT or n[0] == "_")])
        results = {}
        for number in numbers:
            began = time.monotonic()
            results[number] = run_break(number, copy)
            print(f"{number:2} {BREAKS[number][0]}: {results[number]} ({time.monotonic() - began:.0f} s)", flush=True)
    caught = sum(result.startswith("caught") for result in results.values())
    print(f"{caught} of {len(results)} breaks were caught")
    sys.exit(caught != len(results))


if __name__ == "__main__":
    main(sys.argv[1:])
