"""`xcit retrieval`: how well a model finds images again, by published protocols."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from xcit.errors import ConfigError

if TYPE_CHECKING:
    from xcit.evaluate.retrieval import CopyScores, LevelScores

COPYDAYS = "copydays"
LISTED = 5
IMAGE_SIZE = {"roxford5k": 224, "rparis6k": 224, COPYDAYS: 320}
"""In pixels, as in DINO's scripts."""


def retrieval(
    *,
    dataset: Annotated[Literal["roxford5k", "rparis6k", "copydays"], arg(metavar="roxford5k|rparis6k|copydays")],
    data: Annotated[str, arg(metavar="DIR")],
    model: Annotated[str, arg(metavar="MODEL")],
    pool: Annotated[
        Literal["token", "avg", "both", "gem", "token+gem"] | None,
        arg(metavar="token|avg|both|gem|token+gem", help_behavior_hint="(default: token; copydays: token+gem)"),
    ] = None,
    scales: Annotated[str, arg(metavar="X,X,...|multi")] = "1",
    gem_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="(default: 4)")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: 224; copydays: 320)")] = None,
    whole_queries: Annotated[bool, FlagCreatePairsOff] = False,
    distractors: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    whitening: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, fewer for larger images)")
    ] = None,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
    output: Annotated[str | None, arg(metavar="FILE.json", help_behavior_hint="")] = None,
) -> int:
    """Judge a model's features by image retrieval: Revisited Oxford and Paris, or Copydays.

    Examples: `xcit retrieval --dataset roxford5k --data roxford5k/ --model dino_xcit_small_12_p16 --scales multi`, or
    `xcit retrieval --dataset copydays --data copydays/ --model dino_xcit_small_12_p8`.

    DIR is the data as published: gnd_roxford5k.pkl (or gnd_rparis6k.pkl) and jpg/; or original/, strong/, jpegqual/3/
    and so on, crops/10/ and so on. The pickle is read as plain data; one that holds code is refused.

    Revisited Oxford and Paris give mAP and mean precision at 1, 5 and 10 on the easy, medium and hard level. Copydays
    gives mAP for each kind of attack. Images keep their proportions (Copydays: are squeezed into a square).

    Exit status: 0 when all was judged, 2 for a mistake in the command or a broken image, 130 after Ctrl-C.

    Args:
        dataset: Which protocol.
        data: Where it lies; see above.
        model: Who is judged: a released model's name, a checkpoint that xcit wrote, or hf-hub:owner/name.
        pool: The class token, the mean of the patch tokens, both, their generalised mean, or the class token and that.
        scales: Factors by which the image is resized; the features are averaged. multi is 1,0.707,0.5, as in DINO.
        gem_p: For --pool gem and token+gem: exponent of the generalised mean.
        image_size: Longest side in pixels (Copydays: of the square).
        whole_queries: Do not crop the queries to their boxes, as DINO's published script does not.
        distractors: For Copydays: a folder of further images to search among.
        whitening: For Copydays: a folder of images by which the features are whitened.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once, where they are of one size.
        format: What is printed: a table for people, JSON for programs.
        output: Write JSON to this file as well.
    """
    from xcit.cli import embedding_inputs as inputs
    from xcit.cli.result_files import writable, write_files

    inputs.check_numbers(image_size=image_size, batch_size=batch_size, gem_p=gem_p)
    if dataset == COPYDAYS and whole_queries:
        raise ConfigError("--whole-queries is for roxford5k and rparis6k; Copydays' queries have no boxes.")
    if dataset != COPYDAYS and (distractors or whitening):
        raise ConfigError("--distractors and --whitening are for copydays.")
    json_file = writable(output, (".json",), "--output")
    size = image_size or IMAGE_SIZE[dataset]
    pooling = pool or ("token+gem" if dataset == COPYDAYS else "token")
    inputs.refuse_idle_gem_p(gem_p, pooling)

    from xcit.evaluate.retrieval_sets import open_copydays, open_revisited

    options: dict[str, Any] = {"scales": inputs.parse_scales(scales), "gem_p": gem_p, "batch_size": batch_size}
    about = {"dataset": dataset, "data": data, "model": model, "pool": pooling, "scales": options["scales"]}
    about |= {"image_size": size}
    if dataset == COPYDAYS:
        record = _copies(open_copydays(data), model, pooling, device, size, options, distractors, whitening)
    else:
        about["cropped_queries"] = not whole_queries
        record = _revisited(open_revisited(data, dataset), model, pooling, device, size, options, not whole_queries)
    text = inputs.json_text(about | record)
    if format == "json":
        inputs.put(text)
    else:
        _print(about, record)
    write_files((json_file, text.encode()))
    return 0


