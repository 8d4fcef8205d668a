"""The students' prompts: captions or a file, each once, none that is shown in the evaluation, embedded as the clips' captions are."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from cf_model.data.embedded_prompts import EmbeddedPrompts
from cf_model.data.latents import Latents
from cf_model.data.prompt_writer import write_prompts
from cf_model.data.prompts import PromptSpec, iterate_prompts, normalise_prompt, read_ids, read_prompts, select_distinct
from cf_model.text.encoder import WordEncoder
from tasks import prompts, validate
from tasks.params.nightly import CAPTIONS, HELDOUT
from tasks.params.schema import Encode, Text
from tasks.params.yaml_file import Refused
from tasks.runner.track import Track
from tests.small import write_clips

TOKENS = 6
CLIPS = [("a sea", "train"), ("a red disc", "train"), ("a sea", "train"), ("a green square", "heldout"), ("a red disc", "heldout")]


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    clips = (({"id": f"c{n}", "caption": text, "split": split}, torch.zeros(2, 4, 2, 2)) for n, (text, split) in enumerate(CLIPS))
    write_clips(tmp_path / "latents", clips, WordEncoder(TOKENS, 8).encode)
    return tmp_path / "latents"


ALL = PromptSpec(most=None, ids=None, min_words=0, max_words=400, heldout=0.0)
ROW = 8 * 4 / 2**20  # MiB of a word's embedding


def run(
    source: Path, latents: Path, out: Path, *, prompts_file: Path | None = None, nightly: Path | None = None, **changes: Any
) -> dict[str, float]:
    sections = {
        "text": Text(kind="words", weights=None, tokens=TOKENS, channels=8, negative=""),
        "encode": Encode(shard_mib=6 * ROW, dtype="float32", decoder="pyav"),
        "prompts": replace(ALL, **changes),
        "generate": SimpleNamespace(prompts_file=prompts_file),
        "nightly": SimpleNamespace(prompts_file=nightly),
    }
    params: Any = SimpleNamespace(**sections)
    return prompts.run(params, Track("prompts", out.parent), source=source, latents=latents, out=out)


def texts(folder: Path) -> list[str]:
    return (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()


def test_the_captions_of_training_clips_once_and_as_they_were_embedded(latents: Path, tmp_path: Path) -> None:
    assert run(CAPTIONS, latents, tmp_path / "out") == {"prompts": 2, "also_heldout": 1}, "clips are held out, not captions"
    read, clips = EmbeddedPrompts(tmp_path / "out"), Latents(latents)
    assert texts(tmp_path / "out") == ["a sea", "a red disc"] and len(read) == 2
    assert torch.equal(read[[1, 0]], clips.text([1, 0]))


@pytest.mark.parametrize("which", ["prompts_file", "nightly"])
@pytest.mark.parametrize("source", ["captions", "file"])
def test_prompts_that_the_evaluation_or_a_night_shows_are_never_trained_on(
    which: str, source: str, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CF_KEPT", "off")
    (tmp_path / "shown.txt").write_text("A SEA!\n")
    (tmp_path / "own.txt").write_text("a sea\nsnow\na  Sea\n")
    file = CAPTIONS if source == "captions" else tmp_path / "own.txt"
    metrics = run(file, latents, tmp_path / "out", **{which: tmp_path / "shown.txt"})
    assert texts(tmp_path / "out") == (["a red disc"] if source == "captions" else ["snow"]) and metrics["prompts"] == 1


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_files_prompts_without_those_that_are_shown(kind: str, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out captions, and the prompts of generate.prompts_file, whatever their case and white space."""
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    stated = ["A  Green square", "a café, at dusk", "a red disc", "fog", "a CAFÉ, at  dusk", "snow", "rain,\n and wind", "one\ttoo many"]
    file = tmp_path / f"vidprom.{kind}"
    if kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([("id", "prompt"), *enumerate(stated)])
    else:
        file.write_text("\n\n".join(" ".join(prompt.split("\n")) for prompt in stated), encoding="utf-8")
    (tmp_path / "shown.txt").write_text("FOG\n")
    metrics = run(file, latents, tmp_path / "out", most=3, prompts_file=tmp_path / "shown.txt")
    assert texts(tmp_path / "out") == ["a café, at dusk", "snow", "rain, and wind"]
    assert metrics == {"prompts": 3, "left_out": 5, "heldout": 0}
    assert torch.equal(EmbeddedPrompts(tmp_path / "out")[[2, 0]], WordEncoder(TOKENS, 8).encode(["rain, and wind", "a café, at dusk"]))


