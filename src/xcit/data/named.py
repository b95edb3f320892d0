"""Public data sets by name, from local copies in their published form, which torchvision reads (iNaturalist: its JSON).

==============  ========================  ======================================================================
name            parts                     lies in (below the root)
==============  ========================  ======================================================================
cifar10         train, test               ``cifar-10-batches-py/``
cifar100        train, test               ``cifar-100-python/``
flowers102      train, val, test          ``flowers-102/`` (``jpg/``, ``imagelabels.mat``, ``setid.mat``)
stanford_cars   train, test               ``stanford_cars/`` (``cars_train/``, ``cars_test/``, ``devkit/``, ...)
inat18, inat19  train, val                ``train_val2018/`` (or torchvision's ``2018/``), ``train2018.json``, ...
==============  ========================  ======================================================================

The official parts stay what they are: where there is no val, it is split off train and test is left alone. iNaturalist
publishes no labels of its test images; results on it are on val. Flowers102's train and val are often joined for
transfer learning; here they are not, so that a choice can be made on val.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xcit.data.image_set import ImageSet
from xcit.data.images import convert_image
from xcit.data.parts import Part, Texts, canonical, file_set, listing, missing_files, read_text
from xcit.errors import DataError

NAMED_SETS = ("cifar10", "cifar100", "flowers102", "stanford_cars", "inat18", "inat19")

INAT_ADDRESS = "https://ml-inat-competition-datasets.s3.amazonaws.com"
INAT_LISTS = {
    ("2018", "train"): "bfa29d89d629cbf04d826a720c0a68b0",
    ("2018", "val"): "f2ed8bfe3e9901cdefceb4e53cd3775d",
    ("2019", "train"): "b06a6683537867c0d5c7a45f407a306d",
    ("2019", "val"): "5cc5509b0fe495f1c8c1362612448497",
}
"""MD5 of the archives of the lists, as published beside them."""


@dataclass(frozen=True)
class ArrayReader:
    """Gives images out of one array in memory.

    Attributes:
        pixels: (n, H, W, 3) or (n, H, W) uint8.
        in_chans: 3 for RGB, 1 for grey.
    """

    pixels: np.ndarray
    in_chans: int

    def __call__(self, number: int) -> Image.Image:
        """Return one image."""
        return convert_image(Image.fromarray(self.pixels[number]), self.in_chans)

    def content(self, number: int) -> bytes:
        """Return its pixels as they are stored."""
        return self.pixels[number].tobytes()


def array_set(
    pixels: np.ndarray,
    numbers: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    prefix: str,
    in_chans: int,
) -> ImageSet:
    """Return a set of images in memory.

    Args:
        pixels: all images of the array.
        numbers: (n,) int64, those that belong to the set.
        labels: (n,) int64.
        class_names: in the order of the labels.
        prefix: of the images' names; their number follows.
        in_chans: 3 for RGB, 1 for grey.
    """
    names = Texts(f"{prefix}/{number:05d}" for number in numbers)
    return ImageSet(class_names, names, labels.astype(np.int64), ArrayReader(pixels, in_chans), numbers)


def named_parts(name: str, root: Path, in_chans: int, download: bool = False) -> dict[str, Callable[[], Part]]:
    """Return what opens each part of a public data set.

    Args:
        name: one of ``NAMED_SETS``.
        root: folder of the local copy; see the table above.
        in_chans: 3 for RGB, 1 for grey.
        download: fetch what is not there. Stanford Cars can no longer be had like that.

    Raises:
        DataError: when a part is opened whose copy is missing or damaged; the message says how to get it.
    """
    if name in ("cifar10", "cifar100"):
        opening: Callable[..., Part] = partial(_cifar, name)
        parts: tuple[str, ...] = ("train", "test")
    elif name == "flowers102":
        opening, parts = _flowers, ("train", "val", "test")
    elif name == "stanford_cars":
        opening, parts = _cars, ("train", "test")
    else:
        opening, parts = partial(_inat, "20" + name.removeprefix("inat")), ("train", "val")
    return {part: partial(opening, root, part, in_chans, download) for part in parts}


def _cifar(name: str, root: Path, part: str, in_chans: int, download: bool) -> Part:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    data = _published(
        lambda: kind(str(root), train=part == "train", download=download),
        f"{root}: holds no whole copy of {name} ({kind.base_folder}/ as published, unpacked from {kind.filename})",
        download,
    )
    labels = np.asarray(data.targets, dtype=np.int64)
    numbers = np.arange(len(labels), dtype=np.int64)
    return Part(array_set(data.data, numbers, labels, tuple(data.classes), f"{name}/{part}", in_chans))


def _flowers(root: Path, part: str, in_chans: int, download: bool) -> Part:
    from torchvision import datasets

    data = _published(
        lambda: datasets.Flowers102(str(root), split=part, download=download, loader=Path),
        f"{root}: holds no whole copy of flowers102 (flowers-102/ with the published jpg/, imagelabels.mat, setid.mat)",
        download,
    )
    return _listed(
        root, [data[i] for i in range(len(data))], tuple(datasets.Flowers102.classes), "Flowers102", in_chans
    )


def _cars(root: Path, part: str, in_chans: int, download: bool) -> Part:
    from torchvision import datasets

    data = _published(
        lambda: datasets.StanfordCars(str(root), split=part, loader=Path),
        f"{root}: holds no whole copy of stanford_cars (stanford_cars/ with cars_{part}/, devkit/ and, for test, "
        f"cars_test_annos_withlabels.mat), which its authors no longer offer for download: get a copy elsewhere and "
        f"unpack it there",
        None,
    )
    return _listed(root, [data[i] for i in range(len(data))], tuple(data.classes), "Stanford Cars", in_chans)


def _listed(
    root: Path, samples: list[tuple[Path, int]], class_names: tuple[str, ...], title: str, in_chans: int
) -> Part:
    """Return the part that a published list stands for: paths and classes."""
    names = [path.relative_to(root).as_posix() for path, _ in samples]
    labels = np.array([label for _, label in samples], dtype=np.int64)
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(f"{root}: {title} names {len(class_names)} classes, and has labels up to {labels.max() + 1}.")
    images = file_set(root, names, labels, class_names, in_chans)
    return Part(images, missing_files(images, title, f"The copy in {root} is not whole; unpack it again."))


def _published(build: Callable[[], Any], complaint: str, download: bool | None) -> Any:
    """Let torchvision open (and, if asked, fetch) a data set; say in one sentence what is wrong if it cannot.

    Args:
        build: makes torchvision's object.
        complaint: what is not there, without an end.
        download: whether it was asked to; None if that is not possible at all.
    """
    try:
        return build()
    except Exception as error:  # torchvision's own, and whatever a damaged file provokes in its readers
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, ImportError) or "Scipy is not found" in reason:
            raise DataError(
                "The labels of this data set are in .mat files, which SciPy reads: pip install 'xcit[train]'."
            ) from None
        if download:
            raise DataError(f"{complaint}, and downloading it failed: {reason}.") from None
        if "not found" in reason:  # torchvision's words for any copy that is not whole
            advice = "" if download is None else "; put it there, or ask for the download (data.download=true)"
            raise DataError(f"{complaint}{advice}.") from None
        raise DataError(f"{complaint}: {reason}.") from None


# --- iNaturalist ------------------------------------------------------------------------------------------------------


def _inat(year: str, root: Path, part: str, in_chans: int, download: bool) -> Part:
    """Read a part by its published list: torchvision's own class does not tell training from validation images."""
    table = root / f"{part}{year}.json"
    folder = next((name for name in (f"train_val{year}", year) if (root / name).is_dir()), None)
    if download and (folder is None or not table.is_file()):
        folder = _fetch_inat(year, root, part, folder)
    absent = [
        *([] if folder else [f"train_val{year}/ (or {year}/, as torchvision unpacks it)"]),
        *([] if table.is_file() else [table.name]),
    ]
    if folder is None or absent:
        raise DataError(
            f"{root}: holds no whole copy of iNaturalist {year}: {' and '.join(absent)} not there; get them from "
            f"{INAT_ADDRESS}/{year}/, or ask for the download (data.download=true)."
        )
    content = _inat_list(table)
    names = root / "categories.json"
    try:
        categories = _inat_list(names) if names.is_file() else content["categories"]
        name_of = {int(category["id"]): str(category["name"]) for category in categories}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        # "train_val2018/Plantae/7477/name.jpg"; torchvision renames the first folder
        paths = ["/".join([folder, *files[a["image_id"]].split("/")[1:]]) for a in content["annotations"]]
        labels = np.array([int(annotation["category_id"]) for annotation in content["annotations"]], dtype=np.int64)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{table}: is not in the published form ({type(error).__name__}: {error}).") from None
    ids = sorted(name_of)
    if not paths or ids != list(range(len(ids))) or not 0 <= labels.min() <= labels.max() < len(ids):
        raise DataError(f"{table}: its categories are not numbered from 0 without gaps, or it names no image.")
    if len(set(name_of.values())) < len(name_of):
        name_of = {number: f"{number} {name}" for number, name in name_of.items()}
    class_names = [canonical(name_of[number]) for number in ids]
    images = file_set(root, paths, np.array(labels, dtype=np.int64), class_names, in_chans)
    return Part(
        images, missing_files(images, str(table), f"The copy in {root / folder} is not whole; unpack it again.")
    )


def _inat_list(path: Path) -> Any:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON ({error}).") from None
    if path.name != "categories.json":
        lacking = [
            key
            for key in ("images", "annotations", "categories")
            if not isinstance(content, dict) or key not in content
        ]
        if lacking:
            raise DataError(f"{path}: lacks {listing(lacking)}; it must be the published list.")
    return content


def _fetch_inat(year: str, root: Path, part: str, folder: str | None) -> str:
    """Fetch what is not there, check it against the published MD5, and return the folder of the images."""
    from torchvision.datasets import INaturalist
    from torchvision.datasets.utils import download_and_extract_archive

    complaint = f"{root}: holds no whole copy of iNaturalist {year}"
    if not (root / f"{part}{year}.json").is_file():
        address = f"{INAT_ADDRESS}/{year}/{part}{year}.json.tar.gz"
        md5 = INAT_LISTS[year, part]
        _published(lambda: download_and_extract_archive(address, str(root), md5=md5), complaint, True)
    if folder is None:
        _published(lambda: INaturalist(str(root), version=year, download=True), complaint, True)
    return folder or year
