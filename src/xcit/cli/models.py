"""`xcit models`: what there is."""

from __future__ import annotations

import fnmatch
from typing import Annotated

from tyro.conf import Positional, arg

from xcit.errors import UnknownNameError


def models(pattern: Annotated[str, Positional, arg(metavar="PATTERN")] = "*") -> None:
    """List the architectures and the released weights.

    An architecture's name makes a model with random weights, or its distilled ones at 224 px where weights are asked
    for; the name of released weights means exactly those.

    GMACs are 1e9 multiply-adds of one image at that size, as the ports of the released models count them; `xcit info
    NAME` counts them here. Top-1 is the published accuracy on ImageNet-1k; of a DINO backbone, which has no
    classifier, that of a linear one on its features.

    Args:
        pattern: Only names that match a pattern such as '*_p8_*dist', or that contain a text such as small_12.
    """
    from xcit.cli.output import print_table
    from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS

    released = [name for name, c in CHECKPOINTS.items() if c.task in ("classification", "self-supervised")]
    known = [*ARCHITECTURES, *released]
    # A pattern as it is, or, if that matches no whole name, anywhere in one.
    names = fnmatch.filter(known, pattern) or fnmatch.filter(known, f"*{pattern}*")
    if not names:
        raise UnknownNameError("model", pattern, known, "`xcit models` without a pattern lists them all.")
    architectures = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if architectures:
        print_table(
            f"Architectures ({len(architectures)})",
            ["name", ">params", ">width", ">blocks", ">heads", ">patch px"],
            [
                [a.id, _millions(a.num_params), *map(str, (a.embed_dim, a.depth, a.num_heads, a.patch_size))]
                for a in architectures
            ],
        )
    checkpoints = [CHECKPOINTS[name] for name in names if name in CHECKPOINTS]
    if checkpoints:
        print_table(
            f"Released weights ({len(checkpoints)})",
            ["name", ">params", ">GMACs", ">image px", ">top-1 %", "trained"],
            [
                [
                    c.stem,
                    _millions(c.num_params or 0),
                    f"{c.gmacs_port:.2f}",
                    f"{c.image_size}",
                    f"{c.metrics[-1 if c.task == 'self-supervised' else 0].value:.1f}",
                    "DINO, no labels" if c.task == "self-supervised" else "distilled" if c.distilled else "",
                ]
                for c in checkpoints
            ],
        )


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M"
