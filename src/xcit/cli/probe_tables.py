"""What `xcit probe` prints: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xcit import __version__
from xcit.cli.eval_tables import resized
from xcit.cli.output import print_facts, print_table
from xcit.evaluate.probes import ProbeFeatures, ProbeRow, ProbeSets
from xcit.evaluate.run import Skipped
from xcit.files import write_atomic
from xcit.inference.devices import describe_device
from xcit.inference.features import FeatureExtractor

LISTED = 5
"""Broken images that are named on stderr; JSON has them all."""


def tell_skipped(skipped: Sequence[Skipped]) -> None:
    """Name the first broken images on stderr and count them."""
    for each in skipped[:LISTED]:
        print(f"xcit: {each.reason}", file=sys.stderr)
    if skipped:
        more = "" if len(skipped) <= LISTED else f" The first {LISTED} are above; JSON (--output) lists all."
        what = "1 image is broken and was" if len(skipped) == 1 else f"{len(skipped):,} images are broken and were"
        print(f"xcit: {what} skipped.{more}", file=sys.stderr)


def tell(
    rows: Sequence[ProbeRow],
    extract: FeatureExtractor,
    sets: ProbeSets,
    features: ProbeFeatures,
    about: dict[str, Any],
    format: str,
    json_file: Path | None,
    *,
    complete: bool,
) -> None:
    """Print the figures, and write them as JSON.

    Args:
        rows: the figures, at least one.
        extract: whose features.
        sets: the images.
        features: of these images, for how many there were.
        about: what else JSON says: the model, the data, settings.
        format: "table" or "json".
        json_file: to be written as well.
        complete: whether these are all that were asked for.
    """
    skipped = features.skipped
    record = {
        **about,
        "complete": complete,
        "features": extract.settings | {"fingerprint": extract.fingerprint},
        "bank": {"part": "train", "num_images": int(features.bank.decoded.sum())},
        "judged": {"part": sets.judged_part, "num_images": int(features.judge.decoded.sum())},
        "num_classes": len(sets.bank.class_names),
        "device": describe_device(extract.device),
        "version": __version__,
        "skipped": [each._asdict() for each in skipped],
        "probes": [
            {
                "features": row.features,
                "probe": row.probe,
                "setting": row.setting,
                "num_correct": row.accuracy.num_correct,
                "top1": row.accuracy.top1,
                "top1_interval_95": list(row.accuracy.interval),
                "top5": row.accuracy.top5,
            }
            for row in rows
        ],
    }
    text = json.dumps(record, indent=2)
    if format == "json":
        print(text)
    else:
        _print(rows, extract, record)
    sys.stdout.flush()
    if json_file is not None:
        write_atomic(json_file, text.encode() + b"\n")
        print(f"xcit: {json_file} is written.", file=sys.stderr)


def _print(rows: Sequence[ProbeRow], extract: FeatureExtractor, record: dict[str, Any]) -> None:

    prepared = extract.preprocessing
    H, W = prepared.image_size
    sides = " x ".join(map(str, dict.fromkeys(resized(prepared))))
    skipped = f", {len(record['skipped']):,} broken ones skipped" if record["skipped"] else ""
    print_facts(
        f"{record['model']} on {record['data']}",
        [
            (
                "learnt from",
                f"{record['bank']['num_images']:,} images, the train part, {record['num_classes']} classes",
            ),
            ("judged on", f"{record['judged']['num_images']:,} images, the {record['judged']['part']} part{skipped}"),
            ("features", f"{extract.dim} numbers an image ({extract.pool})"),
            ("protocol", f"resized to {sides} px ({prepared.interpolation}), centre crop {H} x {W}"),
            ("device", record["device"]),
        ],
    )
    top5 = any(row.accuracy.top5 is not None for row in rows)
    columns = ["features", "probe", "setting", ">top-1", ">95 % interval", *([">top-5"] if top5 else [])]
    cells = []
    for row in rows:
        low, high = row.accuracy.interval
        cells.append(
            [
                row.features,
                row.probe,
                row.setting,
                f"{100 * row.accuracy.top1:.2f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                *([f"{100 * (row.accuracy.top5 or 0):.2f} %"] if top5 else []),
            ]
        )
    print_table("Accuracy", columns, cells)
