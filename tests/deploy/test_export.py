"""Exported files against the model, in their runtimes; what is refused; that nothing unproved is left behind."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from xcit.deploy import convert, export_files
from xcit.deploy.convert import DTYPES, FORMATS, OFFERED
from xcit.deploy.export import export
from xcit.errors import BackendError, CheckpointError, ConfigError, ExportError, UnknownNameError
from xcit.inference.runtimes import SUFFIXES, open_session
from xcit.models.detectors import create_detector
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmenters import create_segmenter
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat", "dog", "eel"]
CFG = {"input_size": [3, 48, 48], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9}
QUICK = [("onnx", "fp32"), ("torch-export", "fp32")]
PAIRS = [
    pytest.param(format, dtype, marks=() if (format, dtype) in QUICK else pytest.mark.slow)
    for format, dtypes in OFFERED.items()
    for dtype in dtypes
    if dtype != "int8"  # which needs images: test_quantise.py
]
ONNX_AND_OPENVINO_SLOWLY = [
    pytest.param("onnx", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow), "torch-export"
]  # fmt: skip
ALLOWED = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest relative differences of this small model, by hand: well below what a wrong graph gives."""


@pytest.fixture
def model(randomize):
    model = randomize(XCiT(embed_dim=32, depth=1, num_heads=4, cls_attn_layers=1, num_classes=5))
    model.pretrained_cfg = {**CFG, "class_names": NAMES, "label_set": None, "architecture": None}
    return model.eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def difference(got, want):
    """Relative to the largest magnitude, in float64."""
    want = want.detach().double().numpy()
    return np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()


