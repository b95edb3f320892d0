"""What each part of XCiT is worth: the ablation recipes, trained under one budget over several seeds, a row a run."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xcit.bench import results
from xcit.errors import ConfigError, UnknownNameError
from xcit.recipes.ablations import CONTESTANTS
from xcit.recipes.registry import find_recipe
from xcit.recipes.run_folder import RunFolder, new_run, open_run
from xcit.recipes.settings import RunConfig

RECIPES = tuple(CONTESTANTS)
"""Of the comparison, the baseline first."""
BASELINE = RECIPES[0]
COLUMNS = (
    "date", "recipe", "settings", "seed", "epochs", "parameters", "multiply_adds", "val_accuracy", "test_correct",
    "test_images", "train_loss", "minutes", "diverged", *results.ENVIRONMENT,
)  # fmt: skip
NOT_DECISIVE = ("seed", "compute", "log", "task")
"""Settings that are no part of what is compared."""

Row = dict[str, str]


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "ablations.csv"


def settings_digest(config: RunConfig) -> str:
    """Return a short name of the settings that decide what is compared: rows of other settings are not mixed up.

    What is switched off (0, none, empty) does not count, so that a setting that is new and off leaves old rows valid.
    """
    decisive = {name: _switched_on(value) for name, value in asdict(config).items() if name not in NOT_DECISIVE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def _switched_on(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _switched_on(each) for name, each in value.items() if each and each != "none"}
    return value


def run(
    recipes: Sequence[str] = RECIPES,
    *,
    seeds: int,
    results_dir: Path,
    runs_dir: Path,
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Train each recipe with each seed, but for those whose rows are there already.

    A run that ends in a loss that is not a number is a result and gets its row. One that was stopped or killed is gone
    on with, and one that is complete but has no row yet is not trained again.

    Args:
        recipes: names; all seeds of none before the first seed of all.
        seeds: 0 to this, exclusive.
        results_dir: folder of the CSV file that grows.
        runs_dir: where the run folders go.
        device: where to train: "cpu" or "cuda".
        report: takes one line a run.

    Returns:
        The new rows.

    Raises:
        UnknownNameError: a recipe that is not one of the comparison.
        ConfigError: no seed.
        DataError: the CSV file has other columns.
        StoppedError: Ctrl-C; the same command goes on.
        XCiTError: as ``xcit.recipes.train.train``, but for divergence.
    """
    for name in recipes:
        if name not in RECIPES:
            raise UnknownNameError("recipe", name, RECIPES, f"The comparison is of {', '.join(RECIPES)}.")
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; it must be 1 or more.")
    file = path(results_dir)
    known = {(row["recipe"], row["settings"], row["seed"]) for row in results.read(file, COLUMNS)}
    rows = []
    for seed in range(seeds):
        for name in recipes:
            config = find_recipe(name).make()
            config = replace(config, seed=seed, compute=replace(config.compute, device=device))
            if (name, settings_digest(config), str(seed)) in known:
                continue
            row = {"date": results.now()} | measure(config, runs_dir / f"{name}_{seed}") | results.environment(device)
            results.append(file, [row], COLUMNS)
            rows.append(row)
            report(_line(row))
    return rows


def measure(config: RunConfig, root: Path) -> Row:
    """Train one recipe, or read what a complete run of it gave.

    Args:
        config: all settings.
        root: the run's folder; a run of these settings in it is gone on with or read, another one replaced.

    Returns:
        A row, without the columns of date and environment.
    """
    from xcit.recipes.train import train
    from xcit.tasks.task import DivergedError

    folder, complete = folder_of(config, root)
    diverged = False
    if not complete:
        try:
            train(config, folder)
        except DivergedError:
            diverged = True
    parameters, multiply_adds = _sizes(config)
    row = {
        "recipe": config.recipe,
        "settings": settings_digest(config),
        "seed": str(config.seed),
        "epochs": str(config.epochs),
        "parameters": str(parameters),
        "multiply_adds": str(multiply_adds),
        "diverged": "yes" if diverged else "no",
    }
    return row | (_figures_so_far(folder) if diverged else _figures(folder))


def folder_of(config: RunConfig, root: Path) -> tuple[RunFolder, bool]:
    """Return the folder to train in, and whether the run in it is complete."""
    from xcit.recipes.config_file import read_config

    there = RunFolder(root)
    try:
        same = settings_digest(read_config(there.config)) == settings_digest(config)
    except ConfigError:
        same = False
    if same and there.metrics.exists():
        return there, True
    if same and there.last.exists():
        return open_run(root), False
    return new_run(root, overwrite=True), False


def _sizes(config: RunConfig) -> tuple[int, int]:
    """Return the model's parameters and the multiply-adds of one image."""
    from xcit.inference.costs import count_model_costs
    from xcit.recipes.build import build_model, open_splits
    from xcit.recipes.config import TrainConfig

    assert isinstance(config, TrainConfig)
    model = build_model(config, open_splits(config).train.class_names)
    size = config.data.image_size
    costs = count_model_costs(model, (config.data.in_chans, size, size))
    return sum(p.numel() for p in model.parameters()), costs.multiply_adds


