"""ADE20k's 150 classes of scene parsing: their names and colours, and what the values of its masks mean.

``ade20k.csv`` holds them in the order of the benchmark's ``objectInfo150.txt``: class i there is i + 1, and the value
i + 1 in the annotations, where 0 stands for what is in no class. The names are the short ones that mmsegmentation has
for them, and so are the colours, which the benchmark's own toolbox ships as ``color150.mat``; two classes share one.

Source: Zhou et al., "Scene Parsing through ADE20K Dataset", 2017; names and colours as in mmsegmentation 1.2.2,
``mmseg/datasets/ade.py``.
"""

from __future__ import annotations

import csv
from importlib.resources import files

import numpy as np

from xcit.data.mask_files import IGNORE, MaskCoding

LABEL_SET = "ade20k"


def _table() -> list[dict[str, str]]:
    text = files("xcit.data").joinpath("ade20k.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


_rows = _table()
CLASS_NAMES: tuple[str, ...] = tuple(row["name"] for row in _rows)
"""150 names."""
PALETTE: np.ndarray = np.array([[int(row[channel]) for channel in "rgb"] for row in _rows], dtype=np.uint8)
"""(150, 3): red, green and blue of each class."""
PALETTE.flags.writeable = False
CODING = MaskCoding(
    f"ADE20k has the values 0 (ignored) to {len(_rows)}",
    np.array([IGNORE, *range(len(_rows))], dtype=np.int32),
)
"""What the values of its masks mean."""
