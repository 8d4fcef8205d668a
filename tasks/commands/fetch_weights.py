"""`cf fetch-weights`: the networks that the papers' metrics are made with, by pinned revision, with the sha256 of every file."""

from tasks.files.options import parse_options
from tasks.params.yaml_file import refuse_errors


def main(argv: list[str]) -> None:
    args = parse_options("fetch-weights", argv, __doc__)

    from cf_model.metrics.encoders import PINNED, save_head
    from cf_model.metrics.fetch import fetch_role

    for role in args.only or PINNED:
        with refuse_errors():
            print(fetch_role(role, args.out / role))
    if args.head:
        save_head(args.head, args.out / "aesthetic-head.safetensors")
        print(f"{args.out / 'aesthetic-head.safetensors'}: written")
