"""`cf STAGE`: the options of a stage, and its run in one process or, for a training stage, in several that torchrun starts.

These ranks are one for each GPU, or CF_RANKS of them on each machine. `cf stage2` is then the launcher and waits. Rank 0 runs the
stage as a single process would (tasks/runner/execute.py); the other ranks compute their share of each batch and write nothing. Their
number is no parameter, because it changes results by rounding alone. Several machines meet by torchrun's own variables: PET_NNODES,
PET_RDZV_BACKEND=c10d and PET_RDZV_ENDPOINT=HOST:PORT on each.
"""

import argparse
import importlib
import inspect
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cf_model.train.trainer.ranks import join_ranks
from tasks.files.atomic import write_atomically
from tasks.files.settings import read_settings
from tasks.params.project import Project
from tasks.params.yaml_file import Refused
from tasks.wandb_log.lineage import name_pipeline_run

from .execute import WORK, execute, seed_generators, stop_on_sigterm
from .process import BEGAN, resume_collection
from .track import Progress, Track

TRAINING_STAGES = ("base", "teacher", "causal_init", "stage1", "stage2")
SAVING_SECONDS = 24 * 3600  # that ranks may take to end their step and save it after SIGTERM; torchrun's own limit is 30


def run_stage(stage: str, argv: list[str], project: Project) -> None:
    """Run a stage. With several ranks this process only starts them, after it has validated options and parameters."""
    run = importlib.import_module(f"tasks.{stage}").run
    paths = vars(build_parser(stage, run, project).parse_args(argv))
    del paths["params"]  # which `project` has read
    refuse_missing_inputs(stage, paths)
    rank, params = get_rank(), project.params
    if rank is None and (count := count_ranks(stage, project.tree)) * count_nodes() > 1:
        sys.exit(launch_ranks(stage, count))
    store = None if rank is None else join_ranks()
    if rank and store:
        run_follower(stage, run, paths, params, store)
        return
    if stage in TRAINING_STAGES:
        from tasks.commands.plan import refuse_unfit_stage  # here, because other stages need none of its imports

        refuse_unfit_stage(params, stage, paths["out"], WORK / stage)
    announce = None if store is None else lambda work: store.set("work", str(work))
    execute(stage, run, paths, project, began=BEGAN, announce=announce)


def refuse_missing_inputs(stage: str, paths: Mapping[str, Any]) -> None:
    """Refuse a stage before its first step if something that it reads is not there, because some inputs are opened only at its end."""
    for name, path in paths.items():
        if name != "out" and path is not None and not path.exists():
            way = f"`cf repro {stage}` makes first what {stage} needs"
            raise Refused(f"--{name.replace('_', '-')} is {path}, which is not there; {way}")


def build_parser(stage: str, run: Callable[..., Any], project: Project) -> argparse.ArgumentParser:
    """Build a parser with an option for each keyword-only parameter of `run`: a path, required unless the parameter has a default."""
    entry = project.stages.get(stage)
    epilog = f"in dvc.yaml:\n  {' '.join(entry['cmd'].split())}" if entry else None
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"cf {stage}", description=inspect.getdoc(run), epilog=epilog, formatter_class=form)
    for name, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        text = default and f"default: {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=required, default=default, help=text)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    return parser


def count_ranks(stage: str, tree: Mapping[str, Any]) -> int:
    """Return how many processes this machine should have for the stage, by its GPUs and CF_RANKS; 1 for a stage that does not train."""
    visible, stated = os.environ.get("CUDA_VISIBLE_DEVICES"), read_settings().ranks
    devices = list(Path("/dev").glob("nvidia[0-9]*")) if visible is None else visible.split(",")
    gpus = sum(str(device).strip() not in ("", "-1") for device in devices)
    if stated and 1 <= gpus < stated:
        raise Refused(f"CF_RANKS is {stated}, but there are {gpus} GPUs; use at most that, or the CPU by CUDA_VISIBLE_DEVICES=''")
    if stage not in TRAINING_STAGES or (stage == "base" and tree.get("base", {}).get("init") == "wan"):
        return 1
    return stated or max(gpus, 1)


def count_nodes() -> int:
    """Return how many machines share the stage, by torchrun's variable PET_NNODES (`2`, or `1:4`)."""
    return int(os.environ.get("PET_NNODES", "1").split(":")[-1])


