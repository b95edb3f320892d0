"""`xcit giant`: one model over an image of any size, exactly, in bounded memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.errors import ConfigError, XCiTError

if TYPE_CHECKING:
    from torch import nn

    from xcit.inference.giant import GiantImages
    from xcit.inference.giant_processes import RowProcesses

ENDINGS = (".npy", ".zarr", ".tif", ".tiff")


def giant(
    image: Annotated[str, Positional, arg(metavar="IMAGE", help_behavior_hint="(required)")],
    *,
    model: Annotated[str, arg(metavar="NAME|FILE")],
    task: Annotated[
        Literal["classify", "features", "pyramid", "attend", "segment"],
        arg(metavar="classify|features|pyramid|attend|segment"),
    ] = "classify",
    out: Annotated[str | None, arg(aliases=["-o"], metavar="FILE")] = None,
    memory: Annotated[str | None, arg(metavar="4GiB", help_behavior_hint="(default: most of what is free)")] = None,
    work: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="(default: beside --out)")] = None,
    fresh: Annotated[bool, FlagCreatePairsOff] = False,
    dry_run: Annotated[bool, FlagCreatePairsOff] = False,
    block: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the final tokens)")] = None,
    layer: Annotated[int, arg(metavar="N")] = -1,
    scores: Annotated[str | None, arg(metavar="FILE")] = None,
    dtype: Annotated[Literal["float32", "float16"], arg(metavar="float32|float16")] = "float32",
    top_k: Annotated[int, arg(metavar="N")] = 5,
    tiles: Annotated[int | None, arg(metavar="PX")] = None,
    level: Annotated[int, arg(metavar="N")] = 0,
    bands: Annotated[str | None, arg(metavar="B,B,...", help_behavior_hint="(default: all)")] = None,
    axes: Annotated[str | None, arg(metavar="YXC", help_behavior_hint="(default: what the file says)")] = None,
    mean: Annotated[str | None, arg(metavar="X,X,...", help_behavior_hint="(default: the weights')")] = None,
    std: Annotated[str | None, arg(metavar="X,X,...", help_behavior_hint="(default: the weights')")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
) -> int:
    """Run a model over an image of any size, exactly as if it fitted, in the memory that you allow.

    Examples: `xcit giant scene.tif --model runs/fields/model.safetensors --task segment -o classes.tif --memory 4GiB`,
    or `xcit giant slide.tif --model dino_xcit_small_12_p8 --task features -o features.zarr --dry-run`.

    No tiles: every patch attends to the whole image, and the result is that of one forward pass, up to rounding. The
    image keeps its own size. It is read by windows where its format allows (tiled TIFF, zarr, .npy, JPEG 2000); what is
    written keeps its georeference (.tif, .zarr, .npy, by the ending of --out).

    Tasks: classify prints the likeliest classes; features writes a vector a patch; pyramid (of detectors' and
    segmenters' backbones) writes four maps, FILE_4, FILE_8, FILE_16 and FILE_32; attend writes where the class token
    looks, a map a head; segment writes the class of every pixel.

    Tokens that do not fit into --memory lie in files meanwhile. A run on such files that was stopped, by Ctrl-C or
    worse, goes on after its last whole layer when the command is repeated.

    Several processes share an image's rows: `torchrun --nproc-per-node 4 -m xcit.cli.main giant ...` has the same
    result. --tiles goes the usual way instead, tile by tile, to compare with.

    Exit status: 0 if it is done, 2 for a mistake, 130 after Ctrl-C.

    Args:
        image: A file, or the folder of a zarr.
        model: A released model's name, a checkpoint that xcit wrote, or hf-hub:owner/name.
        task: What to do; see above.
        out: Where the result goes.
        memory: That the whole process may take.
        work: Folder for tokens that do not fit into it.
        fresh: Begin anew, whatever a stopped run has left.
        dry_run: Say what it will take, and end.
        block: For features: after which XCA layer, from 0, negative from the end.
        layer: For attend: which class-attention layer.
        scores: For segment: write the probability of each pixel's class here, too.
        dtype: Of features and pyramids.
        top_k: For classify: how many classes.
        tiles: Side of tiles that know nothing of each other, a multiple of 32; for classify, features and segment.
        level: Which resolution of a pyramidal image; 0 is the full one.
        bands: Which bands, counted from 1.
        axes: What the axes of an array mean: Y rows, X columns, C bands.
        mean: Of each band, in units of its white.
        std: Likewise.
        device: Where layers run (cuda:1 is the second card).
        format: What is printed: a table for people, JSON for programs.
    """
    from xcit.cli.result_files import writable

    _check(task, out, scores, block, layer, top_k, tiles, dry_run)
    path, also = writable(out, ENDINGS, "--out"), writable(scores, ENDINGS, "--scores")
    options = {"level": level, "bands": _numbers(bands, "--bands", int), "axes": axes}

    import warnings

    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    from xcit.inference.giant import GiantImages
    from xcit.inference.giant_plan import parse_bytes

    if memory is not None:
        parse_bytes(memory)
    loaded = _model(model, task)
    began = time.perf_counter()
    with _processes() as processes, _progress(shown=not dry_run and _is_first(processes)) as tell:
        runner = GiantImages(
            loaded,
            device=device,
            memory=memory,
            work=work,
            fresh=fresh,
            mean=_numbers(mean, "--mean", float),
            std=_numbers(std, "--std", float),
            progress=tell,
            processes=processes,
        )
        del loaded
        if dry_run:
            return _told(runner, image, task, options, format)
        if tiles is not None:
            found = _by_tiles(runner, image, task, path, options, tiles, dtype)
        else:
            found = _run(runner, image, task, path, also, options, block=block, layer=layer, dtype=dtype)
        if _is_first(processes):
            _print(runner, found, task, path, also, top_k, time.perf_counter() - began, format)
    return 0


@contextmanager
def _processes() -> Iterator[RowProcesses | None]:
    """Yield those that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch.distributed as dist

    from xcit.inference.giant_processes import RowProcesses

    dist.init_process_group("gloo")
    try:
        yield RowProcesses()
    finally:
        dist.destroy_process_group()


def _is_first(processes: RowProcesses | None) -> bool:
    return processes is None or processes.rank == 0


def _by_tiles(
    runner: GiantImages, image: str, task: str, path: Path | None, options: dict[str, Any], tiles: int, dtype: str
) -> Any:
    from xcit.data.large_image import open_large_image
    from xcit.data.large_output import open_dense_output
    from xcit.inference.giant_tiles import TiledImages

    tiled = TiledImages(runner, tiles)
    if task == "classify":
        return tiled.classify(image, **options)
    found = tiled.segment(image, **options) if task == "segment" else tiled.features(image, **options).astype(dtype)
    assert path is not None
    side = 1 if task == "segment" else runner.setup.trunk.patch_size
    with open_large_image(image, **options) as opened:
        place = None if opened.georeference is None else opened.georeference.scaled(side, side)
    with open_dense_output(path, found.shape, found.dtype, georeference=place) as output:
        output.write(0, found)
    return found


def _check(
    task: str,
    out: str | None,
    scores: str | None,
    block: int | None,
    layer: int,
    top_k: int,
    tiles: int | None,
    dry_run: bool,
) -> None:
    problems = []
    if task == "classify" and out is not None:
        problems.append("--out is for the other tasks; classify prints")
    if task != "classify" and out is None and not dry_run:
        problems.append(f"{task} needs --out, a name that ends in {', '.join(ENDINGS)}")
    if scores is not None and task != "segment":
        problems.append("--scores is for --task segment")
    if block is not None and task != "features":
        problems.append("--block is for --task features")
    if layer != -1 and task != "attend":
        problems.append("--layer is for --task attend")
    if tiles is not None and (task in ("pyramid", "attend") or scores is not None or block is not None or dry_run):
        problems.append("--tiles is for classify, features and segment, without --scores, --block and --dry-run")
    if top_k < 1:
        problems.append(f"--top-k is {top_k}; it must be 1 or more")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _model(name: str, task: str) -> nn.Module:
    if task == "segment":
        from xcit.models.segmenters import create_segmenter

        is_file = Path(name).suffix != "" or "/" in name
        return create_segmenter(name) if is_file else create_segmenter(name, pretrained=True)
    if task == "pyramid":
        from xcit.models.segmenters import create_segmenter

        try:
            return create_segmenter(name) if Path(name).suffix else create_segmenter(name, pretrained=True)
        except XCiTError as error:
            raise ConfigError(f"--task pyramid takes a segmenter's file or name. {error}") from error
    from xcit.models.factory import create_model

    return create_model(name, pretrained=True)


def _run(
    runner: GiantImages,
    image: str,
    task: str,
    path: Path | None,
    also: Path | None,
    options: dict[str, Any],
    **chosen: Any,
) -> Any:
    if task == "classify":
        return runner.classify(image, **options)
    if task == "features":
        return runner.features(image, path, block=chosen["block"], dtype=chosen["dtype"], **options)
    if task == "pyramid":
        return runner.pyramid(image, path, dtype=chosen["dtype"], **options)
    if task == "attend":
        return runner.attend(image, path, layer=chosen["layer"], **options)
    return runner.segment(image, path, scores=also or False, **options)


def _told(runner: GiantImages, image: str, task: str, options: dict[str, Any], format: str) -> int:
    plan = runner.plan(image, task, **options)
    if format == "json":
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(plan), indent=2))
    else:
        from xcit.cli.output import print_facts

        print_facts(f"{task} {image}", plan.lines())
    return 0


