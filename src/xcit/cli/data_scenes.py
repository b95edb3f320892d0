"""`xcit data scenes`: a detection and segmentation data set that needs no download."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg


def scenes(
    *,
    out: Annotated[str, arg(metavar="DIR")],
    num: Annotated[int, arg(metavar="N")] = 1000,
    num_test: Annotated[int, arg(metavar="N")] = 200,
    seed: Annotated[int, arg(metavar="S")] = 0,
    size: Annotated[tuple[int, int], arg(metavar="HEIGHT WIDTH")] = (240, 320),
    num_digits: Annotated[tuple[int, int], arg(metavar="LEAST MOST")] = (1, 8),
    height: Annotated[tuple[int, int], arg(metavar="LEAST MOST")] = (20, 90),
    max_degrees: Annotated[float, arg(metavar="DEGREES")] = 30.0,
    max_overlap: Annotated[float, arg(metavar="SHARE")] = 0.5,
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Write handwritten digits over photographs, with exact boxes and masks, to detect and segment without a download.

    In DIR/train: images, annotations.json (COCO) and masks (semantic, as palette PNG: 0 the background, d + 1 the digit
    d); the same in DIR/test, of other digits and other photographs' halves; in DIR/classes.txt the masks' classes.
    The same options give the same files.

    Args:
        out: Folder to write to; it must be new or empty.
        num: Scenes to train on.
        num_test: Held-out scenes.
        seed: Draws the scenes.
        size: Of the scenes, in pixels.
        num_digits: Least and most digits in a scene.
        height: Least and most height of a digit in pixels, before it is rotated.
        max_degrees: Digits are rotated by up to this, either way.
        max_overlap: Share of the smaller of two digits that may be covered, less than 1.
        overwrite: Replace what this command wrote there earlier.
    """
    from xcit.cli.embedding_inputs import progress_bar
    from xcit.data.scene_sets import write_scenes

    with progress_bar("writing", max(num, 0) + max(num_test, 0)) as on_scenes:
        written = write_scenes(
            out,
            num,
            num_test,
            seed,
            overwrite=overwrite,
            on_scene=lambda: on_scenes(1),
            size=size,
            num_digits=num_digits,
            height=height,
            max_degrees=max_degrees,
            max_overlap=max_overlap,
        )
    counts = ", ".join(
        f"{count:,} {part} scenes with {written.num_digits[part]:,} digits"
        for part, count in written.num_images.items()
    )
    print(f"{written.root}: {counts}")
    return 0
