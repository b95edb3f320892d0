"""`xcit train`: a recipe, or a file of settings, becomes a trained model."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from xcit.recipes.detection_job import DetectionResult
    from xcit.recipes.dino_job import DinoResult
    from xcit.recipes.run_folder import RunFolder
    from xcit.recipes.segmentation_job import SegmentationResult
    from xcit.recipes.settings import RunConfig

TRAIN_EXTRA = {
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}
"""Module and package of what the extra adds."""
FLAGS = {
    "data": "data.root",
    "model": "model.name",
    "pretrained": "model.pretrained",
    "teacher": "distill.teacher",
    "epochs": "epochs",
    "batch_size": "optim.batch_size",
    "lr": "optim.lr",
    "image_size": "data.image_size",
    "seed": "seed",
    "device": "compute.device",
    "devices": "compute.devices",
    "precision": "compute.precision",
}
"""Flags and the settings that they are short for."""
FLAGS_OF_TASK: dict[str, dict[str, str]] = {
    "dino": {"image_size": "crops.global_size", "teacher": ""},
    "detection": {"teacher": ""},
    "segmentation": {"teacher": ""},
}
"""Where they mean another setting, or "" none."""
WHILE_RESUMING = ("compute.", "log.")
"""Settings that may change when a run is gone on with."""
OWN = ""


def train(
    recipe: Annotated[str | None, Positional, arg(metavar="RECIPE|FILE", help_behavior_hint="")] = None,
    *,
    data: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")] = None,
    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    pretrained: Annotated[str | None, arg(metavar="none|released|NAME|FILE", help_behavior_hint="")] = None,
    teacher: Annotated[str | None, arg(metavar="NAME|FILE", help_behavior_hint="")] = None,
    epochs: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    lr: Annotated[float | None, arg(metavar="RATE", help_behavior_hint="")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="")] = None,
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    device: Annotated[str | None, arg(metavar="auto|cpu|cuda|mps", help_behavior_hint="")] = None,
    devices: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    precision: Annotated[str | None, arg(metavar="32|bf16|16", help_behavior_hint="")] = None,
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...", help_behavior_hint="")] = (),
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/RECIPE)")] = None,
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
    resume: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    dry_run: Annotated[bool, FlagCreatePairsOff] = False,
    list: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Train by a recipe: a classifier, a detector or a segmenter, or without labels (DINO).

    Examples: `xcit train finetune --data photos/`,
    `xcit train xcit_small_12_p16_224_dist --data /data/imagenet --devices 8`,
    `xcit train --resume runs/finetune`.

    RECIPE is a name of `xcit train --list`, FILE a config.yaml such as every run writes. PATH holds a folder for each
    class, or train/ and val/ with such folders; docs/data.md has the other layouts. The flags replace the recipe's
    settings; --set replaces any other, by the names in config.yaml. --dry-run shows what would happen.

    The run folder gets the best weights (model.safetensors), report.html, metrics.jsonl, all settings, and the state to
    go on from. Ctrl-C saves and stops; --resume goes on to the same result, bit for bit on a CPU.

    Exit status: 0 when the run is complete, 2 with a sentence for what cannot be done (a mistake in the command or the
    data, a loss that is not a number, a full disk), 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        recipe: A recipe's name, or a file of settings; with --list, a pattern.
        data: The images.
        model: An XCiT architecture, or timm:NAME for one of timm's models.
        pretrained: Initial weights: random, the architecture's own released ones, a checkpoint's name, or a file.
        teacher: Distil from this model: a checkpoint's name or file, timm:NAME, or timm:NAME=FILE.
        epochs: Passes over the training images; fewer than the recipe's shorten its warm-up in proportion.
        batch_size: Images a step, over all devices together.
        lr: Peak learning rate, for the recipe's reference batch if it has one (optim.lr_batch).
        image_size: Side of the square in pixels that the model sees.
        seed: Of the initial weights, the order of the images and their distortion.
        device: Where to train (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        devices: Processes on this machine, one a device.
        precision: float32, or mixed with bfloat16 or float16.
        set: Any other setting, such as optim.clip_grad=1 augment.hflip=0.
        out: Folder to write into.
        overwrite: Replace the run that is in the folder.
        resume: Go on with the run that was stopped in this folder, with its settings.
        dry_run: Show data, model, steps, learning rates and memory, and stop.
        list: Show the recipes, all or by a pattern such as '*small_12*', and stop.
    """
    given = {name: value for name, value in locals().items() if name in FLAGS and value is not None}
    if list:
        return _list(recipe)
    require_train_extra()
    if resume is not None:
        run, config = _resumed(resume, recipe, given, set, out, overwrite)
    else:
        if recipe is None:
            raise ConfigError(
                "Name a recipe, such as finetune for your own images (xcit train --list shows all), or a config.yaml, "
                "or --resume FOLDER."
            )
        config = _configured(recipe, given, set)
        run = None
    from rich.console import Console

    console = Console(highlight=False)
    logging.getLogger("xcit").setLevel(logging.WARNING)  # what is chosen stands in the text
    if dry_run:
        return _dry_run(config, console)
    if run is None:
        run = _folder(config, out, overwrite)
    return execute(config, run, console, _command(recipe, given, set, out, overwrite, resume))


