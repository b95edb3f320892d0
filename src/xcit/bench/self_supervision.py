"""What DINO learns of the digits without their labels: probes of its features, of random weights, and of raw pixels.

Random weights stand there twice. A fresh network's batch norms have never seen an image, and a part of what training
gains is only that they are measured. So the second one is shown the training images, and its weights stay random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xcit.bench import results
from xcit.bench.ablations import Row, folder_of, joined, settings_digest, spread
from xcit.errors import ConfigError
from xcit.recipes.dino import dino_digits
from xcit.recipes.dino_config import DinoConfig

if TYPE_CHECKING:
    from xcit.evaluate.probes import ProbeFeatures, ProbeSets
    from xcit.models.xcit import XCiT
    from xcit.recipes.dino_job import DinoJob

COLUMNS = (
    "date", "recipe", "settings", "seed", "epochs", "features", "probe", "correct", "images", "minutes",
    *results.ENVIRONMENT,
)  # fmt: skip
K = 20
"""Neighbours, the usual number."""
TEMPERATURE = 0.07
LEARNED, RANDOM, MEASURED = "DINO", "random weights", "random weights, batch norm measured"
PIXELS, COMPONENTS = "pixels", "pixels, principal components"
FEATURES = (LEARNED, RANDOM, MEASURED, PIXELS, COMPONENTS)
PROBES = ("k-NN", "logistic")
PASSES = 5
"""Times that the training images are shown to measure batch norm's statistics, which move by a tenth a batch."""


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "self_supervision.csv"


