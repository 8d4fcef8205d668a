"""Video files read with PyAV, from the first frame to the last and never with a jump.

VideoFile.sample is the only place that decides which frame belongs to which time. A jump (seek) is where decoders go wrong: they
land on other frames than asked for, or hang. Unknown files are read in child processes (subprocess_reader.py); keep this module
light, because each child imports it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, VideoReformatter
from jaxtyping import UInt8

from .video import HD_LINES

# Containers that hold one film. Others that FFmpeg opens are lists of other files (hls, concat), pictures or text, whatever a name says.
CONTAINERS = frozenset({"mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "nut", "ivf", "h264", "hevc"})
ONLY_THIS_FILE = {"protocol_whitelist": "file"}
# Choice: a decoder stops at the first fault it notices; FFmpeg's default is to paint over it and to go on.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
LONGEST_SIDE = 16_384  # pixels
MOST_STRETCHED = 16  # height to width of a pixel, or width to height; more is a damaged header
# AVI states no times of display, and FFmpeg's guess goes wrong for codecs that reorder frames: these frames are counted.
COUNTED = frozenset({("avi", "h264"), ("avi", "hevc")})
# MPEG program streams state some times and FFmpeg guesses the others, by a frame too early now and then.
SLIGHTLY = 3  # usual distances between frames
PART_OF_FRAME = Fraction(9, 10)  # of its time that a film's last frame must fill, because many containers round times to milliseconds
CUT_OFF = (0.5, 0.05)  # seconds, and share of the length, by which a header that states no number of frames may promise too much
# Choice: high dynamic range is refused, because tone mapping is a matter of taste and PyAV's FFmpeg has no zscale to do it with.
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
FIT_TO_CROP = 4  # a picture of more than so many times the pixels that are needed is cropped before it is scaled


@dataclass(frozen=True)
class VideoFacts:
    """Facts of a file's largest video stream, of which every frame was decoded."""

    frames: int  # decoded
    fps: float  # as the header states it if the frames' times agree, else frames over length
    width: int  # upright and with square pixels
    height: int
    length: Fraction  # seconds from the first frame's beginning to the last frame's end
    stream: str | None = None  # which one was read, where there are several

    @property
    def seconds(self) -> float:
        return float(self.length)

    def count_frames(self, fps: float) -> int:
        """Return how many frames the file has at another rate."""
        return count_ticks(self.length, round_rate(fps))


