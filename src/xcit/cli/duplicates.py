"""`xcit duplicates`: images that are there twice, or nearly so."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.cli.embedding_inputs import Pool
from xcit.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from xcit.cli.embedding_inputs import Failed
    from xcit.inference.duplicates import Member
    from xcit.inference.feature_file import FeatureTable
    from xcit.inference.features import FeatureExtractor

SHOWN = 60
"""Images of a cluster that a sheet shows."""
PRINTED = 60
"""Lines of a table for people; the other forms hold all."""
PRINTED_OF_A_CLUSTER = 6


def duplicates(
    source: Annotated[str, Positional, arg(metavar="DIR|FEATURES", help_behavior_hint="(required)")],
    *,
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(required for a folder)")] = None,
    against: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    threshold: Annotated[str, arg(metavar="auto|COSINE")] = "auto",
    pool: Annotated[Pool | None, arg(metavar="token|avg|both|gem", help_behavior_hint="(default: token)")] = None,
    format: Annotated[Literal["table", "csv", "json"], arg(metavar="table|csv|json")] = "table",
    output: Annotated[str | None, arg(metavar="FILE.csv|json", help_behavior_hint="")] = None,
    sheet: Annotated[str | None, arg(metavar="FILE.png", help_behavior_hint="")] = None,
    list_removable: Annotated[bool, FlagCreatePairsOff] = False,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, fewer for larger images)")
    ] = None,
) -> int:
    """Find images that are there twice: the same bytes, or nearly the same picture.

    Examples: `xcit duplicates photos/ --model dino_xcit_small_12_p16 --sheet twice.png`, or, for leaks,
    `xcit duplicates train/ --against test/ --model dino_xcit_small_12_p16 --output leaks.csv`.

    Files with the same content are exact copies. Near copies are pairs whose features have a cosine of at least the
    threshold; what such pairs join, directly or through others, is a cluster. Features that `xcit embed` wrote are
    taken as well, instead of the folder.

    A cosine means different things with each model, so auto measures: it makes copies of 64 of the images (JPEG at
    quality 30, half the size, the middle 90 %) and takes the cosine that 95 % of them reach with their original, or a
    higher one if else more than a tenth of the 64 were joined with a stranger among all images. Exact copies, and
    neighbours that stand out from all others as copies do, are no strangers. What it found is told, with a warning
    where copies and strangers are hard to tell apart.

    The table has the first 60 lines and up to 6 of a cluster; CSV and JSON have all. Nothing is ever deleted.

    Exit status: 0 when all was compared, copies or not; 1 if broken images were left out, 2 for a mistake in the
    command, 130 after Ctrl-C.

    Args:
        source: The images; see above.
        model: Who looks. For a file of features it is not needed, and checked if it is given.
        against: Other images: only copies between the two are looked for, as of training images in a test set.
        threshold: See above.
        pool: For a folder: the class token, the mean of the patch tokens, both, or their generalised mean.
        format: What is printed: a table for people, the others for programs.
        output: Write the clusters to this file as well.
        sheet: Draw the clusters into this file, the image to keep first.
        list_removable: Print only the files that could go, one a line: all of each cluster but the largest file (of
            equal ones, that of the shortest name, then the first). With --against: all of DIR that are in the other
            folder too.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once.
    """
    from xcit.cli import embedding_inputs as inputs
    from xcit.cli.result_files import writable, write_files

    cosine = _cosine(threshold)
    inputs.check_numbers(batch_size=batch_size)
    table_file = writable(output, (".csv", ".json"), "--output")
    sheet_file = writable(sheet, (".png",), "--sheet")
    table, side, failed, extractor = _features(source, model, against, cosine, pool, device, batch_size)
    paths = [table.origin.locate(name) for name in table.paths]

    from xcit.inference.duplicates import content_groups, find_clusters, kept_member

    exact = content_groups(paths)
    if cosine is not None:
        chosen = cosine
    elif len(table) > 1:
        assert extractor is not None
        chosen = _chosen(paths, table, extractor, exact, side)
    else:
        chosen = 1.0  # nothing to compare
    with inputs.progress_bar("comparing", len(table)) as advance:
        done = 0

        def on_progress(number: int) -> None:
            nonlocal done
            advance(number - done)
            done = number

        clusters = find_clusters(table.features, chosen, exact=exact, side=side, on_progress=on_progress)
    kept = [kept_member(cluster, paths) for cluster in clusters]
    lines = _lines(table, clusters, kept, side)
    head = ("cluster", "copy", "similarity", "keep", *(() if side is None else ("in",)), "file")
    as_csv = inputs.csv_text(head, lines)
    as_json = inputs.json_text(_objects(head, lines, chosen, len(table)))
    if list_removable:
        goes = [line[-1] for line in lines if (line[3] != "yes" if side is None else line[4] == "this")]
        inputs.put("".join(f"{name}\n" for name in goes))
    elif format == "table":
        _print(head, lines, clusters, table, chosen)
    else:
        inputs.put(as_csv if format == "csv" else as_json)
    picture = b""
    if sheet_file is not None and clusters:
        picture = _sheet(table, clusters, kept, paths, f"{source}: {len(clusters)} clusters, threshold {chosen:.4f}")
    elif sheet_file is not None:
        print(f"xcit: there is nothing to draw; {sheet_file} is not written.", file=sys.stderr)
        sheet_file = None
    content = as_json if table_file is not None and table_file.suffix.lower() == ".json" else as_csv
    write_files((table_file, content.encode(errors="surrogateescape")), (sheet_file, picture))
    return 1 if failed else 0


def _cosine(threshold: str) -> float | None:
    if threshold == "auto":
        return None
    try:
        cosine = float(threshold)
    except ValueError:
        cosine = 2.0
    if not -1 < cosine <= 1:
        raise ConfigError(f"--threshold is {threshold}; it must be auto, or more than -1 and at most 1.")
    return cosine


def _features(
    source: str,
    model: str | None,
    against: str | None,
    cosine: float | None,
    pool: Pool | None,
    device: str,
    batch_size: int | None,
) -> tuple[FeatureTable, np.ndarray | None, list[Failed], FeatureExtractor | None]:
    """Return the features, which images are of the other folder, the broken files, and what makes more features."""
    import numpy as np

    from xcit.cli import embedding_inputs as inputs
    from xcit.data.images import find_images
    from xcit.inference.feature_file import read_features

    if inputs.is_feature_file(source):
        inputs.require_retrieval_extra("pyarrow")
        if pool is not None:
            raise ConfigError(f"--pool is for folders; {source} has its features already.")
        if against is not None:
            raise ConfigError("--against compares folders; name the first one instead of its features.")
        table = read_features(Path(source).expanduser())
        if len(table) == 0:
            raise DataError(f"{source}: holds no images.")
        if cosine is None or model is not None:
            return table, None, [], inputs.extractor_like(table.origin, source, model, device, batch_size)
        return table, None, [], None
    if model is None:
        raise ConfigError("--model is missing: name the model that looks at the images.")
    paths = find_images([source])
    others = find_images([against]) if against is not None else []
    both = {os.path.realpath(path) for path in paths} & {os.path.realpath(path) for path in others}
    if both:
        raise ConfigError(f"{len(both)} files are in {source} as well as in {against}; name folders apart.")
    inputs.require_some([*paths, *others])
    extractor = inputs.open_extractor(model, pool=pool, device=device, batch_size=batch_size)
    table, failed = inputs.features_of([*paths, *others], extractor, "embedding")
    side = None
    if against is not None:
        first = {str(path) for path in paths}
        side = np.array([name not in first for name in table.paths])
    return table, side, failed, extractor


def _chosen(
    paths: Sequence[Path],
    table: FeatureTable,
    extractor: FeatureExtractor,
    exact: Sequence[Sequence[int]],
    side: np.ndarray | None,
) -> float:
    from xcit.cli.embedding_inputs import counted
    from xcit.inference.duplicates import FOUND, choose_threshold

    threshold = choose_threshold(paths, table.features, extractor, exact=exact, side=side)
    likely = f", {100 * threshold.likely_copies:.0f} % with a likely copy" if threshold.likely_copies else ""
    print(
        f"xcit: threshold {threshold.value:.4f}, at which {100 * threshold.copies_found:.0f} % of copies made of "
        f"{counted(threshold.num_images, 'image')} are found, and {100 * threshold.images_joined:.0f} % of these "
        f"images are joined with another of all {len(table):,}{likely} (files of the same bytes aside).",
        file=sys.stderr,
    )
    if threshold.copies_found < FOUND:
        print(
            f"xcit: other images are as near as copies here. Either this model does not tell copies from other images "
            f"of this kind well, or most images have many near copies, as frames of a film do. Look at the clusters; "
            f"another model or --pool may do better, and --threshold {threshold.reached:.4f} finds the copies that "
            f"this one leaves out, with more strangers among them.",
            file=sys.stderr,
        )
    return threshold.value


def _lines(
    table: FeatureTable, clusters: list[list[Member]], kept: list[int], side: np.ndarray | None
) -> list[tuple[str, ...]]:
    lines = []
    for number, (cluster, keep) in enumerate(zip(clusters, kept, strict=True), 1):
        for member in sorted(cluster, key=lambda member: (member.position != keep, member.position)):
            lines.append((
                str(number),
                "exact" if member.exact else "near",
                f"{member.similarity:.4f}",
                "yes" if member.position == keep else "",
                *(() if side is None else ("other" if side[member.position] else "this",)),
                table.paths[member.position],
            ))  # fmt: skip
    return lines


def _objects(head: Sequence[str], lines: list[tuple[str, ...]], threshold: float, num_images: int) -> dict[str, object]:
    clusters: dict[str, list[dict[str, object]]] = {}
    for line in lines:
        each: dict[str, object] = dict(zip(head[1:], line[1:], strict=True))
        each["similarity"], each["keep"] = float(line[2]), line[3] == "yes"
        clusters.setdefault(line[0], []).append(each)
    return {"threshold": threshold, "num_images": num_images, "clusters": list(clusters.values())}


def _print(
    head: Sequence[str],
    lines: list[tuple[str, ...]],
    clusters: list[list[Member]],
    table: FeatureTable,
    threshold: float,
) -> None:
    from xcit.cli.embedding_inputs import counted, printable
    from xcit.cli.output import print_table

    if not clusters:
        print(f"No copies among {counted(len(table), 'image')} (threshold {threshold:.4f}).")
        return
    count = sum(map(len, clusters))
    what = f"{counted(len(clusters), 'cluster')} of {count:,} images"
    columns = tuple(f">{name}" if name in ("cluster", "similarity") else name for name in head)
    rows: list[tuple[str, ...]] = []
    num_shown = start = num_whole = 0
    for cluster in clusters:
        shown = lines[start : start + len(cluster)]
        if len(shown) > PRINTED_OF_A_CLUSTER:
            shown = shown[: PRINTED_OF_A_CLUSTER - 1]
        if len(rows) + len(shown) + 1 > PRINTED:
            break
        rows += [(*line[:-1], printable(line[-1])) for line in shown]
        if len(shown) < len(cluster):
            rows.append((shown[0][0], *[""] * (len(head) - 2), f"... {len(cluster) - len(shown):,} more"))
        num_shown += len(shown)
        start += len(cluster)
        num_whole += 1
    print_table(f"{what}, among {len(table):,} (threshold {threshold:.4f})", columns, rows)
    if num_shown < count:
        others = (
            f", {counted(len(clusters) - num_whole, 'whole cluster')} of them," if num_whole < len(clusters) else ""
        )
        print(
            f"{count - num_shown:,} of the {count:,} images{others} are not shown; --output FILE.csv (or .json) and "
            f"--format csv (or json) hold all."
        )


def _sheet(table: FeatureTable, clusters: list[list[Member]], kept: list[int], paths: list[Path], title: str) -> bytes:
    from xcit.report.contact_sheet import Cell, Row, contact_sheet, sheet_png

    rows = []
    for cluster, keep in zip(clusters, kept, strict=True):
        others = [
            Cell(
                paths[m.position],
                f"{'exact' if m.exact else 'near'}   {m.similarity:.3f}",
                Path(table.paths[m.position]).name,
            )
            for m in cluster
            if m.position != keep
        ]
        rows.append(Row(Cell(paths[keep], "keep", Path(table.paths[keep]).name), others[:SHOWN]))
    return sheet_png(contact_sheet(rows, title))
