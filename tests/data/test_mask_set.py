"""Masks as people save them, the list of their classes, and which image each belongs to."""

import ast
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit.data import ade20k
from xcit.data.mask_files import MaskError, distinct_colours, read_classes, read_mask
from xcit.data.mask_set import IGNORE, MaskSet, find_pairs
from xcit.errors import DataError

TRUTH = np.array([[0, 1, 2], [2, IGNORE, 1]])
"""What every mask below means, of three classes."""
VALUES = np.where(TRUTH == IGNORE, 255, TRUTH).astype(np.uint8)
COLOURS = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 255]], dtype=np.uint8)
NAMES = "sky\nred car\nblue\n"
COLOURED = "sky 10 20 30\nred car 200 0 0\nblue #0000ff\nvoid 0 0 0\n"
GREYS = "sky 0 0 0\nred car #7f7f7f\nblue 254 254 254\n"


def coding(tmp_path, text=NAMES):
    (tmp_path / "classes.txt").write_text(text)
    return read_classes(tmp_path / "classes.txt").coding


def saved(tmp_path, image, name="m.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def palette_image(values, colours):
    image = Image.fromarray(values)
    image.putpalette(np.asarray(colours, dtype=np.uint8).ravel().tolist())
    assert image.mode == "P"
    return image


def painted():
    return np.where(TRUTH[..., None] == IGNORE, 0, COLOURS[TRUTH]).astype(np.uint8)


# --- masks that can be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [NAMES, COLOURED])
@pytest.mark.parametrize("name", ["m.png", "m.tif", "no ending"])
def test_grey_values_are_classes(tmp_path, text, name):
    form = "TIFF" if name.endswith("tif") else "PNG"
    mask = read_mask(saved(tmp_path, Image.fromarray(VALUES), name, format=form), coding(tmp_path, text))
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, TRUTH)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_have_room_for_many_classes(tmp_path, form):
    listed = coding(tmp_path, "".join(f"class {i}\n" for i in range(1000)))
    values = np.array([[0, 254, 255, 256], [999, 65535, 300, 1]], dtype=np.uint16)
    mask = read_mask(saved(tmp_path, Image.fromarray(values), "m", format=form), listed)
    np.testing.assert_array_equal(mask, [[0, 254, 255, 256], [999, IGNORE, 300, 1]])
    mask = read_mask(saved(tmp_path, Image.fromarray(values.astype(np.uint8)), "m.png"), listed)
    np.testing.assert_array_equal(mask, [[0, 254, IGNORE, 0], [999 % 256, IGNORE, 300 % 256, 1]])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_not_spread(tmp_path, bits):
    """Pillow shows the values of such greys spread over 0 to 255."""
    values = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]] if bits == 1 else [[0, 1, 2, 0, 1], [2, 2, 1, 0, 1]], np.uint8)
    path = tmp_path / "m.png"
    if bits == 1:
        Image.fromarray(values.astype(bool)).save(path)
    else:  # which Pillow does not write in grey: put it together by hand
        import struct
        import zlib

        rows = b"".join(
            b"\0" + int("".join(f"{v:0{bits}b}" for v in row).ljust(24, "0"), 2).to_bytes(3)[: -(-5 * bits // 8)]
            for row in values
        )
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 5, 2, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
        content = b"\x89PNG\r\n\x1a\n"
        for kind, data in (*chunks, (b"IEND", b"")):
            content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        path.write_bytes(content)
        with Image.open(path) as image:
            assert np.asarray(image).max() == 2 * 255 // (2**bits - 1)
    assert path.read_bytes()[24:26] == bytes([bits, 0])
    np.testing.assert_array_equal(read_mask(path, coding(tmp_path)), values)


def test_a_palette_is_decoration_where_the_list_has_no_colours(tmp_path):
    path = saved(tmp_path, palette_image(VALUES, np.zeros((256, 3))))
    np.testing.assert_array_equal(read_mask(path, coding(tmp_path)), TRUTH)
    path = saved(tmp_path, palette_image(np.minimum(VALUES, 2), [[9, 9, 9]] * 3), bits=2)
    np.testing.assert_array_equal(read_mask(path, coding(tmp_path)), np.where(TRUTH == IGNORE, 2, TRUTH))


def test_a_palette_is_read_by_its_colours_where_the_list_has_them(tmp_path):
    order = np.array([7, 3, 0])  # class i has value order[i]
    palette = np.full((256, 3), 77)
    palette[order] = COLOURS
    values = np.where(TRUTH == IGNORE, 255, order[TRUTH]).astype(np.uint8)
    path = saved(tmp_path, palette_image(values, palette))
    np.testing.assert_array_equal(read_mask(path, coding(tmp_path, COLOURED)), TRUTH)
    palette[255] = COLOURS[1]  # a listed colour is what it is
    path = saved(tmp_path, palette_image(values, palette))
    np.testing.assert_array_equal(read_mask(path, coding(tmp_path, COLOURED)), np.where(TRUTH == IGNORE, 1, TRUTH))
    palette[order[2]] = 1, 2, 3
    path = saved(tmp_path, palette_image(values, palette))
    with pytest.raises(DataError, match=r"m\.png: has the colour 1 2 3 in 2 pixels, but .*classes\.txt has colours"):
        read_mask(path, coding(tmp_path, COLOURED))


def test_colours(tmp_path):
    listed = coding(tmp_path, COLOURED)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(painted())), listed), TRUTH)
    opaque = Image.fromarray(painted()).convert("RGBA")
    np.testing.assert_array_equal(read_mask(saved(tmp_path, opaque), listed), TRUTH)
    with pytest.raises(DataError, match=r"has the colour 0 0 0 in 1 pixel, .* without it; list it there"):
        read_mask(saved(tmp_path, opaque), coding(tmp_path, COLOURED.replace("void 0 0 0\n", "")))