def execute(config: RunConfig, run: RunFolder, console: Console, command: Sequence[str]) -> int:
    """Train, in as many processes as the settings say, and tell how it ended.

    Args:
        config: all settings.
        run: where to.
        console: shows what happens.
        command: this program's arguments, for the other processes.

    Returns:
        The exit code.
    """
    from xcit.recipes.interrupts import StoppedError
    from xcit.recipes.launch import launch, needs_launch

    if needs_launch(config.compute.devices):
        from xcit.recipes.settings import check_config

        check_config(config)
        return launch(["-m", "xcit.cli.main", *command], config.compute.devices)
    try:
        from xcit.recipes.train import train as train_run  # takes seconds: torch, lightning, timm

        metrics = train_run(config, run, console=console)
    except StoppedError as stop:
        print(_stopped(run, f"Stopped by {stop}; the state is saved."), file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(_stopped(run, "Stopped at once."), file=sys.stderr)
        return 130
    if metrics is not None:
        show_result(metrics, run, console)
    return 0


def show_result(metrics: Any, run: RunFolder, console: Console) -> None:
    """Print the figures of a complete run, and what to do with it."""
    import json

    from rich.markup import escape

    if hasattr(metrics, "collapse"):
        _show_dino(metrics, run, console)
        return
    if hasattr(metrics, "figures"):
        _show_detection(metrics, run, console)
        return
    if hasattr(metrics, "overlap"):
        _show_segmentation(metrics, run, console)
        return
    part = "test" if "test" in json.loads(run.metrics.read_text(encoding="utf-8")) else "validation"
    kind = "held-out" if part == "test" else "validation"
    if hasattr(metrics, "accuracy_interval"):
        low, high = metrics.accuracy_interval
        text = (
            f"[bold]{100 * metrics.accuracy:.1f} % of the {kind} images are classified right[/bold] "
            f"({metrics.num_correct} of {metrics.num_images}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
        )
    else:
        text = f"[bold]mean average precision {100 * metrics.mean_average_precision:.1f} % on the {kind} images[/bold]"
    console.print(f"\n{text}", soft_wrap=True)
    if part == "validation":
        console.print(
            "  [dim]the epoch was chosen on these images; data with a test/ part gives a fair figure[/dim]",
            soft_wrap=True,
        )
    shown = run.samples if run.samples.is_dir() else "IMAGE"
    facts = [("report", str(run.report)), ("try it", f"xcit predict {_quoted(shown)} --model {_quoted(run.model)}")]
    if run.skipped.exists():
        facts.append(("skipped", f"some images could not be decoded: {run.skipped}"))
    for what, value in facts:
        console.print(f"  [dim]{what:<8}[/dim]{escape(value)}", soft_wrap=True)


def _show_dino(result: DinoResult, run: RunFolder, console: Console) -> None:
    """Print what a run without labels came to."""
    from rich.markup import escape

    if result.knn is not None:
        k, found = result.knn.of(result.k)  # not the best of them: it would be chosen by the images that judge it
        low, high = found.interval
        text = (
            f"[bold]the nearest neighbours tell the class of {100 * found.top1:.1f} % of the probe's images[/bold] "
            f"(k = {k}; {found.num_correct} of {found.num_images}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
        )
    else:
        text = f"[bold]{result.figures['epoch']:.0f} epochs, loss {result.figures['train_loss']:.3f}[/bold]"
    console.print(f"\n{text}", soft_wrap=True)
    if result.collapse:
        from xcit.recipes.dino_job import COUNSEL

        judge = "the features are worth what the probe above says" if result.knn else "xcit probe judges the features"
        console.print(
            f"  [yellow]collapsed: {result.collapse}; {judge}. Next time, {COUNSEL[result.collapse]}.[/yellow]",
            soft_wrap=True,
        )
    model = _quoted(run.model)
    for what, value in (
        ("report", str(run.report)),
        ("try it", f"xcit attend IMAGE --model {model} --out maps"),
        ("", f"xcit embed IMAGES/ --model {model} -o features.parquet"),
    ):
        console.print(f"  [dim]{what:<8}[/dim]{escape(value)}", soft_wrap=True)
    if run.skipped.exists():
        console.print(f"  [dim]{'skipped':<8}[/dim]some images could not be decoded: {run.skipped}", soft_wrap=True)


def _show_detection(result: DetectionResult, run: RunFolder, console: Console) -> None:
    """Print COCO's figures of a run of detection."""
    from xcit.recipes.detection_report import percent

    kind = "held-out" if result.part == "test" else "validation"
    console.print()
    for name, words in (("bbox", "boxes"), ("segm", "masks")):
        found = result.figures.get(name)  # type: ignore[call-overload]
        if found is not None:
            console.print(
                f"[bold]{words}: AP {percent(found.ap)}, AP50 {percent(found.ap50)}[/bold] on {result.num_images:,} "
                f"{kind} images",
                soft_wrap=True,
            )
    _show_rest(result.part, run, console, "detect", "found")


def _show_segmentation(result: SegmentationResult, run: RunFolder, console: Console) -> None:
    """Print the overlap of classes of a run of segmentation."""
    from xcit.recipes.detection_report import percent

    kind, found = "held-out" if result.part == "test" else "validation", result.overlap
    console.print(
        f"\n[bold]mIoU {percent(found.miou)}, {percent(found.aacc)} of the pixels right[/bold] on "
        f"{result.num_images:,} {kind} images",
        soft_wrap=True,
    )
    _show_rest(result.part, run, console, "segment", "seen")


def _show_rest(part: str, run: RunFolder, console: Console, verb: str, out: str) -> None:
    """Print where the report is and how the model is used."""
    from rich.markup import escape

    if part == "validation":
        console.print(
            "  [dim]the epoch was chosen on these images; data with a test part gives a fair figure[/dim]",
            soft_wrap=True,
        )
    model = _quoted(run.model)
    facts = [("report", str(run.report)), ("try it", f"xcit {verb} IMAGE --model {model} --out {out}")]
    if run.skipped.exists():
        facts.append(("skipped", f"some images could not be used: {run.skipped}"))
    for what, value in facts:
        console.print(f"  [dim]{what:<8}[/dim]{escape(value)}", soft_wrap=True)


def require_train_extra() -> None:
    """Refuse to train without the packages for it.

    Raises:
        BackendError: naming those that are missing, and how to install them.
    """
    missing = [package for module, package in TRAIN_EXTRA.items() if find_spec(module) is None]
    if missing:
        raise BackendError(
            f"Training needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f'pip install "xcit[train]"'
        )


def _changes(task: str, given: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return the settings that flags and --set replace."""
    flags = FLAGS | FLAGS_OF_TASK.get(task, {})
    idle = [name for name in given if not flags[name]]
    if idle:
        raise ConfigError(f"--{idle[0].replace('_', '-')} is not for this recipe, whose task is {task}.")
    changes: dict[str, Any] = {flags[name]: value for name, value in given.items()}
    if "teacher" in given:
        changes["distill.kind"] = OWN  # filled in when the recipe's own is known
    broken = [setting for setting in settings if "=" not in setting]
    if broken:
        raise ConfigError(f"--set takes NAME=VALUE; got {', '.join(broken)}.")
    for setting in settings:
        name, _, value = setting.partition("=")
        if changes.get(name, OWN) != OWN:
            flag = next((flag for flag, target in flags.items() if target == name), None)
            raise ConfigError(
                f"{name} is given twice" + (f", by --{flag.replace('_', '-')} and --set." if flag else ".")
            )
        changes[name] = value
    return changes


def _configured(recipe: str, given: dict[str, Any], settings: Sequence[str]) -> RunConfig:
    from xcit.recipes.config import TrainConfig
    from xcit.recipes.config_file import read_config
    from xcit.recipes.registry import find_recipe
    from xcit.recipes.settings import check_config, override

    is_file = recipe.endswith((".yaml", ".yml"))
    config = read_config(Path(recipe)) if is_file else find_recipe(recipe).make()
    changes = _changes(config.task, given, settings)
    if changes.get("distill.kind") == OWN and isinstance(config, TrainConfig):
        changes["distill.kind"] = "hard" if config.distill.kind == "none" else config.distill.kind
    if "data.root" in changes and getattr(config.data, "format", "") == "digits":
        changes.setdefault("data.format", "auto")
    if not is_file and isinstance(changes.get("epochs"), int) and 0 < changes["epochs"] < config.epochs:
        # A shorter run rises in the same share of its time.
        for name in config.lengths:
            part, _, last = name.partition(".")
            shorter = getattr(getattr(config, part), last) * changes["epochs"] / config.epochs
            changes.setdefault(name, round(shorter, 3))
    config = check_config(override(config, changes))
    if "distill.teacher" in changes and isinstance(config, TrainConfig) and config.distill.kind == "none":
        raise ConfigError("A teacher is named, but distill.kind is none; set it to hard or soft, or name no teacher.")
    return config


def _command(
    recipe: str | None,
    given: dict[str, Any],
    settings: Sequence[str],
    out: Path | None,
    overwrite: bool,
    resume: Path | None,
) -> list[str]:
    """Return the command line that means the same, for the other processes: this one may not have come from one."""
    words = ["train", *([] if recipe is None else [recipe])]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    for name, path in (("--out", out), ("--resume", resume)):
        words += [] if path is None else [name, str(path)]
    words += ["--overwrite"] if overwrite else []
    return [*words, *(["--set", *settings] if settings else [])]


def _resumed(
    resume: Path, recipe: str | None, given: dict[str, Any], settings: Sequence[str], out: Path | None, overwrite: bool
) -> tuple[RunFolder, RunConfig]:
    from xcit.recipes.config_file import read_config
    from xcit.recipes.run_folder import open_run
    from xcit.recipes.settings import check_config, override

    changes = _changes("classification", given, settings)  # what may change is called the same in all tasks
    refused = [name for name in changes if not name.startswith(WHILE_RESUMING)]
    if recipe is not None or out is not None or overwrite or refused:
        raise ConfigError(
            "--resume goes on in a run's folder with its settings; only --device, --devices, --precision and --set of "
            "compute. and log. settings go with it."
        )
    run = open_run(resume)
    return run, check_config(override(read_config(run.config), changes))


def _folder(config: RunConfig, out: Path | None, overwrite: bool) -> RunFolder:
    """Make the run folder; of several processes only the first does."""
    import os

    from xcit.recipes.run_folder import RunFolder, new_run

    root = Path("runs") / Path(config.recipe).name if out is None else out
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) > 0:
        return RunFolder(root)
    return new_run(root, overwrite=overwrite)


def _dry_run(config: RunConfig, console: Console) -> int:
    from rich.markup import escape

    from xcit.recipes.train import open_job

    for name, text in open_job(config).plan():
        for i, line in enumerate(text.splitlines()):
            console.print(f"  [dim]{name if i == 0 else '':<15}[/dim]{escape(line)}", soft_wrap=True)
    console.print("\nNothing was trained or written.")
    return 0


def _list(pattern: str | None) -> int:
    from fnmatch import fnmatchcase

    from xcit.recipes.registry import RECIPES

    width = max(map(len, RECIPES))
    shown = [r for name, r in RECIPES.items() if pattern is None or fnmatchcase(name, pattern)]
    if not shown:
        raise ConfigError(f"No recipe matches {pattern}; xcit train --list shows all.")
    for recipe in shown:
        print(f"{recipe.name:<{width}}  {recipe.summary} [{recipe.status}]")
    return 0


def _stopped(run: RunFolder, text: str) -> str:
    """Say what a stop left and how to go on."""
    if not run.last.exists():
        return f"\n{text.partition(';')[0].rstrip('.')} before there was anything to keep."
    return f"\n{text} Go on with:\n  xcit train --resume {_quoted(run.root)}"


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))
