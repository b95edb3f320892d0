"""Export a trained model to another runtime, with a numerical proof: what cannot be proved is not kept.

The model is folded (``xcit.deploy.fold``), written (``convert``), opened in its runtime and compared with the model as
it was, in float64 (``proof``). Only then do the file and its proof take their names.

Legend: B batch, C channels, H x W the image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from xcit.data.labels import class_names
from xcit.deploy.convert import check_open, check_packages, check_pair, write_artefact
from xcit.deploy.export_files import appearing
from xcit.deploy.export_int8 import Int8Options, Source, check_options, open_images
from xcit.deploy.proof import KINDS, Proof, failure, prove, write_proof
from xcit.errors import BackendError, CheckpointError, ConfigError, ExportError
from xcit.inference.runtimes import SUFFIXES, open_session
from xcit.models.layers import XCA
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmentation import SegmentationModel
from xcit.models.weights import bare, refuse_not_finite
from xcit.models.xcit import XCiT
from xcit.ops.xca_form import FORMS, Form

if TYPE_CHECKING:
    from xcit.deploy.fold import FoldReport
    from xcit.deploy.quantise import Quantised

DYNAMIC: Literal["dynamic"] = "dynamic"
_USUAL = 512
"""Pixels a side of the largest images of a proof whose sizes are open."""
_MIDDLE = 0.5
"""Mean and standard deviation with which a proof's images are normalised where the model does not say."""
Size = int | tuple[int, int] | Literal["dynamic"] | None


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote."""

    path: Path
    """The file; of OpenVINO's two the ``.xml``."""
    files: tuple[Path, ...]
    """All of it: with OpenVINO's ``.bin``, and the proof."""
    proof: Proof
    fold_report: FoldReport | None
    """What was folded; None where nothing was."""
    description: dict[str, Any]
    """What the file says of itself."""
    quantised: Quantised | None = None
    """What int8 loses, and which layers are kept in higher precision; None for other types."""