def run(
    *, seeds: int, results_dir: Path, runs_dir: Path, device: str = "cpu", report: Callable[[str], None] = print
) -> list[Row]:
    """Train with each seed and probe, but for those whose rows are there already.

    A run that was stopped is gone on with; one that is complete but has no rows yet is not trained again.

    Args:
        seeds: 0 to this, exclusive.
        results_dir: folder of the CSV file that grows.
        runs_dir: where the run folders go.
        device: where to train: "cpu" or "cuda".
        report: takes one line a figure.

    Returns:
        The new rows.

    Raises:
        ConfigError: no seed.
        DataError: the CSV file has other columns.
        StoppedError: Ctrl-C; the same command goes on.
        XCiTError: as ``xcit.recipes.train.train``.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; it must be 1 or more.")
    file = path(results_dir)
    known = {(row["settings"], row["seed"]) for row in results.read(file, COLUMNS)}
    added = []
    for seed in range(seeds):
        base = dino_digits()
        config = replace(base, seed=seed, compute=replace(base.compute, device=device))
        if (settings_digest(config), str(seed)) in known:
            continue
        common = {"date": results.now()} | results.environment(device)
        rows = [common | row for row in measure(config, runs_dir / f"{config.recipe}_{seed}")]
        results.append(file, rows, COLUMNS)
        added += rows
        for row in rows:
            share = 100 * int(row["correct"]) / int(row["images"])
            report(f"seed {seed}, {row['features']}, {row['probe']}: {share:.1f} % of {row['images']} held-out digits")
    return added


def measure(config: DinoConfig, root: Path) -> Iterator[Row]:
    """Train, or read what a complete run gave, and yield a row for each kind of features and each probe.

    Args:
        config: all settings.
        root: the run's folder; a run of these settings in it is gone on with or read, another one replaced.
    """
    from xcit.data.sources import open_data
    from xcit.evaluate.embedding import embed_set
    from xcit.evaluate.pixels import PrincipalComponents, pixel_preprocessing, pixel_set
    from xcit.evaluate.probes import ProbeFeatures, embed_parts, probe_sets
    from xcit.models.factory import create_model
    from xcit.recipes.dino_job import DinoJob
    from xcit.recipes.train import train

    folder, complete = folder_of(config, root)
    if not complete:
        train(config, folder)
    content = json.loads(folder.metrics.read_text(encoding="utf-8"))
    job = DinoJob(config)
    preprocessing = job.preprocessing
    data = config.data
    sets = probe_sets(open_data(data.root, data.format, val_fraction=data.val_fraction, in_chans=data.in_chans))

    def embedded(model: XCiT) -> ProbeFeatures:
        return embed_parts(lambda images: embed_set(model, images, preprocessing, num_workers=0), sets)

    pixels = embed_parts(lambda s: pixel_set(s, pixel_preprocessing(preprocessing), num_workers=0), sets)
    model = create_model(str(folder.model)).eval()
    project = PrincipalComponents(pixels.learn, model.num_features)
    found = {
        LEARNED: embedded(model),
        RANDOM: embedded(job.task.model.eval()),
        MEASURED: embedded(_measured(job)),
        PIXELS: pixels,
        COMPONENTS: ProbeFeatures(*map(project, pixels)),
    }
    minutes = sum(row["seconds"] for row in content["epochs"]) / 60
    for name, features in found.items():
        for probe, (correct, images) in _probed(features, sets).items():
            yield {
                "recipe": config.recipe,
                "settings": settings_digest(config),
                "seed": str(config.seed),
                "epochs": str(config.epochs),
                "features": name,
                "probe": probe,
                "correct": str(correct),
                "images": str(images),
                "minutes": f"{minutes:.2f}",
            }


def _measured(job: DinoJob) -> XCiT:
    """Return the teacher with its initial weights after its batch norms have seen the training images."""
    import torch

    from xcit.data.datasets import EvalImages
    from xcit.data.loading import eval_loader

    model = job.task.model.train()
    loader = eval_loader(EvalImages(job.data.train, job.preprocessing), 64)
    with torch.no_grad():
        for _ in range(PASSES):
            for batch in loader:
                model(batch.images)
    return model.eval()


def _probed(features: ProbeFeatures, sets: ProbeSets) -> dict[str, tuple[int, int]]:
    """Return how many held-out images each probe gets right, of how many."""
    from xcit.evaluate.probes import knn_rows, logistic_rows

    classes = len(sets.bank.class_names)
    (near,) = knn_rows("", features, classes, [K], TEMPERATURE)
    (logistic,) = logistic_rows("", features, classes)
    rows = zip(PROBES, (near.accuracy, logistic.accuracy), strict=True)
    return {probe: (accuracy.num_correct, accuracy.num_images) for probe, accuracy in rows}


# --- the table --------------------------------------------------------------------------------------------------------


def table(results_dir: Path) -> str:
    """Return the comparison as Markdown: a row a kind of features, the seeds side by side."""
    settings = settings_digest(dino_digits())
    rows = [row for row in results.read(path(results_dir), COLUMNS) if row["settings"] == settings]
    if not rows:
        return "Not measured yet: `python -m xcit.bench self-supervision` measures it, `make tables` writes it here."
    seeds = sorted({row["seed"] for row in rows}, key=int)
    total = rows[0]["images"]
    lines = [
        f"| features | k-NN (k = {K}), % | digits right of {total}, by seed | logistic regression, % | by seed |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in FEATURES:
        cells = [name]
        for probe in PROBES:
            by_seed = {r["seed"]: int(r["correct"]) for r in rows if (r["features"], r["probe"]) == (name, probe)}
            correct = [by_seed[seed] for seed in seeds]
            cells += [spread([100 * each / int(total) for each in correct], 1), ", ".join(map(str, correct))]
        lines.append(f"| {' | '.join(cells)} |")
    machines = joined(f"{row['hardware']}, {row['threads']} thread{'s' * (row['threads'] != '1')}" for row in rows)
    minutes = [float(row["minutes"]) for row in rows if row["features"] == LEARNED and row["probe"] == PROBES[0]]
    versions = ", ".join(f"{name} {joined(row[name] for row in rows)}" for name in ("torch", "xcit"))
    end = (
        f"Recipe `dino_digits`, {joined(row['epochs'] for row in rows)} epochs, seeds {', '.join(seeds)}; "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes each; {machines}; {versions}; "
        f"{joined(row['date'][:10] for row in rows)}."
    )
    return "\n".join((*lines, "", end))
