"""`xcit data check-masks`: what is wrong with images and their semantic masks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from xcit.data.mask_check import MaskReport


def check_masks(
    root: Annotated[str, Positional, arg(metavar="DIR", help_behavior_hint="(required)")],
    *,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
) -> int:
    """Look at every image and every semantic mask of a data set, and say what is wrong.

    Images without a mask and masks without an image; files that cannot be read; masks that are compressed with losses,
    of another size than their image, with values or colours that no class has, or ignored altogether; classes without
    a pixel, or without one to train on. And how many pixels and images each class has.

    Exit status: 0 if nothing is wrong, 1 if something is, 2 if the data cannot be opened, 130 after Ctrl-C.

    Args:
        root: ADE20k's folder; or one with classes.txt and either images/ and masks/, or train/images, train/masks and
            the same for val and test.
        format: A table for people, JSON for programs.
    """
    import warnings

    from PIL import Image

    from xcit.cli.data import _progress
    from xcit.data import mask_check

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with _progress() as (on_total, on_image):
        report = mask_check.check_masks(root, on_total=on_total, on_image=on_image)
    if format == "json":
        # Names of files may hold bytes that are no UTF-8; escaped, they leave as they came.
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)
    return 0 if report.clean else 1


def _print_report(report: MaskReport) -> None:
    from xcit.cli.data import MAX_CLASSES, _print_findings, _text
    from xcit.cli.output import print_table
    from xcit.data.mask_check import TITLES
    from xcit.data.parts import plural

    print_table(
        _text(report.root) + (f" ({report.label_set})" if report.label_set else ""),
        ["part", ">images", ">usable", ">classes", ">ignored"],
        [
            [
                part.part,
                f"{part.num_images:,}",
                f"{part.num_usable:,}",
                f"{sum(count > 0 for count in part.class_images.values()):,} of {len(part.class_images):,}",
                f"{part.ignored_pixels / max(1, part.num_pixels):.2%}",
            ]
            for part in report.parts
        ],
    )
    names = list(report.parts[0].class_pixels)
    shown = names[:MAX_CLASSES]
    more = f" (the first {MAX_CLASSES} of {len(names):,})" if len(names) > len(shown) else ""
    print_table(
        f"Share of the pixels, and images, of each class{more}",
        ["class", *(heading for part in report.parts for heading in (f">{part.part}", ">images"))],
        [
            [
                _text(name),
                *(
                    cell
                    for part in report.parts
                    for cell in (f"{part.share(name):.2%}", f"{part.class_images[name]:,}")
                ),
            ]
            for name in shown
        ],
    )
    for kind, title in TITLES.items():
        _print_findings(title, [finding.text for finding in report.findings if finding.kind == kind])
    _print_findings("Good to know", list(report.notes))
    print("Nothing is wrong." if report.clean else f"Found: {plural(len(report.findings), 'fault')}.")
