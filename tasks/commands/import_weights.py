"""`cf import-weights`: a published checkpoint of Wan's transformer becomes a folder that every stage can load."""

import argparse
from pathlib import Path

EXAMPLES = """SRC may be
  a folder of diffusers (a pipeline, its transformer/ or a copy of that), sharded or not
  a folder or file of original Wan
  a .pt of Self-Forcing, CausVid, Rolling Forcing, LongLive's base, Infinity-RoPE's hosts, ode_init.pt
  a LoRA of LongLive (generator_lora), SVI or Context Forcing (pipe.dit.), or peft, with its --base; or one already merged

examples:
  cf import-weights Wan2.1-T2V-1.3B-Diffusers --out models/wan
  cf import-weights self_forcing_dmd.pt --out models/self_forcing
  cf import-weights model.pt --branch raw --dtype bfloat16 --out models/raw
  cf import-weights longlive_lora.pt --base longlive_base.pt --lora-alpha 256 --out models/longlive

Nothing is downloaded. A weight that is missing, unknown or misshapen is refused by name. DIR then holds config.json,
diffusion_pytorch_model.safetensors and import.json, which says what was found."""
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf import-weights", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("src", type=Path, metavar="SRC", help="a file or a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--base", type=Path, metavar="SRC", help="what a LoRA was trained on, in any layout")
    parser.add_argument("--branch", choices=("ema", "raw", "critic"), help="of a trainer's file; default: ema where there is one, else raw")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--heads", type=int, help="needed only without a config, where heads are not 128 wide")
    parser.add_argument("--lora-alpha", type=float, help="needed only where neither the LoRA nor adapter_config.json says it")
    options = vars(parser.parse_args(argv))

    import torch  # after the options, because --help must not wait for torch

    from cf_model.foreign import import_checkpoint

    src, out, dtype = (options.pop(name) for name in ("src", "out", "dtype"))
    facts = import_checkpoint.import_transformer(src, out, dtype=dtype and getattr(torch, dtype), **options)
    print(f"{out}: {import_checkpoint.describe_import(facts)}")
