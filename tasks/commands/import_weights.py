"""`cf import-weights`: a published checkpoint of Wan's transformer becomes a folder that every stage can load."""

from tasks.files.options import parse_options


def main(argv: list[str]) -> None:
    options = vars(parse_options("import-weights", argv, __doc__))

    import torch  # after the options, because --help must not wait for torch

    from cf_model.foreign import import_checkpoint

    src, out, dtype = (options.pop(name) for name in ("src", "out", "dtype"))
    facts = import_checkpoint.import_transformer(src, out, dtype=dtype and getattr(torch, dtype), **options)
    print(f"{out}: {import_checkpoint.describe_import(facts)}")