def test_a_second_start_embeds_nothing_again_and_writes_the_same_bytes(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: what was embedded is kept by content beside the outs."""
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    file, asked, encode = tmp_path / "some.txt", list[str](), WordEncoder.encode
    file.write_text("".join(f"prompt {n}\n" for n in range(8)))

    def embed(self: WordEncoder, given: list[str]) -> torch.Tensor:
        asked.extend(given)
        if given == ["prompt 5"] and asked.count("prompt 5") == 1:
            raise KeyboardInterrupt
        return encode(self, given)

    monkeypatch.setattr(WordEncoder, "encode", embed)
    with pytest.raises(KeyboardInterrupt):
        run(file, latents, tmp_path / "out")
    run(file, latents, tmp_path / "out")
    assert sorted(asked) == sorted([*(f"prompt {n}" for n in range(8)), "prompt 5"])
    monkeypatch.setenv("CF_KEPT", "off")
    run(file, latents, tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert files == ["index.json", "prompts.txt", *(f"text-{n:05d}.safetensors" for n in range(3))]  # two words each, three to a shard
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def write_parquet(**columns: list[Any]) -> bytes:
    """Return a Parquet file of these columns."""
    file = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({name: pyarrow.array(cells) for name, cells in columns.items()}), file)
    return file.getvalue().to_pybytes()


def test_a_parquet_file_gives_what_the_same_csv_file_gives(tmp_path: Path) -> None:
    prompts = ["fog over  hills", "", "a red disc, at night", "fog over hills"]
    (tmp_path / "some.parquet").write_bytes(write_parquet(id=[1, 2, 3, 4], prompt=prompts))
    (tmp_path / "some.csv").write_text("id,prompt\n" + "".join(f'{n},"{prompt}"\n' for n, prompt in enumerate(prompts)))
    wanted = ["fog over hills", "a red disc, at night", "fog over hills"]
    assert read_prompts(tmp_path / "some.parquet") == read_prompts(tmp_path / "some.csv") == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, r"none\.txt is not there"),
        ("none.txt", b"\n \n", r"none\.txt has no prompt in it"),
        ("latin.txt", b"fog\ncaf\xe9\n", r"latin\.txt line 2 is not UTF-8 text \(byte 4\); save the file as UTF-8"),
        ("latin.csv", b"prompt\nfog\ncaf\xe9\n", r"latin\.csv line 3 is not UTF-8 text"),
        ("other.csv", b"id,text\n1,fog\n", r"other\.csv has no column `prompt`, only id, text; rename"),
        ("empty.csv", b"", r"empty\.csv has no prompt in it"),
        ("torn.csv", b'prompt\n"fog\nrain\n', r"torn\.csv line 3 is no CSV \(unexpected end of data\)"),
        ("short.csv", b"id,prompt\n1\n", r"short\.csv has no prompt in it"),
        ("seen.txt", b"a green square\n", "all of them are held-out prompts; name a file that has others"),
        ("torn.parquet", b"PAR1", r"torn\.parquet is no Parquet file that can be read \(.+\); write it again, or as a CSV file"),
        ("other.parquet", write_parquet(id=[1], text=["fog"]), r"other\.parquet has no column `prompt`, only id, text; rename"),
        ("numbers.parquet", write_parquet(prompt=[1, 2]), r"numbers\.parquet's column `prompt` holds int64, no text; rename"),
        ("empty.parquet", write_parquet(prompt=["", None, " "]), r"empty\.parquet has no prompt in it"),
        ("zero.parquet", write_parquet(prompt=["fog", "ra\0in"]), r"zero\.parquet line 2 holds a zero byte"),
    ],
)
def test_a_file_that_is_none_gets_one_sentence(name: str, content: bytes | None, said: str, latents: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{said}[^\n]*$"):
        run(tmp_path / name, latents, tmp_path / "out")


def test_a_bad_line_is_found_before_anything_is_embedded(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WordEncoder, "encode", lambda *_: pytest.fail("embedded"))
    (tmp_path / "long.txt").write_bytes(b"fog\n" * 1000 + b"caf\xe9\n")
    with pytest.raises(ValueError, match="line 1001 is not UTF-8"):
        run(tmp_path / "long.txt", latents, tmp_path / "out")
    start, shown = SimpleNamespace(prompts=tmp_path / "long.txt"), SimpleNamespace(prompts_file=HELDOUT)  # which is not there yet
    params: Any = SimpleNamespace(start=start, generate=shown, nightly=shown, prompts=ALL)
    with pytest.raises(Refused, match=r"^start\.prompts: .*long\.txt line 1001 is not UTF-8"):
        validate.run(params, Track("validate", tmp_path), out=tmp_path / "params.json")


def test_a_stream_of_prompts_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Shard by shard: when the writer asks for the second shard, the first is on the disk."""
    read = 0

    def stream() -> Any:
        nonlocal read
        for read in range(7):
            assert len(list(tmp_path.glob("out/text-*"))) == max(0, (read - 1) // 2), "two of two words fit into a shard"
            yield f"prompt {read}"

    assert write_prompts(tmp_path / "out", stream(), WordEncoder(TOKENS, 8).encode, shard_mib=4 * ROW, dtype=torch.float32) == 7
    assert len(EmbeddedPrompts(tmp_path / "out")) == 7
    with pytest.raises(ValueError, match=r"has no index\.json; run the stage prompts first"):
        EmbeddedPrompts(tmp_path)


def test_distinct_is_by_words(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('\ufeffprompt,"other, more"\n"a, b",1\n\n"A,  b",2\nc,3\n', encoding="utf-8")
    assert list(select_distinct(read_prompts(tmp_path / "p.csv"), without=["C"])) == ["a, b"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A cat, running!", "a cat  running", True),
        ("a red-disc", "a red disc", True),
        ("don\u2019t stop", "Don't stop", True),
        ("\uff23at", "cat", True),  # wide letters
        ("\u2014cat\u2014 \U0001f525", "cat", True),
        ("cat 1", "cat 2", False),
        ("\u0915\u093f", "\u0915\u0940", False),  # other vowels of Hindi
        ("???", "!!!", False),
    ],
)
def test_near_identical_prompts_are_one(one: str, other: str, same: bool) -> None:
    assert (normalise_prompt(one) == normalise_prompt(other)) == same
    assert len(list(select_distinct([one, other]))) == 2 - same


def test_held_out_prompts_are_never_trained_on_and_a_longer_file_moves_none(latents: Path, tmp_path: Path) -> None:
    stated = [f"{kind} number {n}" for n in range(60) for kind in ("cat", "Cat,")]
    (tmp_path / "some.txt").write_text("\n".join(stated))
    metrics = run(tmp_path / "some.txt", latents, tmp_path / "out", heldout=0.3, most=30)
    trained, heldout = texts(tmp_path / "out"), (tmp_path / "out" / HELDOUT.name).read_text().splitlines()
    assert not {normalise_prompt(text) for text in trained} & {normalise_prompt(text) for text in heldout}
    assert len(trained) == 30 == metrics["prompts"] and 8 < len(heldout) == metrics["heldout"] < 28, "those beyond `most` too"
    assert metrics["left_out"] == 120 - 30 - len(heldout)
    (tmp_path / "some.txt").write_text("\n".join(["a dog", *reversed(stated), *(f"dog number {n}" for n in range(40))]))
    run(tmp_path / "some.txt", latents, tmp_path / "more", heldout=0.3)
    later = {normalise_prompt(text) for text in (tmp_path / "more" / HELDOUT.name).read_text().splitlines()}
    assert {text for text in later if text.startswith("cat")} == {normalise_prompt(text) for text in heldout}


def test_prompts_that_are_too_short_or_too_long_are_left_out(latents: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("fog\nfog at night\na very long word after word after word\nfog and a sea\n")
    assert run(tmp_path / "some.txt", latents, tmp_path / "out", min_words=2, max_words=4) == {"prompts": 2, "left_out": 2, "heldout": 0}
    assert texts(tmp_path / "out") == ["fog at night", "fog and a sea"]
    for changes in ({"min_words": 5, "max_words": 4}, {"heldout": 1.0}, {"most": 0}):
        with pytest.raises(ValueError, match=r"^(min_words|heldout|most) is [^\n]*; "):
            replace(ALL, **changes)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_prompts_of_vidprom_by_their_ids(kind: str, latents: Path, tmp_path: Path) -> None:
    """By the columns of VidProM's table."""
    rows = {"uuid": ["6a83", "3ba1", "62e5"], "prompt": ["kitten Max", "a clean font", "an alien at a desk"], "time": ["Sun", "Wed", "Tue"]}
    table, ids = tmp_path / f"VidProM_unique.{kind}", tmp_path / "ids.txt"
    if kind == "csv":
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([rows.keys(), *zip(*rows.values(), strict=True)])
    else:
        table.write_bytes(write_parquet(**rows))
    ids.write_text("62e5\n\n6a83\n")
    run(table, latents, tmp_path / "out", ids=ids)
    assert texts(tmp_path / "out") == ["kitten Max", "an alien at a desk"], "in the table's order"
    ids.write_text("62e5\nffff\n")
    with pytest.raises(ValueError, match=r"lacks 1 of 2 ids, such as ffff; take them out of prompts\.ids"):
        run(table, latents, tmp_path / "out", ids=ids)
    with pytest.raises(ValueError, match=r"some\.txt has no ids, but prompts\.ids names some"):
        list(iterate_prompts(write_line(tmp_path / "some.txt"), {"62e5"}))
    with pytest.raises(ValueError, match="holds no ids; write one a line"):
        read_ids(tmp_path / "none.txt")


def write_line(path: Path) -> Path:
    path.write_text("fog\n")
    return path