def round_rate(fps: float) -> Fraction:
    """Return a rate as the fraction that was meant: 29.97003 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001)


def count_ticks(length: Fraction, rate: Fraction) -> int:
    """Return the number of frames in a length, at least one; the last must be there for PART_OF_FRAME of its time."""
    return max(1, math.floor(length * rate + 1 - PART_OF_FRAME))


class VideoFile:
    """A file that is read once. Every method raises ValueError, with one sentence, for what cannot be read."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path.name} is not there; check its name")
        self.path, self.frames, self.packets = path, 0, 0
        self.ends: dict[int, int] = {}  # stream -> its latest time, in its own units
        try:
            self.container = av.open(str(path), options=ONLY_THIS_FILE, metadata_errors="replace")
            self.kind = self.container.format.name
            self.stream = self._pick_stream()
            self.stream.codec_context.thread_count = 1
            self.stream.codec_context.options = STRICT
        except (FFmpegError, OSError):
            raise ValueError(f"{path.name} is not a video, or has lost its header; replace it") from None
        if not CONTAINERS & set(self.kind.split(",")):
            raise ValueError(f"{path.name} is {self.kind}, which is no container of one film; convert it to mp4")

    def _pick_stream(self) -> Any:
        """Choose the video stream with the most pixels; a cover picture is none."""
        videos = [one for one in self.container.streams.video if not one.disposition & Disposition.attached_pic]
        if not videos:
            raise ValueError(f"{self.path.name} has no video stream; replace it")
        unknown = [one for one in videos if one.codec_context is None]
        if unknown:
            raise ValueError(f"{self.path.name} has a video codec that is not known here; convert it to H.264")
        best = max(videos, key=lambda one: (one.codec_context.width * one.codec_context.height, -one.index))
        size = f"{best.codec_context.width}x{best.codec_context.height}"
        self.chosen = f"stream {best.index}, {size}, the largest of {len(videos)}" if len(videos) > 1 else None
        return best

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (time stamp, frame) of every frame in the order in which they are shown, deinterlaced; time stamps grow."""
        graph, stamps = None, deque[int]()  # a filter graph from the first interlaced frame on; it holds one or two frames
        for stamp, frame in self._decode_checked():
            if graph is None and not frame.interlaced_frame:
                yield stamp, frame
                continue
            if graph is None:
                graph = build_deinterlacer(frame)
                self.chosen = "; ".join(filter(None, [self.chosen, "interlaced: FFmpeg's bwdif made its frames whole"]))
            stamps.append(stamp)
            yield from pull_frames(graph, frame, stamps)
        if graph is not None:
            yield from pull_frames(graph, None, stamps)

    def _decode_checked(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (time stamp, frame) as coded, after all checks; the check of the file's end comes after the last frame."""
        last: int | None = None
        usual = self._usual_distance()
        for stamp, frame in self._decode_packets():
            if frame.is_corrupt:
                raise ValueError(self._tell_damage())
            if last is None:
                self._measure_picture(frame)
                self.first = stamp
            elif (frame.width, frame.height) != self.coded:
                size = f"from {self.coded[0]}x{self.coded[1]} to {frame.width}x{frame.height}"
                raise ValueError(f"{self.path.name} changes its size {size} after {self.frames} frames; cut it there")
            elif stamp < last and last - stamp <= SLIGHTLY * usual:
                stamp = last + usual
            elif stamp < last:
                raise ValueError(f"{self.path.name} goes back in time after {self.frames} frames; write it anew, as a single recording")
            elif stamp == last:
                continue  # a frame that is shown for no time
            self.frames, self.last, last, self.last_duration = self.frames + 1, stamp, stamp, int(frame.duration or 0)
            yield stamp, frame
        if last is None:
            raise ValueError(f"{self.path.name} has no frame that can be decoded; replace it")
        self._check_end()

    def _decode_packets(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield frames as FFmpeg delivers them; a frame without a time follows the one before by the stream's usual distance."""
        usual, counted = self._usual_distance(), (self.kind, self.stream.codec_context.name) in COUNTED
        stamp: int | None = None
        try:
            for packet in self.container.demux():
                self._note_end(packet)
                if packet.stream.index != self.stream.index:
                    continue
                self.packets += packet.size > 0
                if packet.is_corrupt:
                    raise ValueError(self._tell_damage())
                for frame in packet.decode():
                    known = frame.pts is not None and not counted
                    stamp = frame.pts if known else 0 if stamp is None else stamp + usual
                    yield stamp, frame
        except (FFmpegError, OSError):
            raise ValueError(self._tell_damage()) from None

    def _usual_distance(self) -> int:
        """Return the time between frames, in the stream's units, as the header states it."""
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        return max(1, round(1 / (rate * self.stream.time_base)))

    def _note_end(self, packet: Any) -> None:
        """Remember the latest time of each stream."""
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            end, index = stamp + (packet.duration or 0), packet.stream.index
            self.ends[index] = max(self.ends.get(index, end), end)

    def _measure_picture(self, frame: av.VideoFrame) -> None:
        """Set sizes and rotation from the first frame."""
        shape = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio or Fraction(1)
        pixel = Fraction(shape) if shape and shape > 0 else Fraction(1)
        self.coded = (frame.width, frame.height)
        if frame.color_trc in HDR:
            way = "convert it to SDR, as FFmpeg's filters zscale and tonemap do"
            raise ValueError(f"{self.path.name} is HDR ({HDR[frame.color_trc]}), whose colours would come out pale; {way}")
        if max(self.coded) > LONGEST_SIDE or not 1 / MOST_STRETCHED <= pixel <= MOST_STRETCHED:
            about = f"{frame.width}x{frame.height} with pixels of {pixel}"
            raise ValueError(f"{self.path.name} says it is {about}, which no video is; replace it")
        wide, tall = (round(frame.width * pixel), frame.height) if pixel >= 1 else (frame.width, round(frame.height / pixel))
        self.turns = round(frame.rotation / 90) % 4  # counter-clockwise
        self.width, self.height = (tall, wide) if self.turns % 2 else (wide, tall)

    def _check_end(self) -> None:
        """Raise ValueError if the header promises more than the file has: a number of frames, else a time."""
        promised, name = self.stream.frames, self.path.name
        streams = (one for one in self.container.streams if one.type in ("video", "audio") and one.time_base)
        latest = max((self.ends.get(one.index, 0) * one.time_base for one in streams), default=Fraction(0))
        # an AVI counts frames that were dropped, which are no packets: its packets' times are numbers of frames
        there = max(self.packets, round(latest / self.stream.time_base)) if self.kind == "avi" else self.packets
        if promised and there < promised:
            raise ValueError(f"{name} is cut off: its header promises {promised} frames, {there} are there")
        if "matroska" in self.kind and (size := read_segment_end(self.path)) and self.path.stat().st_size < size:
            there = self.path.stat().st_size
            raise ValueError(f"{name} is cut off: its header promises {size} bytes, {there} are there")
        if not promised and self.container.duration:
            seconds = self.container.duration / av.time_base
            if latest < seconds - max(CUT_OFF[0], CUT_OFF[1] * seconds):
                raise ValueError(f"{name} is cut off: its header promises {seconds:.2f} s, {float(latest):.2f} s are there")

    def _tell_damage(self) -> str:
        return f"{self.path.name} is damaged: decoding fails after {self.frames} frames; replace it"

    @property
    def facts(self) -> VideoFacts:
        """What the file turned out to be; known after its last frame."""
        length, stated = self._find_length(), self.stream.average_rate
        measured = self.frames / length
        fps = stated if stated and abs(stated - measured) < measured / 100 else measured
        return VideoFacts(self.frames, float(fps), self.width, self.height, length, self.chosen)

    def _find_length(self) -> Fraction:
        """Measure from the first frame's beginning to the last one's end, by time stamps.

        The last frame lasts as long as it says, at most as long as frames do on average: a screen recording's may claim a minute.
        """
        span = self.last - self.first
        mean = Fraction(span, self.frames - 1) if self.frames > 1 else Fraction(self._usual_distance())
        return (span + min(Fraction(self.last_duration or mean), mean)) * Fraction(self.stream.time_base)

    def sample(self, fps: float, convert: Callable[[av.VideoFrame], np.ndarray], *, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the frames nearest in time to k/fps after the first frame, from k = start on; of two as near, the earlier.

        A frame is converted when it is wanted, once. As many come as VideoFacts.count_frames says.
        """
        rate = round_rate(fps)
        step, unit = (1 / (rate * Fraction(self.stream.time_base))).as_integer_ratio()  # a time is step/unit of the stream's units
        waiting: deque[tuple[int, np.ndarray]] = deque()  # the last times, until the film is known to go on beyond them
        tick, before, part = 0, None, PART_OF_FRAME
        for stamp, frame in self.decode():
            if before is not None:
                # the earlier frame is the nearest up to the middle between both
                until = (before[0] + stamp - 2 * self.first) * unit // (2 * step) + 1
                if until > max(tick, start):
                    picture = convert(before[1])
                    waiting.extend((k, picture) for k in range(max(tick, start), until))
                tick = max(tick, until)
            before = stamp, frame
            while waiting and (waiting[0][0] * part.denominator + part.numerator) * step <= (stamp - self.first) * unit * part.denominator:
                yield waiting.popleft()[1]
        assert before is not None
        count = count_ticks(self._find_length(), rate)
        if count > max(tick, start):
            picture = convert(before[1])
            waiting.extend((k, picture) for k in range(max(tick, start), count))
        yield from (picture for k, picture in waiting if k < count)

    def fit_picture(self, frame: av.VideoFrame, height: int, width: int, convert: PictureConverter) -> UInt8[np.ndarray, "Y X 3"]:
        """Scale a frame, upright and with square pixels, so that it covers height x width, and cut its middle out."""
        tall, wide = covering_size(self.height, self.width, height, width)
        if tall * wide > FIT_TO_CROP * height * width and tall * wide > frame.width * frame.height:
            return self._crop_then_scale(frame, height, width, convert)
        picture = self.turn_picture(frame, tall, wide, convert)
        top, left = (tall - height) // 2, (wide - width) // 2
        return picture[top : top + height, left : left + width]

    def _crop_then_scale(self, frame: av.VideoFrame, height: int, width: int, convert: PictureConverter) -> np.ndarray:
        """Do as fit_picture does for a very long or tall picture, without making the part that is cut away."""
        upright = np.rot90(convert(frame, frame.height, frame.width), self.turns)
        tall, wide = covering_size(self.height, self.width, height, width)
        rows, columns = (
            min(size, max(1, round(size * part / whole)))
            for size, part, whole in zip(upright.shape, (height, width), (tall, wide), strict=False)
        )
        top, left = (upright.shape[0] - rows) // 2, (upright.shape[1] - columns) // 2
        part = np.ascontiguousarray(upright[top : top + rows, left : left + columns])
        return convert(av.VideoFrame.from_ndarray(part, format="rgb24"), height, width)

    def turn_picture(self, frame: av.VideoFrame, height: int, width: int, convert: PictureConverter) -> UInt8[np.ndarray, "Y X 3"]:
        """Scale a frame to height x width and turn it upright."""
        if not self.turns:
            return convert(frame, height, width)
        size = (width, height) if self.turns % 2 else (height, width)
        return np.rot90(convert(frame, *size), self.turns)


class PictureConverter:
    """Frames to RGB arrays of a size; it keeps FFmpeg's scaler, which takes a millisecond to make."""

    def __init__(self) -> None:
        self.scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "Y X 3"]:
        matrix, full = None, None
        if not frame.format.is_rgb:
            # Choice: untagged video is what players take it for, BT.709 from HD_LINES on.
            known = frame.colorspace in list(Colorspace)
            matrix = frame.colorspace if known else Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
            full = ColorRange.JPEG if frame.color_range == ColorRange.JPEG else None
        scaled = self.scaler.reformat(
            frame, width=width, height=height, format="rgb24", src_colorspace=matrix, src_color_range=full, threads=1
        )
        plane = scaled.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:height, : 3 * width]
        return rows.reshape(height, width, 3)


