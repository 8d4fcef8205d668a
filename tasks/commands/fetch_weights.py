"""`cf fetch-weights`: the networks that the papers' metrics are made with, by pinned revision, with the sha256 of every file."""

import argparse
from pathlib import Path

from tasks.params.yaml_file import refuse_errors

EPILOG = """What is fetched, with its licence, stands in cf_model/metrics/encoders.py (PINNED). A folder that is there already is checked
and left alone. The Hub's own settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT.

LAION's aesthetic head is not on the Hub: --head FILE takes sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor (MIT)."""


def main(argv: list[str]) -> None:
    from cf_model.metrics.encoders import PINNED, save_head
    from cf_model.metrics.fetch import fetch_role

    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf fetch-weights", description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the folders are made, for `cf score --weights`")
    parser.add_argument("--only", action="append", choices=list(PINNED), help="may be given several times; default: all")
    parser.add_argument("--head", type=Path, metavar="FILE", help="LAION's linear head, which becomes aesthetic-head.safetensors")
    args = parser.parse_args(argv)
    for role in args.only or PINNED:
        with refuse_errors():
            print(fetch_role(role, args.out / role))
    if args.head:
        save_head(args.head, args.out / "aesthetic-head.safetensors")
        print(f"{args.out / 'aesthetic-head.safetensors'}: written")