def in_its_runtime(path, x):
    """Run a file with its runtime's own calls, as somebody would without xcit."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, {"images": x.numpy()})
    if path.suffix == ".xml":
        import openvino

        return list(openvino.compile_model(path, "CPU")([x.numpy()]).values())
    if path.suffix == ".pt2":
        return [output.detach().numpy() for output in torch.export.load(path).module()(x)]
    from executorch.runtime import Runtime

    return [output.numpy() for output in Runtime.get().load_program(path).load_method("forward").execute([x])]


def left(folder):
    return sorted(file.name for file in folder.iterdir())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "dtype"), PAIRS)
def test_every_pair_that_is_offered(model, tmp_path, format, dtype):
    path = tmp_path / f"m{SUFFIXES[format]}"
    exported = export(model, path, format=format, dtype=dtype, size=(48, 64), batch=2)
    x = images(2, 3, 48, 64)
    want = model.double()(x.double())
    (got,) = open_session(path)(x.numpy())
    assert got.dtype == np.float32
    assert difference(got, want) < ALLOWED[dtype]
    assert difference(in_its_runtime(path, x)[0], want) < ALLOWED["bf16" if format == "openvino" else dtype]
    assert exported.proof.passed
    assert exported.proof.version[0].isdigit()
    with_bin = ["m.bin"] if format == "openvino" else []
    assert left(tmp_path) == [*with_bin, path.name, f"{path.name}.proof.json"]
    assert sorted(exported.files) == sorted(tmp_path.iterdir())
    proof = json.loads((tmp_path / f"{path.name}.proof.json").read_text(encoding="utf-8"))
    assert proof["passed"] is True
    assert (proof["format"], proof["dtype"]) == (format, dtype)
    assert sum(case["shape"][0] for case in proof["cases"]) >= 5  # each kind of image
    assert 0 < proof["max_relative_error"] < ALLOWED[dtype]


@pytest.mark.parametrize("format", ONNX_AND_OPENVINO_SLOWLY)
def test_dynamic_files_are_right_at_sizes_that_export_never_saw(model, tmp_path, format):
    path = tmp_path / f"m{SUFFIXES[format]}"
    exported = export(model, path, format=format, size="dynamic", batch="dynamic")
    assert len({case.shape for case in exported.proof.cases}) > 3
    session = open_session(path)
    model.double()
    for shape in ((1, 3, 17, 33), (1, 3, 224, 80), (4, 3, 50, 111), (2, 3, 64, 64)):
        x = images(*shape)
        assert difference(session(x.numpy())[0], model(x.double())) < 1e-5, shape


def test_what_the_file_says_of_itself(model, tmp_path):
    export(model, tmp_path / "m.pt2", format="torch-export", size=(48, 64), fold=False)
    said = open_session(tmp_path / "m.pt2").description
    assert said["task"] == "classification"
    assert said["outputs"] == ["logits"]
    assert said["input"] | {"smallest": 0} == {"batch": 1, "channels": 3, "height": 48, "width": 64, "smallest": 0}
    assert said["pretrained_cfg"]["class_names"] == NAMES
    assert said["pretrained_cfg"]["mean"] == CFG["mean"]
    assert said["pretrained_cfg"]["input_size"] == [3, 48, 64]  # what it takes now
    assert said["config"] == model.config
    assert XCiT(**said["config"]).num_classes == 5


def test_features(model, tmp_path):
    export(model, tmp_path / "m.pt2", format="torch-export", size=48, features=True)
    session = open_session(tmp_path / "m.pt2")
    x = images(1, 3, 48, 48)
    want = model.double().forward_head(model.forward_features(x.double()), pre_logits=True)
    assert difference(session(x.numpy())[0], want) < 1e-5
    assert session.description["task"] == "features"
    assert session.description["pretrained_cfg"]["class_names"] is None
    assert model.num_classes == 5  # the caller's keeps its head


@pytest.mark.slow
def test_unfolded_and_in_the_other_form(model, tmp_path):
    x = images(1, 3, 48, 48)
    for options in ({"fold": False}, {"fold": False, "attn_form": "covariance"}, {"attn_form": "covariance"}):
        exported = export(model, tmp_path / "m.onnx", format="onnx", size=48, **options)
        assert (exported.fold_report is None) == (options.get("fold") is False)
        assert difference(open_session(tmp_path / "m.onnx")(x.numpy())[0], model(x)) < 1e-5
    assert {block.attn.form for block in model.blocks} == {"auto"}


@pytest.mark.parametrize("format", ONNX_AND_OPENVINO_SLOWLY)
def test_a_segmenter_and_its_pyramid(tmp_path, randomize, format):
    model = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=4, depth=3, channels=16, image_size=64)
    randomize(model).eval()
    x = images(1, 3, 64, 96)
    path = tmp_path / f"s{SUFFIXES[format]}"
    export(model, path, format=format, size=(64, 96))
    (got,) = open_session(path)(x.numpy())
    assert got.shape == (1, 4, 64, 96)
    assert difference(got, model(x)) < 1e-5
    exported = export(model, path, format=format, size="dynamic", features=True)
    assert exported.description["outputs"] == ["stride4", "stride8", "stride16", "stride32"]
    x = images(1, 3, 96, 160)
    for ours, theirs in zip(open_session(path)(x.numpy()), model.backbone(x), strict=True):
        assert difference(ours, theirs) < 1e-5


def test_a_pyramid_and_a_detectors(tmp_path, randomize):
    detector = create_detector("xcit_nano_12_p16", num_classes=2, depth=3, min_size=64, max_size=64, out_channels=16)
    randomize(detector).eval()
    with pytest.raises(ConfigError, match="features"):
        export(detector, tmp_path / "d.pt2", format="torch-export")
    pyramid = detector.backbone.body
    assert isinstance(pyramid, XCiTPyramid)
    x = images(1, 3, 64, 64)
    exported = export(detector, tmp_path / "d.pt2", format="torch-export", features=True)
    assert exported.description["pretrained_cfg"]["mean"] == list(detector.config["mean"])
    for ours, theirs in zip(open_session(tmp_path / "d.pt2")(x.numpy()), pyramid(x), strict=True):
        assert difference(ours, theirs) < 1e-5


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "dtype"), [(f, d) for f in FORMATS for d in DTYPES if d not in OFFERED[f]])
def test_pairs_that_are_not_offered_say_why(model, tmp_path, format, dtype):
    with pytest.raises(ConfigError, match=f"{dtype} is not offered for {format}: .+ Take .+ or .+") as caught:
        export(model, tmp_path / f"m{SUFFIXES[format]}", format=format, dtype=dtype)
    for other in str(caught.value).rpartition(", or ")[2].split(" for ")[0].split(" or "):
        assert dtype in OFFERED[other]
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"format": "onyx"}, UnknownNameError, "Did you mean 'onnx'"),
        ({"dtype": "int4"}, UnknownNameError, "fp32, fp16, bf16"),
        ({"size": 15}, ConfigError, "size is 15; it must be 16 px or more"),
        ({"size": "big"}, ConfigError, "size is 'big'"),
        ({"batch": 0}, ConfigError, "batch is 0"),
        ({"batch": "many"}, ConfigError, "batch is 'many'"),
        ({"attn_form": "both"}, ConfigError, "attn_form is 'both'"),
        ({"path": "m.pt2"}, ConfigError, "does not end in .onnx"),
        ({"format": "executorch", "path": "m.pte", "size": "dynamic"}, ConfigError, "plans its memory for one shape"),
        ({"format": "executorch", "path": "m.pte", "batch": "dynamic"}, ConfigError, "dynamic batch"),
    ],
)
def test_mistakes(model, tmp_path, options, kind, message):
    arguments = {"format": "onnx", "path": "m.onnx"} | options
    with pytest.raises(kind, match=message):
        export(model, tmp_path / arguments.pop("path"), **arguments)
    assert left(tmp_path) == []


def test_models_that_cannot_be_exported(model, tmp_path):
    with pytest.raises(ConfigError, match="Expected an XCiT model, got Linear"):
        export(nn.Linear(2, 2), tmp_path / "m.onnx", format="onnx")
    with torch.device("meta"), pytest.raises(ConfigError, match="meta device"):
        export(XCiT(embed_dim=32, depth=1, num_heads=4), tmp_path / "m.onnx", format="onnx")
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*head\.weight"):
        export(model, tmp_path / "m.onnx", format="onnx")


@pytest.mark.parametrize(
    ("format", "module", "extra"),
    [
        ("onnx", "onnx", "export"), ("onnx", "onnxscript", "export"), ("onnx", "onnxruntime", "export"),
        ("openvino", "openvino", "export"), ("executorch", "executorch.exir", "edge"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(model, tmp_path, monkeypatch, format, module, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(BackendError, match=rf"{module.partition('.')[0]} .*xcit\[{extra}\]"):
        export(model, tmp_path / f"m{SUFFIXES[format]}", format=format, size=48)
    assert left(tmp_path) == []


# --- nothing unproved is left -----------------------------------------------------------------------------------------


def broken_onnx(path):
    """Change a few weights in a file by a twentieth of their tensor's largest."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    tensor = max(proto.graph.initializer, key=lambda t: np.prod(t.dims))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[:64] += 0.05 * np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path)