def _extractors(model: str, pooling: str, device: str, options: dict[str, Any]) -> list[Any]:
    """Return an extractor for each part of the pooling; they share one model."""
    from xcit.cli.embedding_inputs import open_extractor

    pools = pooling.split("+")
    first = open_extractor(model, pool=pools[0], device=device, **options)
    others = [
        open_extractor(first.model, pool=pool, preprocessing=first.preprocessing, **options)  # type: ignore[arg-type]
        for pool in pools[1:]
    ]
    return [first, *others]


def _revisited(
    found: Any, model: str, pooling: str, device: str, size: int, options: dict[str, Any], crop: bool
) -> dict[str, Any]:
    from xcit.cli.embedding_inputs import progress_bar
    from xcit.evaluate.retrieval import evaluate_revisited

    extractors = _extractors(model, pooling, device, options)
    with progress_bar("looking", len(found.images) + len(found.queries)) as advance:
        scores: dict[str, LevelScores] = evaluate_revisited(
            extractors, found, image_size=size, crop_queries=crop, on_progress=lambda: advance(1)
        )
    return {
        "num_images": len(found.images),
        "levels": {
            name: {
                "mean_average_precision": _number(level.mean_average_precision),
                "precision_at": {str(k): _number(value) for k, value in level.precision_at.items()},
                "num_queries": level.num_queries,
            }
            for name, level in scores.items()
        },
    }


def _copies(
    found: Any,
    model: str,
    pooling: str,
    device: str,
    size: int,
    options: dict[str, Any],
    distractors: str | None,
    whitening: str | None,
) -> dict[str, Any]:
    from xcit.cli.embedding_inputs import progress_bar
    from xcit.data.images import find_images
    from xcit.evaluate.retrieval import evaluate_copies

    others = find_images([distractors]) if distractors else []
    basis = find_images([whitening]) if whitening else []
    extractors = _extractors(model, pooling, device, options)
    total = len(found.originals) + len(others) + len(basis) + sum(map(len, found.blocks.values()))
    if found.absent:
        more = ", ..." if len(found.absent) > LISTED else ""
        print(f"xcit: not there, so not judged: {', '.join(found.absent[:LISTED])}{more}.", file=sys.stderr)
    with progress_bar("looking", total) as advance:
        scores: dict[str, CopyScores] = evaluate_copies(
            extractors,
            found,
            image_size=size,
            distractors=others,
            whitening=basis,
            on_progress=lambda: advance(1),
        )
    return {
        "num_images": len(found.originals) + len(others),
        "whitened_by": len(basis),
        "attacks": {
            name: {"mean_average_precision": each.mean_average_precision, "num_queries": each.num_queries}
            for name, each in scores.items()
        },
    }


def _number(value: float) -> float | None:
    """Return a figure as JSON has it: NaN, of a level without queries, is null."""
    return None if value != value else value


def _print(about: dict[str, Any], record: dict[str, Any]) -> None:
    from xcit.cli.output import print_table

    title = f"{about['model']} on {about['dataset']} ({record['num_images']:,} images, pool {about['pool']})"

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    if "levels" in record:
        rows = [
            (
                name,
                percent(level["mean_average_precision"]),
                *(percent(value) for value in level["precision_at"].values()),
                str(level["num_queries"]),
            )
            for name, level in record["levels"].items()
        ]
        print_table(title, ("level", ">mAP %", ">mP@1 %", ">mP@5 %", ">mP@10 %", ">queries"), rows)
    else:
        attacks = record["attacks"].items()
        rows = [(name, percent(each["mean_average_precision"]), str(each["num_queries"])) for name, each in attacks]
        print_table(title, ("attack", ">mAP %", ">queries"), rows)
