"""The paper's question of robustness: how do accuracy and cost change with the size of the test images?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError
from xcit.evaluate.run import Evaluation, Precision, evaluate_classifier
from xcit.inference.costs import Costs, count_costs
from xcit.models.weights import bare
from xcit.models.xcit import XCiT


@dataclass(frozen=True)
class ResolutionPoint:
    """A model at one size of image.

    Attributes:
        image_size: side in pixels.
        costs: of one image, in the paper's form of XCA.
        evaluation: on the whole test set.
    """

    image_size: int
    costs: Costs
    evaluation: Evaluation


def parse_sizes(text: str, patch_size: int) -> tuple[int, ...]:
    """Read sizes such as "160,224,288", in ascending order.

    Args:
        text: numbers between commas.
        patch_size: of the model, the least that a side may have.

    Raises:
        ConfigError: something that is no number, a number twice, fewer than two, or one below the patch size.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not re.fullmatch(r"[0-9]{1,5}", part)]
    if wrong:
        raise ConfigError(
            f"--sizes is {text!r}, in which {wrong[0]!r} is no number of pixels; give numbers between commas, such as "
            f"160,224,288,384,512."
        )
    sizes = sorted(map(int, parts))
    if sizes[0] < patch_size:
        raise ConfigError(f"--sizes has {sizes[0]}; an image must be at least one patch of {patch_size} px.")
    twice = [size for size, following in pairwise(sizes) if size == following]
    if twice:
        raise ConfigError(f"--sizes has {twice[0]} twice; name each size once.")
    if len(sizes) < 2:
        raise ConfigError(f"--sizes has {sizes[0]} alone; take --image-size {sizes[0]} for a single size.")
    return tuple(sizes)


def sweep_resolution(
    model: XCiT,
    image_set: ImageSet,
    preprocessing: Preprocessing,
    sizes: Sequence[int],
    *,
    device: torch.device,
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: Precision = "32",
    max_bad_fraction: float = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[ResolutionPoint]:
    """Yield a model's figures at one size after the other; nothing is trained or adapted in between.

    Args:
        model: an XCiT, which takes images of any size.
        image_set: the test set.
        preprocessing: how images are prepared; its ``image_size`` is replaced, its ``crop_pct`` kept.
        sizes: sides in pixels.
        device: where the model runs.
        batch_size: as in ``evaluate_classifier``; None chooses it for each size.
        num_workers: likewise.
        precision: likewise.
        max_bad_fraction: likewise.
        on_progress: called after each batch with the size and the number of images done.

    Raises:
        ConfigError, CheckpointError, ShapeError, DataError: as ``evaluate_classifier`` does.
    """
    config = bare(model).config
    for size in sizes:
        costs = count_costs(config, (size, size), "tokens")

        def progress(done: int, size: int = size) -> None:
            if on_progress is not None:
                on_progress(size, done)

        evaluation = evaluate_classifier(
            model,
            image_set,
            replace(preprocessing, image_size=(size, size)),
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            max_bad_fraction=max_bad_fraction,
            on_progress=progress,
        )
        yield ResolutionPoint(size, costs, evaluation)
