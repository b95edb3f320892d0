"""`xcit data check-coco`: what is wrong with a COCO file of instances, and a mended copy of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

if TYPE_CHECKING:
    from xcit.data.coco_check import CocoReport


def check_coco(
    file: Annotated[str, Positional, arg(metavar="FILE", help_behavior_hint="(required)")],
    *,
    images: Annotated[str | None, arg(metavar="DIR")] = None,
    fix: Annotated[str | None, arg(metavar="OUT.json")] = None,
    no_decode: Annotated[bool, FlagCreatePairsOff] = False,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
) -> int:
    """Look at every annotation of a COCO file of instances and at every image, and say what is wrong.

    Images that are missing, cannot be read, or are of another size than listed; ids and names that are repeated;
    annotations of images or categories that are not listed; boxes that are empty or reach out of the image; polygons
    and RLE that cannot be drawn; masks that do not fit their box; areas that are missing or wrong; categories without
    instances.

    With --fix, a copy in which everything is mended that has one way to be mended: what cannot be used is left out,
    boxes are clipped, areas computed, repeated ids of annotations replaced. The file itself is never changed.

    Exit status: 0 if nothing is wrong, 1 if something is (mended or not), 2 if the file cannot be opened, 130 after
    Ctrl-C.

    Args:
        file: JSON with the lists images, annotations and categories.
        images: The folder that its file names are relative to; looked for beside the file if not given.
        fix: Write a mended copy here. Beside FILE, its images are found as FILE's are.
        no_decode: Do not read the images; look only whether they are there.
        format: A table for people, JSON for programs.
    """
    import warnings
    from pathlib import Path

    from PIL import Image

    from xcit.cli.data import _progress
    from xcit.cli.result_files import writable, write_files
    from xcit.data import coco_check
    from xcit.data.coco import read_coco
    from xcit.errors import ConfigError

    out = writable(fix, (".json",), "--fix")
    if out is not None and out.exists() and Path(file).exists() and out.samefile(file):
        raise ConfigError(f"--fix is {fix}, which is the file that is checked; name another, it stays as it is.")
    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with _progress() as (on_total, on_image):
        report = coco_check.check_coco(file, images, decode_images=not no_decode, on_total=on_total, on_image=on_image)
    if format == "json":
        # Names of files may hold bytes that are no UTF-8; escaped, they leave as they came.
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report, mended=out is not None)
    if out is not None:
        fixed = coco_check.fixed_coco(read_coco(file), report)
        write_files((out, json.dumps(fixed).encode("ascii")))
    return 0 if report.clean else 1


def _print_report(report: CocoReport, *, mended: bool) -> None:
    from xcit.cli.data import MAX_CLASSES, _print_findings, _text
    from xcit.cli.output import print_table
    from xcit.data.coco_check import TITLES
    from xcit.data.parts import plural

    print_table(
        report.file,
        [">images", ">annotations", ">categories", "images in"],
        [
            [
                f"{report.num_images:,}",
                f"{report.num_annotations:,}",
                f"{len(report.class_counts):,}",
                _text(report.root) or "-",
            ]
        ],
    )
    shown = list(report.class_counts.items())[:MAX_CLASSES]
    more = len(report.class_counts) > len(shown)
    print_table(
        "Instances of each category" + (f" (the first {MAX_CLASSES} of {len(report.class_counts):,})" if more else ""),
        ["category", ">instances"],
        [[_text(name), f"{count:,}"] for name, count in shown],
    )
    for kind, title in TITLES.items():
        # what needs a person comes first
        found = sorted((f for f in report.findings if f.kind == kind), key=lambda f: f.fixable)
        num_fixable = sum(f.fixable for f in found)
        how = "" if not num_fixable else ", fixable" if num_fixable == len(found) else f", {num_fixable:,} fixable"
        _print_findings(f"{title}{how}", [f.text for f in found])
    _print_findings("Good to know", list(report.notes))
    if report.clean:
        print("Nothing is wrong.")
        return
    verdict = f"Found: {plural(len(report.findings), 'fault')}, {report.num_fixable:,} fixable"
    print(f"{verdict}." if mended or not report.num_fixable else f"{verdict} (--fix OUT.json).")
