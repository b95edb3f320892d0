"""``xcit quickstart``: train a small XCiT on handwritten digits, here and now, and look at the result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from xcit.errors import ConfigError

DEFAULT_FOLDER = Path("runs/quickstart")


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
    all figures and settings, and a few digits to try the model on. It is `xcit train digits_quickstart` in one word.

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
    from xcit.cli.train import execute, require_train_extra

    require_train_extra()
    if resume is not None and not (out is epochs is seed is None and not overwrite):
        raise ConfigError(
            "--resume goes on in a run's folder with its settings; leave out --out, --epochs, --seed and --overwrite."
        )
    from rich.console import Console

    from xcit.recipes.config_file import read_config
    from xcit.recipes.digits import digits_quickstart, expected_minutes
    from xcit.recipes.run_folder import epochs_done, new_run, open_run
    from xcit.recipes.settings import check_config, override

    changes = {"epochs": epochs, "seed": seed, "compute.device": device}
    changes = {name: value for name, value in changes.items() if value is not None}
    if resume is not None:
        run = open_run(resume)
        config = check_config(override(read_config(run.config), {"compute.device": device}))
    else:
        config = check_config(override(digits_quickstart(), changes))
        run = new_run(DEFAULT_FOLDER if out is None else out, overwrite=overwrite)

    logging.getLogger("xcit").setLevel(logging.WARNING)  # the device, which is logged as chosen, stands in the text
    console = Console(highlight=False)
    console.print("A small XCiT learns to read handwritten digits", style="bold")
    left = config.epochs - epochs_done(run) * run.resume
    console.print(f"  [dim]time    [/dim]{expected_minutes(left)} on two CPU cores")
    return execute(config, run, console, [])
