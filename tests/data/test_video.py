"""Videos in and out: times, turns, sizes, and files that are broken in every way."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from xcit.data.video import VideoReader, write_video
from xcit.data.video_files import find_videos, is_video
from xcit.errors import DataError, ExportError, ShapeError

TIMES = [0, 20, 50, 60, 100, 111, 200]  # in 1/600 s: no two gaps alike
CORNERS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "grey": (128, 128, 128)}


def picture(height=32, width=48, shade=0):
    """A picture whose corners are red, green (right), blue (below) and grey."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    y, x = height // 2, width // 2
    image[:y, :x], image[:y, x:], image[y:, :x], image[y:, x:] = CORNERS.values()
    return np.clip(image.astype(int) + shade, 0, 255).astype(np.uint8)


def corners(image):
    """The names of a picture's corners: upper left, upper right, lower left, lower right."""
    h, w = image.shape[0] // 4, image.shape[1] // 4
    colours = [image[h, w], image[h, -w], image[-h, w], image[-h, -w]]
    return [min(CORNERS, key=lambda name: np.abs(c.astype(int) - CORNERS[name]).sum()) for c in colours]


def write_raw(path, images, times=None, codec="libx264", pix_fmt="yuv420p", sound=False, options=None, **kwargs):
    """Write a file with PyAV alone."""
    times = times or [20 * i for i in range(len(images))]
    with av.open(str(path), "w", options=options or {}, **kwargs) as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        voice = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for image, pts in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 8000, 0
            container.mux(voice.encode(samples))
            container.mux(voice.encode(None))
    return path