@dataclass(frozen=True)
class _Task:
    """What is to be exported of a model."""

    name: str
    """"classification", "features", "segmentation" or "pyramid"."""
    model: nn.Module
    """Images to outputs, as it was trained; in eval mode, on the CPU, float32."""
    outputs: tuple[str, ...]
    in_chans: int
    patch_size: int
    config: dict[str, Any]
    cfg: dict[str, Any]
    """``pretrained_cfg``."""
    size: tuple[int, int]
    """Height and width that the model expects."""


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    dtype: str = "fp32",
    size: Size = None,
    batch: int | Literal["dynamic"] = 1,
    features: bool = False,
    fold: bool = True,
    attn_form: Form = "auto",
    calibration: Source | None = None,
    calibration_images: int | None = None,
    validation: Source | None = None,
    max_loss: float | None = None,
) -> Exported:
    """Write a model as a file for another runtime, and beside it the proof that it computes the same.

    Args:
        model: an ``XCiT``, an ``XCiTPyramid``, or a segmenter; of a ``MaskRCNN`` the pyramid, with ``features``. It
            stays as it is.
        path: where to; ends as the format's files do (.onnx, .xml, .pt2, .pte). Existing files are replaced.
        format: "onnx", "openvino", "torch-export" or "executorch".
        dtype: "fp32", "fp16", "bf16" or "int8", as ``convert.OFFERED`` lists.
        size: height and width in pixels, or one number for both; "dynamic" for any; None for what the weights expect.
        batch: images at once, or "dynamic" for any number.
        features: what the heads see instead of what they say: a classifier's pooled features (B, C), the four maps of
            a segmenter's or a detector's pyramid.
        fold: fold the model first.
        attn_form: of XCA: "auto" for what costs less at the size ("tokens" for dynamic ones), "tokens", "covariance".
        calibration: for int8, which needs it: a folder of images like those that the model will meet.
        calibration_images: for int8: how many of them at most, at even distances; None for 300.
        validation: for int8 of a classifier: class folders, by which top-1 is measured before and after.
        max_loss: for int8: what may be lost, in percentage points, before layers are kept in higher precision: of top-1
            on the validation images (None: 0.5); without them, of agreement with the float32 model on the calibration
            images (1); of features, their mean relative difference in percent (5).

    Returns:
        The files, the proof, what was folded, and what int8 costs.

    Raises:
        UnknownNameError, ConfigError: a pair that is not offered, a value out of its range, a model that cannot be
            exported; the message says what can; an int8 option without int8, or int8 without calibration.
        DataError: images for int8 that cannot be used.
        BackendError: the format's packages are not installed.
        CheckpointError: weights that are not finite.
        ExportError: the file could not be written, failed its proof, or loses too much; then nothing is left.
    """
    path = Path(path).expanduser()
    check_pair(format, dtype)
    options = Int8Options(calibration, calibration_images, validation, max_loss)
    check_options(options, dtype)
    if path.suffix != SUFFIXES[format]:
        raise ConfigError(f"{path.name} does not end in {SUFFIXES[format]}, as {format} files do; name it so.")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it.")
    if attn_form not in FORMS:
        raise ConfigError(f"attn_form is {attn_form!r}; XCA has the forms {', '.join(FORMS)}.")
    open_axes = [name for name, value in (("batch", batch), ("size", size)) if value == DYNAMIC]
    check_open(format, open_axes)
    check_packages(format, dtype)
    task = _task(model, features)
    check_options(options, dtype, task.name)
    height, width = _size(size, task)
    number = _batch(batch)
    refuse_not_finite(task.model.state_dict(), "The model", "it is not exported")

    ready, report = task.model, None
    if fold:
        ready, report = _folded(task.model, attn_form, () if size == DYNAMIC else ((height, width),))
    elif attn_form != "auto":
        ready = _with_form(copy.deepcopy(task.model), attn_form)
    description = _described(task, attn_form, fold, None if size == DYNAMIC else (height, width))
    scores = task.name in ("classification", "segmentation")
    int8 = None
    if dtype == "int8":
        cfg = description["pretrained_cfg"]
        trained = task.size if size == DYNAMIC else (height, width)
        int8 = open_images(options, cfg, trained, cfg["class_names"] or (), scores=scores)
    shapes = _shapes(number, task, (height, width), size == DYNAMIC)
    mean = task.cfg.get("mean") or [_MIDDLE] * task.in_chans
    std = task.cfg.get("std") or [_MIDDLE] * task.in_chans
    example = torch.zeros(number or 2, task.in_chans, height, width)
    described: dict[str, Any] = {
        "format": format,
        "dynamic": open_axes,
        "smallest": task.patch_size + 1 if task.name in ("classification", "features") else 32,
        "output_names": task.outputs,
        "description": description,
    }
    quantised = None
    with appearing(path) as staged:
        if int8 is None:
            write_artefact(ready, example, staged, dtype=dtype, **described)
        with _usable(staged):
            if int8 is not None:
                quantised = int8.write(ready, task.model, example, staged, number=number, **described)
            session = open_session(staged)
            proof = prove(
                session,
                task.model,
                shapes,
                dtype=dtype,
                mean=mean,
                std=std,
                scores=scores,
                images_of=int8.batch if int8 else None,
            )
        if not proof.passed:
            raise failure(proof, path.name)
        proof = replace(proof, arithmetic=session.arithmetic)
        if int8 is not None and quantised is not None:
            proof = replace(proof, int8=int8.facts(quantised))
        description = session.description
        del session  # a runtime may hold the file that is about to be moved
        write_proof(proof, staged.with_name(f"{path.name}.proof.json"))
        names = sorted(file.name for file in staged.parent.iterdir())
    files = tuple(path.with_name(name) for name in names)
    return Exported(path, files, proof, report, description, quantised)


@contextmanager
def _usable(staged: Path) -> Iterator[None]:
    """Turn a failure to open or to run what was just written into the reason why it is not kept.

    Raises:
        ExportError: it cannot be read, or its runtime fails on it.
    """
    try:
        yield
    except (CheckpointError, BackendError) as error:
        reason = str(error).replace(str(staged), staged.name)
        raise ExportError(f"What was written cannot be used, and is not kept: {reason}") from error


def _task(model: nn.Module, features: bool) -> _Task:
    """Say what is to be exported of a model.

    Raises:
        ConfigError: nothing can be.
    """
    if isinstance(model, MaskRCNN):
        if not features:
            raise ConfigError(
                "A detector cannot be exported whole: torchvision's suppression of overlapping boxes branches on how "
                "many an image gives, which torch.export, by which every format is written, cannot follow. Its pyramid "
                "can be exported: add --features (features=True)."
            )
        pyramid = model.backbone.body
        assert isinstance(pyramid, XCiTPyramid)
        cfg = pyramid.pretrained_cfg | {"mean": list(model.config["mean"]), "std": list(model.config["std"])}
        return _dense(pyramid, pyramid, "pyramid", cfg, model.config["min_size"])
    if isinstance(model, SegmentationModel):
        if features:
            cfg = {"mean": list(model.mean), "std": list(model.std)}
            return _dense(model.backbone, model.backbone, "pyramid", cfg, model.image_size)
        return _dense(model, model.backbone, "segmentation", model.pretrained_cfg, model.image_size)
    if isinstance(model, XCiTPyramid):
        return _dense(model, model, "pyramid", model.pretrained_cfg, None)
    xcit = bare(model)
    copied = _copy(xcit)
    assert isinstance(copied, XCiT)
    if features and copied.num_classes:
        copied.reset_classifier(0)
    name = "classification" if copied.num_classes else "features"
    _, height, width = copied.pretrained_cfg.get("input_size") or (3, 224, 224)
    return _Task(
        name,
        copied,
        ("logits" if copied.num_classes else "features",),
        copied.config["in_chans"],
        copied.config["patch_size"],
        copied.config,
        copied.pretrained_cfg,
        (height, width),
    )