def launch_ranks(stage: str, count: int) -> int:
    """Run this command in `count` ranks on this machine; return the exit code of the stage, 143 after SIGTERM.

    When a rank fails, torchrun ends the others, and the cause is printed as one sentence.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what happened is said in our own sentence
    # Each rank has a process group of its own, by which name_pipeline_run() would name each stage's run in W&B anew.
    os.environ.setdefault("CF_RUN", name_pipeline_run(WORK))
    # DeepSpeed calls torch by deprecated names, which warn at every call.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    with tempfile.TemporaryDirectory(prefix="cf-ranks-") as folder:
        words = [*_torchrun_options(count, folder), "--no-python", sys.executable, *sys.orig_argv[1:]]
        config, program, arguments = config_from_args(get_args_parser().parse_args(words))
        try:
            elastic_launch(config, program)(*arguments)
        except SignalException as error:
            reports = sorted(Path(folder).rglob("error.json"), key=lambda report: report.stat().st_mtime_ns)
            if not reports:
                return 128 + error.sigval
            # A rank could not save: on a full disk, for example.
            print(f"cf {stage}: {json.loads(reports[0].read_text())['message']}", file=sys.stderr)
            return 1
        except ChildFailedError as error:
            rank, failure = _find_root_cause(error.failures)
            if failure.exitcode != 143:  # the rank was asked to stop, and has saved
                print(f"cf {stage}: rank {rank} of {count * count_nodes()} {_describe_end(failure, Path(folder))}", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        return 0


def _torchrun_options(count: int, folder: str) -> list[str]:
    options = {"nproc-per-node": count, "max-restarts": 0, "monitor-interval": 0.05, "shutdown-timeout": SAVING_SECONDS, "log-dir": folder}
    options["redirects"] = ",".join(f"{rank}:2" for rank in range(1, count)) or "0"  # stderr of all ranks but the first goes to files
    if count_nodes() == 1:  # the ranks meet on this machine's own address
        options |= {"rdzv-backend": "c10d", "rdzv-endpoint": "localhost:0", "rdzv-id": uuid.uuid4().hex, "local-addr": "localhost"}
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return [f"--{name}={value}" for name, value in options.items()]


def _find_root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Find the rank that failed first, because the others fail for want of it.

    A rank that was killed leaves no report, and the others report within a second that it is gone. SIGTERM is torchrun's own
    way to end the others. Among ranks that left a report the oldest is the cause.
    """
    reports = sorted((f for f in failures.values() if os.path.exists(f.error_file)), key=lambda f: os.stat(f.error_file).st_mtime_ns)
    last = reports[0].timestamp + 1 if reports else time.time()
    killed = [f for f in failures.values() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM and f.timestamp <= last]
    cause = next(iter([*killed, *reports, *failures.values()]))
    return next(rank for rank, failure in failures.items() if failure is cause), cause


def _describe_end(failure: ProcessFailure, logs: Path) -> str:
    """Say how a rank ended; without a report, with the last lines of its stderr."""
    if os.path.exists(failure.error_file):
        return f"stopped: {failure.message.strip()}"
    lines = [line for file in logs.rglob(f"{failure.local_rank}/stderr.log") for line in file.read_text().splitlines()[-20:]]
    output = "".join(f"\n  {line}" for line in lines)
    if failure.exitcode > 0:
        return f"ended with code {failure.exitcode}{output}"
    name = signal.Signals(-failure.exitcode).name
    hint = " (the machine may be out of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}; the last checkpoint is intact, the same command goes on from there{output}"


def get_rank() -> int | None:
    """Return the rank of this process among all machines; None in a process that torchrun did not start."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def report_failure(message: str, code: int) -> None:
    """Leave the cause of this rank's end to the launcher, and exit at once, because the other ranks wait for this one."""
    report = {"message": message, "timestamp": int(time.time())}
    write_atomically(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), json.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_follower(stage: str, run: Callable[..., Any], paths: Mapping[str, Any], params: Any, store: Store) -> None:
    """Run the stage in a rank other than the first: the same steps, nothing written. Rank 0 announces the working folder."""
    seed_generators(params)
    while not store.check(["work"]):
        time.sleep(0.05)
    track = Follower(stage, Path(store.get("work").decode()))
    resume_collection()
    with stop_on_sigterm(track):
        run(params, track, **paths)


class Follower(Track):
    """The record of a rank other than the first: it writes nothing, and ends the process where rank 0 begins to save the model.

    It ends with code 0 also when it was asked to stop, because torchrun ends rank 0, which still saves, after any other code.
    """

    first = False

    def log(self, step: int, **values: float) -> None: ...
    def time(self, step: int, seconds: Mapping[str, float], **memory: float) -> None: ...
    def resumed(self, step: int) -> None: ...

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Progress:
        return Progress(self.stage, total, unit, start, hidden=True)

    def stopped(self, step: int) -> None:
        raise SystemExit(0)

    def finished(self) -> None:
        raise SystemExit(0)