def turn(path, matrix):
    """Write a display matrix a, b, c, d into an MP4 file's track header."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(65536 * each) for each in matrix)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_frames_come_with_their_times(tmp_path):
    images = [picture(shade=5 * i) for i in range(len(TIMES))]
    with VideoReader(write_raw(tmp_path / "v.mp4", images, TIMES)) as video:
        assert video.num_frames == len(TIMES)
        assert not video.has_sound
        frames = list(video)
        assert [frame.pts * video.time_base for frame in frames] == [Fraction(t, 600) for t in TIMES]
        assert [frame.seconds for frame in frames] == [pytest.approx(t / 600) for t in TIMES]
        assert video.problem is None
    for frame, image in zip(frames, images, strict=True):
        assert frame.image.shape == image.shape
        assert np.abs(frame.image.astype(int) - image).mean() < 6


@pytest.mark.parametrize(
    ("matrix", "expected", "shape"),
    [
        ((1, 0, 0, 1), ["red", "green", "blue", "grey"], (32, 48)),
        ((0, 1, -1, 0), ["blue", "red", "grey", "green"], (48, 32)),  # a quarter clockwise: a phone held upright
        ((-1, 0, 0, -1), ["grey", "blue", "green", "red"], (32, 48)),
        ((0, -1, 1, 0), ["green", "grey", "red", "blue"], (48, 32)),
        ((-1, 0, 0, 1), ["green", "red", "grey", "blue"], (32, 48)),  # mirrored
        ((1, 0, 0, -1), ["blue", "grey", "red", "green"], (32, 48)),
        ((0, 1, 1, 0), ["red", "blue", "green", "grey"], (48, 32)),
    ],
)
def test_metadata_turns_and_mirrors_the_picture(tmp_path, matrix, expected, shape):
    path = write_raw(tmp_path / "v.mp4", [picture()] * 3)
    turn(path, matrix)
    with VideoReader(path) as video:
        for frame in video:
            assert frame.image.shape == (*shape, 3)
            assert corners(frame.image) == expected


def test_odd_sizes_are_read_as_they_are(tmp_path):
    path = write_raw(tmp_path / "v.mkv", [picture(33, 47)] * 2, codec="ffv1", pix_fmt="bgr0")
    with VideoReader(path) as video:
        assert [frame.image.shape for frame in video] == [(33, 47, 3)] * 2
        assert video.problem is None


def test_sound_is_noted(tmp_path):
    with VideoReader(write_raw(tmp_path / "v.mp4", [picture()] * 3, sound=True)) as video:
        assert video.has_sound
        assert len(list(video)) == 3
        assert video.problem is None  # that the sound lasts longer is none


def noise(num):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(num)]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_of_a_truncated_file_the_frames_that_are_there(tmp_path, ending):
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    path = write_raw(tmp_path / f"v.{ending}", noise(40), options=options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with VideoReader(path) as video:
        frames = list(video)
        assert 5 < len(frames) < 35
        assert video.problem
        assert "cut off or damaged" in video.problem
        assert str(len(frames)) in video.problem


def test_damage_in_the_middle_is_noticed(tmp_path):
    path = write_raw(tmp_path / "v.mp4", noise(30), options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20000] = bytes(20000)
    path.write_bytes(data)
    with VideoReader(path) as video:
        frames = list(video)
        assert frames
        assert "damaged" in (video.problem or "")


def test_what_is_no_video_is_refused_in_one_sentence(tmp_path):
    whole = write_raw(tmp_path / "whole.mp4", noise(10))
    (tmp_path / "no_index.mp4").write_bytes(whole.read_bytes()[:-3000])  # its index was at its end
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video at all\n" * 50)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n")  # a playlist
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        voice = container.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 8000, 0
        container.mux(voice.encode(samples))
        container.mux(voice.encode(None))
    for name, message in {
        "no_index.mp4": "is not a video that can be read, or one whose end is missing",
        "empty.mp4": "is empty",
        "text.mp4": "is not a video that can be read",
        "list.mp4": "is not a video that can be read",
        "folder.mp4": "is a folder",
        "sound.mp4": "holds sound only",
        "none.mp4": "there is no such file",
    }.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            VideoReader(tmp_path / name)


def test_a_video_without_frames_is_refused(tmp_path):
    path = write_raw(tmp_path / "v.mp4", noise(10), options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 8])
    with VideoReader(path) as video, pytest.raises(DataError, match="holds no frame that can be decoded"):
        list(video)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 700])
def test_what_is_written_is_read_back_with_its_times(tmp_path, first):
    path = tmp_path / "new" / "v.mp4"
    with write_video(path, Fraction(1, 600)) as writer:
        for i, pts in enumerate(TIMES):
            writer.write(picture(shade=5 * i), pts + first)
        assert writer.num_frames == len(TIMES)
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["v.mp4"]
    with VideoReader(path) as video:
        frames = list(video)
        assert [frame.pts * video.time_base for frame in frames] == [Fraction(t + first, 600) for t in TIMES]
        assert video.problem is None
    assert all(corners(frame.image) == list(CORNERS) for frame in frames)


def test_odd_sizes_are_written_with_the_last_row_and_column_twice(tmp_path):
    with write_video(tmp_path / "v.mp4", Fraction(1, 25)) as writer:
        writer.write(picture(33, 47), 0)
    with VideoReader(tmp_path / "v.mp4") as video:
        (frame,) = video
    assert frame.image.shape == (34, 48, 3)
    assert np.abs(frame.image[:33, :47].astype(int) - picture(33, 47)).mean() < 10


def test_after_an_error_there_is_no_file_and_the_old_one_stays(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"the old one")

    def write():
        with write_video(path, Fraction(1, 25)) as writer:
            writer.write(picture(), 0)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]
    assert path.read_bytes() == b"the old one"


def test_frames_are_of_one_size_and_of_bytes(tmp_path):
    def write(*images):
        with write_video(tmp_path / "v.mp4", Fraction(1, 25)) as writer:
            for i, image in enumerate(images):
                writer.write(image, i)

    with pytest.raises(ShapeError, match="uint8"):
        write(np.zeros((4, 4, 3)))
    with pytest.raises(ShapeError, match="32 x 48"):
        write(picture(), picture(64, 48))
    assert not (tmp_path / "v.mp4").exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    def write():
        with write_video(tmp_path / "file" / "v.mp4", Fraction(1, 25)) as writer:
            writer.write(picture(), 0)

    with pytest.raises(ExportError, match="could not be written"):
        write()


def test_videos_are_told_by_their_ending():
    assert is_video("a/b.MP4")
    assert is_video("clip.webm")
    assert not is_video("clip.png")
    assert not is_video("mp4")


def test_a_folders_videos_at_any_depth(tmp_path):
    for name in ("b.mp4", "sub/a.MKV", ".hidden.mp4", ".cache/c.mp4", "d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_videos(tmp_path) == [tmp_path / "b.mp4", tmp_path / "sub" / "a.MKV"]
