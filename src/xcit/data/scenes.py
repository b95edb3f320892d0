"""Scenes that need no download: handwritten digits laid over photographs, with exact boxes and masks.

The digits are scikit-learn's (``xcit.data.digits``), enlarged until they look like strokes of a pen, the photographs
its two (a temple and a flower). The parts share nothing: scenes to train on take digits that are not held out and the
left halves of the photographs, test scenes the held-out digits and the right halves.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from xcit.data.digits import CLASS_NAMES, Digits, digit_splits
from xcit.errors import BackendError, ConfigError, DataError
from xcit.files import write_atomic

try:
    from sklearn.datasets import load_sample_images
except ModuleNotFoundError:
    raise BackendError('The photos come with scikit-learn, which is not installed: pip install "xcit[train]"') from None

PARTS = ("train", "test")
MARGIN = 2
"""Empty pixels around the 8 x 8 of a digit, so that strokes at its border end roundly."""
SHARPNESS = 2.0
"""Steepness of a stroke's edge: from paper to ink in about 1.5 px at every size."""
TRIES = 50
"""Places that are tried for a digit, and times that a scene is begun anew, before it is given up."""
CONTRAST = (40, 160)
"""Smallest difference in luminance, of 255, between ink and what is under it: drawn from this range a digit."""
LUMA = np.array([0.299, 0.587, 0.114])


class Scene(NamedTuple):
    """A picture and what is in it; digit i + 1 lies over digit i."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    labels: tuple[int, ...]
    """The digits, 0 to 9."""
    boxes: np.ndarray
    """(n, 4) int64: x0, y0, x1, y1 of the visible ink in pixels; x1 and y1 are the first column and row after it."""
    masks: np.ndarray
    """(n, H, W) bool: the visible ink, each pixel of at most one digit."""
    visible: np.ndarray
    """(n,) float64: the share of each digit's ink that no other digit hides, more than 0 and up to 1."""


def compose_scene(
    seed: int,
    part: Literal["train", "test"],
    *,
    size: tuple[int, int] = (240, 320),
    num_digits: tuple[int, int] = (1, 8),
    height: tuple[int, int] = (20, 90),
    max_degrees: float = 30.0,
    max_overlap: float = 0.5,
    label: int | None = None,
) -> Scene:
    """Compose one scene; the same one for the same arguments.

    Args:
        seed: 0 or more; of many scenes, ``scene_seed`` gives each its own.
        part: which digits and which halves of the photographs.
        size: height and width in pixels.
        num_digits: least and most digits. Fewer than were drawn may find a place, never fewer than the least.
        height: of a digit in pixels before it is rotated, least and most; the largest must fit in at any angle.
        max_degrees: digits are rotated by up to this either way, 0 to 180.
        max_overlap: how much of the smaller of two digits' boxes the other's may cover, and how much of a digit's ink
            all others may hide, at least 0 and less than 1.
        label: only this digit; None for all ten.

    Raises:
        ConfigError: an argument is out of its range, or so many digits find no place.
    """
    _check(seed, part, size, num_digits, height, max_degrees, max_overlap, label)
    rng = np.random.default_rng([PARTS.index(part), seed])
    for _ in range(TRIES):
        image = _background(rng, part, size)
        wanted = int(rng.integers(num_digits[0], num_digits[1] + 1))
        labels: list[int] = []
        inks: list[np.ndarray] = []  # whole masks, hidden parts included
        for _ in range(wanted):
            digit, alpha = _pen_strokes(rng, part, height, max_degrees, label)
            place = _place(rng, alpha >= 0.5, inks, size, max_overlap)
            if place is None:
                continue
            region = (slice(place[0], place[0] + alpha.shape[0]), slice(place[1], place[1] + alpha.shape[1]))
            ink = np.zeros(size, dtype=bool)
            ink[region] = alpha >= 0.5
            colour = _ink_colour(rng, image[region][alpha >= 0.5].mean(axis=0))
            opacity = (alpha * np.float32(rng.uniform(0.8, 1.0)))[..., None]
            image[region] += opacity * (colour.astype(np.float32) - image[region])
            labels.append(digit)
            inks.append(ink)
        if len(labels) >= num_digits[0]:
            return _scene(image, labels, inks)
    raise ConfigError(
        f"{num_digits[0]} digits of {height[0]} to {height[1]} px found no place in {size[0]} x {size[1]} px with "
        f"max_overlap={max_overlap}; ask for fewer or smaller ones, or a larger scene."
    )


