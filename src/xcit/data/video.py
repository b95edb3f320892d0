"""Videos frame by frame: read upright with their timestamps, written as MP4 with the same ones.

What a file may hold and what becomes of it:

=========================  ===========================================================================================
variable frame rate        every frame keeps its time
rotation, mirroring        as its metadata says, applied to the pixels (to the nearest quarter turn)
odd height or width        H.264 has none: written with the last row or column twice
sound                      is not copied
several video streams      the first that is no cover picture
damaged or cut off         the frames that can be decoded; ``VideoReader.problem`` then says so
=========================  ===========================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from xcit.errors import BackendError, DataError, ShapeError
from xcit.files import replacing

try:
    import av
except ModuleNotFoundError:
    raise BackendError('Videos are read with PyAV, which is not installed: pip install "xcit[video]"') from None

FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc,ivf,nut,yuv4mpegpipe"
"""The containers that are read, by content. Playlists are left out on purpose: they would open other files."""

QUALITY = 18
"""x264's constant rate factor: smaller is better and larger, 18 looks like the original."""


class VideoFrame(NamedTuple):
    """One picture of a video."""

    image: np.ndarray
    """(H, W, 3) uint8, upright."""
    pts: int
    """When it is shown, in units of the video's ``time_base``."""
    seconds: float
    """The same in seconds."""


