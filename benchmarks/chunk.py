"""Seconds of one chunk against the usual cache and the floor: every window, every preset, long videos, many videos at once.

  python -m benchmarks chunk [SECTION ...]     windows, fast_paths, memories, presets, batch, long; writes results/chunk.json

One chunk is four denoising passes and the clean one over 3 latents of 64 tokens, by a model of width 256 with 8 layers and random
weights, in float32 by one thread, when the memory is full. Ours, the usual cache (common/usual_cache.py) and the floor, which are the
matrix products and attentions of the same shapes alone, run in turn in one process (A B C C B A). What is compared is CPU time of the
process, because the machine is shared. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common import chunks
from benchmarks.common.chunks import SMALL, Sizes, repeat, run_floor, run_ours, run_usual
from benchmarks.common.interleave import compare, interleave, summarize
from benchmarks.common.machine import describe_machine, read_result, write_result
from cf_model.codec.interface import SPACE
from cf_model.model.context import build_plain_spec
from cf_model.model.memory import MemorySpec
from tasks.commands.preset import apply_preset
from tasks.params.load import load_params, validate_params
from tasks.params.yaml_file import read_yaml

ROUNDS, COUNT = 6, 2  # runs of each way, chunks of a run
WINDOW_ROUNDS = 12  # where five ways are compared; with 4 the ratio moved by 0.03 from one start to the next
GOALS = {"over_usual": 1.2, "memory_over_window": 1.03, "batch_share": 0.35}


def compare_ways(spec: MemorySpec, *, rounds: int = ROUNDS, batch: int = 1, with_onednn: bool = False) -> dict[str, Any]:
    """Measure ours with one memory, the usual cache of the same number of frames, and the floor.

    `with_onednn`: ours and the usual cache also with oneDNN's products (`cf video --fast onednn`).
    """
    model, size = chunks.build_model(SMALL), spec.size
    sink = spec.sink if spec.sink % SMALL.chunk == 0 else 0
    ways = {
        "ours": repeat(run_ours(model, SMALL, spec, batch=batch), COUNT),
        "usual": repeat(run_usual(model, SMALL, sink=sink, window=size, batch=batch), COUNT),
        "floor": repeat(run_floor(SMALL, attended=size, batch=batch), COUNT),
    }
    if with_onednn:
        ours, usual = chunks.build_onednn_models(SMALL)
        ways["ours_onednn"] = repeat(run_ours(ours, SMALL, spec, batch=batch), COUNT)
        ways["usual_onednn"] = repeat(run_usual(usual, SMALL, sink=sink, window=size, batch=batch), COUNT)
    spent = interleave(ways, rounds=rounds, units=COUNT)
    row = {name: summarize(values) for name, values in spent.items()}
    row |= {"usual_over_ours": compare(spent, "ours", "usual"), "ours_over_floor": compare(spent, "floor", "ours")}
    if with_onednn:
        row["usual_over_ours_onednn"] = compare(spent, "ours_onednn", "usual")
        row["both_onednn"] = compare(spent, "ours_onednn", "usual_onednn")
    return row


def measure_windows() -> Iterator[dict[str, Any]]:
    """Every window at absolute positions, where both make the same video; the largest first."""
    for window in reversed(list(chunks.each_window(SMALL))):
        yield {"window": window} | compare_ways(build_plain_spec(0, window, "absolute"), rounds=WINDOW_ROUNDS, with_onednn=True)


def measure_memories() -> Iterator[dict[str, Any]]:
    """Slow memory and bounded positions against a plain window of the same size, both ours."""
    paper = load_params(ROOT / "profiles/wan-1.3b.yaml").stage2.memory
    plain = build_plain_spec(0, paper.size, "absolute")
    memories = {
        "plain window, packed": replace(plain, positions="packed"),
        "plain window, anchored": replace(plain, positions="anchored"),
        "sink 3, anchored": replace(plain, sink=3, fast=paper.size - 3, positions="anchored"),
        "slow memory, absolute": replace(paper, positions="absolute"),
        "slow memory, anchored (the paper's)": paper,
        "slow memory, decision of each layer": replace(paper, scope="layer"),
    }
    model = chunks.build_model(SMALL)
    ways = {"plain window, absolute": plain} | memories
    # eight chunks a run, because the slow part is put together anew every few chunks
    runs = {name: repeat(run_ours(model, SMALL, spec), 8) for name, spec in ways.items()}
    spent = interleave(runs, rounds=4, units=8)
    for name in ways:
        yield {"memory": name} | summarize(spent[name]) | {"over_plain_window": compare(spent, "plain window, absolute", name)}


def list_preset_memories() -> dict[MemorySpec, list[str]]:
    """Return the memories that all presets generate with (profile wan-1.3b), each with the presets that have it."""
    tree, specs = read_yaml(ROOT / "profiles/wan-1.3b.yaml"), dict[MemorySpec, list[str]]()
    for file in sorted((ROOT / "presets").glob("*.yaml")):
        params = validate_params(apply_preset(tree, file.stem), file)
        system = params.generate.systems[file.stem]
        specs.setdefault(replace(system.memory or getattr(params, system.weights).memory, tau=0.95), []).append(file.stem)
    return specs


def measure_presets() -> Iterator[dict[str, Any]]:
    """Every preset's memory against the usual cache of as many frames."""
    for spec, names in list_preset_memories().items():
        yield {"presets": names, "frames": spec.size} | compare_ways(spec, rounds=4)


