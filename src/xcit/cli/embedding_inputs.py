"""What the verbs around features share: opening a model for them, reading features, writing results."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xcit.errors import BackendError, ConfigError, DataError

if TYPE_CHECKING:
    from xcit.inference.embedding import Failed
    from xcit.inference.feature_file import FeatureTable, Origin
    from xcit.inference.features import FeatureExtractor

Pool = Literal["token", "avg", "both", "gem"]
PACKAGES = {"pyarrow": "pyarrow", "faiss": "faiss-cpu"}
"""Module and package of what the extra adds."""
LISTED = 20
"""Broken images that are named on stderr."""
INTERRUPTED = 130


def require_retrieval_extra(*modules: str) -> None:
    """Refuse before anything slow what would fail for want of a package.

    Raises:
        BackendError: naming those that are missing, and how to install them.
    """
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        raise BackendError(
            f"This needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f'pip install "xcit[retrieval]"'
        )


def check_numbers(**numbers: float | None) -> None:
    """Refuse, all at once, numbers below 1 (gem_p: 0 and below); None is not looked at."""
    problems = []
    for name, number in numbers.items():
        if number is not None and (number <= 0 if name == "gem_p" else number < 1):
            least = "more than 0" if name == "gem_p" else "1 or more"
            problems.append(f"--{name.replace('_', '-')} is {number}; it must be {least}")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def refuse_idle_gem_p(gem_p: float | None, pool: str) -> None:
    """Refuse an exponent that nothing would use; ``pool`` may name several with + between them."""
    if gem_p is not None and "gem" not in pool.split("+"):
        raise ConfigError(f"--gem-p is for --pool gem, and --pool is {pool}.")


def require_some(paths: Sequence[Path]) -> None:
    """Refuse, before a model is loaded, images none of which is there; of some, each is told when its turn comes.

    Raises:
        DataError: the message names the first.
    """
    if any(path.exists() for path in paths):
        return
    from xcit.data.images import open_image

    try:
        open_image(paths[0])
    except DataError as error:
        several = f"None of the {len(paths):,} images can be read. The first: " if len(paths) > 1 else ""
        raise DataError(f"{several}{error}") from None


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s unless there is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def parse_scales(text: str) -> tuple[float, ...]:
    """Read ``1,0.7,0.5``; ``multi`` are DINO's scales."""
    if text == "multi":
        from xcit.inference.features import MULTI_SCALE

        return MULTI_SCALE
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--scales is {text!r}; it must be numbers with commas between them, or multi.") from None


def open_extractor(model: str, **options: Any) -> FeatureExtractor:
    """Return the extractor; ``options`` are its arguments, None standing for its defaults."""
    import warnings

    from PIL import Image

    from xcit.inference.features import FeatureExtractor

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return FeatureExtractor(model, **{name: value for name, value in options.items() if value is not None})


def extractor_like(
    origin: Origin, name: str, model: str | None, device: str, batch_size: int | None = None
) -> FeatureExtractor:
    """Return an extractor whose features can be compared with others; its fingerprint is made sure of.

    Args:
        origin: of the others.
        name: of the file that holds them, for messages.
        model: takes the place of the one that is noted there, such as the same weights in another place.
        device: where to run.
        batch_size: images at once.

    Raises:
        ConfigError: the model gives other features; the message names both.
        DataError: the file does not say enough of its settings.
    """
    from xcit.data.preprocess import Preprocessing

    try:
        settings = origin.settings
        options = {
            "pool": settings["pool"],
            "scales": settings["scales"],
            "gem_p": settings["gem_p"],
            "preprocessing": Preprocessing.from_cfg(settings["preprocessing"]),
        }
        noted = settings["model"]
    except (KeyError, TypeError):
        raise DataError(f"{name}: does not say how its features were made; make it again.") from None
    if model is None and not (os.path.isabs(noted) or os.path.exists(noted)):  # noqa: PTH110, PTH117 (a name, perhaps)
        elsewhere = Path(origin.folder, noted)
        model = str(elsewhere) if elsewhere.is_file() else None
    chosen = model or noted
    try:
        extractor = open_extractor(chosen, device=device, batch_size=batch_size, **options)
    except ConfigError as error:
        ours = _as_it_can(chosen, device, options)
        if ours is None or ours.fingerprint == origin.fingerprint:
            raise
        raise ConfigError(_unlike(origin, ours, name)) from error
    ours = _origin(extractor)
    if ours.fingerprint != origin.fingerprint:
        raise ConfigError(_unlike(origin, ours, name))
    return extractor


