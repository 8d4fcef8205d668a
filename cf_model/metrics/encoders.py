"""Encoders of frames and prompts: DINO, DINOv2 and CLIP of transformers, from local folders, with preparations of our own.

Which weights VBench and Context Forcing take is in PINNED, by repository and revision. `cf fetch-weights` writes the folders;
nothing is downloaded here. An encoder whose folder lacks the fetch's record, or whose bytes differ from it, is a substitute.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from cf_model.metrics import preprocess

Video = UInt8[np.ndarray, "V Y X 3"]
Features = Float[np.ndarray, "V C"]
BATCH = 16  # frames that are encoded at once
TEXT_TOKENS = 77  # CLIP's limit, with the tokens that begin and end a text
RECORD = "weights.json"  # repository, revision and sha256 of the files of a folder that `cf fetch-weights` wrote


class Pinned(NamedTuple):
    """Weights that a metric of the papers is made with."""

    repository: str
    revision: str
    licence: str
    metrics: tuple[str, ...]


PINNED = {
    "dino": Pinned("facebook/dino-vitb16", "f205d5d8e640a89a2b8ef0369670dfc37cc07fc2", "Apache-2.0", ("subject_consistency",)),
    "dinov2": Pinned("facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415", "Apache-2.0", ("dinov2",)),
    # the revision that holds the same weights as safetensors
    "clip": Pinned(
        "openai/clip-vit-base-patch32",
        "c237dc49a33fc61debc9276459120b7eac67e7ef",
        "MIT",
        ("background_consistency", "clip_score", "clip_f", "clip_t"),
    ),
    "clip-large": Pinned("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "MIT", ("aesthetic_quality",)),
}


class FrameEncoder(Protocol):
    """An encoder of frames. `suffix` is empty for the pinned weights; scores of a substitute are called METRIC@name."""

    name: str
    weights: str  # repository and revision, or the hash of the weight files
    suffix: str

    def encode(self, video: Video) -> Features:
        """Encode frames of any size, one row each."""


class TextImageEncoder(FrameEncoder, Protocol):
    """An encoder of frames and texts into one space."""

    def encode_text(self, text: str) -> Float[np.ndarray, " C"]:
        """Encode a text; a long one is cut."""


class HubEncoder:
    """A network of transformers with the preparation of its frames."""

    def __init__(self, role: str, folder: Path, device: torch.device | None = None) -> None:
        """Open an encoder for a role of PINNED; ValueError says what is wrong with its folder."""
        self.role, self.folder, self.device = role, folder, device or torch.device("cpu")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json; `cf fetch-weights --out DIR` writes the folders that scores need")
        record = check_record(folder)
        pinned = PINNED[role]
        genuine = (record.get("repository"), record.get("revision")) == (pinned.repository, pinned.revision)
        self.weights = f"{pinned.repository}@{pinned.revision}" if genuine else f"sha256:{hash_file(find_weights(folder))}"
        self.name = pinned.repository if genuine else folder.name
        self.suffix = "" if genuine else f"@{folder.name}"
        self.model = self.load_model().eval().requires_grad_(False).to(self.device)

    def load_model(self) -> Any:
        """Load the network of the role; ValueError where config.json is of another kind, or weights are missing."""
        from transformers import CLIPModel, Dinov2Model, ViTModel

        kind, options = {
            "dino": (ViTModel, {"add_pooling_layer": False}),
            "dinov2": (Dinov2Model, {}),
            "clip": (CLIPModel, {}),
            "clip-large": (CLIPModel, {}),
        }[self.role]
        found = json.loads((self.folder / "config.json").read_text()).get("model_type")
        if found != kind.config_class.model_type:
            wanted = kind.config_class.model_type
            raise ValueError(f"{self.folder} is a {found} network, and {self.role} must be a {wanted}; name the folder of another network")
        model, report = kind.from_pretrained(
            self.folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
        )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(f"{self.folder} lacks {len(missing)} weights of its network, among them {missing[0]}; fetch it again")
        return model

    @torch.no_grad()
    def encode(self, video: Video) -> Features:
        """Encode frames in batches of 16; the rows are not normalised."""
        rows = [self.encode_batch(preprocess.make_tensor(batch).to(self.device)) for batch in split_batches(video)]
        return torch.cat(rows).float().cpu().numpy()

    def encode_batch(self, frames: Float[Tensor, "V 3 _ _"]) -> Float[Tensor, "V C"]:
        """Return the class token after the last normalisation: what DINO's and DINOv2's own code returns for an image."""
        size = self.model.config.image_size
        if self.role == "dino":  # frames are not cut, so positions are interpolated to their shape
            return self.model(preprocess.prepare_dino(frames, min(size, 224)), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        # DINOv2's config says 518, the size it was trained with last; VBench-Long gives it 224
        return self.model(preprocess.prepare_dinov2(frames, min(size, 224))).last_hidden_state[:, 0]


class ClipEncoder(HubEncoder):
    """CLIP: frames and texts in one space. A text is encoded alone, which gives the same numbers as padding, because CLIP is causal."""

    def __init__(self, role: str, folder: Path, device: torch.device | None = None) -> None:
        super().__init__(role, folder, device)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file} isn't there; fetch the whole folder again")
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode_batch(self, frames: Float[Tensor, "V 3 _ _"]) -> Float[Tensor, "V C"]:
        """Return the projected image features."""
        pixels = preprocess.prepare_clip(frames, self.model.config.vision_config.image_size)
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def encode_text(self, text: str) -> Float[np.ndarray, " C"]:
        """Return the projected features of a text; one above 77 tokens is cut, and still ends with the end token."""
        ids = self.tokenizer.encode(text).ids
        limit = min(TEXT_TOKENS, self.model.config.text_config.max_position_embeddings)
        if len(ids) > limit:
            ids = [*ids[: limit - 1], ids[-1]]
        tokens = torch.tensor([ids], device=self.device)
        return self.model.get_text_features(input_ids=tokens).pooler_output[0].float().cpu().numpy()


class PooledEncoder:
    """A stand-in without weights: the means of 8 x 8 parts of a frame, less their own mean. Scores made with it say its name.

    It lets a folder be scored for change over time where no weights were fetched; it knows nothing of what a frame shows.
    """

    name, weights, suffix = "pooled-8x8", "none", "@pooled-8x8"
    SIDE = 8

    def encode(self, video: Video) -> Features:
        """Return 192 values a frame."""
        rows = [
            torch.nn.functional.adaptive_avg_pool2d(preprocess.make_tensor(batch), self.SIDE).flatten(2) for batch in split_batches(video)
        ]
        return torch.cat([(row - row.mean(dim=2, keepdim=True)).flatten(1) for row in rows]).numpy()


def open_encoder(role: str, folder: Path, device: torch.device | None = None) -> HubEncoder:
    """Open the encoder of a role of PINNED."""
    kind: Callable[..., HubEncoder] = ClipEncoder if role.startswith("clip") else HubEncoder
    return kind(role, folder, device)


def split_batches(video: Video) -> Iterator[Video]:
    """Yield the frames in batches."""
    for first in range(0, len(video), BATCH):
        yield video[first : first + BATCH]


def find_weights(folder: Path) -> Path:
    """Return a folder's weight file; ValueError if there is none in safetensors."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} holds no model.safetensors; `cf fetch-weights --out DIR` writes it, from other formats too")
    return file