def test_random_colours_against_a_dictionary(tmp_path):
    rng = np.random.default_rng(0)
    colours = np.unique(rng.integers(0, 256, (300, 3)), axis=0)
    rng.shuffle(colours)
    listed = coding(tmp_path, "".join("c{} {} {} {}\n".format(i, *colour) for i, colour in enumerate(colours)))
    truth = rng.integers(0, len(colours), (40, 50))
    number = {tuple(colour): i for i, colour in enumerate(colours.tolist())}
    image = colours[truth].astype(np.uint8)
    assert [[number[tuple(pixel)] for pixel in row] for row in image.tolist()] == truth.tolist()
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(image)), listed), truth)


def test_grey_images_of_grey_colours(tmp_path):
    """0 and 255 are two classes if the list says so, not a class and what is ignored."""
    two = coding(tmp_path, "ground 0 0 0\nroad 255 255 255\n")
    values = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    for image in (Image.fromarray(values), Image.fromarray(values > 0), Image.fromarray(values).convert("RGB")):
        np.testing.assert_array_equal(read_mask(saved(tmp_path, image), two), values > 0)
    listed = coding(tmp_path, GREYS)
    shown = np.where(TRUTH == IGNORE, 255, np.array([0, 127, 254])[TRUTH]).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(shown)), listed), TRUTH)
    with pytest.raises(DataError, match="has the colour 1 1 1 in 1 pixel"):
        read_mask(saved(tmp_path, Image.fromarray(np.array([[1]], dtype=np.uint8))), listed)


def test_grey_saved_as_rgb(tmp_path):
    path = saved(tmp_path, Image.fromarray(VALUES).convert("RGB"))
    np.testing.assert_array_equal(read_mask(path, coding(tmp_path)), TRUTH)
    with pytest.raises(DataError, match="is coloured, but the list of classes has no colours; write each class as"):
        read_mask(saved(tmp_path, Image.fromarray(painted())), coding(tmp_path))


def test_a_line_that_is_ignored(tmp_path):
    listed = coding(tmp_path, "sky\nIgnore\nblue\n")
    path = saved(tmp_path, Image.fromarray(np.array([[0, 1, 2, 255]], dtype=np.uint8)))
    np.testing.assert_array_equal(read_mask(path, listed), [[0, IGNORE, 1, IGNORE]])
    assert read_classes(tmp_path / "classes.txt").names == ("sky", "blue")


# --- masks that cannot ------------------------------------------------------------------------------------------------


def refused(tmp_path, image, kind, match, name="m.png", text=NAMES, **options):
    path = saved(tmp_path, image, name, **options)
    with pytest.raises(MaskError, match=match) as caught:
        read_mask(path, coding(tmp_path, text))
    assert caught.value.kind == kind
    assert str(path) in str(caught.value)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), MaskError)


