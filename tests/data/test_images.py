"""Image files of every kind that users have, written here by Pillow, read back against values known beforehand."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from xcit.data.images import EXTENSIONS, array_to_image, convert_image, find_images, open_image
from xcit.errors import ConfigError, DataError

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def quadrants(size=(40, 20)):
    """Left half red, right half white, a black top left quarter."""
    image = Image.new("RGB", size, WHITE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    image.paste(BLACK, (0, 0, size[0] // 2, size[1] // 2))
    return image


def corners(image):
    """Colours just inside the top left, top right, bottom left and bottom right."""
    w, h = image.size
    return [image.getpixel(at) for at in ((1, 1), (w - 2, 1), (1, h - 2), (w - 2, h - 2))]


def near(a, b, tolerance=3):
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


# --- opening: what a file may hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["png", "bmp", "tif", "webp", "gif", "ppm", "tga", "ico", "pcx", "qoi", "sgi", "jp2"]
)
def test_rgb_in_every_format(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    options = {"lossless": True} if ending == "webp" else {"sizes": [(40, 20)]} if ending == "ico" else {}
    quadrants().save(path, **options)
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (40, 20)
    assert all(near(got, want) for got, want in zip(corners(image), [BLACK, WHITE, RED, WHITE], strict=True))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path):
    quadrants((64, 32)).save(tmp_path / "a.avif", quality=95)
    assert all(near(a, b, 12) for a, b in zip(corners(open_image(tmp_path / "a.avif")), UPRIGHT, strict=True))


def test_content_decides_not_the_ending(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    quadrants().save(tmp_path / "photo.dat", format="PNG")
    assert open_image(tmp_path / "photo.dat").getpixel((1, 18)) == RED


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_red_is_red(tmp_path, ending):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / f"a.{ending}")
    assert near(open_image(tmp_path / f"a.{ending}").getpixel((16, 16)), RED)


def test_cmyk_black_ink(tmp_path):
    Image.new("CMYK", (32, 32), (0, 0, 0, 255)).save(tmp_path / "a.tif")
    assert open_image(tmp_path / "a.tif").getpixel((16, 16)) == BLACK


def test_lab_red_is_red(tmp_path):
    Image.new("LAB", (8, 8), (136, 208, 195)).save(tmp_path / "a.tif")  # L* 53, a* 80, b* 67: sRGB's red
    assert near(open_image(tmp_path / "a.tif").getpixel((4, 4)), RED, 12)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending, in_chans):
    gradient = np.linspace(0, 65535, 256).astype(np.uint16)  # k * 257, which is k in 8 bits
    Image.fromarray(np.tile(gradient, (4, 1))).save(tmp_path / f"a.{ending}")
    got = np.asarray(open_image(tmp_path / f"a.{ending}", in_chans))
    want = np.tile(np.arange(256), (4, 1))
    np.testing.assert_array_equal(got, want if in_chans == 1 else np.repeat(want[..., None], 3, axis=2))


def test_16_bit_grey_is_rounded(tmp_path):
    values = np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16)  # 128.5 and 65406.5 are the halves
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png", 1)).tolist() == [[0, 0, 1, 254, 255, 255]]


def test_big_endian_16_bit_tiff(tmp_path):
    Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0, 257 * 200)).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif", 1)).tolist() == [[0, 200]]


def test_16_bit_grey_with_a_transparent_value(tmp_path):
    values = np.array([[0, 300, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=300)
    assert np.asarray(open_image(tmp_path / "a.png", 1)).tolist() == [[0, 255, 255]]


def test_16_bit_rgb_png(tmp_path):
    """Pillow cannot write one: two pixels, 16 bits a channel, by hand."""
    rows = b"\0" + struct.pack(">6H", 257 * 10, 257 * 20, 257 * 30, 65535, 0, 257 * 128)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert np.asarray(open_image(tmp_path / "a.png")).tolist() == [[[10, 20, 30], [255, 0, 128]]]


@pytest.mark.parametrize(("top", "unit"), [(1.0, 1 / 255), (255.0, 1.0), (65535.0, 257.0)])
def test_float_tiff(tmp_path, top, unit):
    values = (np.arange(256, dtype=np.float32) * np.float32(unit)).clip(0, top)[None]
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif", 1)).tolist() == [list(range(256))]


@pytest.mark.parametrize("values", [[-1000.0, 3000.0], [0.0, 1e6], [0.5, np.nan], [0.0, np.inf]])
def test_float_tiff_without_one_reading_is_refused(tmp_path, values):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: its floating-point values go from .* black and white"):
        open_image(tmp_path / "a.tif")


def test_32_bit_integers_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="its integer values go from 0 to 70000"):
        open_image(tmp_path / "a.tif")


def test_grey_and_1_bit(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((3, 3)) == (77, 77, 77)
    assert open_image(tmp_path / "grey.png", in_chans=1).getpixel((3, 3)) == 77
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert open_image(tmp_path / "bit.png").getpixel((3, 3)) == WHITE


def test_rgb_to_grey_weighs_the_colours_as_the_eye_does(tmp_path):
    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", in_chans=1).getpixel((3, 3)) == round(0.587 * 255)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_rgba_is_composited_on_white(tmp_path, ending, in_chans):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 51), (0, 0, 0, 255)])  # see-through, a fifth, solid
    image.save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    got = np.asarray(open_image(tmp_path / f"a.{ending}", in_chans)).reshape(3, -1)
    np.testing.assert_allclose(got, np.array([[255], [204], [0]]).repeat(in_chans, 1), atol=1)


def test_grey_with_alpha(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putdata([(10, 0), (10, 255)])
    image.save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png", 1)).tolist() == [[255, 10]]


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_palette_with_transparency_is_composited_on_white(tmp_path, ending):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / f"a.{ending}", transparency=0)
    opened = open_image(tmp_path / f"a.{ending}")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]


def test_palette_with_an_alpha_for_every_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=bytes([51, 255]))
    opened = open_image(tmp_path / "a.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(204, 204, 204), RED]


def test_rgb_png_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), RED)
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    opened = open_image(tmp_path / "a.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]


UPRIGHT = [BLACK, WHITE, RED, WHITE]  # top left, top right, bottom left, bottom right


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [  # how the pixels of an upright picture lie in a file with this tag (EXIF 2.3, table of Orientation)
        (1, None),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_exif_orientation(tmp_path, ending, orientation, stored):
    picture = quadrants((64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}
    (picture.transpose(stored) if stored is not None else picture).save(tmp_path / f"a.{ending}", exif=exif, **options)
    opened = open_image(tmp_path / f"a.{ending}")
    assert opened.size == (64, 32)
    assert all(near(got, want, 12) for got, want in zip(corners(opened), UPRIGHT, strict=True))


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_first_frame_of_several(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLACK, WHITE)]
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert open_image(tmp_path / f"a.{ending}").getpixel((4, 4)) == RED


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (30, 20_000)])
def test_extreme_sizes_are_opened(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == size


def test_an_icc_profile_is_ignored(tmp_path):
    Image.new("RGB", (4, 4), (10, 200, 30)).save(tmp_path / "a.png", icc_profile=b"not a profile")
    assert open_image(tmp_path / "a.png").getpixel((1, 1)) == (10, 200, 30)


# --- opening: what is refused -----------------------------------------------------------------------------------------


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


def test_zero_bytes(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"a\.jpg: is empty \(0 bytes\)\.") as error:
        open_image(tmp_path / "a.jpg")
    one_sentence(error)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated(tmp_path, ending, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending))
    whole = buffer.getvalue()
    (tmp_path / f"a.{ending}").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=rf"a\.{ending}: is (damaged or incomplete|not an image)") as error:
        open_image(tmp_path / f"a.{ending}")
    one_sentence(error)


def test_damaged_inside(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    data[2000:2100] = bytes(100)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("text", [b"hello, this is text", b"<html><body>404</body></html>", b"version https://git-lfs"])
def test_text_named_jpg_shows_how_it_begins(tmp_path, text):
    (tmp_path / "a.jpg").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.jpg: is not an image") as error:
        open_image(tmp_path / "a.jpg")
    assert repr(text[:10])[:-1] in one_sentence(error)


def test_eps_is_never_handed_to_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", format="EPS")
    with pytest.raises(DataError, match="not an image in a format"):
        open_image(tmp_path / "a.jpg")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("1", (1000, 1000)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    with pytest.raises(DataError, match=r"claims more than 800,000 pixels.*scale it down") as error:
        open_image(tmp_path / "a.png")
    one_sentence(error)


def test_a_header_that_claims_a_huge_image(tmp_path):
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(DataError, match="claims more than"):
        open_image(tmp_path / "a.png")


def test_missing_file_names_its_neighbour(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "kitten.png")
    with pytest.raises(DataError, match=r"kiten\.png: there is no such file; did you mean '.*kitten\.png'\?"):
        open_image(tmp_path / "kiten.png")
    with pytest.raises(DataError, match="nor a folder"):
        open_image(tmp_path / "nowhere" / "kitten.png")
    with pytest.raises(DataError, match="is a folder"):
        open_image(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(DataError, match=r"a\.png: cannot be read: Permission denied"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("in_chans", [2, 4, 13])
def test_other_numbers_of_channels_are_refused(tmp_path, in_chans):
    with pytest.raises(ConfigError, match=f"takes {in_chans} channels"):
        open_image(tmp_path / "never-read.png", in_chans)


def test_the_file_is_closed(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert image.getpixel((0, 0)) == RED


# --- images and arrays in memory --------------------------------------------------------------------------------------


def test_convert_image_leaves_the_argument_alone():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert convert_image(image).getpixel((0, 0)) == WHITE
    assert image.mode == "RGBA"


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (np.array([[0, 200]], dtype=np.uint8), [[0, 200]]),
        (np.array([[[0], [200]]], dtype=np.uint8), [[0, 200]]),
        (np.array([[0, 257 * 200]], dtype=np.uint16), [[0, 200]]),
        (np.array([[0.0, 1.0]], dtype=np.float32), [[0, 255]]),
        (np.array([[[255, 0, 0]]], dtype=np.uint8), [[[255, 0, 0]]]),
        (np.array([[[1.0, 0, 0, 1.0]]]), [[[255, 0, 0, 255]]]),
    ],
)
def test_arrays(array, want):
    assert np.asarray(array_to_image(array)).tolist() == want


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape is \(3, 8, 8\)"),
        (np.zeros((0, 8), np.uint8), "shape is"),
        (np.zeros((8, 8), np.int64), "is of int64"),
        (np.full((8, 8), 2.0), "go from 2 to 2"),
        (np.full((8, 8), np.nan), "go from nan to nan"),
    ],
)
def test_arrays_that_are_refused(array, message):
    with pytest.raises(DataError, match=message):
        array_to_image(array)


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        "img10.png",
        "img2.PNG",
        "img1.jpg",
        "notes.txt",
        ".hidden.png",
        "sub/b.webp",
        "sub/a.tiff",
        "sub/.cache/c.png",
        "sub/deep/d.jpeg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(paths):
    return [path.as_posix() for path in paths]


def test_a_folder_recursively_in_natural_order(tree):
    got = names(find_images(["."]))
    assert got == ["img1.jpg", "img2.PNG", "img10.png", "sub/a.tiff", "sub/b.webp", "sub/deep/d.jpeg"]


def test_sources_keep_their_order_and_come_once(tree):
    got = names(find_images(["sub", "img10.png", "sub/b.webp", "./img10.png", str(tree / "sub")]))
    assert got == ["sub/a.tiff", "sub/b.webp", "sub/deep/d.jpeg", "img10.png"]


def test_patterns(tree):
    assert names(find_images(["img*.*"])) == ["img1.jpg", "img2.PNG", "img10.png"]
    assert names(find_images(["**/*.jpeg"])) == ["sub/deep/d.jpeg"]
    assert names(find_images(["s?b"])) == ["sub/a.tiff", "sub/b.webp", "sub/deep/d.jpeg"]
    assert names(find_images([str(tree / "*.png")])) == [(tree / "img10.png").as_posix()]
    assert "notes.txt" in names(find_images(["*"]))  # as the shell would: everything that matches


def test_a_name_with_brackets_is_a_name_when_it_exists(tree):
    (tree / "a[1].png").touch()
    assert names(find_images(["a[1].png"])) == ["a[1].png"]


def test_named_files_are_taken_whatever_they_are(tree):
    assert names(find_images(["notes.txt", ".hidden.png", "missing.png"])) == [
        "notes.txt",
        ".hidden.png",
        "missing.png",
    ]


def test_linked_folders_are_followed_once(tree):
    (tree / "sub" / "loop").symlink_to(tree)
    outside = tree / "empty"
    (outside / "e.png").touch()
    (tree / "sub" / "link").symlink_to(outside)
    got = names(find_images(["sub"]))
    assert "sub/link/e.png" in got
    assert len(got) < 20


def test_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert find_images(["~/img1.jpg"]) == [tree / "img1.jpg"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "No images were given"),
        ([""], "name is empty"),
        (["empty"], "The folder 'empty' holds no image"),
        (["*.bmp"], r"The pattern '\*\.bmp' matches nothing; '\.' holds files that end in \.PNG, \.jpg, \.png"),
        (["nowhere/*.png"], "matches nothing: there is no folder 'nowhere'"),
        (["emp*"], "matches folders only"),
    ],
)
def test_nothing_to_find_is_an_error(tree, sources, message):
    with pytest.raises(DataError, match=message):
        find_images(sources)


def test_extensions_are_lower_case_and_dotted():
    assert all(ext.startswith(".") and ext == ext.lower() for ext in EXTENSIONS)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"} <= set(EXTENSIONS)
