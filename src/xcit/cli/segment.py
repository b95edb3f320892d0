"""`xcit segment`: what each pixel of images is, as label maps, pictures and areas."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.cli.progress import image_progress
from xcit.errors import ConfigError, DataError, XCiTError

if TYPE_CHECKING:
    from xcit.cli.segmentation_files import Sink, Targets
    from xcit.inference.segmentations import Segmentation
    from xcit.inference.segmenter import Segmenter


def segment(
    images: Annotated[list[str], Positional, arg(metavar="IMAGES...", help_behavior_hint="(required)")],
    *,
    model: Annotated[str, arg(metavar="FILE|NAME")],
    out: Annotated[str | None, arg(metavar="DIR")] = None,
    csv: Annotated[str | None, arg(metavar="FILE.csv", help_behavior_hint="(default: areas.csv in --out)")] = None,
    mode: Annotated[Literal["auto", "whole", "slide"], arg(metavar="auto|whole|slide")] = "auto",
    window: Annotated[
        int | None, arg(metavar="PX", help_behavior_hint="(default: the model's shorter side, 512)")
    ] = None,
    stride: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: 2/3 of the window)")] = None,
    scales: Annotated[str, arg(metavar="S,S,...")] = "1",
    flip: Annotated[bool, FlagCreatePairsOff] = False,
    image_size: Annotated[
        int | None, arg(metavar="PX", help_behavior_hint="(default: what the model says, 512)")
    ] = None,
    max_size: Annotated[
        int | None, arg(metavar="PX", help_behavior_hint="(default: what the model says, 2048)")
    ] = None,
    native: Annotated[bool, FlagCreatePairsOff] = False,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 1 on the CPU, else 4 of 512 x 2048 px)")
    ] = None,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Name the class of every pixel of images.

    Examples: `xcit segment photos/ --model upernet_xcit_small_12_p16 --out segmented`, or
    `xcit segment aerial.tif --model runs/fields/model.safetensors --native --out segmented`.

    The model is a released segmenter's name or a segmenter's file. Each image is scaled as it says (the released ones:
    shorter side 512 px, longer at most 2048) and looked at whole, as published; results are at the image's own size.
    --native keeps the image's size, for small things in large images. Images that are then much larger than the model
    was trained on go through it by overlapping windows whose seams are blended; --mode chooses otherwise.

    --out writes, for photo.jpg: photo_classes.png, whose pixels are the classes' numbers from 0 (with the model's
    colours as its palette; of 16 bits from 256 classes on); photo_overlay.png, the colours over the image with a
    legend, at most 2000 px long; and areas.csv, with a row for each class in each image (file, label, name, pixels,
    share, error) and one for each image that could not be read. Numbers are those of the model: of ADE20k's classes 0
    is the wall, where ADE20k's own annotations count from 1. Images from several folders keep these below DIR.

    A file that cannot be read costs one line on stderr, not the run. After Ctrl-C what was done is kept.

    Exit status: 0 if all images were looked at, 1 if some could not be, 2 if none could or for a mistake in the
    command, 130 after Ctrl-C.

    Args:
        images: Files, folders (searched to any depth) and quoted patterns such as 'photos/**/*.jpg'.
        model: Who looks; see above.
        out: Folder for label maps, pictures and areas.csv.
        csv: Write the areas here.
        mode: whole looks at the whole image, slide by windows, auto by windows if the scaled image is larger than the
            model's own sizes allow, or than fits in memory.
        window: Side of a window, a multiple of 32.
        stride: From a window to the next at most, a multiple of 4.
        scales: Look at several sizes, such as 0.5,0.75,1,1.25,1.5,1.75 times the usual one, and average.
        flip: Look at the mirrored image too, and average.
        image_size: Scale images so that the shorter side has so many pixels.
        max_size: And the longer at most so many. If one of the two is given, the other follows in proportion.
        native: Keep each image's own size.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images of one size, or windows of one image, that go through the model at once.
        format: What is printed: a table for people, JSON for programs.
        overwrite: Replace files of --out that are there already.
    """
    from xcit.cli.result_files import writable
    from xcit.cli.segmentation_files import targets_of

    factors = _factors(scales)
    if out is None and overwrite:
        raise ConfigError("--overwrite is for --out only; --csv replaces a former file anyway.")
    table = writable(csv, (".csv",), "--csv")

    import warnings

    from PIL import Image

    from xcit.data.images import find_images

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    paths = find_images(images)
    targets = None if out is None else targets_of(paths, out, overwrite, areas=csv is None)
    if targets is not None and table is None:
        table = targets.areas

    from xcit.inference.segmenter import Segmenter

    segmenter = Segmenter(
        model,
        device=device,
        mode=mode,
        window=window,
        stride=stride,
        scales=factors,
        flip=flip,
        image_size=image_size,
        max_size=max_size,
        native=native,
        batch_size=batch_size,
    )
    return _segment(segmenter, paths, targets, table, format)


