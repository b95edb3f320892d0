"""A classifier's way through a whole test set: batches in, figures out, broken images listed instead of fatal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from xcit.data.batches import LabelledImages
from xcit.data.datasets import EvalImages
from xcit.data.image_set import ImageSet
from xcit.data.loading import default_workers, eval_loader
from xcit.data.preprocess import Preprocessing
from xcit.errors import BackendError, CheckpointError, ConfigError, DataError
from xcit.evaluate.classification import ClassificationMetrics, ClassificationTotals
from xcit.inference.devices import is_out_of_memory, synchronize

if TYPE_CHECKING:
    from xcit.evaluate.multi_label import MultiLabelMetrics, MultiLabelTotals

Precision = Literal["32", "bf16", "16"]
AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}

PIXELS_A_BATCH = {"cpu": 32 * 224 * 224, "mps": 32 * 224 * 224, "cuda": 128 * 224 * 224}
"""Where no batch size is given, as many images go into a batch as have this many pixels together ..."""
LARGEST_BATCH = 256
"""... but no more than this: the first batch is no measurement, and small images would all be in it."""


class Skipped(NamedTuple):
    """An image that could not be judged."""

    name: str
    reason: str
    """One sentence."""


class Speed(NamedTuple):
    """How fast the images went through, loading and decoding included, the first batch (warm-up) left out."""

    images_per_second: float
    data_wait: float
    """Share of the time in which the model had to wait for images, 0 to 1."""


@dataclass(frozen=True)
class Evaluation:
    """What a test set says about a model.

    Attributes:
        metrics: of the images that could be decoded.
        skipped: those that could not.
        indices: position in the set of each image that was judged, in the set's order.
        predicted: (images,), the most probable class of each of these.
        seconds: from the first image asked for to the last figure, warm-up included.
        speed: None where a single batch was all, which is the warm-up.
        peak_memory_bytes: the most that tensors took at once on a CUDA device, weights included; None elsewhere.
        batch_size: images that went through the model at once.
        num_workers: processes that decoded them.
    """

    metrics: ClassificationMetrics | MultiLabelMetrics
    skipped: tuple[Skipped, ...]
    indices: tuple[int, ...]
    predicted: tuple[int, ...]
    seconds: float
    speed: Speed | None
    peak_memory_bytes: int | None
    batch_size: int
    num_workers: int


def evaluate_classifier(
    model: nn.Module,
    image_set: ImageSet,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: Precision = "32",
    max_bad_fraction: float = 0.1,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Judge a model by all images of a set. The figures depend neither on the number of workers nor on the batch size.

    (But for rounding: another batch size may sum in another order, which can tip a prediction that hangs in balance.)

    Args:
        model: returns logits (B, classes of the set); it is moved to the device and put back into the mode it was in.
        image_set: with one class an image, or several.
        preprocessing: how its images are prepared.
        device: where the model runs.
        batch_size: images at once; None for as many as have the pixels of 32 images of 224 (128 on CUDA), up to 256.
        num_workers: processes that decode; 0 does it in this one; None chooses by the number of cores.
        precision: float32, or autocast to bfloat16 or float16. Figures are computed in float32 and float64.
        max_bad_fraction: share of the images that may fail to decode, 0 to 1.
        on_progress: called after each batch with the number of images done, the skipped ones included.

    Raises:
        ConfigError: an empty set, a number out of its range, a precision that the device does not have, a batch that
            does not fit in memory, or logits that overflow.
        CheckpointError: the model's weights are not finite.
        ShapeError: the model has another number of classes than the set.
        DataError: more images are broken than may be.
        BackendError: several classes an image need torchmetrics, which is not installed; or a worker process died.
    """
    _check(image_set, batch_size, num_workers, precision, max_bad_fraction, device)
    H, W = preprocessing.image_size
    fitting = PIXELS_A_BATCH.get(device.type, PIXELS_A_BATCH["cpu"]) // (H * W)
    batch_size = batch_size or max(1, min(LARGEST_BATCH, fitting))
    workers = default_workers() if num_workers is None else num_workers
    workers = min(workers, -(-len(image_set) // batch_size))  # more would have nothing to do
    loader = eval_loader(
        QuietImages(image_set, preprocessing), batch_size, num_workers=workers, pin_memory=device.type == "cuda"
    )
    model = model.to(device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _run(model, image_set, loader, device, precision, max_bad_fraction, on_progress)
    finally:
        for module, training in modes:
            module.training = training


def _check(
    image_set: ImageSet,
    batch_size: int | None,
    num_workers: int | None,
    precision: str,
    max_bad_fraction: float,
    device: torch.device,
) -> None:
    problems = []
    if not len(image_set):
        problems.append("There are no images to judge the model by")
    if batch_size is not None and batch_size < 1:
        problems.append(f"batch_size is {batch_size}; it must be 1 or more")
    if num_workers is not None and num_workers < 0:
        problems.append(f"num_workers is {num_workers}; it must be 0 or more")
    if not 0 <= max_bad_fraction <= 1:
        problems.append(f"max_bad_fraction is {max_bad_fraction}; it must be from 0 to 1")
    if precision not in ("32", *AUTOCAST):
        problems.append(f"precision is {precision!r}; it must be 32, bf16 or 16")
    if precision == "16" and device.type == "cpu":
        problems.append("precision is 16, which is for GPUs; take bf16 or 32 on the CPU")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


class QuietImages(EvalImages):
    """Images whose size is no reason for a warning: Pillow refuses those that are really too large."""

    def __getitem__(self, index: int) -> LabelledImages:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return super().__getitem__(index)


def _run(
    model: nn.Module,
    image_set: ImageSet,
    loader: DataLoader[LabelledImages],
    device: torch.device,
    precision: Precision,
    max_bad_fraction: float,
    on_progress: Callable[[int], None] | None,
) -> Evaluation:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    totals: Any = _totals(image_set)
    bad: list[int] = []
    indices: list[int] = []
    predicted: list[int] = []
    began = time.perf_counter()
    warm = began  # when the first batch was done
    warm_images, wait = 0, 0.0
    done = 0
    batches = iter(loader)
    while True:
        asked = time.perf_counter()
        batch = next_batch(batches)
        if batch is None:
            break
        wait += time.perf_counter() - asked
        logits = _logits(model, batch.images, device, precision)
        labels, positions = batch.labels, batch.indices
        if not bool(batch.decoded.all()):
            bad += positions[~batch.decoded].tolist()
            _check_bad(bad, image_set, max_bad_fraction)
            logits, labels, positions = logits[batch.decoded], labels[batch.decoded], positions[batch.decoded]
        totals.update(logits, labels)
        indices += positions.tolist()
        predicted += logits.argmax(dim=1).tolist()
        done += len(batch.labels)
        if warm_images == 0:
            warm, warm_images, wait = time.perf_counter(), done, 0.0
        if on_progress is not None:
            on_progress(done)
    end = time.perf_counter()
    if not totals.num_images:
        raise DataError(f"None of the {len(image_set)} images could be decoded. The first: {why_broken(image_set, 0)}")
    timed = end - warm
    return Evaluation(
        metrics=totals.compute(),
        skipped=tuple(Skipped(image_set.names[index], why_broken(image_set, index)) for index in bad),
        indices=tuple(indices),
        predicted=tuple(predicted),
        seconds=time.perf_counter() - began,
        speed=Speed((done - warm_images) / timed, min(1.0, wait / timed)) if done > warm_images else None,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        batch_size=loader.batch_size or 1,
        num_workers=loader.num_workers,
    )


def next_batch(batches: Iterator[LabelledImages]) -> LabelledImages | None:
    """Return the next batch, or None after the last.

    Raises:
        BackendError: a worker process died.
    """
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise BackendError(
            f"A process that decodes images ended unexpectedly, mostly for want of memory (in a container: of shared "
            f"memory, /dev/shm); take a smaller --num-workers, or 0. PyTorch says: {str(error).partition('.')[0]}."
        ) from None


def _totals(image_set: ImageSet) -> ClassificationTotals | MultiLabelTotals:
    if not image_set.multi_label:
        return ClassificationTotals(image_set.class_names)
    if find_spec("torchmetrics") is None:
        raise BackendError('Average precision needs torchmetrics, which is not installed: pip install "xcit[train]".')
    from xcit.evaluate.multi_label import MultiLabelTotals

    return MultiLabelTotals(image_set.class_names)


def _logits(model: nn.Module, images: Tensor, device: torch.device, precision: Precision) -> Tensor:
    """Return a batch's logits on the CPU, in float32."""
    out_of_memory = False
    cast = torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()
    try:
        with torch.inference_mode(), cast:
            dtype = next(model.parameters()).dtype
            logits: Tensor = model(images.to(device, dtype, non_blocking=True)).float().cpu()
            synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    if out_of_memory:  # outside of the handler: the error's traceback would keep the failed batch's memory
        N, _, H, W = images.shape
        way_out = f"take --batch-size {N // 2}" if N > 1 else "take smaller images, a smaller model or another device"
        raise ConfigError(f"Out of memory on {device} with {N} images of {H} x {W} px at once; {way_out}.")
    if not logits.isfinite().all():
        _explain_not_finite(model, precision)
    return logits


def _explain_not_finite(model: nn.Module, precision: Precision) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"The model's weights are not finite (first: {name}), so there is nothing to judge; training has "
                f"diverged or the file is damaged."
            )
    dtype = AUTOCAST.get(precision, next(model.parameters()).dtype)
    way_out = "take --precision 32" if precision in AUTOCAST else "use weights of a wider type"
    raise ConfigError(
        f"The model's logits are NaN or infinite, though its weights are finite: something overflows in "
        f"{str(dtype).removeprefix('torch.')}; {way_out}."
    )


def _check_bad(bad: Sequence[int], image_set: ImageSet, max_bad_fraction: float) -> None:
    """Refuse as soon as it is certain that too many images are broken."""
    if len(bad) > max_bad_fraction * len(image_set):
        raise DataError(
            f"{len(bad)} of {len(image_set)} images cannot be decoded so far, more than the share of "
            f"{max_bad_fraction:g} that --max-bad-fraction allows. The first: {why_broken(image_set, bad[0])} Mend or "
            f"remove them, or allow more."
        )


def why_broken(image_set: ImageSet, index: int) -> str:
    """Say why an image cannot be decoded, by trying once more: workers send back numbers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image_set.open(index)
    except DataError as error:
        return str(error)
    return f"{image_set.names[index]}: could not be read the first time, though it can now."
