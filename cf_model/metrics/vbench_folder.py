"""A folder of videos in VBench's own naming, `PROMPT-INDEX.mp4`, and the results that its official script writes.

VBench runs in an environment of its own, because it pins transformers 4.33 and numpy 1. Files go in, a JSON file comes out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

LONGEST = 255  # bytes of a file name
PERCENT = ("imaging_quality",)  # dimensions that VBench's script gives in 0..100 for single videos
PROTOCOL = "vbench/official"
# VBench's script and its libraries get these of our environment, and none of its secrets
HANDED_ON = ("PATH", "HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE", "VBENCH_CACHE_DIR", "TMPDIR", "LANG")


def name_video(prompt: str, number: int, index: int) -> str:
    """Return VBench's name for the `index`-th video of a prompt; `number` stands for a prompt that can be no file name.

    Such are prompts with a slash or a control character, those that begin or end with a dot or space, and those above 255 bytes.
    MovieGen's are up to 845 bytes.
    """
    name = f"{prompt}-{index}.mp4"
    usable = prompt.strip(". ") == prompt != "" and "/" not in prompt and prompt.isprintable() and len(name.encode()) <= LONGEST
    return name if usable else f"{number:04d}-{index}.mp4"


def name_videos(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Name the videos of a manifest: {file: (name in VBench's folder, prompt)}; ValueError for a row without a prompt."""
    numbers: dict[str, int] = {}
    counts: dict[str, int] = {}
    out: dict[str, tuple[str, str]] = {}
    for row in rows:
        prompt = row.get("prompt")
        if not prompt:
            raise ValueError(f"{row['file']} has no prompt, and VBench names videos by their prompts; add it to the manifest")
        number = numbers.setdefault(prompt, len(numbers))
        index = counts.get(prompt, 0)
        counts[prompt] = index + 1
        out[row["file"]] = name_video(prompt, number, index), prompt
    taken = [name for name, _ in out.values()]
    if doubled := sorted({name for name in taken if taken.count(name) > 1}):
        raise ValueError(f"two videos would both be called {doubled[0]}; change the prompt that is a number")
    return out


def read_results(results: Mapping[str, Sequence[Any]], names: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Turn the script's results, {dimension: [mean, [{video_path, video_results}]]}, into cells of our own names.

    ValueError if they are of another form, or of a video that was not handed in.
    """
    files = {name: file for file, (name, _) in names.items()}
    cells = []
    for dimension, entry in results.items():
        try:
            rows = [(PurePosixPath(row["video_path"]).name, float(row["video_results"])) for row in entry[1]]
        except (TypeError, LookupError, ValueError):
            raise ValueError(f"VBench's results of {dimension} are not a mean and a list of videos; check its version") from None
        if unknown := [name for name, _ in rows if name not in files]:
            raise ValueError(f"VBench's results of {dimension} are of {unknown[0]}, which was not handed in; empty its output folder")
        scale = 0.01 if dimension in PERCENT else 1.0
        cells += [{"file": files[name], "protocol": PROTOCOL, "metric": dimension, "value": value * scale} for name, value in rows]
    return cells


def run_script(out: Path, python: Path, checkout: Path, dimensions: list[str]) -> Path:
    """Run VBench's script on the folder and return the file of its results; ValueError with its last line if it fails."""
    words = ["--videos_path", out / "videos", "--prompt_file", out / "prompts.json", "--output_path", out / "results"]
    command = [python, "evaluate.py", "--mode", "custom_input", *words, "--dimension", *dimensions]
    environment = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    done = subprocess.run(
        [str(word) for word in command], cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    found = sorted((out / "results").glob("*_eval_results.json"))
    if done.returncode or not found:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it wrote no results")
        raise ValueError(f"VBench's script ended with code {done.returncode}: {last[:200]}; its folder is {out}, to run it by hand")
    return found[-1]