def _dense(model: nn.Module, pyramid: XCiTPyramid, name: str, cfg: dict[str, Any], side: int | None) -> _Task:
    outputs = ("logits",) if name == "segmentation" else tuple(f"stride{stride}" for stride in pyramid.strides)
    _, height, width = cfg.get("input_size") or (3, side or 224, side or 224)
    config = model.config if isinstance(model, SegmentationModel) else pyramid.config | {"taps": list(pyramid.taps)}
    in_chans, patch_size = pyramid.config["in_chans"], pyramid.patch_size
    return _Task(name, _copy(model), outputs, in_chans, patch_size, dict(config), dict(cfg), (height, width))


def _copy(model: nn.Module) -> nn.Module:
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ConfigError("The model is on the meta device: it has shapes but no weights to export.")
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def _with_form(model: nn.Module, form: Form) -> nn.Module:
    """Set the form of XCA in every block of a copy that is ours."""
    for module in model.modules():
        if isinstance(module, XCA):
            module.form = form
    return model


def _folded(model: nn.Module, attn_form: Form, sizes: tuple[tuple[int, int], ...]) -> tuple[nn.Module, FoldReport]:
    from xcit.deploy.fold import fold

    folded = fold(model, form=attn_form, image_sizes=sizes)
    return folded.model, folded.report


def _size(size: Size, task: _Task) -> tuple[int, int]:
    """Return the height and width to trace at.

    Raises:
        ConfigError: no size, or a smaller one than the model takes.
    """
    least = task.patch_size if task.name in ("classification", "features") else 32
    if size == DYNAMIC:
        return 3 * max(task.patch_size, 32), 4 * max(task.patch_size, 32)
    sides = task.size if size is None else (size, size) if isinstance(size, int) else size
    if isinstance(sides, str) or len(sides) != 2 or min(sides) < least:
        raise ConfigError(f"size is {size!r}; it must be {least} px or more a side, for this model, or 'dynamic'.")
    return int(sides[0]), int(sides[1])


def _batch(batch: int | str) -> int | None:
    """Return the number of images, None for any."""
    if batch == DYNAMIC:
        return None
    if isinstance(batch, str) or batch < 1:
        raise ConfigError(f"batch is {batch!r}; it must be 1 or more, or 'dynamic'.")
    return int(batch)


def _shapes(number: int | None, task: _Task, size: tuple[int, int], any_size: bool) -> list[tuple[int, int, int, int]]:
    """Return the batches of the proof, which show every kind of image: at the traced size, if sizes are open at others.

    Those are square and not, and whole patches and not.
    """
    C, p = task.in_chans, max(32, task.patch_size)
    usual = task.size if max(task.size) <= _USUAL else (_USUAL, _USUAL)
    sizes = [size, (2 * p, 5 * p), (3 * p + 5, 2 * p + 3), usual] if any_size else [size]
    numbers = (3, 1, 2, 5) if number is None else (number,) * max(len(sizes), -(-len(KINDS) // number))
    return [(n, C, *sizes[i % len(sizes)]) for i, n in enumerate(numbers)]


def _described(task: _Task, attn_form: Form, folded: bool, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return what the file says of its model: all that a program needs that has nothing but the file."""
    cfg = dict(task.cfg)
    if size is not None:
        cfg["input_size"] = [task.in_chans, *size]
    elif not cfg.get("input_size"):
        cfg["input_size"] = [task.in_chans, *task.size]
    num_classes = task.config.get("num_classes", 0)
    if num_classes and task.name in ("classification", "segmentation"):
        cfg["class_names"] = class_names(cfg, num_classes)
    else:
        cfg["class_names"] = None
    return {
        "task": task.name,
        "architecture": cfg.get("architecture"),
        "config": task.config,
        "pretrained_cfg": cfg,
        "folded": folded,
        "attn_form": attn_form,
    }
