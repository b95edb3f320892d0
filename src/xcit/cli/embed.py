"""`xcit embed`: what a model sees in images, as a file of vectors."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.cli.embedding_inputs import INTERRUPTED, Pool
from xcit.errors import XCiTError


def embed(
    images: Annotated[list[str], Positional, arg(metavar="IMAGES...", help_behavior_hint="(required)")],
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE")],
    model: Annotated[str, arg(metavar="MODEL")],
    pool: Annotated[Pool, arg(metavar="token|avg|both|gem")] = "token",
    scales: Annotated[str, arg(metavar="X,X,...|multi")] = "1",
    gem_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="(default: 4)")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model expects)")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, fewer for larger images)")
    ] = None,
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Write the features of images to a file, for search, duplicates, or work of your own.

    Examples: `xcit embed photos/ -o features.parquet --model dino_xcit_small_12_p16`, or
    `xcit embed photos/ -o features.parquet --model runs/flowers/model.safetensors --pool gem --scales multi`.

    MODEL is a released model's name, a checkpoint that xcit wrote, or hf-hub:owner/name; a classifier's head is left
    aside. The file's ending decides: .parquet has the columns path, size, mtime_ns and features, and what made them in
    its metadata; .npy has the vectors (paths beside it, in .json); .csv has path, f0, f1, ...

    The run may be stopped at any moment, by Ctrl-C or worse: the same command, repeated, goes on where it was. A
    finished .parquet is brought up to date by it: only files that are new, or were changed, are read. Broken files cost
    a line on stderr each and are listed in FILE.errors.csv.

    Exit status: 0 if every image was read, 1 if some were not, 2 if none was or for a mistake in the command, 130 after
    Ctrl-C.

    Args:
        images: Files, folders (searched to any depth) and quoted patterns such as 'photos/**/*.jpg'.
        output: The file to write.
        model: Who looks; see above.
        pool: The class token, the mean of the patch tokens, both after each other, or their generalised mean.
        scales: Factors by which the image is resized; the features are averaged. multi is 1,0.707,0.5, as in DINO.
        gem_p: For --pool gem: exponent of the generalised mean.
        image_size: Side of the square in pixels to which images are resized and cropped.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once.
        overwrite: Replace a file that was made with another model, other settings or other images.
    """
    from xcit.cli import embedding_inputs as inputs
    from xcit.cli.result_files import writable

    inputs.check_numbers(image_size=image_size, batch_size=batch_size, gem_p=gem_p)
    inputs.refuse_idle_gem_p(gem_p, pool)
    factors = inputs.parse_scales(scales)
    inputs.require_retrieval_extra("pyarrow")

    from xcit.data.images import find_images
    from xcit.inference.feature_file import ENDINGS

    path = writable(output, ENDINGS, "--output")
    assert path is not None
    paths = find_images(images)
    inputs.require_some(paths)
    extractor = inputs.open_extractor(
        model, pool=pool, scales=factors, gem_p=gem_p, image_size=image_size, device=device, batch_size=batch_size
    )

    from xcit.inference.embedding import Failed, embed_files

    num_kept, of_all = 0, f"of {inputs.counted(len(paths), 'image')}"
    with inputs.progress_bar("embedding", len(paths)) as advance:

        def on_reused(number: int) -> None:
            nonlocal num_kept
            num_kept = number
            if number:
                print(f"xcit: {number:,} {of_all} {'was' if number == 1 else 'were'} done before.", file=sys.stderr)
            advance(number)

        def on_kept(number: int) -> None:
            nonlocal num_kept
            num_kept += number

        def on_row(failed: Failed | None) -> None:
            advance(1)

        try:
            done = embed_files(
                paths, extractor, path, overwrite=overwrite, on_row=on_row, on_reused=on_reused, on_kept=on_kept
            )
        except (KeyboardInterrupt, XCiTError) as error:
            kept = f"{num_kept:,} {of_all} {'is' if num_kept == 1 else 'are'} done and kept."
            if isinstance(error, KeyboardInterrupt):
                print(f"xcit: interrupted; {kept} Repeat the command to go on.", file=sys.stderr)
                return INTERRUPTED
            if num_kept:
                print(f"xcit: {kept}", file=sys.stderr)
            raise
    inputs.tell_failed(done.failed, len(paths), f" {path}.errors.csv lists them.")
    if done.num_gone:
        what = (
            "1 image whose file is gone was"
            if done.num_gone == 1
            else f"{done.num_gone:,} images whose files are gone were"
        )
        print(f"xcit: {what} taken out.", file=sys.stderr)
    rows = inputs.counted(done.num_rows, "image")
    print(f"{path}: {rows}, {extractor.dim} numbers each ({model}, pool {pool}).")
    return 1 if done.failed else 0
