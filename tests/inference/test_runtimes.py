"""Exported files opened and used: right results, clear refusals, and the predictor on them."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.deploy.convert import write_artefact
from xcit.deploy.export import export
from xcit.errors import BackendError, CheckpointError, ConfigError, ShapeError
from xcit.inference.predictor import Predictor
from xcit.inference.runtime_model import SessionModel
from xcit.inference.runtimes import SUFFIXES, is_artefact, open_session
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat", "dog", "eel"]
CFG = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9}
FORMATS = tuple(SUFFIXES)


class Small(torch.nn.Module):
    """Two outputs that are easily computed by hand."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return [self.scale * x.mean(dim=(2, 3)), x[:, :1] + 1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One file of ``Small`` a format, made for two images of 8 x 12."""
    folder = tmp_path_factory.mktemp("small")
    files = {}
    for format, suffix in SUFFIXES.items():
        files[format] = folder / f"small{suffix}"
        write_artefact(Small(), torch.zeros(2, 3, 8, 12), files[format], format=format)
    return files


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_any_module_in_any_runtime(small, format):
    session = open_session(small[format], threads=1)
    x = noise(2, 3, 8, 12)
    means, shifted = session(x)
    np.testing.assert_allclose(means, 3 * x.mean(axis=(2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shifted, x[:, :1] + 1, rtol=1e-6)
    again, _ = session(np.zeros_like(x))
    assert not again.any()
    assert means.any()  # the first call's results are not overwritten by the second's
    assert session.format == format
    assert session.version[0].isdigit()
    assert session.description["dtype"] == "fp32"
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (2, 1, 8, 12), (2, 3, 12, 8), (3, 8, 12)])
def test_other_shapes_are_refused(small, format, shape):
    with pytest.raises(
        ShapeError, match=rf"takes float32 images \(batch, 3, H, W\): 2 at once, 8 x 12 px; got \({shape[0]}"
    ):
        open_session(small[format])(noise(*shape))


def test_another_type_is_refused(small):
    with pytest.raises(ShapeError, match="float64"):
        open_session(small["onnx"])(noise(2, 3, 8, 12).astype(np.float64))