def hash_file(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def check_record(folder: Path) -> dict[str, Any]:
    """Read what `cf fetch-weights` recorded of a folder, empty if it wrote none; ValueError if a file has changed since."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    record = json.loads(file.read_text())
    changed = [name for name, digest in record["sha256"].items() if not (folder / name).is_file() or hash_file(folder / name) != digest]
    if changed:
        raise ValueError(f"{folder}/{changed[0]} is not what was fetched; remove the folder and fetch it again")
    return record


def keep_as_safetensors(source: Path, target: Path) -> None:
    """Write a pickled state dict of tensors as safetensors; ValueError if it holds anything else, which is never run."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        save_file({name: value.clone().contiguous() for name, value in state.items()}, target, {"format": "pt"})
    except (pickle.UnpicklingError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{source} holds something else than tensors ({' '.join(str(error).split())[:80]}); fetch it again") from None


def save_head(source: Path, target: Path) -> None:
    """Write LAION's linear head, a pickled weight [1, C] and bias [1], as safetensors."""
    if not source.is_file():
        raise ValueError(f"{source} isn't there; name LAION's sa_0_4_vit_l_14_linear.pth")
    target.parent.mkdir(parents=True, exist_ok=True)
    keep_as_safetensors(source, target)
    open_head(target)


def open_head(file: Path) -> tuple[Float[np.ndarray, " C"], float]:
    """Read a linear head: its weight and its bias."""
    state = load_file(file)
    if sorted(state) != ["bias", "weight"] or state["weight"].dim() != 2 or state["bias"].numel() != 1 or len(state["weight"]) != 1:
        raise ValueError(f"{file} holds {', '.join(sorted(state))}; LAION's head is a weight of one row and a bias")
    return state["weight"][0].float().numpy(), float(state["bias"].item())


def list_missing(roles: Sequence[str], folder: Path) -> list[str]:
    """Return the roles whose folders are not below `folder`."""
    return [role for role in roles if not (folder / role / "config.json").is_file()]
