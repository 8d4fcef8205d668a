"""Visual Stability: the rating in a judge's answer, its scale, and judges that are down or talk nonsense."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cf_model.evaluate.published import list_published
from cf_model.metrics import judge, judges
from tests.metrics.small_networks import write_judge

NO_REPEAT = [67.19, 73.44, 95.31, 92.97, 100.0, 98.44]  # Self-Forcing++, Table 8
VIDEO = np.random.default_rng(0).integers(60, 190, (20, 90, 160, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Bright at 3 s, dark at 5 s.\n\nFinal score: 4", 4),
        ("**Score:** 2/5", 2),
        ("The exposure is even.\nI rate it with a rating of 5 out of 5.", 5),
        ("Score 1 would be too low.\nFinal Score: 3", 3),
        ("Highlights are clipped.\n\n**0**", 0),
    ],
)
def test_the_rating_is_read(text: str, score: int) -> None:
    assert judge.read_rating(text) == score


@pytest.mark.parametrize(
    "text", ["", "I can't see videos.", "Score: 7", "Score: 3.5", "score: 8/10", "Frames 1 to 5 are dark.", "-1 of 20 frames"]
)
def test_an_answer_without_a_rating_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="holds no score from 0 to 5"):
        judge.read_rating(text)


def test_the_scale_is_that_of_the_papers_table() -> None:
    """Self-Forcing++ rated 128 videos, so its numbers are 20 k / 128 to a digit: all but two of those in its Tables 1 and 2."""
    printed = [one.value for one in list_published() if one.metric == "visual_stability"]
    odd = [value for value in printed if min(abs(20 * k / 128 - value) for k in range(641)) > 0.01]
    assert len(printed) == 18
    assert odd == [60.41, 40.12]
    ratings = [judge.Rating(score, "", "replay") for score in [5] * 70 + [4] * 58]
    assert judge.score_stability(ratings) == pytest.approx(20 * (350 + 232) / 128)


def test_no_repeat_is_a_share_of_128_videos() -> None:
    assert all(min(abs(100 * k / 128 - value) for k in range(129)) < 0.0051 for value in NO_REPEAT)


def test_recorded_answers_are_rated_and_failures_are_kept() -> None:
    replay = judges.ReplayJudge({"a": "Score: 4", "b": "no idea"})
    good, nonsense, absent = (judge.rate_video(replay, VIDEO, 2, "a cat", key=key)[0] for key in "abc")
    assert good.score == 4 and good.rubric == judge.RUBRIC_HASH
    assert nonsense.score is None and nonsense.text == "no idea" and "ask it again" in nonsense.failure
    assert absent.failure == "no answer is recorded for c; record one, or leave the video out"
    with pytest.raises(ValueError, match="2 of 3 ratings failed; the first: the judge's answer holds no score"):
        judge.score_stability([good, nonsense, absent])
    with pytest.raises(ValueError, match="no video was rated"):
        judge.score_stability([])
    assert judge.measure_agreement([good, good, nonsense, judge.Rating(3, "", "")]) == 0.5


def test_the_rule_of_thumb_sees_exposure() -> None:
    ramp = np.linspace(0, 1, 20)[:, None, None, None]
    videos = {
        "even": VIDEO,
        "brighter": np.clip(VIDEO * (1 + 0.4 * ramp), 0, 255),
        "white": np.full_like(VIDEO, 255),
        "darker": VIDEO * (1 - 0.4 * ramp),
    }
    scores = {
        name: judge.rate_video(judges.HeuristicJudge(), video.astype(np.uint8), 2, "", key=name)[0].score for name, video in videos.items()
    }
    assert scores["even"] == 5 and scores["white"] == 0
    assert all(score is not None and 0 < score < 5 for name, score in scores.items() if name in ("brighter", "darker")), scores


Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


class Endpoint:
    """A local stand-in for an OpenAI-compatible server."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.reply: Answer = lambda body: (200, json.dumps({"choices": [{"message": {"content": "Score: 3"}}]}).encode())
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body, self.headers["Authorization"]))
                code, answer = outer.reply(body)
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    stand_in = Endpoint()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


def test_an_endpoint_is_asked_with_rubric_and_pictures(endpoint: Endpoint) -> None:
    model = judges.EndpointJudge(endpoint.url, "some-model", key="secret")
    rating = judge.rate_video(model, VIDEO, 2, "a cat at sea", key="a")[0]
    assert (rating.score, rating.judge) == (3, "some-model")
    path, body, authorization = endpoint.asked[0]
    assert (
        path == "/v1/chat/completions" and authorization == "Bearer secret" and body["model"] == "some-model" and body["temperature"] == 0
    )
    text, *pictures = body["messages"][0]["content"]
    assert "a cat at sea" in text["text"] and "Catastrophic Exposure" in text["text"] and len(pictures) == judges.PICTURES
    kind, data = pictures[0]["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 90)


@pytest.mark.parametrize(
    ("code", "answer", "sentence"),
    [
        (500, b"", r"gave no answer \(HTTP 500\); start it, or take another judge"),
        (302, b"", r"gave no answer \(HTTP 302\)"),
        (200, b"<html>", "answered something else than a chat completion"),
        (200, b'{"choices": []}', "answered something else than a chat completion"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "answered without text"),
    ],
)
def test_an_endpoint_that_answers_nonsense(endpoint: Endpoint, code: int, answer: bytes, sentence: str) -> None:
    endpoint.reply = lambda body: (code, answer)
    with pytest.raises(ValueError, match=sentence):
        judges.EndpointJudge(endpoint.url, "m", key="secret").answer(VIDEO, 2, "?", key="a")
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_is_down(endpoint: Endpoint) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    failed = judge.rate_video(judges.EndpointJudge(endpoint.url, "m"), VIDEO, 2, "", key="a")[0]
    assert failed.score is None and "gave no answer" in failed.failure


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/v1", "http://name:word@host/v1", "127.0.0.1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="must be http"):
        judges.EndpointJudge(address, "m")


def test_a_local_model_is_asked_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random LLaVA: its answer means nothing, but is made of the rubric and the frames, and always the same."""
    monkeypatch.setattr(judges, "ANSWER_TOKENS", 4)
    model = judges.TransformersJudge(write_judge(tmp_path / "some-model"))
    assert model.name == "some-model"
    answers = [model.answer(video, 2, judge.RUBRIC.format(prompt="a cat"), key="a") for video in (VIDEO, VIDEO, VIDEO[:1])]
    assert answers[0] == answers[1] and len(answers[0].split()) >= 1
    failed = judge.rate_video(model, VIDEO, 2, "a cat", key="a")[0]
    assert failed.score is None or 0 <= failed.score <= 5
    with pytest.raises(ValueError, match=r"absent can't be opened as a judge"):
        judges.TransformersJudge(tmp_path / "absent")