def measure_batch() -> Iterator[dict[str, Any]]:
    """Many videos at once against one at a time: the sizes of the comparison with the paper's memory, profile tiny with its own."""
    paper, tiny = (load_params(ROOT / f"profiles/{name}.yaml") for name in ("wan-1.3b", "tiny"))
    small = Sizes(tiny.model, tiny.codec.linear.channels, tiny.video.height // SPACE, tiny.text.tokens, tiny.text.channels)
    for sizes, memory, name in ((small, tiny.stage2.memory, "profile tiny"), (SMALL, paper.stage2.memory, "the comparison")):
        for batch in (4, 32):
            yield {"sizes": name} | share_of_batch(sizes, memory, batch)


def share_of_batch(sizes: Sizes, memory: MemorySpec, batch: int) -> dict[str, Any]:
    """Measure the CPU time a video of many at once over that of one at a time, ours and the floor's."""
    model, found, shares = chunks.build_model(sizes), dict[str, Any](), dict[str, Any]()
    one, many = (run_ours(model, sizes, memory, batch=count) for count in (1, batch))
    floors = [run_floor(sizes, attended=memory.size, batch=count) for count in (1, batch)]
    for share, (alone, together) in {"share": (one, many), "share_of_the_floor": floors}.items():
        spent = interleave({"one": repeat(alone, 4), "many": repeat(together, 1)}, rounds=2)
        per_video = {"one": [value / 4 for value in spent["one"]], "many": [value / batch for value in spent["many"]]}
        found = found or {name: summarize(values) for name, values in per_video.items()}
        shares[share] = compare(per_video, "one", "many")
    return {"videos": batch} | found | shares


def measure_long() -> Iterator[dict[str, Any]]:
    """A chunk after 10, 100 and 1,000 chunks of the same video, with the paper's memory; those before are passed clean.

    At chunk 10 three of the slow part's twelve places are filled, and all of them from chunk 29 on.
    """
    paper, model = load_params(ROOT / "profiles/wan-1.3b.yaml").stage2.memory, chunks.build_model(SMALL)
    runs = {count: run_ours(model, SMALL, paper, chunks_before=count) for count in (10, 100, 1000)}
    spent = interleave({str(count): repeat(run, 8) for count, run in runs.items()}, rounds=4, units=8)
    for count in spent:
        ratios = {f"over_chunk_{base}": compare(spent, str(base), count) for base in (10, 100)}
        yield {"chunks_before": int(count)} | summarize(spent[count]) | ratios


def measure_fast_paths() -> Iterator[dict[str, Any]]:
    """The settings that are worth something on a CPU against none of them: window 21, one chunk a run."""
    spec = build_plain_spec(0, 21, "absolute")
    models = {name: chunks.build_model(SMALL) for name in ("plain", "merged", "compiled")}
    models["onednn"], models["usual, onednn"] = chunks.build_onednn_models(SMALL)
    models["onednn, merged"] = models["onednn"]
    ways = dict[str, Callable[[], object]]()
    for name, model in models.items():
        if name.startswith("usual"):
            continue
        for block in model.transformer.blocks:
            block.is_compiled = "compiled" in name
        make = run_ours(model, SMALL, spec, merged="merged" in name)
        make(2)  # compiles, and leaves a first chunk that is not remembered yet
        ways[name] = repeat(make, 1)
    for name, model in {"usual": models["plain"], "usual, onednn": models["usual, onednn"]}.items():
        ways[name] = repeat(run_usual(model, SMALL, sink=0, window=21), 1)
    spent = interleave(ways, rounds=4)
    for name in spent:
        ratios = {"over_plain": compare(spent, "plain", name), "usual_over": compare(spent, name, "usual")}
        yield {"way": name} | summarize(spent[name]) | ratios


SECTIONS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "windows": measure_windows,
    "fast_paths": measure_fast_paths,
    "memories": measure_memories,
    "presets": measure_presets,
    "batch": measure_batch,
    "long": measure_long,
}


def main() -> None:
    torch.set_num_threads(1)
    result = read_result("chunk")
    for name in sys.argv[1:] or SECTIONS:
        if name not in SECTIONS:
            sys.exit(f"{name} is no section of this benchmark; known are {', '.join(SECTIONS)}")
        rows, machine = [], describe_machine()  # at its beginning: the code that runs is the code that was loaded
        about = {"sizes": str(SMALL), "dtype": "float32", "kernel": "torch SDPA (native)", "goals": GOALS}
        for row in SECTIONS[name]():
            rows.append(row)
            print(name, row, flush=True)
            result = result | about | {name: {"machine": machine, "rows": rows}}
            write_result("chunk", result)  # after every row, because a shared machine may end the run


if __name__ == "__main__":
    main()
