"""`xcit index`: features, ready to be searched."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from xcit.cli.embedding_inputs import Pool
from xcit.errors import ConfigError


def index(
    source: Annotated[str, Positional, arg(metavar="FEATURES|DIR", help_behavior_hint="(required)")],
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE")],
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(required for a folder)")] = None,
    kind: Annotated[Literal["exact", "hnsw", "ivf"], arg(metavar="exact|hnsw|ivf")] = "exact",
    pool: Annotated[Pool | None, arg(metavar="token|avg|both|gem", help_behavior_hint="(default: token)")] = None,
    scales: Annotated[str | None, arg(metavar="X,X,...|multi", help_behavior_hint="(default: 1)")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model expects)")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
) -> int:
    """Make images searchable by similarity.

    Examples: `xcit index features.parquet -o photos.index`, or
    `xcit index photos/ -o photos.index --model dino_xcit_small_12_p16 --kind hnsw`.

    FEATURES is a .parquet file of `xcit embed`; a folder's images are embedded first, in memory: for many, xcit embed
    is better, since it can be stopped. Similarity is the cosine of the angle between two vectors.

    exact compares with every image: right always, and fast up to some 100,000. hnsw (a graph) and ivf (cells, of at
    least 624 images) are approximate. How far they look is set while they are built, until they find 99 % of the ten
    nearest neighbours of 200 of the images; what was reached is shown, and kept with the index.

    Exit status: 0 when the index is written, 1 if images of the folder were left out as broken, 2 for a mistake in the
    command, 130 after Ctrl-C.

    Args:
        source: What to index; see above.
        output: The index, one file; an index that is there already is replaced.
        model: Who looks at a folder's images. For a file of features it is not needed, and checked if it is given.
        kind: See above.
        pool: For a folder: the class token, the mean of the patch tokens, both, or their generalised mean.
        scales: For a folder: factors by which images are resized; the features are averaged. multi: 1,0.707,0.5.
        image_size: For a folder: side of the square in pixels to which images are resized and cropped.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
    """
    from xcit.cli import embedding_inputs as inputs
    from xcit.cli.output import print_facts
    from xcit.cli.result_files import writable

    inputs.check_numbers(image_size=image_size)
    inputs.require_retrieval_extra("faiss", "pyarrow")
    path = writable(output, (), "--output")
    assert path is not None

    from pathlib import Path

    from xcit.inference.feature_file import read_features
    from xcit.inference.index import RECALL_AT, TARGET_RECALL, build_index, is_index, save_index

    if path.exists() and not is_index(path):
        raise ConfigError(f"--output is {output}, which is there already and is no index; name another file.")
    failed: list[inputs.Failed] = []
    if inputs.is_feature_file(source):
        if pool is not None or scales is not None or image_size is not None:
            raise ConfigError(f"--pool, --scales and --image-size are for folders; {source} has its features already.")
        table = read_features(Path(source).expanduser())
        if model is not None:
            inputs.extractor_like(table.origin, source, model, device)
    else:
        if model is None:
            raise ConfigError("--model is missing: name the model that looks at the folder's images.")
        from xcit.data.images import find_images

        paths = find_images([source])
        inputs.require_some(paths)
        extractor = inputs.open_extractor(
            model,
            pool=pool,
            scales=None if scales is None else inputs.parse_scales(scales),
            image_size=image_size,
            device=device,
        )
        table, failed = inputs.features_of(paths, extractor, "embedding")
    built = build_index(table, kind)
    save_index(path, built)
    facts = [("images", f"{len(built):,}, {built.dim} numbers each"), ("kind", kind)]
    if kind == "ivf":
        facts.append(("cells", f"{built.num_lists:,}, of which the nearest {built.breadth:,} are looked into"))
    if kind == "hnsw":
        facts.append(("candidates", f"{built.breadth:,}"))
    if built.recall is not None:
        facts.append((
            "agreement",
            f"{100 * built.recall.value:.1f} % of the {RECALL_AT} nearest neighbours that exact finds, "
            f"of {built.recall.num_queries} images",
        ))  # fmt: skip
        if built.recall.value < TARGET_RECALL:
            print(f"xcit: {kind} does not suit these images (see agreement); take exact.", file=sys.stderr)
    print_facts(str(path), [*facts, ("made with", table.origin.describe())])
    return 1 if failed else 0