def scene_seed(seed: int, index: int) -> int:
    """Return the seed of scene ``index`` among many that have one seed; others for every other seed."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def scene_folder(out: Path, num: int, seed: int, part: Literal["train", "test"], **options: Any) -> None:
    """Write scenes of one digit each as PNG files in a folder a class: ``out/7/00017.png``.

    Args:
        out: a new or an empty folder.
        num: how many scenes, 10 or more; the classes take turns.
        seed: scene i is ``compose_scene(scene_seed(seed, i), part, num_digits=(1, 1), label=i % 10)``.
        part: "train" or "test".
        **options: further ones of ``compose_scene``.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: the folder holds something already.
        ExportError: it cannot be written.
    """
    if num < len(CLASS_NAMES):
        raise ConfigError(f"num is {num}; every one of the ten classes needs a scene, so it must be 10 or more.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; name a new or an empty folder.")
    for i in range(num):
        digit = i % len(CLASS_NAMES)
        scene = compose_scene(scene_seed(seed, i), part, num_digits=(1, 1), label=digit, **options)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, format="PNG")
        write_atomic(out / CLASS_NAMES[digit] / f"{i:05d}.png", file.getvalue())


def _scene(image: np.ndarray, labels: list[int], inks: list[np.ndarray]) -> Scene:
    hidden = np.zeros(image.shape[:2], dtype=bool)
    masks = []
    for ink in reversed(inks):
        masks.append(ink & ~hidden)
        hidden |= ink
    masks.reverse()
    boxes = [_box(mask) for mask in masks]
    visible = [mask.sum() / ink.sum() for mask, ink in zip(masks, inks, strict=True)]
    return Scene(
        np.rint(image).astype(np.uint8),
        tuple(labels),
        np.array(boxes, dtype=np.int64),
        np.stack(masks),
        np.array(visible),
    )


@functools.cache
def _photos() -> list[np.ndarray]:
    return [np.asarray(image) for image in load_sample_images().images]  # each (427, 640, 3) uint8


def _half(photo: np.ndarray, part: str) -> np.ndarray:
    """Return the half of a photograph that a part may use."""
    middle = photo.shape[1] // 2
    return photo[:, :middle] if part == "train" else photo[:, middle:]


@functools.cache
def _digits(part: str) -> Digits:
    """Return the digits that a part may use: what is held out, or all the rest."""
    splits = digit_splits()
    if part == "test":
        return splits.test
    return Digits(*(np.concatenate([getattr(d, k) for d in splits[:2]]) for k in ("images", "labels", "indices")))


@functools.cache
def _by_label(part: str) -> list[np.ndarray]:
    labels = _digits(part).labels
    return [np.flatnonzero(labels == digit) for digit in range(len(CLASS_NAMES))]


def _background(rng: np.random.Generator, part: str, size: tuple[int, int]) -> np.ndarray:
    """Cut a region of a photograph, at random scale, mirrored or not, brighter or darker: (H, W, 3) float32."""
    photos = _photos()
    photo = _half(photos[rng.integers(len(photos))], part)
    H, W = size
    largest = min(photo.shape[0] / H, photo.shape[1] / W)
    scale = largest * rng.uniform(0.4, 1.0)  # of photograph pixels to a pixel of the scene
    rows, columns = (max(1, round(side * scale)) for side in size)
    top = int(rng.integers(photo.shape[0] - rows + 1))
    left = int(rng.integers(photo.shape[1] - columns + 1))
    region = Image.fromarray(photo[top : top + rows, left : left + columns])
    pixels = np.asarray(region.resize((W, H), Image.Resampling.BICUBIC))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    contrast, brightness = rng.uniform(0.6, 1.1), rng.uniform(-25, 25)
    mean = pixels.mean()
    shades = ((np.arange(256) - mean) * contrast + mean + brightness).clip(0, 255).astype(np.float32)
    return shades[pixels]


def _pen_strokes(
    rng: np.random.Generator, part: str, height: tuple[int, int], max_degrees: float, label: int | None
) -> tuple[int, np.ndarray]:
    """Draw a digit, rotated: its label and how much each pixel of its box is covered by ink, 0 to 1.

    An 8 x 8 image counts ink in cells; enlarged smoothly it is a hilly ground whose contour at half height is the rim
    of the stroke. The contour is cut after the rotation, as sharp for a large digit as for a small one.
    """
    digits = _digits(part)
    among = np.arange(len(digits)) if label is None else _by_label(part)[label]
    index = int(rng.choice(among))
    tall = int(rng.integers(height[0], height[1] + 1))
    angle = rng.uniform(-max_degrees, max_degrees)
    rim = 255 * rng.uniform(0.35, 0.55)  # a lower rim is a thicker pen
    blur = rng.uniform(0.0, 0.8)

    cells = np.pad(digits.images[index], MARGIN)
    rows = np.flatnonzero(cells.max(axis=1) > rim)
    pixels_a_cell = tall / (rows[-1] - rows[0] + 1)
    side = round(cells.shape[0] * pixels_a_cell)
    ground = Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)
    ground = ground.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    coverage = (0.5 + (np.arange(256) - rim) / 255 * pixels_a_cell / SHARPNESS).clip(0, 1)
    strokes = ground.point(np.rint(255 * coverage).astype(int).tolist()).filter(ImageFilter.GaussianBlur(blur))
    covered = np.asarray(strokes)
    x0, y0, x1, y1 = _box(covered > 4)
    return int(digits.labels[index]), covered[y0:y1, x0:x1].astype(np.float32) / 255


def _ink_colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Draw a colour that stands out in luminance from what is under it."""
    enough = rng.uniform(*CONTRAST)
    for _ in range(TRIES):
        colour = rng.uniform(0, 255, size=3)
        if abs(LUMA @ (colour - under)) >= enough:
            return colour
    return np.full(3, 0.0 if LUMA @ under > 127.5 else 255.0)


