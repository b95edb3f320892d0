"""`xcit search`: the images of an index that are most like others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from xcit.inference.feature_file import FeatureTable
    from xcit.inference.index import Hits, ImageIndex


def search(
    images: Annotated[list[str], Positional, arg(metavar="IMAGES...", help_behavior_hint="(required)")],
    *,
    index: Annotated[str, arg(metavar="FILE")],
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: the index's)")] = None,
    top_k: Annotated[int, arg(metavar="N")] = 10,
    format: Annotated[Literal["table", "csv", "json"], arg(metavar="table|csv|json")] = "table",
    output: Annotated[str | None, arg(metavar="FILE.csv|json", help_behavior_hint="")] = None,
    sheet: Annotated[str | None, arg(metavar="FILE.png", help_behavior_hint="")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, fewer for larger images)")
    ] = None,
) -> int:
    """Find the indexed images that are most like yours.

    Examples: `xcit search photo.jpg --index photos.index`, or
    `xcit search found/*.jpg --index photos.index --top-k 5 --output found.csv --sheet found.png`.

    FILE is what `xcit index` wrote. The model that made it is taken, and it is made sure that it is the very same: the
    vectors of another would be compared in vain. Similarity is the cosine of the angle between two vectors, 1 at most;
    of images that are equally similar, such as exact copies, the one that was indexed first comes first.

    Exit status: 0 if every image was looked up, 1 if some could not be read, 2 if none could or for a mistake in the
    command, 130 after Ctrl-C.

    Args:
        images: Files, folders (searched to any depth) and quoted patterns such as 'photos/**/*.jpg'.
        index: Where to look.
        model: The index's model, if it lies in another place now.
        top_k: Results of each image.
        format: What is printed: a table for people, the others for programs.
        output: Write the results to this file as well.
        sheet: Draw the images and what was found for them into this file.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once.
    """
    from xcit.cli import embedding_inputs as inputs
    from xcit.cli.result_files import writable, write_files

    inputs.check_numbers(top_k=top_k, batch_size=batch_size)
    inputs.require_retrieval_extra("faiss")
    table_file = writable(output, (".csv", ".json"), "--output")
    sheet_file = writable(sheet, (".png",), "--sheet")

    from xcit.data.images import find_images
    from xcit.inference.index import read_index

    paths = find_images(images)
    inputs.require_some(paths)
    found = read_index(Path(index).expanduser())
    extractor = inputs.extractor_like(found.origin, index, model, device, batch_size)
    table, failed = inputs.features_of(paths, extractor, "looking")
    hits = found.search(table.features, top_k)
    lines = _lines(table, hits, found)
    as_csv = inputs.csv_text(("query", "rank", "similarity", "file"), lines)
    as_json = inputs.json_text(_objects(table, lines))
    if format == "table":
        _print_table(table, lines)
    else:
        inputs.put(as_csv if format == "csv" else as_json)
    picture = b""
    if sheet_file is not None:
        picture = _sheet(table, hits, found, index)
    chosen = as_json if table_file is not None and table_file.suffix.lower() == ".json" else as_csv
    write_files((table_file, chosen.encode(errors="surrogateescape")), (sheet_file, picture))
    return 1 if failed else 0


def _lines(table: FeatureTable, hits: Hits, index: ImageIndex) -> list[tuple[str, int, str, str]]:
    """Return query, rank, similarity and file, a line a result."""
    return [
        (query, rank, f"{similarity:.4f}", index.paths[position])
        for query, similarities, positions in zip(table.paths, hits.similarities, hits.positions, strict=True)
        for rank, (similarity, position) in enumerate(zip(similarities, positions, strict=True), 1)
        if position >= 0
    ]


def _objects(table: FeatureTable, lines: list[tuple[str, int, str, str]]) -> list[dict[str, object]]:
    results: dict[str, list[dict[str, object]]] = {query: [] for query in table.paths}
    for query, rank, similarity, file in lines:
        results[query].append({"rank": rank, "similarity": float(similarity), "file": file})
    return [{"query": query, "results": found} for query, found in results.items()]


def _print_table(table: FeatureTable, lines: list[tuple[str, int, str, str]]) -> None:
    from xcit.cli.embedding_inputs import printable
    from xcit.cli.output import print_table

    results: dict[str, list[tuple[str, str, str]]] = {query: [] for query in table.paths}
    for query, rank, similarity, file in lines:
        results[query].append((str(rank), similarity, printable(file)))
    for query, rows in results.items():
        print_table(printable(query), (">rank", ">similarity", "file"), rows)
    sys.stdout.flush()


def _sheet(table: FeatureTable, hits: Hits, index: ImageIndex, name: str) -> bytes:
    from xcit.report.contact_sheet import Cell, Row, contact_sheet, sheet_png

    rows = []
    for query, similarities, positions in zip(table.paths, hits.similarities, hits.positions, strict=True):
        cells = [
            Cell(index.origin.locate(index.paths[p]), f"{rank}   {similarity:.3f}", Path(index.paths[p]).name)
            for rank, (similarity, p) in enumerate(zip(similarities, positions, strict=True), 1)
            if p >= 0
        ]
        rows.append(Row(Cell(Path(query), "query", Path(query).name), cells))
    return sheet_png(contact_sheet(rows, f"{name}: {len(index):,} images, {index.origin.describe()}"))
