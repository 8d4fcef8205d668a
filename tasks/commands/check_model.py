"""`cf check-model`: whether a folder is a whole model that fits params.yaml, asked before hours are spent on what needs it."""

from cf_model.plan.forecast import count_channels
from tasks.files.options import parse_options
from tasks.params.project import Project
from tasks.params.yaml_file import Refused, refuse_errors


def main(argv: list[str]) -> None:
    options, params = parse_options("check-model", argv), Project().params
    channels = count_channels(params)
    if options.stage == "codec":
        from cf_model.codec.codec_file import load_codec

        sizes = {"channels": (load_codec(options.folder).channels, channels, "codec")}
    else:
        from cf_model.foreign.check_folder import check_transformer

        with refuse_errors():
            config = check_transformer(options.folder)
        sizes = {"in_channels": (config["in_channels"], channels, "codec"), "text_dim": (config["text_dim"], params.text.channels, "text")}
    for name, (found, wanted, section) in sizes.items():
        if found != wanted:
            raise Refused(f"{options.folder} has {name} {found}, and by the section {section} of params.yaml it must be {wanted}")
    print(f"{options.folder} is a whole model that fits params.yaml")
