"""`xcit detect`: what is where in images: boxes, masks, classes and scores."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.cli.progress import image_progress
from xcit.errors import BackendError, ConfigError, DataError, XCiTError

if TYPE_CHECKING:
    from xcit.cli.detection_files import Listing, Sink
    from xcit.inference.detections import Detections
    from xcit.inference.detector import Detector

ENDING = "_detections.png"
"""Of a drawn picture's name, after the image's."""


def detect(
    images: Annotated[list[str], Positional, arg(metavar="IMAGES...", help_behavior_hint="(required)")],
    *,
    model: Annotated[str, arg(metavar="FILE|NAME")],
    out: Annotated[str | None, arg(metavar="DIR")] = None,
    json: Annotated[str | None, arg(metavar="FILE.json")] = None,
    coco: Annotated[str | None, arg(metavar="ANNOTATIONS.json")] = None,
    csv: Annotated[str | None, arg(metavar="FILE.csv")] = None,
    score: Annotated[float, arg(metavar="0..1")] = 0.5,
    class_score: Annotated[str | None, arg(metavar="CLASS=0..1,...")] = None,
    top: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: what the model says, 100)")] = None,
    min_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model says)")] = None,
    max_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model says)")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 1 on the CPU, else 4 of 800 x 1333 px)")
    ] = None,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Find objects in images: their classes, boxes, masks and scores.

    Examples: `xcit detect photos/ --model maskrcnn_xcit_small_12_p16 --out drawn`, or
    `xcit detect scene.png --model runs/digits/detector.safetensors --json results.json --class-score 7=0.3,1=0.6`.

    The model is a released detector's name or a detector's file. Each image is scaled as it says (the released ones:
    shorter side 800 px, longer at most 1333), whatever its size; --min-size looks closer, for small things in large
    images. Boxes are in pixels of the upright image.

    --out draws photo_detections.png for photo.jpg, at most 2000 px long. Images from several folders keep these below
    DIR. --csv has a row for each instance, and one for each image that could not be read, with the error.

    --json has COCO's results: image_id, category_id, bbox (x, y, width, height), score, segmentation (RLE). With
    --coco, ids are those of that file: an image's path must end in its file_name there; classes are matched by name,
    and those that are no category there are left out; images lie as annotated. Without it images are numbered 1, 2, ...
    in their order, categories 1 to K (COCO's own classes as COCO numbers them), and FILE.images.json lists both.

    A file that cannot be read costs one line on stderr, not the run. After Ctrl-C what was done is kept.

    Exit status: 0 if all images were looked at, 1 if some could not be, 2 if none could or for a mistake in the
    command, 130 after Ctrl-C.

    Args:
        images: Files, folders (searched to any depth) and quoted patterns such as 'photos/**/*.jpg'.
        model: Who looks; see above.
        out: Folder for drawn pictures.
        json: Write COCO's results here.
        coco: Whose ids --json bears: annotations, or a list of images without.
        csv: Write a table here.
        score: Keep instances that are surer than this.
        class_score: Instead, for some classes.
        top: At most so many instances an image, the surest.
        min_size: Scale images so that the shorter side has so many pixels.
        max_size: And the longer at most so many. If one of the two is given, the other follows in proportion.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once, if they have the same size when scaled.
        format: What is printed: a table for people, JSON for programs.
        overwrite: Replace drawn pictures that are there already.
    """
    from xcit.cli.detection_files import Listing
    from xcit.cli.result_files import writable

    thresholds = _thresholds(score, class_score)
    _check_numbers(top=(top, 1), batch_size=(batch_size, 1), min_size=(min_size, 32), max_size=(max_size, 32))
    if coco is not None and json is None:
        raise ConfigError("--coco is for --json only, which writes the results that bear its ids.")
    if overwrite and out is None:
        raise ConfigError("--overwrite is for --out only; --json and --csv replace a former file anyway.")
    results, table = writable(json, (".json",), "--json"), writable(csv, (".csv",), "--csv")
    if results is not None and coco is not None and results.resolve() == Path(coco).expanduser().resolve():
        raise ConfigError(f"--json is {json}, which is the file of --coco; name another, it stays as it is.")

    import warnings

    from PIL import Image

    from xcit.data.images import find_images

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    paths = find_images(images)
    pictures = _pictures(paths, out, overwrite)
    listing = None if coco is None else Listing(coco, paths)

    from xcit.inference.detector import OTHERS, Detector

    detector = Detector(
        model,
        device=device,
        batch_size=batch_size,
        score_threshold={OTHERS: score} | thresholds,
        max_detections=top,
        min_size=min_size,
        max_size=max_size,
    )
    if results is not None and detector.has_masks and find_spec("faster_coco_eval") is None:
        raise BackendError(
            '--json writes masks with faster-coco-eval, which is not installed: pip install "xcit[detection]"'
        )
    return _detect(detector, paths, pictures, results, table, listing, format)


