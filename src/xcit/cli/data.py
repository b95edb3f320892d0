"""`xcit data`: look at a data set, or write one to try things on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from xcit.cli.data_coco import check_coco
from xcit.cli.data_masks import check_masks
from xcit.cli.data_scenes import scenes

if TYPE_CHECKING:
    from xcit.data.check import DataReport, Duplicate, PartSummary, Spread

MAX_CLASSES = 60
"""More rows than that are no table that anybody reads; JSON has them all."""
MAX_FINDINGS = 20
"""Likewise, of each kind of finding."""


def check(
    root: Annotated[str, Positional, arg(metavar="DIR", help_behavior_hint="(required)")],
    *,
    layout: Annotated[
        Literal[
            "auto", "folder", "csv", "shards", "cifar10", "cifar100", "flowers102", "stanford_cars", "inat18", "inat19"
        ],
        arg(metavar="auto|folder|csv|shards|NAME"),
    ] = "auto",
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
) -> int:
    """Decode every image of a data set and say what is wrong with it.

    Counts and sizes, images that cannot be read, images that are there twice (the same file, or the same pixels),
    within a part, across parts, or under different labels; classes that differ between parts; files that are left out.

    Exit status: 0 if nothing is wrong, 1 if something is, 2 if the data cannot be opened, 130 after Ctrl-C.

    Args:
        root: A folder, a CSV file, a quoted pattern of tar shards, or the local copy of a public set.
        layout: What lies there; auto finds out a folder, a CSV file or shards. NAME is one of cifar10, cifar100,
            flowers102, stanford_cars, inat18, inat19.
        format: A table for people, JSON for programs.
    """
    import warnings

    from PIL import Image

    from xcit.data.check import check_data

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with _progress() as (on_total, on_image):
        report = check_data(root, layout, on_total=on_total, on_image=on_image)
    if format == "json":
        # Names of files may hold bytes that are no UTF-8; escaped, they leave as they came.
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)
    return 0 if report.clean else 1


def digits(
    *,
    out: Annotated[str, arg(metavar="DIR")],
    layout: Annotated[Literal["folder", "csv", "shards"], arg(metavar="folder|csv|shards")] = "folder",
    image_size: Annotated[int, arg(metavar="PX")] = 32,
    val_fraction: Annotated[float, arg(metavar="SHARE")] = 0.2,
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Write the embedded handwritten digits as files, so that any layout can be tried without a download.

    1,797 grey PNG files in the parts train, val and test; the test part, a fifth, is always the same. A model that is
    trained on them at their size sees the same pixels as one trained on the embedded digits.

    Args:
        out: Folder to write to; it must be new or empty.
        layout: One folder a class; or a list, digits.csv; or tar shards.
        image_size: Side of the pictures in pixels.
        val_fraction: Share of what is not held out that validates.
        overwrite: Replace what this command wrote there earlier.
    """
    from xcit.data.digits_folder import write_digits

    written = write_digits(out, layout=layout, image_size=image_size, val_fraction=val_fraction, overwrite=overwrite)
    counts = ", ".join(f"{count:,} {part}" for part, count in written.counts.items())
    print(f"{written.root}: {counts}")
    return 0


def data(
    status: Annotated[
        Annotated[int, subcommand("check", constructor=check)]
        | Annotated[int, subcommand("check-coco", constructor=check_coco)]
        | Annotated[int, subcommand("check-masks", constructor=check_masks)]
        | Annotated[int, subcommand("digits", constructor=digits)]
        | Annotated[int, subcommand("scenes", constructor=scenes)],
        arg(name=""),
        OmitArgPrefixes,
        OmitSubcommandPrefixes,
    ],
) -> int:
    """Check a data set before training on it, or write one to try things on.

    Examples: `xcit data check photos/`, `xcit data check-coco instances.json`, `xcit data check-masks street/`,
    or `xcit data digits --out digits`.
    """
    return status


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """Show a progress bar on stderr if that is a terminal; yield what sets its length, and what moves it on by one."""
    if not sys.stderr.isatty():
        yield (lambda total: None), (lambda: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("checking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    ) as progress:
        task = progress.add_task("checking", total=None)
        yield (lambda total: progress.update(task, total=total)), (lambda: progress.advance(task))


def _print_report(report: DataReport) -> None:
    from xcit.cli.output import print_table

    print_table(
        report.root,
        ["part", ">images", ">classes", ">fewest", ">most", ">unreadable", ">width", ">height"],
        [_part_row(part) for part in report.parts],
    )
    names = list(dict.fromkeys(name for part in report.parts for name in part.class_counts))
    shown = names[:MAX_CLASSES]
    print_table(
        f"Images of each class{f' (the first {MAX_CLASSES} of {len(names):,})' if len(names) > len(shown) else ''}",
        ["class", *(f">{part.part}" for part in report.parts)],
        [[_text(name), *(f"{part.class_counts.get(name, 0):,}" for part in report.parts)] for name in shown],
    )
    _print_findings("Images that cannot be read", [bad.reason for bad in report.unreadable])
    _print_findings("Images that are there more than once", [_duplicate_text(group) for group in report.duplicates])
    _print_findings("Classes that differ", list(report.mismatches))
    _print_findings("Left out, or odd", list(report.notes))
    print("Nothing is wrong." if report.clean else _verdict(report))


def _part_row(part: PartSummary) -> list[str]:
    counts = list(part.class_counts.values())
    return [
        part.part,
        f"{part.num_images:,}",
        f"{len(counts):,}",
        f"{min(counts):,}",
        f"{max(counts):,}",
        f"{part.num_unreadable:,}",
        _range(part.width),
        _range(part.height),
    ]


def _range(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.min}" if spread.min == spread.max else f"{spread.min}..{spread.median:g}..{spread.max}"


def _print_findings(title: str, findings: list[str]) -> None:
    if not findings:
        return
    print(f"{title} ({len(findings):,})")
    for finding in findings[:MAX_FINDINGS]:
        print(f"  {_text(finding)}")
    if len(findings) > MAX_FINDINGS:
        print(f"  and {len(findings) - MAX_FINDINGS:,} more; --format json lists them all")
    print()


def _duplicate_text(group: Duplicate) -> str:
    kind = "same file" if group.same_file else "same pixels"
    marks = [
        kind,
        *(["ACROSS PARTS"] if group.across_parts else []),
        *(["DIFFERENT LABELS"] if group.labels_differ else []),
    ]
    places = [f"{place.name} ({' | '.join(place.labels) or 'no class'})" for place in group.places]
    more = f" and {len(places) - 4:,} more" if len(places) > 4 else ""
    return f"{', '.join(marks)}: {', '.join(places[:4])}{more}"


def _verdict(report: DataReport) -> str:
    from xcit.data.parts import plural

    found = [
        plural(len(findings), what)
        for findings, what in (
            (report.unreadable, "unreadable image"),
            (report.duplicates, "duplicate"),
            (report.mismatches, "class difference"),
            (report.notes, "note"),
        )
        if findings
    ]
    return f"Found: {', '.join(found)}."


def _text(text: str) -> str:
    """Return a text that every terminal can show: names may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