def test_refused(tmp_path):
    grey, colour = Image.fromarray(VALUES), Image.fromarray(painted())
    refused(tmp_path, grey, "mask-lossy", "is a JPEG, whose compression changes values", format="JPEG")  # by content
    refused(tmp_path, colour, "mask-lossy", "is a WEBP", "m.webp")
    refused(tmp_path, colour, "mask-lossy", "is a JPEG", "m.tif", compression="jpeg")
    refused(tmp_path, grey, "mask-kind", "is a BMP; masks must be PNG or TIFF", "m.bmp")
    refused(tmp_path, Image.fromarray(VALUES.astype(np.float32)), "mask-kind", "floating-point", "m.tif")
    refused(tmp_path, Image.fromarray(VALUES.astype(np.int32)), "mask-kind", "32 bits", "m.tif")
    refused(tmp_path, grey, "mask-kind", "has 2 pages", "m.tif", save_all=True, append_images=[grey])
    refused(tmp_path, grey, "mask-kind", "has 2 pages", save_all=True, append_images=[Image.fromarray(VALUES + 1)])
    clear = colour.convert("RGBA")
    clear.putpixel((0, 0), (10, 20, 30, 0))
    refused(tmp_path, clear, "mask-kind", "1 transparent pixel;", text=COLOURED)
    many = Image.fromarray(np.array([[3, 4, 4, 250]], dtype=np.uint8))
    refused(tmp_path, many, "mask-values", r"has the values 3, 4, 250 in 4 pixels, but .* values 0 to 2 \(and 255")
    wide = Image.fromarray(np.array([[3, 255]], dtype=np.uint16))
    refused(tmp_path, wide, "mask-values", r"has the values 3, 255 in 2 pixels, .*\(and 65535")


def test_files_that_are_none(tmp_path):
    for content, match in ((b"", "is empty"), (b"no image", "is not an image"), (None, "there is no such mask")):
        path = tmp_path / "broken.png"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MaskError, match=match):
            read_mask(path, coding(tmp_path))
    whole = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 3, (60, 60)).astype(np.uint8)))
    whole.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(MaskError, match=r"m\.png: is damaged or incomplete"):
        read_mask(whole, coding(tmp_path))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MaskError, match="cannot be read"):
        read_mask(tmp_path / "folder.png", coding(tmp_path))


# --- the list of classes ----------------------------------------------------------------------------------------------


def test_a_list_as_windows_writes_it(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeffsky  1 2 3\r\n\r\n  red car\t#Ff0010 \r\nvoid 0 0 0\r\n".encode())
    names, palette, listed = read_classes(tmp_path / "classes.txt")
    assert names == ("sky", "red car")
    assert palette.tolist() == [[1, 2, 3], [255, 0, 16]]
    assert palette.dtype == np.uint8
    assert listed.classes.tolist() == [0, 1, IGNORE]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "names 0 classes; at least two"),
        ("\n \n", "names 0 classes"),
        ("cat\nvoid\n", "names 1 class; at least two"),
        ("cat\ndog\n\ncat\n", "lines 1 and 4 have the same name, 'cat'"),
        ("cat 1 2 3\ndog #010203\n", "lines 1 and 2 have the same colour, 1 2 3"),
        ("cat\ndog 1 2 3\n", "line 2 has a colour, line 1 has none"),
        ("cat 1 2 256\ndog 1 2 3\n", "line 1: the colour 1 2 256 has a part above 255"),
        ("cat #12345\ndog #123456\n", "line 1: '#12345' is no colour"),
        ("#123456\ndog 1 2 3\n", "line 1: has a colour without a name"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, match):
    with pytest.raises(DataError, match=match):
        coding(tmp_path, text)


