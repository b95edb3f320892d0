"""The images of a COCO file: the folder that they lie in, and which way up they belong to their annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from xcit.errors import DataError

_NUM_TRIED = 20
"""Files that are looked for in each place where the images may lie."""
_ORIENTATION = 0x0112  # the EXIF tag
_AS_STORED = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What turns an upright image back to how its file has it, of the orientations that swap width and height."""


def find_root(file: Path, names: Sequence[str], images_root: str | Path | None) -> Path:
    """Return the folder with the images; ``open_coco`` says where they are looked for.

    Raises:
        DataError: the folder that was named is none, or no image is in any of the usual places.
    """
    if images_root is not None:
        root = Path(images_root).expanduser()
        if not root.is_dir():
            raise DataError(f"{root}: is not a folder; name the one that the file names in {file} are relative to.")
        return root
    folder = file.parent
    above = folder.parent if folder.name.strip(".") else folder / ".."
    parts = dict.fromkeys((file.stem, file.stem.rpartition("_")[2]))
    near = [folder, folder / "images", *(f for part in parts for f in (folder / part, folder / "images" / part))]
    far = [f for part in parts for f in (above / part, above / "images" / part)]
    tried = names[:: max(1, len(names) // _NUM_TRIED)]
    best, most = folder, 0
    for place in (*near, *far, above / "images", above):
        found = sum(os.path.exists(os.path.join(place, name)) for name in tried)  # noqa: PTH110, PTH118
        if found > most:
            best, most = place, found
    if not most:
        raise DataError(
            f"{file}: none of its images, such as {names[0]!r}, is in {folder} or the usual folders near it; name the "
            f"folder that they are relative to."
        )
    return best


def as_annotated(upright: Image.Image, path: Path, size: tuple[int, int]) -> Image.Image | None:
    """Return the image of the given width and height: upright, or else as it is stored; None if neither has them."""
    if upright.size == size:
        return upright
    if upright.size[::-1] != size:
        return None
    with Image.open(path) as stored:
        back = _AS_STORED.get(stored.getexif().get(_ORIENTATION, 1))
    return None if back is None else upright.transpose(back)


def wrong_size(path: Path, found: tuple[int, int], listed: tuple[int, int]) -> str:
    """Return the sentence on an image whose width and height are not the listed ones."""
    return (
        f"{path}: is {found[0]} x {found[1]} px, but its annotations are for {listed[0]} x {listed[1]} px; they belong "
        f"to another version of it."
    )
