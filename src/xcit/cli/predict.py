"""`xcit predict`: the likeliest classes of image files."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.cli.progress import image_progress
from xcit.errors import ConfigError

if TYPE_CHECKING:
    from xcit.cli.formats import Writer

FORMAT_OF_ENDING = {".csv": "csv", ".json": "json", ".jsonl": "jsonl"}


def predict(
    images: Annotated[list[str], Positional, arg(metavar="IMAGES...", help_behavior_hint="(required)")],
    *,
    model: Annotated[str, arg(metavar="MODEL")],
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, fewer for larger images)")
    ] = None,
    top_k: Annotated[int, arg(metavar="N")] = 5,
    format: Annotated[
        Literal["table", "csv", "json", "jsonl"] | None,
        arg(metavar="table|csv|json|jsonl", help_behavior_hint="(default: by the ending of --output, else table)"),
    ] = None,
    output: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: stdout)")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model expects)")] = None,
    fold: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Name the likeliest classes of images.

    Examples: `xcit predict photo.jpg --model xcit_small_12_p16`, or
    `xcit predict photos/ --model runs/quickstart/model.safetensors --output classes.csv`.

    MODEL is a released model's name (`xcit models` lists them; an architecture means its distilled weights at 224 px;
    downloaded once), a checkpoint that xcit wrote, a file that `xcit export` wrote (.onnx, .xml, .pt2, .pte; it runs in
    its own runtime on the CPU), or hf-hub:owner/name. Images are prepared as its weights expect.

    A file that cannot be predicted costs one line on stderr, not the run. Results are written as they come; those made
    before Ctrl-C are kept. csv, json and jsonl (one JSON object a line) also hold the failed files, with their errors.

    Exit status: 0 if every image was predicted, 1 if some were not, 2 if none was or for a mistake in the command, 130
    after Ctrl-C.

    Args:
        images: Files, folders (searched to any depth) and quoted patterns such as 'photos/**/*.jpg'.
        model: Who predicts; see above.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once.
        top_k: Classes to name of each image.
        format: A table for people, the others for programs.
        output: Write to this file instead; it appears when the run ends.
        image_size: Side of the square in pixels to which images are resized and cropped.
        fold: Run a folded copy of the model: the same classes, faster on a CPU.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; it must be 1 or more.")
    if top_k < 1:
        raise ConfigError(f"--top-k is {top_k}; it must be 1 or more.")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"--image-size is {image_size}; it must be 1 or more, and at least one patch of the model.")
    chosen = format or FORMAT_OF_ENDING.get(Path(output).suffix.lower() if output else "", "table")

    from xcit.data.images import find_images

    paths = find_images(images)
    with _destination(output) as file:
        return _predict(paths, file, chosen, model, device, batch_size, top_k, image_size, fold)


def _predict(
    paths: list[Path],
    file: TextIO | None,
    format: str,
    model: str,
    device: str,
    batch_size: int | None,
    top_k: int,
    image_size: int | None,
    fold: bool,
) -> int:
    """Predict the files and write to ``file``, or stdout if None; return the exit status."""
    import warnings

    from PIL import Image

    from xcit.inference.predictor import Predictor

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    predictor = Predictor(model, device=device, batch_size=batch_size, image_size=image_size, fold=fold)
    num_done = num_failed = 0
    with image_progress("predicting", len(paths), format, to_file=file is not None) as advance:
        # A progress bar puts itself in stdout's place, so that lines appear above it: hence not before here.
        writer = _writer(format, file or sys.stdout, paths)
        try:
            for prediction in predictor.stream(paths, top_k):
                if prediction.error:
                    num_failed += 1
                    print(f"xcit: {prediction.error}", file=sys.stderr)
                writer.write(prediction)
                if file is None:
                    sys.stdout.flush()  # whoever reads it sees each image at once
                num_done += 1
                advance()
        except KeyboardInterrupt:
            print(f"xcit: interrupted; {num_done} of {len(paths)} images were done and are kept.", file=sys.stderr)
            return 130
        finally:
            if num_done:
                writer.close()
    if num_failed:
        print(f"xcit: {num_failed} of {len(paths)} images could not be predicted.", file=sys.stderr)
    return 0 if not num_failed else 1 if num_failed < len(paths) else 2


def _writer(format: str, file: TextIO, paths: list[Path]) -> Writer:
    from xcit.cli.formats import CsvWriter, JsonLinesWriter, JsonWriter, TableWriter

    if format == "table":
        return TableWriter(file, paths, shutil.get_terminal_size().columns if file.isatty() else None)
    writers: dict[str, Callable[[TextIO], Writer]] = {"csv": CsvWriter, "json": JsonWriter, "jsonl": JsonLinesWriter}
    return writers[format](file)


@contextmanager
def _destination(output: str | None) -> Iterator[TextIO | None]:
    """Yield a file that takes the name ``output`` when all went in that will; None means stdout.

    Whatever ended the run, what was written is kept; if nothing was, a file of that name stays as it was.
    """
    if output is None:
        # Names of files may hold bytes that are no UTF-8; they leave as they came.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield None
        return
    path = Path(output).expanduser()
    if path.is_dir():
        raise ConfigError(f"--output is {output}, which is a folder; name a file in it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file = temporary.open("x", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror} ({path.parent}).") from None
    try:
        with file:
            yield file
    finally:
        if temporary.stat().st_size:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        else:
            temporary.unlink()
