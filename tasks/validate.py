"""Stage `validate`: all of params.yaml against its types, before any other stage runs."""

import json
from pathlib import Path

from cf_model.data.prompts import iterate_prompts, read_ids
from tasks.params.nightly import CAPTIONS, HELDOUT
from tasks.params.schema import Params
from tasks.params.yaml_file import Refused
from tasks.runner.track import Track


def run(params: Params, track: Track, *, out: Path = Path("build/params.json")) -> dict[str, float]:
    """Check every value of params.yaml, alone and against the others, and write them to build/params.json, sorted."""
    own = params.start.prompts if params.start.prompts != CAPTIONS else None
    files = [("start.prompts", own, params.prompts.ids)]
    for key, file in (("generate.prompts_file", params.generate.prompts_file), ("nightly.prompts_file", params.nightly.prompts_file)):
        files.append((key, file if file != HELDOUT else None, None))  # the stage prompts will make that file
    for key, file, chosen in files:
        try:  # read to its end now, because a later stage would refuse it after hours
            for _ in iterate_prompts(file, read_ids(chosen) if chosen else ()) if file else ():
                pass
        except ValueError as error:
            raise Refused(f"{key}: {error}") from None
    out.write_text(json.dumps(params.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
    return {}