def _as_it_can(model: str, device: str, options: dict[str, Any]) -> Origin | None:
    """Return what a model makes that cannot be used as asked: with its own preparation of images, then without more."""
    for asked in ({**options, "preprocessing": None}, {"pool": "avg"}):
        try:
            return _origin(open_extractor(model, device=device, **asked))
        except ConfigError:
            continue
    return None


def _origin(extractor: FeatureExtractor) -> Origin:
    from xcit.inference.feature_file import Origin

    return Origin(extractor.fingerprint, extractor.settings, os.getcwd())  # noqa: PTH109 (text is wanted)


def _unlike(origin: Origin, ours: Origin, name: str) -> str:
    return (
        f"{origin.unlike(ours, name)} Their features cannot be compared: take the model that it was made with, or make "
        f"it again."
    )


def is_feature_file(source: str) -> bool:
    """Tell a file of features from a folder of images."""
    return source.lower().endswith(".parquet") and not Path(source).is_dir()


def features_of(paths: Sequence[Path], extractor: FeatureExtractor, word: str) -> tuple[FeatureTable, list[Failed]]:
    """Compute the features of files in memory, with a progress bar.

    Returns:
        Those that could be read, and the others, which have been told on stderr.

    Raises:
        DataError: none could be read.
    """
    import numpy as np

    from xcit.inference.embedding import Failed
    from xcit.inference.feature_file import FeatureTable

    good: list[Path] = []
    vectors: list[np.ndarray] = []
    failed: list[Failed] = []
    with progress_bar(word, len(paths)) as advance:
        for path, features in zip(paths, extractor.stream(paths), strict=True):
            if features.vector is None:
                failed.append(Failed(str(path), str(features.error)))
            else:
                good.append(path)
                vectors.append(features.vector)
            advance(1)
    if not good and len(failed) == 1:
        raise DataError(printable(failed[0].error))
    if not good:
        _name(failed)
        raise DataError(f"None of the {len(paths):,} images can be read.")
    tell_failed(failed, len(paths))
    none = np.zeros(len(good), np.int64)
    return FeatureTable(_origin(extractor), [str(path) for path in good], np.stack(vectors), none, none), failed


def tell_failed(failed: Sequence[Failed], total: int, where: str = "") -> None:
    """Name broken images on stderr, and say how many they are."""
    _name(failed)
    if failed:
        more = f" The first {LISTED} are above." if len(failed) > LISTED else ""
        print(
            f"xcit: {len(failed):,} of {counted(total, 'image')} cannot be read and "
            f"{'is' if len(failed) == 1 else 'are'} left out.{more}{where}",
            file=sys.stderr,
        )


def _name(failed: Sequence[Failed]) -> None:
    for each in failed[:LISTED]:
        print(f"xcit: {printable(each.error)}", file=sys.stderr)


@contextmanager
def progress_bar(word: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if that is a terminal; yield what moves it on."""
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn(word),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(word, total=total)
        yield lambda steps: progress.advance(task, steps)


def printable(name: str | Path) -> str:
    """Return a name that takes one line: a file's name may hold any byte."""
    name = str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def json_text(data: object) -> str:
    """Return plain data as JSON, indented."""
    return json.dumps(data, indent=2) + "\n"


def put(text: str) -> None:
    """Print what programs read: names of files may hold bytes that are no UTF-8, which leave as they came."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    sys.stdout.write(text)
    sys.stdout.flush()
