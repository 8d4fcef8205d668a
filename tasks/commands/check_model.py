"""`cf check-model`: whether a folder is a whole model that fits params.yaml, asked before hours are spent on what needs it."""

import argparse
from pathlib import Path

from tasks.files.json_lines import load_json_object
from tasks.params.project import Project
from tasks.params.yaml_file import Refused

WAN_CHANNELS = 16  # of Wan's own latents
CLASS = "WanTransformer3DModel"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf check-model", description="Says whether a folder is a whole model that fits params.yaml.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--stage", default="stage2", help="whose model it may stand for; default: stage2")
    options, params = parser.parse_args(argv), Project().params
    channels = WAN_CHANNELS if params.codec.kind == "wan" else params.codec.linear.channels
    if options.stage == "codec":
        from cf_model.codec.codec_file import load_codec

        sizes = {"channels": (load_codec(options.folder).channels, channels, "codec")}
    else:
        config = check_transformer(options.folder)
        sizes = {"in_channels": (config["in_channels"], channels, "codec"), "text_dim": (config["text_dim"], params.text.channels, "text")}
    for name, (found, wanted, section) in sizes.items():
        if found != wanted:
            raise Refused(f"{options.folder} has {name} {found}, and by the section {section} of params.yaml it must be {wanted}")
    print(f"{options.folder} is a whole model that fits params.yaml")


def check_transformer(folder: Path) -> dict[str, int]:
    """Return the config of a transformer's folder in diffusers' layout; of the weights only names, shapes and length are read.

    Raises Refused or ValueError for anything else, and for weights that are not exactly those that the config names.
    """
    file, way = folder / "config.json", "name a folder that a stage or `cf import-weights` wrote"
    if not file.is_file():
        raise Refused(f"{folder} holds no config.json, so it is no transformer of diffusers; {way}")
    if (kind := load_json_object(file).get("_class_name")) != CLASS:
        raise Refused(f"{file} is of class {kind}, and must be of {CLASS}; {way}")

    import torch
    from diffusers import WanTransformer3DModel
    from safetensors import safe_open

    from cf_model.model.weights import WEIGHTS, check_safetensors_header, check_weights

    config = WanTransformer3DModel.load_config(folder, local_files_only=True)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in WanTransformer3DModel.from_config(config).state_dict().items()}
    check_safetensors_header(folder / WEIGHTS)
    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        state = {
            name: torch.empty(part.get_shape(), dtype=kinds.get(part.get_dtype(), torch.int8), device="meta")
            for name, part in slices.items()
        }
    try:
        check_weights(state, shapes)
    except ValueError as error:
        raise Refused(f"{folder / WEIGHTS}: {error}") from None
    return {"in_channels": config["in_channels"], "text_dim": config["text_dim"]}
