"""Fetching of files by address, with resume, checksum, and limits of size and time; only params.yaml allows it (clips.fetch)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx2

ATTEMPTS = 5  # a connection that breaks is opened again, as long as the attempt before brought something
PAUSE = 30.0  # seconds without a byte after which a connection counts as broken
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # answers after which another try may succeed


@dataclass(frozen=True)
class FetchLimits:
    """What one file may cost that is fetched, from an address in a table or from a collection on the Hugging Face Hub."""

    max_mib: float  # MiB; a collection's archives have tens of thousands
    seconds: float  # for an address
    revision: str | None  # of a collection: a branch, tag or commit; None: the newest

    def __post_init__(self) -> None:
        for name in ("max_mib", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use more than 0, or fetch: null")

    def refuse_size(self, size: int, what: str) -> None:
        """Raise ValueError for a file of more bytes than are allowed."""
        if size > self.max_mib * 2**20:
            rule = f"clips.fetch.max_mib is {self.max_mib:g}; raise it, or leave the file out"
            raise ValueError(f"{what} has {size / 2**20:,.1f} MiB or more, but {rule}")


class NotFetchedError(ValueError):
    """Failure of a fetch that another try may mend: a connection, a busy server, a time limit. What came stays for that try."""


class AddressFetcher:
    """Fetcher of the files that a table names by address. `left_out` has those that can't be had, `broken` what another try may mend.

    A file lies in `folder` under a hash of its address, with the address's ending if that is one of `suffixes`, else with the first.
    """

    def __init__(self, folder: Path, limits: FetchLimits, suffixes: Sequence[str], left_out: MutableMapping[str, str]) -> None:
        self.folder, self.limits, self.suffixes, self.left_out = folder, limits, suffixes, left_out
        self.broken: list[str] = []

    def place(self, address: str) -> Path:
        """Return where the file of an address is kept."""
        suffix = PurePosixPath(urlsplit(address).path).suffix.lower()
        name = hashlib.sha256(address.encode()).hexdigest()[:12]
        return self.folder / (name + (suffix if suffix in self.suffixes else self.suffixes[0]))

    def fetch(self, address: str, checksum: str | None) -> bool:
        """Fetch the file of an address and return whether it is there."""
        try:
            fetch_file(address, self.place(address), self.limits, checksum)
        except NotFetchedError as error:
            self.broken.append(str(error))
            return False
        except ValueError as error:
            self.left_out[address] = str(error).removeprefix(f"{address} ")
            return False
        return True


def fetch_file(address: str, place: Path, limits: FetchLimits, checksum: str | None = None) -> None:
    """Fetch an address (http or https) to `place`, or leave the file there if it came earlier; `checksum` is a sha256 or md5 in hex.

    The bytes go to PLACE.partial, which takes the place when it is whole. A second call goes on where the first one broke off, if the
    server says that the file is still the same. Raises NotFetchedError for a fault that may pass, and ValueError for one that stays: a
    kind of address that is not allowed, an answer such as 404, too many bytes, another checksum. The message names the address.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"{address} is no http or https address; use one of those")
    partial, mark = place.with_name(f"{place.name}.partial"), place.with_name(f"{place.name}.mark")
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + limits.seconds
        for attempt in range(ATTEMPTS):
            before = _count_bytes(partial)
            try:
                _fetch_rest(address, partial, mark, limits, end)
                break
            except httpx2.TransportError as error:
                if attempt + 1 == ATTEMPTS or _count_bytes(partial) <= before:
                    raise NotFetchedError(f"{address} broke off ({error or type(error).__name__}); start again to go on with it") from None
            except httpx2.InvalidURL as error:
                raise ValueError(f"{address} is no address that can be fetched ({error})") from None
        mark.unlink(missing_ok=True)
    check_sum(partial if partial.exists() else place, checksum, address)
    if partial.exists():
        partial.replace(place)


def _fetch_rest(address: str, partial: Path, mark: Path, limits: FetchLimits, end: float) -> None:
    """Fetch what is missing of a partial file. `mark` holds what the server calls the version that the partial file began with."""
    size, known = _count_bytes(partial), mark.read_text() if mark.is_file() else ""
    headers = {"Accept-Encoding": "identity"}  # bytes as they are stored, because places in the file are counted
    if size and known:
        headers |= {"Range": f"bytes={size}-", "If-Range": known}
    with httpx2.stream("GET", address, headers=headers, follow_redirects=True, timeout=PAUSE) as answer:
        if answer.status_code in TRANSIENT:
            raise NotFetchedError(f"{address} was answered with {answer.status_code}; start again later")
        if answer.status_code == 416:  # nothing is behind the end, but what came can't be told from another version
            partial.unlink()
            raise NotFetchedError(f"{address} has another size than before; start again to fetch it from its beginning")
        if answer.status_code not in (200, 206):
            raise ValueError(f"{address} was answered with {answer.status_code}, which gives no file; correct it, or leave it out")
        first = size if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length")
        total = first + int(length) if length else None
        limits.refuse_size(total or 0, address)
        # A weak mark (W/) does not promise the same bytes, so a file with one is fetched from its beginning again.
        tag = answer.headers.get("ETag", "")
        mark.write_text(tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", ""))
        with partial.open("r+b" if first else "wb") as file:
            file.seek(first)
            file.truncate()
            for block in answer.iter_raw():  # as they come: blocks of a stated size would be lost in part when a connection breaks
                file.write(block)
                limits.refuse_size(file.tell(), address)
                if time.monotonic() > end:
                    took = f"took longer than clips.fetch.seconds, {limits.seconds:g}"
                    raise NotFetchedError(f"{address} {took}; start again to go on with it")
    if total is not None and _count_bytes(partial) != total:
        raise httpx2.ReadError(f"{_count_bytes(partial)} of {total} bytes came")


def check_sum(file: Path, checksum: str | None, what: str) -> None:
    """Raise ValueError for a file with another sha256 or md5 than the stated one, and remove it."""
    if not checksum:
        return
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "md5" if len(checksum) == 32 else "sha256").hexdigest()
    if found != checksum.lower():
        file.unlink()
        raise ValueError(f"{what} has the checksum {found}, not {checksum}; correct the table, or leave it out")


def _count_bytes(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
