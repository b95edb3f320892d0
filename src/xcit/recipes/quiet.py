"""What Lightning says that is of no use to who runs a recipe, by name; everything else it says is heard."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""They announce the devices found, tips, and each stop, as information."""

MESSAGES = (
    r".*does not have many workers which may be a bottleneck",  # the images lie in memory
    r".*LeafSpec",  # a name in PyTorch that Lightning still uses
    r".*You are using a `trainer.fit\(ckpt_path",
    r".*The dirpath has changed",
    r"Grad strides do not match bucket view strides",  # of channels-last kernels; costs a copy of small tensors
    r".*module\(s\) in eval mode at the start of training",  # the averaged weights, the frozen stem
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence those announcements and warnings, inside the block only."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in MESSAGES:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