def _figures(folder: RunFolder) -> Row:
    content: dict[str, Any] = json.loads(folder.metrics.read_text(encoding="utf-8"))
    test = content["test"]
    return {
        "val_accuracy": f"{content['val']['val_accuracy']:.6f}",
        "test_correct": str(test["num_correct"]),
        "test_images": str(test["num_images"]),
        "train_loss": f"{content['epochs'][-1]['train_loss']:.6f}",
        "minutes": f"{sum(row['seconds'] for row in content['epochs']) / 60:.3f}",
    }


def _figures_so_far(folder: RunFolder) -> Row:
    """Of a run that diverged: its best epoch on the validation part, and no test figure."""
    epochs = []
    if folder.history.exists():
        with folder.history.open(encoding="utf-8", newline="") as file:
            epochs = list(csv.DictReader(file))
    return {
        "val_accuracy": f"{max(float(row['val_accuracy']) for row in epochs):.6f}" if epochs else "",
        "test_correct": "",
        "test_images": "",
        "train_loss": "nan",
        "minutes": f"{sum(float(row['seconds']) for row in epochs) / 60:.3f}",
    }


def _line(row: Row) -> str:
    start = f"{row['recipe']}, seed {row['seed']}: "
    if row["diverged"] == "yes":
        return f"{start}diverged after {row['minutes']} min"
    share = int(row["test_correct"]) / int(row["test_images"])
    return f"{start}{100 * share:.2f} % of {row['test_images']} test images, {float(row['minutes']):.1f} min"


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All runs of one recipe with its present settings."""

    name: str
    rows: Sequence[Row]
    """The last of each seed."""

    @property
    def correct(self) -> list[int]:
        """Test images that each run got right; of those that did not diverge."""
        return [int(row["test_correct"]) for row in self.rows if row["diverged"] == "no"]

    @property
    def mean_correct(self) -> float:
        """Their mean; NaN if all diverged."""
        return statistics.fmean(self.correct) if self.correct else math.nan


def outcomes(results_dir: Path) -> list[Outcome]:
    """Return what was measured with the recipes' present settings, in the recipes' order."""
    rows = results.read(path(results_dir), COLUMNS)
    found = []
    for name in RECIPES:
        settings = settings_digest(find_recipe(name).make())
        by_seed = {row["seed"]: row for row in rows if (row["recipe"], row["settings"]) == (name, settings)}
        if by_seed:
            found.append(Outcome(name, [by_seed[seed] for seed in sorted(by_seed, key=int)]))
    return found


def table(results_dir: Path) -> str:
    """Return the comparison as Markdown: mean and spread over the seeds, and what they are in images."""
    found = outcomes(results_dir)
    if not found:
        return "Not measured yet: `python -m xcit.bench ablations` measures it, `make tables` writes it here."
    base = next((outcome.mean_correct for outcome in found if outcome.name == BASELINE), math.nan)
    lines = [
        "| model | parameters | multiply-adds | seeds | test accuracy, % | images right | against the baseline | "
        "validation accuracy, % | final training loss | minutes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_table_row(outcome, base) for outcome in found),
    ]
    rows = [row for outcome in found for row in outcome.rows]
    machines = " / ".join(
        sorted({f"{row['hardware']}, {row['threads']} thread{'s' * (row['threads'] != '1')}" for row in rows})
    )
    versions = ", ".join(f"{name} {joined(row[name] for row in rows)}" for name in ("torch", "timm", "xcit"))
    days = joined(row["date"][:10] for row in rows)
    epochs = joined(row["epochs"] for row in rows)
    return "\n".join((*lines, "", f"{epochs} epochs; {machines}; {versions}; {days}."))


def _table_row(outcome: Outcome, base: float) -> str:
    first, correct = outcome.rows[0], outcome.correct
    diverged = len(outcome.rows) - len(correct)
    accuracy = images = against = "–"
    if correct:
        total = next(int(row["test_images"]) for row in outcome.rows if row["test_images"])
        accuracy = spread([100 * value / total for value in correct], 2)
        images = f"{', '.join(map(str, correct))} of {total}"
        if outcome.name != BASELINE and not math.isnan(base):
            against = f"{outcome.mean_correct - base:+.1f}".replace("-", "\u2212")
    val = [100 * float(row["val_accuracy"]) for row in outcome.rows if row["val_accuracy"] and row["diverged"] == "no"]
    loss = [float(row["train_loss"]) for row in outcome.rows if row["diverged"] == "no"]
    runs = str(len(outcome.rows)) + (f", {diverged} diverged" if diverged else "")
    cells = (
        f"`{outcome.name}`: {CONTESTANTS[outcome.name].summary}",
        f"{int(first['parameters']) / 1e6:.2f} M",
        f"{int(first['multiply_adds']) / 1e6:.1f} M",
        runs,
        accuracy,
        images,
        against,
        spread(val, 2) if val else "–",
        spread(loss, 3) if loss else "–",
        f"{statistics.fmean(float(row['minutes']) for row in outcome.rows):.1f}",
    )
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and half of the range."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def joined(values: Any) -> str:
    """Return different values once each, as text."""
    return " / ".join(sorted(set(values)))