class VideoReader:
    """A video that is open for reading; a context manager.

    Args:
        path: a file of one of ``FORMATS``.

    Attributes:
        path: the file.
        num_frames: how many the file says that it holds; None if it does not say.
        time_base: unit of the timestamps in seconds.
        has_sound: whether it has a sound track too.
        problem: when all frames have been read: what was wrong with the file, in one sentence, or None.

    Raises:
        DataError: the file is missing, empty, no video or too damaged to be opened, or has sound only; the message
            names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.problem: str | None = None
        self._check_file()
        try:
            self._container = av.open(str(self.path), options={"format_whitelist": FORMATS}, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: is not a video that can be read, or one whose end is missing ({_reason(error)})."
            ) from None
        streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        self.has_sound = bool(self._container.streams.audio)
        if not streams:
            self._container.close()
            what = "sound only" if self.has_sound else "no video stream"
            raise DataError(f"{self.path}: holds {what}; there are no frames to look at.")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        self.num_frames: int | None = self._stream.frames or None
        self.time_base = Fraction(self._stream.time_base or 0)

    def _check_file(self) -> None:
        try:
            with self.path.open("rb") as file:
                if not file.read(1):
                    raise DataError(f"{self.path}: is empty (0 bytes).")
        except FileNotFoundError:
            raise DataError(f"{self.path}: there is no such file.") from None
        except IsADirectoryError:
            raise DataError(f"{self.path}: is a folder, not a video.") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}.") from None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames in the order in which they are shown, once.

        Timestamps are strictly increasing: a frame without one, or with one that was there already, comes one unit
        after the frame before it. Frames that change their size are scaled to the first one's.

        Raises:
            DataError: not one frame can be decoded.
        """
        num_frames, pts, end = 0, None, 0.0
        size: dict[str, int] = {}
        self._num_damaged = 0
        for frame in self._decoded():
            stated = frame.pts if frame.pts is not None else 0
            pts = stated if pts is None else max(stated, pts + 1)
            size = size or {"width": frame.width, "height": frame.height}
            image = _upright(frame.to_ndarray(format="rgb24", **size), _display_matrix(frame))
            num_frames += 1
            seconds = float(pts * self.time_base)
            end = seconds + float((frame.duration or 0) * self.time_base)
            yield VideoFrame(np.ascontiguousarray(image), pts, seconds)
        if not num_frames:
            raise DataError(f"{self.path}: holds no frame that can be decoded.")
        self.problem = self._what_is_wrong(num_frames, end)

    def _decoded(self) -> Iterator[Any]:
        """Yield PyAV's frames, and count the packets that could not be decoded."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError):  # nothing more can be read; what was begun is still to come out
                self._num_damaged += 1
                packet = None
            try:
                frames = self._stream.codec_context.decode(None) if packet is None else packet.decode()
            except av.error.EOFError:  # all had come out already
                frames = []
            except (av.error.FFmpegError, OSError):
                self._num_damaged += 1
                frames = []
            for frame in frames:
                self._num_damaged += bool(frame.is_corrupt)
                yield frame
            if packet is None:
                return

    def _what_is_wrong(self, num_frames: int, end: float) -> str | None:
        stated = self._stream.duration
        duration = (
            None if stated is None else float(stated * self.time_base + (self._stream.start_time or 0) * self.time_base)
        )
        if duration is None and self._container.duration and len(self._container.streams) == 1:
            duration = ((self._container.start_time or 0) + self._container.duration) / av.time_base
        a_frame = 1 / float(self._stream.average_rate or 25)
        if duration is not None and end < duration - max(0.1, 2 * a_frame):
            of = f" of {self.num_frames}" if self.num_frames and self.num_frames > num_frames else ""
            return (
                f"{self.path}: is cut off or damaged: {num_frames}{of} frames, up to {end:.2f} s of "
                f"{duration:.2f} s, could be decoded."
            )
        if self._num_damaged:
            return f"{self.path}: is damaged; {num_frames} frames could be decoded, not all of them whole."
        return None


class VideoWriter:
    """Takes pictures and their times and encodes them as H.264 in an MP4 file; see ``write_video``."""

    def __init__(self, path: Path, time_base: Fraction) -> None:
        self._path, self._time_base = path, time_base
        self._container: Any = None
        self.num_frames = 0
        """Pictures taken so far."""

    def write(self, image: np.ndarray, pts: int) -> None:
        """Add a picture.

        Args:
            image: (H, W, 3) uint8; all of one size. An odd height or width becomes even by a second last row or column.
            pts: when it is shown, in units of the time base; more than that of the picture before.

        Raises:
            ShapeError: not such an array, or of another size than the first.
            BackendError: PyAV has no H.264 encoder here.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ShapeError(f"A frame is (H, W, 3) of uint8; got {image.shape} of {image.dtype}.")
        image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*image.shape[:2])
        if image.shape[:2] != (self._stream.height, self._stream.width):
            raise ShapeError(
                f"The video's frames are {self._stream.height} x {self._stream.width}; got one of "
                f"{image.shape[0]} x {image.shape[1]}."
            )
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = pts, self._time_base
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def _open(self, height: int, width: int) -> None:
        if "libx264" not in av.codecs_available:
            raise BackendError('This PyAV has no H.264 encoder (libx264); install its own wheel: pip install "av"')
        # the time at which the first frame stands is stored in this unit, which is a thousandth otherwise
        options = {"movie_timescale": str(self._time_base.denominator)}
        self._container = av.open(str(self._path), mode="w", format="mp4", options=options)
        # no B-frames: frames are stored in the order in which they are shown, from the first timestamp on
        self._stream = self._container.add_stream("libx264", options={"crf": str(QUALITY), "bf": "0"})
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = self._time_base

    def close(self) -> None:
        """Encode what is waiting and end the file."""
        if self._container is not None:
            try:
                self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()
                self._container = None


@contextmanager
def write_video(path: Path, time_base: Fraction) -> Iterator[VideoWriter]:
    """Write an MP4 file that appears when the block ends without an error, whole.

    Args:
        path: where to; its folder is made if need be.
        time_base: unit of the timestamps in seconds.

    Yields:
        What takes the pictures; at least one must be written.

    Raises:
        ExportError: it cannot be written: no space, no permission, or the like.
    """
    with replacing(path) as partial:
        writer = VideoWriter(partial, time_base)
        try:
            yield writer
        finally:
            writer.close()


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return a, b, c, d of x' = a x + c y, y' = b x + d y, each of -1, 0, 1: how a frame is turned to be shown."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5] / 65536
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
            return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)
    return (1, 0, 0, 1)


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    a, b, c, d = matrix
    if a:
        return image[::d, ::a]
    return image.transpose(1, 0, 2)[::b, ::c]


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".") or type(error).__name__
