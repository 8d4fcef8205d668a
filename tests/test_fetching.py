"""Clips that are fetched: by address from a server that breaks off, and collections from a stand-in for the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.utils import _http

from cf_model.data import fetch_files, hub_collections
from cf_model.data.clip_table import read_clip_table
from cf_model.data.fetch_files import FetchLimits, NotFetchedError, fetch_file
from cf_model.data.hub_collections import COLLECTIONS, CollectionReader, JoinedFiles
from tasks import clips
from tests.test_clips import folder, rows

LIMITS = FetchLimits(max_mib=1.0, seconds=60.0, revision=None)
CONTENT = bytes(range(256)) * 1000
COMMIT = "c" * 40


class Server(ThreadingHTTPServer):
    """A server on loopback that can break off, forget ranges, change a file, and play the Hub's part for one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []  # after how many bytes each of the next answers ends
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each GET
        self.damaged: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/"):
            listed = [
                {"rfilename": name, "size": len(content), "lfs": {"sha256": sha(content), "size": len(content), "pointerSize": 130}}
                for name, content in self.server.files.items()
            ]
            return self.answer(200, json.dumps({"id": "some/where", "sha": COMMIT, "siblings": listed}).encode(), {})
        content = self.server.files.get(path.partition(f"/resolve/{COMMIT}/")[2] or path.lstrip("/"))
        if content is None:
            return self.answer(404, b"", {})
        asked = self.headers.get("Range")
        if self.command == "GET":
            self.server.asked.append((path, asked))
        headers = {"ETag": f'"{sha(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        sent = content[:-1] + b"?" if path in self.server.damaged else content
        if asked and self.server.ranges and self.headers.get("If-Range") in (None, headers["ETag"]):
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            return self.answer(206, sent[first:], headers | {"Content-Range": f"bytes {first}-{len(sent) - 1}/{len(sent)}"})
        return self.answer(200, sent, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.server.breaks.pop(0)] if self.server.breaks and status < 300 else body)
        self.close_connection = True


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.files["a.mp4"] = CONTENT
        yield running
        running.shutdown()


# ------------------------------------------------------------------------------------------------------- addresses


def test_a_file_that_breaks_off_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 50_000]
    fetch_file(f"{server.url}/a.mp4", tmp_path / "a.mp4", LIMITS, sha(CONTENT))
    assert (tmp_path / "a.mp4").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    fetch_file(f"{server.url}/a.mp4", tmp_path / "a.mp4", LIMITS)
    assert len(server.asked) == 3, "what is there is not fetched again"


def test_a_second_start_goes_on_and_a_changed_file_is_fetched_from_its_beginning(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 0]
    with pytest.raises(NotFetchedError, match=r"a\.mp4 broke off \(.*\); start again to go on with it"):
        fetch_file(f"{server.url}/a.mp4", tmp_path / "a.mp4", LIMITS)
    assert (tmp_path / "a.mp4.partial").stat().st_size == 100_000 and not (tmp_path / "a.mp4").exists()
    changed = bytes(reversed(CONTENT))
    server.files["a.mp4"] = changed
    fetch_file(f"{server.url}/a.mp4", tmp_path / "a.mp4", LIMITS)
    assert (tmp_path / "a.mp4").read_bytes() == changed


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.breaks, server.ranges = [100_000], False
    fetch_file(f"{server.url}/a.mp4", tmp_path / "a.mp4", LIMITS, hashlib.md5(CONTENT).hexdigest())
    assert (tmp_path / "a.mp4").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("address", "limits", "checksum", "said"),
    [
        ("file:///etc/passwd", {}, None, "is no http or https address"),
        ("ftp://x.org/a.mp4", {}, None, "is no http or https address"),
        ("{}/none.mp4", {}, None, "was answered with 404, which gives no file"),
        ("{}/a.mp4", {"max_mib": 0.1}, None, r"has 0\.2 MiB or more, but clips\.fetch\.max_mib is 0\.1"),
        ("{}/a.mp4", {}, "0" * 64, "has the checksum [0-9a-f]{64}, not 0000"),
    ],
)
def test_what_can_not_be_had_is_said_and_leaves_nothing(
    server: Server, tmp_path: Path, address: str, limits: dict[str, float], checksum: str | None, said: str
) -> None:
    stated = FetchLimits(**({"max_mib": 1.0, "seconds": 60.0, "revision": None} | limits))
    with pytest.raises(ValueError, match=said) as raised:
        fetch_file(address.format(server.url), tmp_path / "a.mp4", stated, checksum)
    assert not isinstance(raised.value, NotFetchedError) and "\n" not in str(raised.value)
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".mp4" or file.stat().st_size > 100]


