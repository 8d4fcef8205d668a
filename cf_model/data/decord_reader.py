"""Frames by decord instead of PyAV's decoder, of files of which decord is known to be right (params.encode.decoder).

Only files that the filter has accepted are read so, because decord does not notice damage. Times come from the packets, which PyAV reads
without decoding them, so the same code as ever decides which frame belongs to which time (VideoFile.sample). A file of which decord
can't be sure to give PyAV's frames raises ValueError, and the caller takes PyAV (clip_reader.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import av
import numpy as np

from .video_reader import PictureConverter, VideoFile

# Measured: the containers, codecs and pixels of which decord 0.6, read without jumps, gives every frame (benchmarks/results/decoders.json).
KINDS = frozenset({"mov", "matroska"})
CODECS = frozenset({"h264", "hevc", "vp9"})
PIXELS = "yuv420p"
CLOSE = 1  # grey levels by which a pixel of the first frame may differ: both convert 8-bit pixels alike, or one takes another matrix
LATE = 0.001  # seconds by which decord's time of a frame may differ from its packet's


class DecordFile(VideoFile):
    """A file that is read once, by decord."""

    def _decode_packets(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (time stamp, frame in RGB) of every frame in the order in which they are shown."""
        if not (KINDS & set(self.kind.split(",")) and self.stream.codec_context.name in CODECS):
            raise self._refuse(f"{self.kind} with {self.stream.codec_context.name}")
        if self.chosen is not None:
            raise self._refuse("which of its streams is read")
        times = self._list_times()
        with VideoFile(self.path) as other:
            stamp, first = next(iter(other.decode()))
            if first.format.name != PIXELS or other.turns or first.interlaced_frame or stamp != times[0][0]:
                raise self._refuse("its first frame")
            truth = PictureConverter()(first, first.height, first.width)
        decord = importlib.import_module("decord")
        try:
            reader = decord.VideoReader(str(self.path), num_threads=1)
            if len(reader) != len(times) or not self._agree(times, reader.get_frame_timestamp(range(len(times)))[:, 0]):
                raise self._refuse("the number or times of its frames")
            for number, (stamp, duration) in enumerate(times):
                picture = reader.next().asnumpy()
                if number == 0 and (picture.shape != truth.shape or np.abs(picture.astype(np.int16) - truth).max() > CLOSE):
                    raise self._refuse("the colours of its first frame")
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.duration = duration
                yield stamp, frame
        except (RuntimeError, StopIteration, decord.DECORDError) as error:
            raise self._refuse(" ".join(str(error).split())[:80]) from None

    def _list_times(self) -> list[tuple[int, int]]:
        """Return time stamp and duration of every frame, in the order in which they are shown, by the packets alone."""
        times = []
        for packet in self.container.demux():
            self._note_end(packet)
            if packet.stream.index == self.stream.index and packet.size:
                if packet.pts is None or packet.is_discard or packet.is_corrupt:
                    raise self._refuse("the times of its packets")
                self.packets += 1
                times.append((packet.pts, packet.duration or 0))
        if len({stamp for stamp, _ in times}) < max(1, len(times)):
            raise self._refuse("the times of its packets")
        return sorted(times)

    def _agree(self, times: list[tuple[int, int]], starts: np.ndarray) -> bool:
        """Say whether decord's times, in seconds, are those of the packets; both count from the first frame."""
        ours = np.array([stamp - times[0][0] for stamp, _ in times]) * float(self.stream.time_base)
        return bool(np.abs(starts - starts[0] - ours).max() <= LATE)

    def _refuse(self, why: str) -> ValueError:
        return ValueError(f"{self.path.name} is read by PyAV, because decord may be wrong about {why}; set encode.decoder to pyav")