def _print(
    runner: GiantImages,
    found: Any,
    task: str,
    path: Path | None,
    also: Path | None,
    top_k: int,
    seconds: float,
    format: str,
) -> None:
    files = [str(each) for each in (path, also) if each is not None]
    if task == "pyramid" and path is not None:
        files = [str(path.with_name(f"{path.stem}_{stride}{path.suffix}")) for stride in (4, 8, 16, 32)]
    labels = _labels(runner, found, top_k) if task == "classify" else []
    if format == "json":
        import json

        shown: dict[str, Any] = {"task": task, "seconds": round(seconds, 3)}
        if task == "classify":
            shown["labels"] = [{"index": i, "name": name, "probability": p} for i, name, p in labels]
            shown["features"] = found.features.tolist()
        elif task == "attend":
            shown |= {"files": files, "own": found.own.tolist()}
        else:
            shown["files"] = files
        print(json.dumps(shown, indent=2))
        return
    if task == "classify" and labels:
        from xcit.cli.output import print_table

        rows = [(str(i), name, f"{probability:.4f}") for i, name, probability in labels]
        print_table("", ("class", "name", "probability"), rows)
    elif task == "classify":
        print(f"The model has no classes; --format json prints its {len(found.features)} features.")
    for name in files:
        print(f"{name}: written.")
    print(f"{seconds:.1f} s.", file=sys.stderr)


def _labels(runner: GiantImages, found: Any, top_k: int) -> list[tuple[int, str, float]]:
    if found.logits is None:
        return []
    import numpy as np

    from xcit.data.labels import class_names

    cfg: dict[str, Any] = runner.model.pretrained_cfg  # type: ignore[assignment]
    names = class_names(cfg, len(found.logits))
    shares = np.exp(found.logits - found.logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top_k]
    return [(int(i), names[i], float(shares[i])) for i in order]


def _numbers(text: str | None, option: str, kind: type) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; it must be numbers with commas between them.") from None


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on stderr if that is a terminal; yield what moves it on."""
    if not shown or not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("reading", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)