def _segment(segmenter: Segmenter, paths: list[Path], targets: Targets | None, table: Path | None, format: str) -> int:
    """Look at the files and write what was asked for; return the exit status."""
    num_done = num_failed = 0
    ended: BaseException | None = None
    with ExitStack() as stack:
        sinks = _sinks(stack, table)
        advance = stack.enter_context(image_progress("segmenting", len(paths), format))
        # A progress bar puts itself in stdout's place, so that lines appear above it: hence not before here.
        printed = _printed(format, paths)
        try:
            for index, seen in enumerate(segmenter.stream(paths)):
                seen = seen if targets is None else _written(seen, targets, index)
                if seen.error is not None:
                    num_failed += 1
                    print(f"xcit: {seen.error}", file=sys.stderr)
                for sink in sinks:
                    sink.write(seen)
                num_done += 1
                printed.write(seen)
                sys.stdout.flush()  # whoever reads it sees each image at once
                advance()
        except (KeyboardInterrupt, BrokenPipeError, XCiTError) as error:
            if not num_done:
                raise  # former files stay as they were
            ended = error
        for sink in (*sinks, *([] if isinstance(ended, BrokenPipeError) else [printed])):
            sink.close()
    if ended is not None:
        interrupted = "" if isinstance(ended, XCiTError) else "interrupted; "
        print(f"xcit: {interrupted}{num_done} of {len(paths)} images were done and are kept.", file=sys.stderr)
        if isinstance(ended, KeyboardInterrupt):
            return 130
        raise ended
    if num_failed:
        print(f"xcit: {num_failed} of {len(paths)} images could not be looked at.", file=sys.stderr)
    return 0 if not num_failed else 1 if num_failed < len(paths) else 2


def _sinks(stack: ExitStack, table: Path | None) -> list[Sink]:
    """Open the table if it was asked for; it takes its name when the stack ends without an error."""
    from xcit.cli.segmentation_files import CsvSink
    from xcit.files import replacing

    if table is None:
        return []
    partial = stack.enter_context(replacing(table))
    file = stack.enter_context(partial.open("x", encoding="utf-8", errors="surrogateescape", newline=""))
    return [CsvSink(file)]


def _printed(format: str, paths: Sequence[Path]) -> Sink:
    from xcit.cli.segmentation_files import JsonSink, TableSink

    # Names of files may hold bytes that are no UTF-8; they leave as they came.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    if format == "json":
        return JsonSink(sys.stdout)
    return TableSink(sys.stdout, paths, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)


def _written(seen: Segmentation, targets: Targets, index: int) -> Segmentation:
    """Write an image's label map and picture; return it, or the error if the image cannot be read any more."""
    from xcit.cli.segmentation_files import label_png
    from xcit.data.images import open_image
    from xcit.files import write_atomic
    from xcit.inference.segmentations import Segmentation
    from xcit.report.segmentations import draw_segmentation

    if seen.error is not None:
        return seen
    assert seen.path is not None
    try:
        picture = draw_segmentation(open_image(seen.path), seen.labels, seen.class_names, seen.palette)
    except DataError as error:
        return Segmentation(seen.path, error=str(error))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    write_atomic(targets.maps[index], label_png(seen.labels, seen.palette))
    write_atomic(targets.overlays[index], file.getvalue())
    return seen


def _factors(scales: str) -> tuple[float, ...]:
    """Read "0.5,1,1.5"."""
    try:
        return tuple(float(part) for part in scales.split(","))
    except ValueError:
        raise ConfigError(f"--scales is {scales!r}; it must be numbers with commas, such as 0.5,1,1.5.") from None
