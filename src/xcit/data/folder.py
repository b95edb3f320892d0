"""Images in one folder a class: divided into train/ and val/ (and test/), or all together. ImageNet lies like this."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from xcit.data.images import EXTENSIONS
from xcit.data.parts import PART_OF_WORD, WHOLE, WORDS_OF_PART, Part, canonical, file_set, listing, plural
from xcit.errors import DataError


def folder_parts(root: Path, in_chans: int) -> dict[str, Callable[[], Part]]:
    """Find the parts of an image folder.

    Args:
        root: holds ``train/``, ``val/`` (or ``valid/``, ``validation/``) and ``test/``, as far as there are such; or
            the class folders themselves.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        What opens each part. Its classes are the folders on its first level, in the order of their characters; their
        images may lie at any depth. Hidden files and folders are passed over, links are followed. A class folder
        without an image is left out, with a note.

    Raises:
        DataError: no folder, or one of which cannot be said how it is divided.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder of images.")
    folders = _folders(root)
    divided: dict[str, list[str]] = {}
    others = []
    for name in folders:
        part = PART_OF_WORD.get(name.lower())
        if part is None:
            others.append(name)
        else:
            divided.setdefault(part, []).append(name)
    for part, names in divided.items():
        if len(names) > 1:
            raise DataError(f"{root}: {listing(names)} would all be the {part} part; leave one of them.")
    if not divided or (others and not _is_divided(root, divided, others)):
        return {WHOLE: partial(_open, root, "", in_chans, ())}
    notes = (
        [f"{plural(len(others), 'folder')} of {root} beside its parts stay unused: {listing(others)}."]
        if others
        else []
    )
    # The note belongs to the first part that is opened in any case.
    return {
        part: partial(_open, root, names[0], in_chans, tuple(notes) if part == "train" else ())
        for part, names in sorted(divided.items())
    }


def _is_divided(root: Path, divided: dict[str, list[str]], others: list[str]) -> bool:
    """Tell parts from classes that happen to be called like a part, such as trains among vehicles."""
    if len(divided) > 1:
        return True
    [(name,)] = divided.values()
    loose = _entries(root / name, lambda entry: entry.is_file() and _is_image(entry.name))
    if loose:
        return False
    raise DataError(
        f"{root}: {name!r} may be a part or a class, next to {listing(others)}. If it is a part, move the other "
        f"folders away or add {WORDS_OF_PART['val' if name.lower() in WORDS_OF_PART['train'] else 'train'][0]}/; if "
        f"it is a class, rename it."
    )


def _open(root: Path, subfolder: str, in_chans: int, notes: tuple[str, ...]) -> Part:
    """Read one part: its classes, the files of each, and what is odd about it."""
    base = root / subfolder
    found: list[str] = []
    labels: list[int] = []
    class_names: list[str] = []
    empty: list[str] = []
    strange: Counter[str] = Counter()
    folder_of: dict[str, str] = {}
    for name in _folders(base):
        class_name = canonical(name)
        if class_name in folder_of:
            raise DataError(
                f"{base}: two folders are called {class_name!r}, in two spellings of its accents; join them."
            )
        folder_of[class_name] = name
    for class_name, name in sorted(folder_of.items()):
        images = []
        for path in _files_below(base / name):
            if _is_image(path):
                images.append(path)
            else:
                strange[os.path.splitext(path)[1].lower() or "no ending"] += 1  # noqa: PTH122 (a million of them)
        if not images:
            empty.append(class_name)
            continue
        prefix = f"{subfolder}/{name}" if subfolder else name
        found += [f"{prefix}/{path}" for path in sorted(images)]
        labels += [len(class_names)] * len(images)
        class_names.append(class_name)
    loose = _entries(base, lambda entry: entry.is_file() and _is_image(entry.name))
    if not found:
        raise DataError(_why_nothing(base, loose, empty, strange))
    notes += tuple(_oddities(base, loose, empty, strange))
    images_set = file_set(root, found, np.array(labels, dtype=np.int64), class_names, in_chans)
    return Part(images_set, notes)


def _oddities(base: Path, loose: list[str], empty: list[str], strange: Counter[str]) -> Iterator[str]:
    if empty:
        these = "It is" if len(empty) == 1 else "They are"
        yield f"{plural(len(empty), 'class folder')} of {base} without an image: {listing(empty)}. {these} left out."
    if loose:
        yield f"{plural(len(loose), 'image')} beside the class folders of {base} left out: {listing(loose)}."
    if strange:
        endings = listing(ending for ending, _ in strange.most_common())
        yield f"{plural(strange.total(), 'file')} below {base} left out, being no images by their ending: {endings}."


def _why_nothing(base: Path, loose: list[str], empty: list[str], strange: Counter[str]) -> str:
    if loose:
        return (
            f"{base}: holds {plural(len(loose), 'image')} but no folder of a class. Sort them into one folder a "
            f"class, or list them with their labels in a CSV file."
        )
    if strange:
        return f"{base}: holds no image; its files end in {listing(strange)}, and images in {', '.join(EXTENSIONS)}."
    if empty:
        return f"{base}: holds no image; its class folders are empty ({listing(empty)})."
    return f"{base}: is empty; it must hold one folder of images a class."


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _folders(folder: Path) -> list[str]:
    return _entries(folder, lambda entry: entry.is_dir())


def _entries(folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Return the names, sorted, of what is wanted in a folder; hidden ones never are."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and wanted(entry))
    except OSError as error:
        raise _unreadable(error) from None


def _files_below(folder: Path) -> Iterator[str]:
    """Yield the files at any depth, as paths relative to the folder with "/" between their parts."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error) from None

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename}: cannot be read: {error.strerror}.")