def test_open_sizes_have_a_smallest(tmp_path):
    path = tmp_path / "small.onnx"
    write_artefact(
        Small(), torch.zeros(2, 3, 8, 12), path, format="onnx", dynamic=("batch", "size"), smallest=4, output_names="ab"
    )
    session = open_session(path)
    assert session.description["outputs"] == ["a", "b"]
    x = noise(5, 3, 4, 31)
    np.testing.assert_allclose(session(x)[0], 3 * x.mean(axis=(2, 3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ShapeError, match="any number at once, any size of 4 px and more a side"):
        session(noise(1, 3, 3, 9))


def test_onnx_names_its_open_axes(tmp_path):
    import onnx

    write_artefact(Small(), torch.zeros(2, 3, 8, 12), tmp_path / "s.onnx", format="onnx", dynamic=("batch", "size"))
    proto = onnx.load(tmp_path / "s.onnx")
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize(
    ("format", "module", "extra"),
    [
        ("onnx", "onnxruntime", "export"),
        ("openvino", "openvino", "export"),
        ("executorch", "executorch.runtime", "edge"),
    ],
)
def test_a_missing_runtime_is_named_with_its_extra(small, monkeypatch, format, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=rf"^{module.partition('.')[0]} .*xcit\[{extra}\]"):
        open_session(small[format])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_files(small, tmp_path, format, damage):
    path = tmp_path / small[format].name
    content = small[format].read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"nothing of the kind" * 10)
    with pytest.raises(CheckpointError) as caught:
        open_session(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_openvino_without_its_weights(small, tmp_path):
    (tmp_path / "m.xml").write_bytes(small["openvino"].read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read by OpenVINO"):
        open_session(tmp_path / "m.xml")


def test_files_of_others_say_nothing_of_themselves(small, tmp_path):
    import onnx

    proto = onnx.load(small["onnx"])
    said = json.loads(proto.metadata_props[0].value)
    for text, message in (
        (None, "does not say what it is"),
        ("{", "damaged description"),
        ('{"format_version": 1}', "damaged description"),
        (json.dumps(said | {"format_version": 99}), "has format version 99; this xcit reads up to 1"),
    ):
        del proto.metadata_props[:]
        if text is not None:
            proto.metadata_props.add(key="xcit", value=text)
        onnx.save(proto, tmp_path / "m.onnx")
        with pytest.raises(CheckpointError, match=message):
            open_session(tmp_path / "m.onnx")


def test_mistakes(small, tmp_path):
    with pytest.raises(ConfigError, match=r"\.onnx \(onnx\)"):
        open_session(tmp_path / "m.engine")
    with pytest.raises(CheckpointError, match="is not there"):
        open_session(tmp_path / "m.onnx")
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        open_session(tmp_path / "d.onnx")
    with pytest.raises(ConfigError, match="threads is 0"):
        open_session(small["onnx"], threads=0)
    assert is_artefact("a/b.ONNX")
    assert not is_artefact("a/b.safetensors")


class Runs:
    """Whoever unpickles it runs code."""

    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("part", ["sample", "weights", "constants", "former format"])
def test_pickles_in_torchs_files_are_refused(small, tmp_path, capsys, part):
    evil = io.BytesIO()
    torch.save(Runs(), evil)
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(small["torch-export"]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if part == "sample" and "/sample_inputs/" in name:
                content = evil.getvalue()
            if part == "weights" and name.endswith("_weights_config.json"):
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config).encode()
            if part == "constants" and name.endswith("_constants_config.json"):
                payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
                content = json.dumps({"config": {"c": payload}}).encode()
            target.writestr(name, content)
        if part == "former format":
            target.writestr("version", "1.0")
    with pytest.raises(CheckpointError, match="no program that" if part == "former format" else "could run code"):
        open_session(path)
    assert "this ran" not in capsys.readouterr().out


# --- the predictor on them --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A classifier, its files, and photos of which one is none."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, cls_attn_layers=1, num_classes=5).eval()
    torch.nn.init.normal_(model.head.weight)
    model.pretrained_cfg = {**CFG, "class_names": NAMES, "label_set": None}
    export(model, folder / "fixed.onnx", format="onnx", batch=3, fold=False)
    export(model, folder / "open.xml", format="openvino", size="dynamic", batch="dynamic", fold=False)
    export(model, folder / "one.pt2", format="torch-export", fold=False)
    export(model, folder / "features.pt2", format="torch-export", features=True, fold=False)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "4.png").write_bytes(b"nothing of the kind")
    return folder, model


@pytest.mark.parametrize("name", ["fixed.onnx", "open.xml", "one.pt2"])
def test_the_predictor_says_the_same(place, name):
    folder, model = place
    want = Predictor(model)(folder / "photos", top_k=2)
    predictor = Predictor(folder / name)
    assert predictor.class_names == NAMES
    assert predictor.preprocessing == Predictor(model).preprocessing
    for ours, theirs in zip(predictor(folder / "photos", top_k=2), want, strict=True):
        assert (ours.path, ours.error) == (theirs.path, theirs.error)
        assert [label[:2] for label in ours.labels] == [label[:2] for label in theirs.labels]
        np.testing.assert_allclose(
            [label.probability for label in ours.labels], [label.probability for label in theirs.labels], rtol=1e-4
        )


def test_another_size_needs_a_file_that_takes_it(place):
    folder, model = place
    photos = folder / "photos" / "0.png"
    want = Predictor(model, image_size=(48, 64)).logits(photos)
    got = Predictor(folder / "open.xml", image_size=(48, 64)).logits(photos)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"image_size is 48 x 48, but .*fixed\.onnx was exported for 32 x 32 px"):
        Predictor(folder / "fixed.onnx", image_size=48)
    assert Predictor(folder / "fixed.onnx", image_size=32).logits(photos).shape == (1, 5)


def test_what_the_predictor_refuses(place):
    folder, _ = place
    with pytest.raises(ConfigError, match=r"open\.xml is an exported file.*leave fold out"):
        Predictor(folder / "open.xml", fold=True)
    with pytest.raises(ConfigError, match="exported files run on the CPU"):
        Predictor(folder / "fixed.onnx", device="cuda")
    with pytest.raises(ConfigError, match="no classifier"):
        Predictor(folder / "features.pt2")


def test_a_batch_is_split_and_filled_up(place):
    folder, model = place
    x = torch.from_numpy(noise(7, 3, 32, 32))
    got = SessionModel(open_session(folder / "fixed.onnx"))(x)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_a_session_is_no_whole_model(place, small):
    folder, _ = place
    with pytest.raises(ConfigError, match="its outputs alone"):
        SessionModel(open_session(folder / "fixed.onnx")).forward_features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="not a classifier"):
        SessionModel(open_session(small["onnx"]))


def test_the_predictor_counts_memory_without_running_the_file(place, monkeypatch):
    folder, _ = place
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: 2**20)
    assert Predictor(folder / "one.pt2").logits(folder / "photos" / "0.png").shape == (1, 5)
