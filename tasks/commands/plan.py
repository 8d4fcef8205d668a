"""`cf plan`: what each training stage needs in memory, operations, hours and disk, before anything is started.

All of it is arithmetic on params.yaml (cf_model/plan/); nothing is loaded and no GPU is needed. A training stage asks here before it
starts, and is refused if it can't fit.
"""

import json
import os
from pathlib import Path

from cf_model.data.video_folder import VideoFolder
from cf_model.plan import hardware
from cf_model.plan.forecast import forecast_stages, format_plan, refuse_unfit
from tasks.files.options import parse_options
from tasks.files.settings import read_settings
from tasks.files.videos import VIDEO_SUFFIXES
from tasks.params.load import load_params
from tasks.params.schema import Params
from tasks.params.yaml_file import Refused, refuse_errors


def count_clips(p: Params) -> int:
    """Return how many clips there are before the filter: those to be rendered or fetched, or the videos in the user's folder."""
    if p.clips.source not in ("folder", "table"):
        return p.clips.count
    return sum(1 for _ in VideoFolder(p.clips.folder, VIDEO_SUFFIXES).videos) if p.clips.folder else 0


def refuse_unfit_stage(p: Params, stage: str, out: Path, work: Path) -> None:
    """Raise Refused before a training stage begins that can't end here; CF_IGNORE_PLAN=1 skips this."""
    if not read_settings().ignore_plan:
        ranks = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        with refuse_errors("; CF_IGNORE_PLAN=1 starts it all the same"):
            refuse_unfit(p, stage, out, work, ranks)


def main(argv: list[str]) -> None:
    args = parse_options("plan", argv, __doc__)
    if args.gpus is not None and args.gpus < 0:
        raise Refused(f"--gpus is {args.gpus}; use 0 for the CPU, or 1 and more")
    if not 0 < args.utilisation <= 1:
        raise Refused(f"--utilisation is {args.utilisation}; it is a share of the peak: use a value above 0 and at most 1")
    for name in ("gpu_memory", "tflops"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise Refused(f"--{name.replace('_', '-')} is {value}; use a value above 0")
    p = load_params(args.params)
    machine = hardware.describe_hardware(args.gpus, args.gpu_memory, args.tflops, args.utilisation)
    if args.json:
        print(json.dumps({"profile": p.profile, "hardware": machine.description, "stages": forecast_stages(p, machine)}, indent=1))
    else:
        print(format_plan(p, machine, count_clips(p)))