def test_a_broken_file_is_caught_and_a_former_one_stays(model, tmp_path, monkeypatch):
    writer = convert._onnx

    def damage(program, path, *rest):
        files = writer(program, path, *rest)
        broken_onnx(path)
        return files

    path = tmp_path / "m.onnx"
    path.write_bytes(b"former")
    monkeypatch.setattr(convert, "_onnx", damage)
    with pytest.raises(
        ExportError, match=r"m\.onnx does not reproduce the model: in onnxruntime .* 1\.0e-04 is allowed"
    ):
        export(model, path, format="onnx", size=48)
    assert left(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"former"


def test_a_truncated_file_is_caught(model, tmp_path, monkeypatch):
    writer = convert._torch

    def damage(program, path, *rest):
        files = writer(program, path, *rest)
        path.write_bytes(path.read_bytes()[:-1000])
        return files

    monkeypatch.setattr(convert, "_torch", damage)
    with pytest.raises(ExportError, match=r"^What was written cannot be used, .*: m\.pt2 cannot be read by torch"):
        export(model, tmp_path / "m.pt2", format="torch-export", size=48)
    assert left(tmp_path) == []


def test_a_file_on_which_its_runtime_fails_is_caught(model, tmp_path, monkeypatch):
    def fail(self, images):
        raise ValueError("Traceback\n node 7: invalid index")  # as onnxruntime's errors, no RuntimeError

    monkeypatch.setattr("xcit.inference.runtime_torch.TorchSession._run", fail)
    with pytest.raises(
        ExportError, match=r"not kept: torch .* fails on m\.pt2 for images .* \(node 7: invalid index\)"
    ):
        export(model, tmp_path / "m.pt2", format="torch-export", size=48, fold=False)
    assert left(tmp_path) == []


def test_ctrl_c_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("xcit.deploy.export.prove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "m.pt2", format="torch-export", size=48, fold=False)
    assert left(tmp_path) == []


def fill(path):
    with export_files.appearing(path) as staged:
        staged.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(tmp_path):
    former = tmp_path / "m.xml"
    former.write_bytes(b"former")
    with pytest.raises(ExportError, match=r"m\.xml could not be written: .*; make room"):
        fill(former)
    assert left(tmp_path) == ["m.xml"]
    assert former.read_bytes() == b"former"


def test_no_folder_to_write_in(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(ExportError, match="name a folder that you may write to"),
        export_files.appearing(tmp_path / "file" / "m.onnx"),
    ):
        pass


def test_files_appear_together(tmp_path):
    path = tmp_path / "new" / "m.xml"
    with export_files.appearing(path) as staged:
        staged.write_bytes(b"graph")
        staged.with_suffix(".bin").write_bytes(b"weights")
        assert left(path.parent) != ["m.bin", "m.xml"]
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {"m.bin": b"weights", "m.xml": b"graph"}
