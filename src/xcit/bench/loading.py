"""From JPEG files to batches: our loader and timm's read the same folder with the same distortions.

Both have as many worker processes, which stay from epoch to epoch, and each is used as a training run uses it: ours
with its sampler, its seeds of every draw, and its record of broken files; timm's as ``create_loader`` makes it for the
CPU. Before anything is timed, both must make the same pixels of the same draws.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader

from xcit.bench import results, timer
from xcit.bench.cases import LOADING_COLUMNS, LoadingCase
from xcit.bench.runner import OutputsDifferError
from xcit.data.datasets import TrainImages
from xcit.data.loading import TrainLoader
from xcit.data.preprocess import Preprocessing
from xcit.data.sampling import EpochSampler, seeded
from xcit.data.sources import open_eval_set
from xcit.recipes.augment import train_transform
from xcit.recipes.config import AugmentConfig

SIZE = (500, 375)
"""Width and height of the files, ImageNet's most common."""
QUALITY = 90
"""Of the JPEG compression: about 80 kB a file."""
AUGMENT = AugmentConfig(repeats=1, rand_augment="rand-m9-mstd0.5-mmax9-inc1")
"""The paper's distortions, each image once an epoch. Magnitudes stop at 9: at 10 timm's posterize asks Pillow for zero
bits, which current Pillow refuses, so that its loader would end in an error now and then."""
SEED = 2106

ImagesAndLabels = tuple[Tensor, Tensor]


def run(
    cases: Sequence[LoadingCase],
    *,
    results_dir: Path | None,
    plan: timer.Plan,
    report: Callable[[str], None] = print,
) -> list[dict[str, str]]:
    """Measure cases one after another; with a record, each one's rows are on disk before the next begins.

    Args:
        cases: which.
        results_dir: folder of the CSV file; None keeps no record.
        plan: how long to time.
        report: takes one line a case.

    Returns:
        All rows, timm's of each case first.

    Raises:
        OutputsDifferError: before any timing.
        DataError: the CSV file has other columns.
    """
    path = results_dir / "loading.csv" if results_dir else None
    if path:
        results.read(path, LOADING_COLUMNS)  # a file of other columns should fail now
    common = {"date": results.now(), **results.environment("cpu")}
    all_rows = []
    for case in cases:
        with _folder(case.num_images) as root:
            rows = [common | row for row in measure(case, root, plan)]
        if path:
            results.append(path, rows, LOADING_COLUMNS)
        all_rows += rows
        report(f"{case}: " + "; ".join(_told(row) for row in rows))
    return all_rows


def measure(case: LoadingCase, root: Path, plan: timer.Plan) -> list[dict[str, str]]:
    """Measure one case on a folder of images, and return a row a competitor, timm's first."""
    theirs, ours = timm_loader(case, root), our_loader(case, root)
    compare(theirs, ours)
    samples = timer.time_interleaved({"timm": _epoch(theirs), "xcit": _epoch(ours)}, plan)
    rows = []
    for name, own in samples.items():
        spread = timer.spread(own)
        rows.append(
            {
                **{column: str(value) for column, value in vars(case).items()},
                "competitor": name,
                "images_per_second": f"{_counted(case) / spread.median * 1e3:.1f}",
                "median_ms": f"{spread.median:.1f}",
                "p25_ms": f"{spread.p25:.1f}",
                "p75_ms": f"{spread.p75:.1f}",
                "ratio_vs_timm": f"{timer.paired_ratio(samples['timm'], own):.3f}",
                "rounds": str(len(own)),
            }
        )
    return rows


def our_loader(case: LoadingCase, root: Path) -> TrainLoader:
    """Return the loader of a training run."""
    images = open_eval_set(root, "folder")
    sampler = EpochSampler(len(images), case.batch_size, seed=SEED, repeats=AUGMENT.repeats)
    dataset = TrainImages(images, train_transform(AUGMENT, Preprocessing((case.image_size, case.image_size))))
    return TrainLoader(dataset, sampler, case.batch_size, num_workers=case.num_workers)


def timm_loader(case: LoadingCase, root: Path) -> DataLoader[ImagesAndLabels]:
    """Return timm's for the same: what its training script would make of the same settings on a CPU."""
    return create_loader(
        create_dataset("", root=str(root)),
        input_size=(3, case.image_size, case.image_size),
        batch_size=case.batch_size,
        is_training=True,
        re_prob=AUGMENT.erase,
        re_mode="pixel",
        scale=(AUGMENT.min_area, 1.0),
        hflip=AUGMENT.hflip,
        color_jitter=AUGMENT.color_jitter,
        auto_augment=AUGMENT.rand_augment,
        interpolation="bicubic",
        num_workers=case.num_workers,
        device=torch.device("cpu"),
        use_prefetcher=False,
        persistent_workers=case.num_workers > 0,
    )


def compare(theirs: DataLoader[ImagesAndLabels], ours: TrainLoader, draws: int = 8) -> None:
    """Check that both transforms make the same pixels of some images, each drawn with a seed of its own.

    Raises:
        OutputsDifferError: they do not.
    """
    transform = theirs.dataset.transform  # type: ignore[attr-defined]
    dataset = ours.dataset
    assert isinstance(dataset, TrainImages)
    images = dataset.images
    for index in range(min(draws, len(images))):
        with seeded(SEED + index):
            expected = transform(images.open(index))
        with seeded(SEED + index):
            got = dataset.transform(images.open(index))
        difference = (got - expected).abs().max().item()
        if not difference <= 1e-5:
            raise OutputsDifferError(
                f"{images.names[index]}: our transform differs from timm's by {difference:.1e}. Nothing was timed."
            )


def _epoch(loader: DataLoader[Any]) -> Callable[[], int]:
    """What is timed: all batches of one epoch, a new one each time."""
    epochs = itertools.count()

    def step() -> int:
        if isinstance(loader, TrainLoader):
            loader.sampler.set_epoch(next(epochs))
        return sum(len(batch[0]) for batch in loader)

    return step


def _counted(case: LoadingCase) -> int:
    return case.num_images // case.batch_size * case.batch_size


def _told(row: dict[str, str]) -> str:
    return f"{row['competitor']} {row['images_per_second']} images/s ({float(row['ratio_vs_timm']):.2f}×)"


@contextmanager
def _folder(num_images: int) -> Iterator[Path]:
    """Two classes of JPEG files, cut at random from scikit-learn's two photos."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    draw = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="xcit-bench-") as name:
        for index in range(num_images):
            label = index % len(photos)
            photo = Image.fromarray(photos[label])
            left, top = (int(draw.integers(0, free + 1)) for free in np.subtract(photo.size, SIZE))
            folder = Path(name) / f"class_{label}"
            folder.mkdir(exist_ok=True)
            part = photo.crop((left, top, left + SIZE[0], top + SIZE[1]))
            part.save(folder / f"{index:04}.jpg", quality=QUALITY)
        yield Path(name)
