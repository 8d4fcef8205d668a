"""Judges of Visual Stability: recorded answers, a rule of thumb, an OpenAI-compatible endpoint, and a local model of transformers."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from cf_model.metrics.drift import measure_drift, measure_frames
from cf_model.metrics.judge import BEST, Judge, Video
from cf_model.metrics.preprocess import sample_middle_frames

PICTURES = 16  # frames of a video that a judge of pictures sees, the middle ones of as many equal parts
LONGEST = 512  # pixels of their longer side
ANSWER_TOKENS = 512


class ReplayJudge:
    """Recorded answers by the video's key, for tests and for ratings that were made elsewhere."""

    def __init__(self, answers: Mapping[str, str], name: str = "replay") -> None:
        self.answers, self.name = answers, name

    def answer(self, video: Video, fps: float, question: str, *, key: str) -> str:
        """Return the recorded answer; ValueError if there is none."""
        if key not in self.answers:
            raise ValueError(f"no answer is recorded for {key}; record one, or leave the video out")
        return self.answers[key]


class HeuristicJudge:
    """A rule of thumb from clipped pixels and the drift of luma. It is no model of people's judgement, and its score says its name."""

    name = "heuristic"

    def answer(self, video: Video, fps: float, question: str, *, key: str) -> str:
        """Take a point for every tenth of the pixels that is clipped at the worst moment, and for every tenth that luma has moved."""
        frames = measure_frames(video)
        clipped = float(np.quantile(frames["clipped"], 0.9))
        moved = abs(measure_drift(frames["luma"], fps)["late"])
        score = max(0, BEST - round(10 * max(clipped, moved)))
        return f"{clipped:.0%} of the pixels are clipped, and luma ends {moved:.0%} from where it began. Final score: {score}"


def pick_pictures(video: Video) -> list[Image.Image]:
    """Return 16 frames of a video as pictures of at most 512 pixels."""
    pictures = [Image.fromarray(video[k]) for k in dict.fromkeys(sample_middle_frames(PICTURES, len(video)).tolist())]
    for picture in pictures:
        picture.thumbnail((LONGEST, LONGEST))
    return pictures


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint (POST URL/chat/completions), which gets a video's frames as JPEG pictures."""

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 120) -> None:
        """Take the address up to and with /v1; `key` is the bearer token. Raises ValueError for an address that is not http(s)."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError("the judge's address must be http(s)://HOST/v1, without a name or password in it")
        self.url, self.model, self.name, self.key, self.timeout = url.rstrip("/"), model, model, key, timeout
        self.host = parts.hostname

    def answer(self, video: Video, fps: float, question: str, *, key: str) -> str:
        """Send the question and the pictures; ValueError if the endpoint is down, refuses, or answers something else."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        for picture in pick_pictures(video):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=90)
            address = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
            content.append({"type": "image_url", "image_url": {"url": address}})
        body = {"model": self.model, "temperature": 0, "max_tokens": ANSWER_TOKENS, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(RefuseRedirects).open(request, timeout=self.timeout) as response:
                text = json.load(response)["choices"][0]["message"]["content"]
        except (OSError, HTTPException) as error:
            reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            raise ValueError(f"the judge at {self.host} gave no answer ({reason}); start it, or take another judge") from None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"the judge at {self.host} answered something else than a chat completion; check its address") from None
        if not isinstance(text, str):
            raise ValueError(f"the judge at {self.host} answered without text; check that {self.model} is a model for chats")
        return text


class RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """No redirects, because urllib would send the bearer token to wherever they lead."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class TransformersJudge:
    """A vision-language model of transformers from a local folder, which gets a video's frames as pictures.

    The folder needs a processor with a chat template. Its answers are greedy, so the same video gets the same answer.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        """Load model and processor; nothing is downloaded, and no code of the folder is run."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{folder} can't be opened as a judge ({' '.join(str(error).split())[:200]}); name another folder") from None
        self.model = self.model.eval().requires_grad_(False).to(device or torch.device("cpu"))
        self.name = folder.name

    def answer(self, video: Video, fps: float, question: str, *, key: str) -> str:
        """Generate an answer of at most 512 tokens."""
        pictures = pick_pictures(video)
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=[pictures], return_tensors="pt").to(self.model.device)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        return str(self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])


def open_judge(named: str, model: str | None, key: str | None, device: torch.device) -> Judge:
    """Open the judge that `cf score --judge` names: heuristic, a file of answers, a model's folder, or an endpoint with its model and key.

    Raises ValueError for a name that is none of them.
    """
    if named == "heuristic":
        return HeuristicJudge()
    if "://" in named:
        if not model:
            raise ValueError("--judge is an endpoint, and --judge-model names no model; name one that the endpoint serves")
        return EndpointJudge(named, model, key)
    place = Path(named)
    if place.is_file():
        return ReplayJudge(read_answers(place), name=f"replay-{place.stem}")
    if place.is_dir():
        return TransformersJudge(place, device)
    raise ValueError(f"--judge is {named}; it must be heuristic, a file of answers, a model's folder, or http(s)://HOST/v1")


def read_answers(file: Path) -> dict[str, str]:
    """Read recorded answers by the video's key. Raises ValueError for a file that is no JSON object."""
    try:
        answers = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(answers, dict):
        raise ValueError(f"{file} is damaged: it has no names")
    return answers
