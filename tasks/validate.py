"""Stage `validate`: all of params.yaml against its types, before any other stage runs."""

import json
from pathlib import Path

from tasks.params.schema import Params
from tasks.params.yaml_file import Refused
from tasks.runner.track import Track


def run(params: Params, track: Track, *, out: Path = Path("build/params.json")) -> dict[str, float]:
    """Check every value of params.yaml, alone and against the others, and write them to build/params.json, sorted."""
    file = params.generate.prompts_file
    if file is not None:  # refused now, because `generate` would refuse it an hour later
        if not file.is_file():
            raise Refused(f"generate.prompts_file is {file}, which isn't there; name a file with one prompt a line, or null")
        if not file.read_text().strip():
            raise Refused(f"generate.prompts_file is {file}, which holds no prompt; write one a line, or null for the held-out captions")
    out.write_text(json.dumps(params.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
    return {}