def build_deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    """Make a filter graph that fills in the lines of the other field in interlaced frames and passes on others as they are."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
    return graph


def pull_frames(graph: av.filter.Graph, frame: av.VideoFrame | None, stamps: deque[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Hand a frame to a graph, or the film's end, and yield (time stamp, frame) of what it has ready, in the order of going in."""
    graph.push(frame)
    while stamps:
        try:
            made = graph.pull()
        except (BlockingIOError, EOFError):
            return
        yield stamps.popleft(), made


def read_segment_end(path: Path) -> int | None:
    """Return where a Matroska file must end, in bytes, as its segment states; None if it does not, as in a live recording.

    A file is an EBML header and a segment; each is an id of 4 bytes, a size, and so many bytes. A size has 1 to 8 bytes, as the place of
    its first 1 bit says; all ones stand for unknown.
    """
    with path.open("rb") as file:
        place = 0
        for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
            file.seek(place)
            head = file.read(12)
            if head[:4] != element or len(head) < 12:
                return None
            length = 9 - head[4].bit_length()
            if not 1 <= length <= 8:
                return None
            size = int.from_bytes(head[4 : 4 + length], "big") & ((1 << 7 * length) - 1)
            unknown = size == (1 << 7 * length) - 1
            place += 4 + length + (size if element[0] == 0x1A else 0)
        return None if unknown else place + size