def test_a_file_that_takes_too_long_is_kept_for_the_next_start(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 10_000, 100))
    # this module's clock alone, because threads of other tests in this process read the clock, too
    monkeypatch.setattr(fetch_files, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with pytest.raises(NotFetchedError, match=r"took longer than clips\.fetch\.seconds, 60"):
        fetch_file(f"{server.url}/a.mp4", tmp_path / "a.mp4", LIMITS)
    assert (tmp_path / "a.mp4.partial").is_file()


def table_of(path: Path, *lines: str, fetch: FetchLimits | None = LIMITS) -> Any:
    path.mkdir(exist_ok=True)
    (path / "clips.csv").write_text("\n".join(["file,caption,md5", *lines]))
    p = folder(path)
    p.clips = p.clips.model_copy(update={"source": "table", "table": path / "clips.csv", "fetch": fetch})
    return p


def test_a_table_of_addresses(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server.files["b%20c.bin"] = server.files["b c.bin"] = b"another"
    lines = [f"{server.url}/a.mp4,a red disc,{hashlib.md5(CONTENT).hexdigest()}", f"{server.url}/b%20c.bin,,", f"{server.url}/gone.mp4,x,"]
    p = table_of(tmp_path / "raw", *lines)
    clips.run(p, MagicMock(), out=tmp_path / "clips")
    listed = rows(tmp_path / "clips/clips.jsonl")
    assert [(row["source"], row["caption"]) for row in listed] == [
        (f"{server.url}/a.mp4", "a red disc"),
        (f"{server.url}/b%20c.bin", "b c"),
    ]
    assert (tmp_path / "clips" / listed[0]["file"]).read_bytes() == CONTENT and listed[1]["file"].endswith(".mp4")
    [left] = rows(tmp_path / "clips/left_out.jsonl")
    assert left["source"].endswith("/gone.mp4") and left["why"].startswith("was answered with 404")
    asked = len(server.asked)
    clips.run(p, MagicMock(), out=tmp_path / "again")
    assert len(server.asked) == asked and rows(tmp_path / "again/clips.jsonl") == listed
    with pytest.raises(ValueError, match=r"clips\.csv row 1 names http.*/a\.mp4, an address, but clips\.fetch is null"):
        clips.run(table_of(tmp_path / "raw", *lines, fetch=None), MagicMock(), out=tmp_path / "none")


def test_a_run_in_which_an_address_broke_off_is_refused_and_the_next_one_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.breaks = [100_000, 0]
    p = table_of(tmp_path / "raw", f"{server.url}/a.mp4,a red disc,")
    with pytest.raises(ValueError, match=r"^1 of 1 videos were not fetched, the first: .*/a\.mp4 broke off .*work/fetched"):
        clips.run(p, MagicMock(), out=tmp_path / "clips")
    assert not (tmp_path / "clips/clips.jsonl").exists()
    assert clips.run(p, MagicMock(), out=tmp_path / "clips")["clips"] == 1
    assert server.asked[-1][1] == "bytes=100000-"


# ----------------------------------------------------------------------------------------------------- collections


def zip_of(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"folder/{name}.mp4", content)
    return made.getvalue()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Sekai's files by their published names and columns; the walking archive is in two parts."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    # HF_ENDPOINT is read when the library is imported, and so is this.
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    head = "videoFile,cameraFile,caption,location,scene,crowdDensity,weather,timeOfDay\n"
    walking = zip_of(w1=b"walk one", w2=b"walk two" * 1000, other=b"in no table")
    server.files = {
        "train/sekai-game-walking.csv": f'{head}w1.mp4,w1.npz,"a street, at night",,,,,\nw2.mp4,w2.npz,a wood,,,,,\n'.encode(),
        "train/sekai-game-drone.csv": f"{head}d1.mp4,d1.npz,a coast,,,,,\nd2.mp4,d2.npz,nowhere,,,,,\n".encode(),
        "sekai-game-walking.zip.part_aa": walking[:50],
        "sekai-game-walking.zip.part_ab": walking[50:],
        "sekai-game-drone.zip": zip_of(d1=b"drone one"),
    }
    return server


def collection(name: str, **changes: Any) -> Any:
    p = folder(Path("raw"))
    p.clips = p.clips.model_copy(update={"source": name, "folder": None, "fetch": LIMITS} | changes)
    return p


def test_sekai_is_fetched_by_its_published_columns(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clips.run(collection("sekai"), MagicMock(), out=tmp_path / "clips")
    listed = rows(tmp_path / "clips/clips.jsonl")
    assert [row["caption"] for row in listed] == ["a street, at night", "a wood", "a coast"]
    assert listed[1]["source"] == f"Lixsp11/Sekai-Project@{COMMIT}:sekai-game-walking.zip/folder/w2.mp4"
    assert (tmp_path / "clips" / listed[1]["file"]).read_bytes() == b"walk two" * 1000
    assert [row["source"] for row in rows(tmp_path / "clips/left_out.jsonl")] == ["d2.mp4"]
    asked = len(hub.asked)
    clips.run(collection("sekai"), MagicMock(), out=tmp_path / "again")
    assert len(hub.asked) == asked and rows(tmp_path / "again/clips.jsonl") == listed


def test_of_a_collection_no_more_archives_are_fetched_than_are_needed(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert clips.run(collection("sekai", count=2), MagicMock(), out=tmp_path / "clips")["clips"] == 2
    assert not [path for path, _ in hub.asked if path.endswith("drone.zip")]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("damaged", "sekai-game-drone.zip of Lixsp11/Sekai-Project has the checksum"),
        ("no zip", "sekai-game-drone.zip of Lixsp11/Sekai-Project is no zip file"),
        ("too large", r"sekai-game-drone\.zip of Lixsp11/Sekai-Project has [0-9.]+ MiB or more, but clips\.fetch\.max_mib is 1;"),
        ("renamed", r"Lixsp11/Sekai-Project@c+ has no file \*sekai-game-drone\.zip\*: it was changed; state an earlier"),
        ("no table", r"train/sekai-game-drone\.csv of Lixsp11/Sekai-Project was not fetched"),
        ("no network", r"Lixsp11/Sekai-Project can't be asked for its files"),
    ],
)
def test_faults_of_a_collection_are_one_sentence(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    name = "sekai-game-drone.zip"
    if fault == "damaged":
        hub.damaged.add(f"/datasets/Lixsp11/Sekai-Project/resolve/{COMMIT}/{name}")
    elif fault == "no zip":
        hub.files[name] = b"no zip"
    elif fault == "too large":
        hub.files[name] = bytes(2**20 + 1)
    elif fault in ("renamed", "no table"):
        del hub.files[name if fault == "renamed" else "train/sekai-game-drone.csv"]
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=said) as raised:
        list(CollectionReader("sekai", tmp_path, LIMITS))
    assert "\n" not in str(raised.value)


def test_ultravideo_names_files_that_were_cut_out_already(tmp_path: Path) -> None:
    """Its start_time and end_time are of the film on YouTube: taken for the file's, they leave nothing of a clip."""
    row = "clip_id,url,fps,start_time,end_time,Brief Description,Detailed Description"
    (tmp_path / "long.csv").write_text(f"{row}\n7a0f.mp4,BJRp,23.97,90.96,104.2,a riverside,The video opens wide.\n")
    [entry] = read_clip_table(tmp_path / "long.csv")
    assert (entry.file, entry.caption, entry.start, entry.end) == ("7a0f.mp4", "The video opens wide.", None, None)
    (tmp_path / "own.csv").write_text("clip_id,start,end\n7a0f.mp4,1,12\n")
    assert read_clip_table(tmp_path / "own.csv")[0].start == 1.0
    assert COLLECTIONS["ultravideo"].tables == ("long.csv",)


def test_parts_are_read_as_one_file(tmp_path: Path) -> None:
    parts = [CONTENT[:7], b"", CONTENT[7:1000]]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).write_bytes(part)
    with JoinedFiles([tmp_path / str(number) for number in range(3)]) as joined:
        assert joined.read() == CONTENT[:1000]
        joined.seek(-995, io.SEEK_END)
        assert joined.read(10) == CONTENT[5:7], "up to a part's end"
        assert joined.tell() == 7 and joined.read(3) == CONTENT[7:10]
    assert sorted(["c_10.zip", "c_2.zip"], key=hub_collections._split_numbers) == ["c_2.zip", "c_10.zip"]