def _place(
    rng: np.random.Generator, ink: np.ndarray, others: list[np.ndarray], size: tuple[int, int], max_overlap: float
) -> tuple[int, int] | None:
    """Return the row and column of a digit's corner at which it covers no other too much, or None."""
    rows, columns = ink.shape
    if rows > size[0] or columns > size[1]:
        return None
    boxes = [_box(other) for other in others]
    x0, y0, x1, y1 = _box(ink)
    for _ in range(TRIES):
        top = int(rng.integers(size[0] - rows + 1))
        left = int(rng.integers(size[1] - columns + 1))
        mine = (x0 + left, y0 + top, x1 + left, y1 + top)
        if all(_overlap(mine, box) <= max_overlap for box in boxes) and _all_show(
            ink, others, (top, left), max_overlap
        ):
            return top, left
    return None


def _all_show(ink: np.ndarray, others: list[np.ndarray], place: tuple[int, int], max_overlap: float) -> bool:
    """Tell whether of every digit enough ink still shows under this one and those after it."""
    if not others:
        return True
    above = np.zeros_like(others[0])
    above[place[0] : place[0] + ink.shape[0], place[1] : place[1] + ink.shape[1]] = ink
    for other in reversed(others):
        if (other & above).sum() > max_overlap * other.sum():
            return False
        above = above | other
    return True


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the share of the smaller of two boxes that lies in the other."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 of what is set, ends exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _check(
    seed: int,
    part: str,
    size: tuple[int, int],
    num_digits: tuple[int, int],
    height: tuple[int, int],
    max_degrees: float,
    max_overlap: float,
    label: int | None,
) -> None:
    problems = []
    if seed < 0:
        problems.append(f"seed is {seed}; it must be 0 or more")
    if part not in PARTS:
        problems.append(f"part is {part!r}; it must be {' or '.join(PARTS)}")
    if not 1 <= num_digits[0] <= num_digits[1]:
        problems.append(f"num_digits is {num_digits}; it must be a least of 1 or more and a most not below it")
    if not 12 <= height[0] <= height[1]:
        problems.append(f"height is {height}; it must be a least of 12 px or more and a most not below it")
    if 1.5 * height[1] > min(size):
        problems.append(
            f"size is {size}; digits of {height[1]} px, at any angle, need {int(np.ceil(1.5 * height[1]))} px each way"
        )
    if not 0 <= max_degrees <= 180:
        problems.append(f"max_degrees is {max_degrees}; it must be between 0 and 180")
    if not 0 <= max_overlap < 1:
        problems.append(f"max_overlap is {max_overlap}; it must be at least 0 and less than 1")
    if label is not None and label not in range(len(CLASS_NAMES)):
        problems.append(f"label is {label}; it must be a digit from 0 to 9, or None")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