def covering_size(tall: int, wide: int, height: int, width: int) -> tuple[int, int]:
    """Return the smallest size with the proportions of tall x wide that covers height x width."""
    covering = max(width, round(wide * height / tall))
    return max(height, round(tall * covering / wide)), covering


def probe_video(path: Path) -> VideoFacts:
    """Decode a file to its end and return its facts. A ValueError says if it is damaged or no video."""
    with VideoFile(path) as file:
        for _ in file.decode():
            pass
        return file.facts


def read_pieces(
    path: Path, *, height: int, width: int, fps: float, size: int, start: int = 0, frames: int | None = None, opener: Any = VideoFile
) -> Iterator[UInt8[np.ndarray, "V Y X 3"]]:
    """Read the frames nearest in time to start/fps, (start + 1)/fps, …, resized to cover height x width and cut to their middle.

    A file that has this size and rate already comes back as decoded. `size` frames come at a time, so that a long film never lies in
    memory; `frames` limits their number, and raises ValueError if the file has fewer. `opener`: VideoFile, or a class of its kind.
    """
    convert, count = PictureConverter(), 0
    with opener(path) as file:
        pictures = file.sample(fps, lambda frame: file.fit_picture(frame, height, width, convert), start=start)
        piece: list[np.ndarray] = []
        for picture in pictures:
            piece.append(picture)
            count += 1
            if len(piece) == size or count == frames:
                yield np.stack(piece)
                piece = []
            if count == frames:
                return
        if frames is not None:
            whole = f"{path.name} has {start + count} frames at {fps:g} fps"
            raise ValueError(f"{whole}, fewer than the {start + frames} asked for; use a longer video")
        if piece:
            yield np.stack(piece)


def read_video(path: Path, *, height: int, width: int, fps: float, frames: int | None = None) -> UInt8[np.ndarray, "V Y X 3"]:
    """Read as `read_pieces` does, all at once."""
    return np.concatenate(list(read_pieces(path, height=height, width=width, fps=fps, size=256, frames=frames)))
