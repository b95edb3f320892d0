"""What the files of `xcit attend` are called: known before a model is loaded, so that nothing is computed in vain."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

KINDS = ("overlay", "mask", "heads", "raw", "xca", "pca")

Head = str | int
"""Which map an overlay or a mask shows: "mean", "all" (one picture a head) or a head's number, from 0."""


def file_ends(kinds: Sequence[str], heads: Sequence[int | None], picture: str = ".png") -> list[str]:
    """Return the ends of the names of all files of one input.

    Args:
        kinds: some of ``KINDS``.
        heads: of which overlays and masks are; None stands for their mean.
        picture: the pictures' own ending, ".mp4" of a video.
    """
    found = []
    for kind in kinds:
        if kind in ("overlay", "mask"):
            found += [f"_{kind}{head_end(head)}{picture}" for head in heads]
        elif kind == "raw":
            found += ["_attention.npy", "_attention.json"]
        elif kind == "xca":
            found += ["_xca.png", "_xca.npy"]
        else:
            found.append(f"_{kind}{picture}")
    return found


def head_end(head: int | None) -> str:
    """Return what names the head in a file's name: "" for the mean, else such as "_head3"."""
    return "" if head is None else f"_head{head}"


def output_stems(paths: Sequence[Path], out: Path) -> list[Path]:
    """Return, for each input, what its outputs' names begin with, no two alike even where case does not count.

    Below ``out`` stands what the inputs do not share of their folders: of ``a/x.png`` and ``b/x.png`` come ``a/x`` and
    ``b/x``, of one folder's images ``x``. Of ``x.png`` and ``x.jpg`` in one folder come ``x.png`` and ``x.jpg``.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 (links stay apart)
    shared = os.path.commonpath([path.parent for path in whole])
    inner = [path.relative_to(shared) for path in whole]
    stems = [str(path.with_suffix("")).casefold() for path in inner]
    named = [path.with_suffix("") if stems.count(stem) == 1 else path for path, stem in zip(inner, stems, strict=True)]
    taken: set[str] = set()
    unique = []
    for path in named:
        each = next(
            candidate
            for candidate in itertools.chain([path], (path.with_name(f"{path.name}_{i}") for i in itertools.count(2)))
            if str(candidate).casefold() not in taken
        )
        taken.add(str(each).casefold())
        unique.append(out / each)
    return unique
