"""What an ``AttentionViewer`` sees, as files: of an image, and of a video frame by frame.

Every file appears whole or not at all.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from xcit.data.images import open_image
from xcit.errors import DataError
from xcit.files import replacing, write_atomic
from xcit.inference.attention_viewer import AttentionViewer, Looked
from xcit.inference.stream import PIXELS_A_BATCH

if TYPE_CHECKING:
    from xcit.data.video import VideoFrame, VideoReader

SAMPLE = 16
"""Frames of a video, or images of a run, from which the directions of its feature colours are found."""
MOST_FRAMES = 16
"""Frames that go through the model at once, if they are small."""

Progress = Callable[[int], None]
"""Is told how many frames are done."""


class WrittenVideo(NamedTuple):
    """What became of a video."""

    num_frames: int
    """Frames that were written."""
    interrupted: bool
    """Ctrl-C ended it; the files hold the frames up to there."""
    problem: str | None
    """What was wrong with the file that was read, in one sentence."""
    has_sound: bool
    """It has sound, which is not in what was written."""


def write_image(viewer: AttentionViewer, path: Path, stem: Path) -> list[Path]:
    """Look at an image file and write all that the viewer's kinds ask for.

    Args:
        viewer: what to see.
        path: the image.
        stem: what the files' names begin with.

    Returns:
        The files.

    Raises:
        DataError: the image cannot be read, or does not fit into memory.
        ExportError: a file cannot be written.
    """
    image = open_image(path)
    looked = viewer.look([image])[0]
    content = {end: _png(picture) for end, picture in viewer.pictures(image, looked).items()}
    if "raw" in viewer.kinds:
        assert looked.attention is not None
        content["_attention.npy"] = _npy(looked.attention.patches[0].astype(np.float32))
        content["_attention.json"] = _json({"image": str(path)} | viewer.facts(looked))
    if "xca" in viewer.kinds:
        content["_xca.npy"] = _npy(np.stack(viewer.channels(image)).astype(np.float32))
    written = []
    for end, data in content.items():
        written.append(stem.with_name(stem.name + end))
        write_atomic(written[-1], data)
    return written


def fit_common_basis(viewer: AttentionViewer, paths: Sequence[Path]) -> None:
    """Fit the viewer's feature colours to some of these images, evenly chosen; those that cannot be read do not count.

    Raises:
        DataError: all their patches have the same features.
    """
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, SAMPLE).round().astype(int))]
    features = []
    for path in chosen:
        try:
            features.append(viewer.features(open_image(path)))
        except DataError:
            continue
    if features:
        viewer.fit_basis(features)


def write_video(
    viewer: AttentionViewer, path: Path, stem: Path, progress: Progress = lambda done: None
) -> WrittenVideo:
    """Look at a video frame by frame and write all that the viewer's kinds ask for: MP4, without sound.

    Every frame keeps its time. A raw array is (frames, heads, Hp, Wp); feature colours have one basis, fitted to
    ``SAMPLE`` frames at most, evenly chosen; channel attention is that of the first frame. Ctrl-C ends the files
    at the last frame that was done.

    Args:
        viewer: what to see. Its feature basis is replaced by the video's.
        path: the video.
        stem: what the files' names begin with.
        progress: is told how many frames are done.

    Raises:
        DataError: nothing of the video can be decoded, or a frame does not fit into memory.
        BackendError: PyAV is missing.
        ExportError: a file cannot be written.
    """
    from xcit.data.video import VideoReader

    if "pca" in viewer.kinds:
        with VideoReader(path) as video:
            viewer.fit_basis([viewer.features(image) for image in _sample(video)])
    with VideoReader(path) as video:
        frames = iter(video)
        first = next(frames)  # before any file is begun: it raises if there is none
        height, width = first.image.shape[:2]
        seen = viewer.whole.seen_size(height, width)
        at_once = max(1, min(MOST_FRAMES, PIXELS_A_BATCH // (4 * seen[0] * seen[1])))
        done, seconds, kept, interrupted = 0, [], [], False
        facts: dict[str, Any] = {}
        with ExitStack() as stack:
            sink = _VideoFiles(stack, stem, video.time_base)
            try:
                for batch in _batches(itertools.chain([first], frames), at_once):
                    images = [Image.fromarray(frame.image) for frame in batch]
                    for frame, image, looked in zip(batch, images, viewer.look(images), strict=True):
                        drawn = viewer.moving_pictures(image, looked)
                        sink.write(drawn, looked if "raw" in viewer.kinds else None, frame.pts)
                        done += 1
                        seconds.append(frame.seconds)
                        if looked.attention is not None:
                            kept.append([float(share) for share in looked.attention.own[0]])
                            facts = facts or viewer.facts(looked)
                        progress(done)
            except KeyboardInterrupt:
                interrupted = True
            if not done:  # nothing to keep
                raise KeyboardInterrupt
        if "raw" in viewer.kinds:
            about = {"video": str(path)} | facts | {"class_token_keeps": kept, "seconds": seconds}
            write_atomic(stem.with_name(f"{stem.name}_attention.json"), _json(about))
        if "xca" in viewer.kinds:
            image = Image.fromarray(first.image)
            matrices = viewer.channels(image)
            write_atomic(stem.with_name(f"{stem.name}_xca.npy"), _npy(np.stack(matrices).astype(np.float32)))
            picture = viewer.channels_picture(matrices)
            write_atomic(stem.with_name(f"{stem.name}_xca.png"), _png(picture))
        return WrittenVideo(done, interrupted, video.problem, video.has_sound)


class _VideoFiles:
    """The open files of one video: an MP4 file for each kind of picture, and the raw array; begun when first needed."""

    def __init__(self, stack: ExitStack, stem: Path, time_base: Any) -> None:
        self._stack, self._stem, self._time_base = stack, stem, time_base
        self._writers: dict[str, Any] = {}
        self._array: _GrowingArray | None = None

    def write(self, pictures: dict[str, Image.Image], looked: Looked | None, pts: int) -> None:
        from xcit.data.video import write_video as write_mp4

        for end, picture in pictures.items():
            if end not in self._writers:
                path = self._stem.with_name(f"{self._stem.name}{end}.mp4")
                self._writers[end] = self._stack.enter_context(write_mp4(path, self._time_base))
            self._writers[end].write(np.asarray(picture.convert("RGB")), pts)
        if looked is not None:
            assert looked.attention is not None
            if self._array is None:
                path = self._stem.with_name(f"{self._stem.name}_attention.npy")
                self._array = self._stack.enter_context(_growing_array(path))
            self._array.append(looked.attention.patches[0].astype(np.float32))


class _GrowingArray:
    """An .npy file that is written row by row, so that a long video's array need not fit into memory."""

    def __init__(self, file: Any) -> None:
        self._file, self._rows, self._shape = file, 0, (0,)

    def append(self, row: np.ndarray) -> None:
        if not self._rows:
            self._shape, self._dtype = row.shape, row.dtype
            self._write_header()
        self._file.write(np.ascontiguousarray(row).tobytes())
        self._rows += 1

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first number to grow
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def _growing_array(path: Path) -> Iterator[_GrowingArray]:
    with replacing(path) as partial, partial.open("xb") as file:
        array = _GrowingArray(file)
        yield array
        array.close()


def _sample(video: VideoReader) -> list[Image.Image]:
    """Return at most ``SAMPLE`` frames, evenly spaced over the video whatever its length is."""
    kept: list[VideoFrame] = []
    step = 1
    for i, frame in enumerate(video):
        if i % step:
            continue
        kept.append(frame)
        if len(kept) > SAMPLE:
            kept, step = kept[::2], 2 * step
    return [Image.fromarray(frame.image) for frame in kept]


def _batches(frames: Iterator[VideoFrame], at_once: int) -> Iterator[list[VideoFrame]]:
    while batch := list(itertools.islice(frames, at_once)):
        yield batch


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")
