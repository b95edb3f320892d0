"""`xcit export`: a trained model as a file for another runtime, with the proof that it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.errors import ConfigError

if TYPE_CHECKING:
    from xcit.deploy.export import Exported, Size
    from xcit.deploy.proof import Case


def export(
    model: Annotated[str, Positional, arg(metavar="MODEL")],
    *,
    out: Annotated[str, arg(metavar="FILE")],
    format: Annotated[
        Literal["onnx", "openvino", "torch-export", "executorch"] | None,
        arg(metavar="onnx|openvino|torch-export|executorch", help_behavior_hint="(default: by the ending of --out)"),
    ] = None,
    dtype: Annotated[Literal["fp32", "fp16", "bf16", "int8"], arg(metavar="fp32|fp16|bf16|int8")] = "fp32",
    size: Annotated[
        str | None, arg(metavar="PX|HxW|dynamic", help_behavior_hint="(default: what the model expects)")
    ] = None,
    batch: Annotated[str, arg(metavar="N|dynamic")] = "1",
    features: Annotated[bool, FlagCreatePairsOff] = False,
    no_fold: Annotated[bool, FlagCreatePairsOff] = False,
    attn_form: Annotated[Literal["auto", "tokens", "covariance"], arg(metavar="auto|tokens|covariance")] = "auto",
    calibration: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="(int8 needs it)")] = None,
    calibration_images: Annotated[int | None, arg(metavar="N", help_behavior_hint="(int8; default: 300)")] = None,
    validation: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="(int8)")] = None,
    max_loss: Annotated[
        float | None, arg(metavar="POINTS", help_behavior_hint="(int8; default: 0.5, or 1 without --validation)")
    ] = None,
) -> None:
    """Write a model as a file for another runtime, and prove that it computes the same.

    Examples: `xcit export xcit_small_12_p16 --out s12.onnx`, or
    `xcit export runs/scenes/model.safetensors --out scenes.xml --dtype bf16 --size 512x1024`.

    MODEL is a released model's name (`xcit models` lists them), a checkpoint that xcit wrote (a classifier, a backbone,
    a segmenter), or hf-hub:owner/name. Its layers are folded into each other first, as far as that changes nothing.

    The file is then opened in its runtime and compared with the model in float64, on images of several kinds and, where
    sizes are dynamic, on several sizes. The figures go to FILE.proof.json. A file that differs by more than rounding in
    its dtype explains is not kept. It carries the preparation of images and the names of classes: `xcit predict --model
    FILE` runs a classifier's.

    int8 is post-training quantisation, by onnxruntime or by NNCF for OpenVINO: `--dtype int8 --calibration FOLDER
    --validation FOLDER`. What it loses is measured, and the layers that cost the most are kept in higher precision
    until that is no more than --max-loss.

    Endings: .onnx (onnxruntime), .xml with a .bin beside it (OpenVINO), .pt2 (torch), .pte (ExecuTorch). Existing files
    are replaced.

    Exit status: 0 if the file is written and proved, 2 otherwise, 130 after Ctrl-C.

    Args:
        model: What to export; see above.
        out: The file to write.
        format: What it is for.
        dtype: Of the arithmetic: fp32, fp16 and int8 for onnx; fp32, fp16 (weights alone), bf16 and int8 for openvino;
            fp32 and bf16 for torch-export; fp32 for executorch.
        size: Height and width of the images that it takes, such as 224 or 480x640, or dynamic for any.
        batch: How many it takes at once, or dynamic for any number.
        features: Write what the heads see instead: pooled features of a classifier, the four maps of a segmenter's or
            a detector's pyramid.
        no_fold: Write the layers as they were trained.
        attn_form: Form of XCA; auto takes what costs less at the size, and tokens for dynamic sizes.
        calibration: Images like those that the model will meet, from which the ranges of int8 are taken.
        calibration_images: How many of them at most, at even distances through the folder.
        validation: Class folders (or what else `xcit eval` reads) by which a classifier's top-1 is measured before and
            after.
        max_loss: What int8 may lose, in percentage points: of top-1 with --validation; without, of agreement with the
            float32 model on the calibration images; of features, their mean relative difference in percent (default 5).
    """
    images, number = _size(size), _batch(batch)
    ending = Path(out).suffix.lower()

    from xcit.inference.runtimes import FORMAT_OF_SUFFIX

    chosen = format or FORMAT_OF_SUFFIX.get(ending)
    if chosen is None:
        raise ConfigError(f"--out is {out}; name a file that ends in {', '.join(FORMAT_OF_SUFFIX)}, or give --format.")

    from xcit.deploy.convert import check_open, check_packages, check_pair
    from xcit.deploy.export import export as write
    from xcit.deploy.export_int8 import Int8Options, check_options
    from xcit.deploy.export_source import load_model

    # before weights are downloaded
    check_pair(chosen, dtype)
    check_open(chosen, [name for name, value in (("size", images), ("batch", number)) if value == "dynamic"])
    check_options(Int8Options(calibration, calibration_images, validation, max_loss), dtype)
    check_packages(chosen, dtype)
    exported = write(
        load_model(model),
        out,
        format=chosen,
        dtype=dtype,
        size=images,
        batch=number,
        features=features,
        fold=not no_fold,
        attn_form=attn_form,
        calibration=calibration,
        calibration_images=calibration_images,
        validation=validation,
        max_loss=max_loss,
    )
    _print(exported)


def _size(size: str | None) -> Size:
    """Read "224", "480x640" or "dynamic"."""
    if size is None or size == "dynamic":
        return size  # type: ignore[return-value]  # mypy does not narrow it to the word
    try:
        sides = [int(side) for side in size.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError(
            f"--size is {size!r}; it must be pixels such as 224, height x width such as 480x640, or dynamic."
        )
    return (sides[0], sides[-1])


def _batch(batch: str) -> int | Literal["dynamic"]:
    """Read "8" or "dynamic"."""
    if batch == "dynamic":
        return "dynamic"
    if not batch.isdecimal() or int(batch) < 1:
        raise ConfigError(f"--batch is {batch!r}; it must be 1 or more, or dynamic.")
    return int(batch)


def _print(exported: Exported) -> None:
    from xcit.cli.output import mib, print_facts, print_table

    proof, described = exported.proof, exported.description
    made_for = described["input"]
    size = f"{made_for['height']} x {made_for['width']} px" if made_for["height"] else "any size"
    number = "any number" if made_for["batch"] is None else str(made_for["batch"])
    facts = [
        ("files" if i == 0 else "", f"{file} ({mib(file.stat().st_size)})") for i, file in enumerate(exported.files)
    ]
    facts += [
        ("runtime", f"{proof.runtime} {proof.version}, {proof.arithmetic if proof.int8 else proof.dtype}"),
        ("takes", f"images of {size}, {number} at once"),
        ("returns", ", ".join(described["outputs"])),
    ]
    if exported.fold_report is not None:
        facts += [("" if i else "folding", line) for i, line in enumerate(str(exported.fold_report).splitlines())]
    print_facts(str(exported.path), facts)
    columns = (
        "images",
        ">largest difference",
        ">relative",
        ">allowed",
        *((">same class",) if _scored(proof.cases) else ()),
    )
    print_table("proof against the model in float64", columns, (_row(case) for case in proof.cases))
    if exported.quantised is not None:
        print_facts("int8", _int8_facts(exported))


def _int8_facts(exported: Exported) -> list[tuple[str, str]]:
    quantised, said = exported.quantised, exported.proof.int8
    assert quantised is not None
    assert said is not None
    figures, calibration = quantised.figures, said["calibration"]
    facts = [("calibrated on", f"{calibration['images']:,} images of {calibration['folder']}")]
    if figures.kind == "top-1" and figures.before is not None and figures.after is not None:
        before, after = 100 * figures.before / figures.compared, 100 * figures.after / figures.compared
        facts += [
            ("validated on", f"{figures.compared:,} images of {said['validation']['folder']}"),
            ("top-1", f"{before:.2f} % before, {after:.2f} % after"),
            ("changed", f"{figures.to_wrong:,} to wrong, {figures.to_right:,} to right"),
        ]
    elif figures.after is not None:
        facts.append(("same class", f"{figures.after:,} of {figures.compared:,} as in float32, on those images"))
    facts.append(("loss", f"{figures.loss:.2f} points; {quantised.limit:g} allowed"))
    number = quantised.num_layers - len(quantised.kept)
    facts.append(("in int8", f"{number} of {quantised.num_layers} layers"))
    for i, layer in enumerate(quantised.kept):
        facts.append(
            ("" if i else "kept in higher precision", f"{layer.name} (alone {layer.error:.1e} of the outputs)")
        )
    return facts


def _scored(cases: tuple[Case, ...]) -> bool:
    return cases[0].compared is not None


def _row(case: Case) -> list[str]:
    shape = " x ".join(map(str, case.shape))
    row = [shape, f"{case.absolute:.1e}", f"{case.relative:.1e}", f"{case.tolerance:.1e}"]
    return row if case.compared is None else [*row, f"{case.agreeing:,} of {case.compared:,}"]
