"""``xcit quickstart``: train a small XCiT on handwritten digits, here and now, and look at the result."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, arg

from xcit.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from xcit.recipes.run_folder import RunFolder

DEFAULT_FOLDER = Path("runs/quickstart")
INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""
TRAIN_EXTRA = {
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}
"""Module and package of what the extra adds."""


def quickstart(
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/quickstart)")] = None,
    epochs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 40)")] = None,
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
    resume: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
) -> int:
    """Train a small XCiT on scikit-learn's handwritten digits and write a report: about two minutes on two CPU cores.

    Nothing is downloaded. The run folder gets the trained model (model.safetensors), report.html, the pictures in it,
    all figures and settings, and a few digits to try the model on.

    Args:
        out: Folder to write into.
        epochs: Passes over the training images.
        seed: Of the initial weights, the order of the images and their distortion.
        device: Where to train (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        overwrite: Replace the run that is in the folder.
        resume: Go on with the run that was stopped in this folder, with its settings.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        XCiTError: what cannot be done, in a sentence.
    """
    _require_train_extra()
    if resume is not None and not (out is epochs is seed is None and not overwrite):
        raise ConfigError(
            "--resume goes on in a run's folder with its settings; leave out --out, --epochs, --seed and --overwrite."
        )
    from rich.console import Console
    from rich.markup import escape

    from xcit.recipes.config import check_config, read_config
    from xcit.recipes.digits import digits_quickstart, expected_minutes
    from xcit.recipes.run_folder import epochs_done, new_run, open_run

    if resume is not None:
        run = open_run(resume)
        config = read_config(run.config)
    else:
        recipe = digits_quickstart()
        config = check_config(
            replace(
                recipe,
                epochs=recipe.epochs if epochs is None else epochs,
                seed=recipe.seed if seed is None else seed,
            )
        )
        run = new_run(DEFAULT_FOLDER if out is None else out, overwrite=overwrite)

    logging.getLogger("xcit").setLevel(logging.WARNING)  # the device, which is logged as chosen, stands in the text
    console = Console(highlight=False)
    console.print("A small XCiT learns to read handwritten digits", style="bold")
    console.print(
        f"  [dim]time    [/dim]{expected_minutes(config.epochs - epochs_done(run) * run.resume)} on two CPU cores"
    )
    try:
        from xcit.recipes.train import train  # takes seconds: torch, lightning, timm

        metrics = train(config, run, device=device, console=console)
    except KeyboardInterrupt:
        print(_stopped(run, epochs_done(run), config.epochs), file=sys.stderr)
        return INTERRUPTED
    low, high = metrics.accuracy_interval
    console.print(
        f"\n[bold]{100 * metrics.accuracy:.1f} % of the held-out digits are read right[/bold] "
        f"({metrics.num_correct} of {metrics.num_images}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %)",
        soft_wrap=True,
    )
    for what, value in (
        ("report", str(run.report)),
        ("try it", f"xcit predict {shlex.quote(str(run.samples))} --model {shlex.quote(str(run.model))}"),
    ):
        console.print(f"  [dim]{what:<8}[/dim]{escape(value)}", soft_wrap=True)
    return 0


def _stopped(run: RunFolder, done: int, epochs: int) -> str:
    """Say what Ctrl-C left and how to go on."""
    if not run.config.exists():
        return "\nStopped before the training began; nothing is kept."
    kept = f"{done} of {epochs} epochs {'is' if done == 1 else 'are'} kept"
    return f"\nStopped; {kept}. Go on with:\n  xcit quickstart --resume {shlex.quote(str(run.root))}"


def _require_train_extra() -> None:
    missing = [package for module, package in TRAIN_EXTRA.items() if find_spec(module) is None]
    if missing:
        raise BackendError(
            f"Training needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f'pip install "xcit[train]"'
        )