def test_lists_that_are_no_text(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"k\xe4fer\nhund\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_classes(tmp_path / "classes.txt")


def test_numbers_are_names_too(tmp_path):
    coding(tmp_path, "background\n0\n1\n2 3\n")
    assert read_classes(tmp_path / "classes.txt").names == ("background", "0", "1", "2 3")


def test_colours_for_lists_without(tmp_path):
    for num in (2, 11, 150, 400):
        colours = distinct_colours(num)
        assert colours.shape == (num, 3)
        assert len(np.unique(colours, axis=0)) == num


# --- images and masks -------------------------------------------------------------------------------------------------


def write_pair(tmp_path, image=None, mask=None, suffix=".png"):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir(exist_ok=True)
    image = Image.new("RGB", (3, 2)) if image is None else image
    image.save(tmp_path / "images" / f"a{suffix}", exif=image.getexif())
    (Image.fromarray(VALUES) if mask is None else mask).save(tmp_path / "masks" / "a.png")
    (tmp_path / "classes.txt").write_text(NAMES)
    names, palette, listed = read_classes(tmp_path / "classes.txt")
    return MaskSet(str(tmp_path), [f"images/a{suffix}"], ["masks/a.png"], names, palette, listed)


def test_a_set_is_light_and_can_be_pickled(tmp_path):
    masks = pickle.loads(pickle.dumps(write_pair(tmp_path)))
    assert len(masks) == 1
    assert masks.open(0).size == (3, 2)
    np.testing.assert_array_equal(masks.open_mask(0), TRUTH)
    assert masks.subset([0, 0]).names[1] == "images/a.png"
    image, mask = masks.subset([0]).open_pair(0)
    assert (image.mode, mask.tolist()) == ("RGB", TRUTH.tolist())


def test_sizes_must_agree(tmp_path):
    masks = write_pair(tmp_path, Image.new("RGB", (4, 2)))
    for opened in (masks.open_mask, masks.open_pair):
        with pytest.raises(MaskError, match=r"masks/a\.png: is 3 x 2 px, but its image images/a\.png is 4 x 2 px"):
            opened(0)
    masks = write_pair(tmp_path, Image.new("RGB", (2, 3)))  # turned, and nothing says so
    with pytest.raises(MaskError, match="is 3 x 2 px"):
        masks.open_mask(0)
    (tmp_path / "images" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"images/a\.png: is not an image"):
        masks.open_mask(0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_cameras_that_were_held_upright(tmp_path, orientation, suffix):
    """A mask drawn on the image as it is stored is turned with it; one of the upright image is not."""
    from PIL import ImageOps

    stored = Image.fromarray(np.repeat(40 * (1 + TRUTH[..., None]), 3, axis=2).astype(np.uint8))
    stored.getexif()[0x0112] = orientation
    masks = write_pair(tmp_path, stored, suffix=suffix)
    upright = np.asarray(masks.open(0))[..., 0]
    assert upright.shape == (3, 2)
    np.testing.assert_array_equal(40 * (1 + masks.open_mask(0)), upright)
    np.testing.assert_array_equal(masks.open_pair(0)[1], masks.open_mask(0))
    lying = Image.fromarray(VALUES)
    lying.getexif()[0x0112] = orientation
    masks = write_pair(tmp_path, stored, ImageOps.exif_transpose(lying), suffix=suffix)
    np.testing.assert_array_equal(40 * (1 + masks.open_mask(0)), upright)


def test_pairs(tmp_path):
    files = (
        "images/b/x.y.JPG", "images/a10.png", "images/a2.tif", "images/lone.png", "images/twice.png",
        "images/twice.jpg",
        "masks/a2.png", "masks/b/x.y.png", "masks/a10.png", "masks/other.png", "masks/twice.png", "masks/.hidden.png",
        "masks/notes.txt",
    )  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks", tmp_path)
    assert pairs.images == ["images/a2.tif", "images/a10.png", "images/b/x.y.JPG"]
    assert pairs.masks == ["masks/a2.png", "masks/a10.png", "masks/b/x.y.png"]
    assert pairs.images_alone == ["images/lone.png"]
    assert pairs.masks_alone == ["masks/other.png"]
    assert len(pairs.ambiguous) == 1
    assert "images/twice.jpg, images/twice.png differ in their ending alone" in pairs.ambiguous[0]


# --- ADE20k -----------------------------------------------------------------------------------------------------------


def test_ade20k():
    assert len(ade20k.CLASS_NAMES) == len(set(ade20k.CLASS_NAMES)) == 150
    assert ade20k.PALETTE.shape == (150, 3)
    assert ade20k.CLASS_NAMES[:2] + ade20k.CLASS_NAMES[-1:] == ("wall", "building", "flag")
    assert ade20k.PALETTE[0].tolist() == [120, 120, 120]
    assert ade20k.CODING.classes.tolist() == [IGNORE, *range(150)]


def test_ade20k_is_that_of_mmsegmentation():
    """Its names and colours, read from its source: importing it needs mmcv."""
    found = importlib.util.find_spec("mmseg")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mmsegmentation is not installed")
    source = (Path(next(iter(found.submodule_search_locations))) / "datasets" / "ade.py").read_text()
    values = {
        keyword.arg: ast.literal_eval(keyword.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for keyword in node.value.keywords
    }  # fmt: skip
    assert tuple(name.strip() for name in values["classes"]) == ade20k.CLASS_NAMES  # one has a space behind it
    assert values["palette"] == ade20k.PALETTE.tolist()