def _detect(
    detector: Detector,
    paths: list[Path],
    pictures: list[Path],
    results: Path | None,
    table: Path | None,
    listing: Listing | None,
    format: str,
) -> int:
    """Look at the files and write what was asked for; return the exit status."""
    num_done = num_failed = 0
    ended: BaseException | None = None
    opener = None if listing is None else listing.open
    with ExitStack() as stack:
        sinks = _sinks(stack, detector, paths, results, table, listing)
        advance = stack.enter_context(image_progress("detecting", len(paths), format))
        # A progress bar puts itself in stdout's place, so that lines appear above it: hence not before here.
        printed = _printed(format, paths)
        try:
            for index, found in enumerate(detector.stream(paths, opener=opener)):
                found = _drawn(found, pictures[index], detector, opener) if pictures else found
                if found.error is not None:
                    num_failed += 1
                    print(f"xcit: {found.error}", file=sys.stderr)
                for sink in sinks:
                    sink.write(index, found)
                num_done += 1
                printed.write(index, found)
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


def _sinks(
    stack: ExitStack,
    detector: Detector,
    paths: Sequence[Path],
    results: Path | None,
    table: Path | None,
    listing: Listing | None,
) -> list[Sink]:
    """Open the files that were asked for; they take their names when the stack ends without an error."""
    from xcit.cli.detection_files import CocoImages, CocoSink, CsvSink, own_ids

    sinks: list[Sink] = []
    if table is not None:
        sinks.append(CsvSink(_open(stack, table)))
    if results is None:
        return sinks
    if listing is not None:
        categories, left_out = listing.category_ids(detector.class_names)
        if left_out:
            print(
                f"xcit: {len(left_out)} of the model's classes are no category of {listing.name} and are left out of "
                f"{results}: {', '.join(left_out)}.",
                file=sys.stderr,
            )
        return [*sinks, CocoSink(_open(stack, results), listing.image_ids, categories)]
    image_ids, numbered = own_ids(detector, paths)
    sinks.append(CocoSink(_open(stack, results), image_ids, detector.category_ids))
    return [*sinks, CocoImages(_open(stack, results.with_suffix(".images.json")), image_ids, numbered)]


def _open(stack: ExitStack, path: Path) -> TextIO:
    from xcit.files import replacing

    partial = stack.enter_context(replacing(path))
    return stack.enter_context(partial.open("x", encoding="utf-8", errors="surrogateescape", newline=""))


def _printed(format: str, paths: Sequence[Path]) -> Sink:
    from xcit.cli.detection_files import JsonSink, TableSink

    # Names of files may hold bytes that are no UTF-8; they leave as they came.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    if format == "json":
        return JsonSink(sys.stdout)
    return TableSink(sys.stdout, paths, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(paths: Sequence[Path], out: str | None, overwrite: bool) -> list[Path]:
    """Return where the drawn pictures go, none if none are wanted; refuse what would replace a file.

    Raises:
        ConfigError: a picture is there already, or would replace an input, or the folder cannot be one.
    """
    if out is None:
        return []
    from xcit.cli.result_files import writable
    from xcit.inference.attention_names import output_stems

    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; name a folder.")
    writable(str(folder / f"a{ENDING}"), (), "--out")
    targets = [stem.with_name(stem.name + ENDING) for stem in output_stems(paths, folder)]
    inputs = {path.resolve() for path in paths}
    for target in targets:
        if target.exists() and target.resolve() in inputs:
            raise ConfigError(f"{target} would be replaced, and is an input; name another --out.")
        if target.exists() and not overwrite:
            raise ConfigError(f"{target} is there already; name another --out, or replace it with --overwrite.")
    return targets


def _drawn(found: Detections, target: Path, detector: Detector, opener: Callable | None) -> Detections:
    """Draw what was found; return it, or the error if the image cannot be read any more."""
    from xcit.data.images import open_image
    from xcit.files import write_atomic
    from xcit.inference.detections import Detections
    from xcit.report.detections import draw_detections

    if found.error is not None:
        return found
    assert found.path is not None
    try:
        image = (opener or open_image)(found.path)
        picture = draw_detections(image, found, colours="class" if len(detector.class_names) > 1 else "instance")
    except DataError as error:
        return Detections(found.path, error=str(error))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    write_atomic(target, file.getvalue())
    return found


# --- arguments --------------------------------------------------------------------------------------------------------


def _thresholds(score: float, class_score: str | None) -> dict[str, float]:
    """Read "cat=0.3,dog=0.6"; a part without "=" belongs to the name that follows, which then has a comma."""
    thresholds: dict[str, float] = {}
    problems = []
    if not 0 <= score <= 1:
        problems.append(f"--score is {score}; it must be between 0 and 1")
    begun: list[str] = []
    for part in [] if class_score is None else class_score.split(","):
        name, equals, number = part.rpartition("=")
        if not equals:
            begun.append(part)
            continue
        name = ",".join([*begun, name]).strip()
        begun = []
        try:
            thresholds[name] = float(number)
        except ValueError:
            problems.append(f"--class-score gives {name!r} the score {number!r}, which is no number")
            continue
        if not 0 <= thresholds[name] <= 1:
            problems.append(f"--class-score gives {name!r} the score {number}; it must be between 0 and 1")
    if begun:
        problems.append(f"--class-score ends in {','.join(begun)!r}; it must be CLASS=SCORE, several with commas")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    return thresholds


def _check_numbers(**numbers: tuple[int | None, int]) -> None:
    problems = [
        f"--{name.replace('_', '-')} is {number}; it must be {least} or more"
        for name, (number, least) in numbers.items()
        if number is not None and number < least
    ]
    low, high = numbers["min_size"][0], numbers["max_size"][0]
    if low is not None and high is not None and not problems and high < low:
        problems.append(f"--max-size is {high}, less than --min-size, {low}")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
