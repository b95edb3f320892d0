"""int8: what is calibrated and judged, that costly layers are kept, and what is refused. Tiny models, few images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xcit.data.preprocess import Preprocessing
from xcit.deploy import calibration, convert
from xcit.deploy.calibration import batches, calibration_images, validation_images
from xcit.deploy.export import export
from xcit.deploy.fold import fold
from xcit.deploy.judge import Figures, Judge
from xcit.deploy.quantise import Quantiser, quantise
from xcit.errors import BackendError, ConfigError, DataError, ExportError
from xcit.inference.runtimes import SUFFIXES, Session, open_session
from xcit.models.xcit import XCiT

FORMATS = ("onnx", "openvino")
OPENVINO_SLOWLY = ["onnx", pytest.param("openvino", marks=pytest.mark.slow)]
PREPARED = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of colours, six images each, in class folders; one file in class a is no image."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate("abc"):
        (root / name).mkdir()
        for i in range(6):
            pixels = (rng.normal(0, 30, (40, 36, 3)) + 60 + 120 * np.eye(3)[label]).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "a" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture
def model(randomize):
    model = randomize(XCiT(embed_dim=32, depth=1, num_heads=4, cls_attn_layers=1, num_classes=3))
    model.pretrained_cfg = PREPARED.to_cfg() | {"class_names": list("abc"), "label_set": None, "architecture": None}
    return model.eval()


# --- images -----------------------------------------------------------------------------------------------------------


def test_calibration_takes_images_at_even_distances_and_leaves_out_broken_ones(photos, caplog):
    with caplog.at_level("WARNING", logger="xcit"):
        images = calibration_images(photos, PREPARED)
    assert len(images) == 18
    assert images.skipped == 1
    assert "1 of 19 images for calibration cannot be read" in caplog.text
    assert "broken.png" in caplog.text
    with Image.open(photos / "a" / "0.png") as image:
        np.testing.assert_array_equal(images[0], PREPARED(image).numpy())
    few = calibration_images(photos, PREPARED, 4)
    reddest = [int(np.argmax(image.mean(axis=(1, 2)))) for image in few]
    assert reddest == [0, 0, 1, 2]  # of each folder


def test_images_that_do_not_fit_the_cache_are_read_again(photos, monkeypatch):
    cached = calibration_images(photos, PREPARED, 4)
    monkeypatch.setattr(calibration, "CACHE_BYTES", 3 * 32 * 32 * 4 + 1)
    small = calibration_images(photos, PREPARED, 4)
    assert len(small._cache) == 1
    np.testing.assert_array_equal(small[:], cached[:])


def test_calibration_mistakes(tmp_path, photos):
    with pytest.raises(DataError, match="holds no image"):
        calibration_images(tmp_path, PREPARED)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 1 images for calibration can be read\. The first: .*x\.png"):
        calibration_images(tmp_path, PREPARED)
    with pytest.raises(ConfigError, match="calibration images is 0"):
        calibration_images(photos, PREPARED, 0)


def test_validation_has_the_models_classes(photos):
    found = validation_images(photos, PREPARED, ["c", "b", "a"])
    assert found.labels.tolist() == [2] * 6 + [1] * 6 + [0] * 6  # the broken one of class a left out
    assert len(found.images) == 18
    with pytest.raises(DataError, match="it lacks"):
        validation_images(photos, PREPARED, ["a", "b"])


def test_batches():
    images = [np.full((1, 2, 2), i, dtype=np.float32) for i in range(5)]
    found = [(batch[:, 0, 0, 0].tolist(), new) for batch, new in batches(images, 2)]
    assert found == [([0, 1], 2), ([2, 3], 2), ([4, 0], 1)]
    assert [(len(batch), new) for batch, new in batches(images, None)] == [(5, 5)]


# --- the judge --------------------------------------------------------------------------------------------------------


class Table(Session):
    """A session that answers an image by its first pixel."""

    format, runtime = "table", "table"

    def __init__(self, rows):
        made_for = {"batch": None, "channels": 1, "height": 1, "width": 1, "smallest": 1}
        super().__init__("table", "0", {"input": made_for, "dtype": "int8"})
        self.rows = np.asarray(rows, dtype=np.float32)

    def _run(self, images):
        return [self.rows[images[:, 0, 0, 0].astype(int)]]


class Rows(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows, dtype=torch.float32)

    def forward(self, x):
        return self.rows[x[:, 0, 0, 0].long()]


FLOAT = [[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [4, 0, 0]]
INT8 = [[4.0, 0, 0], [3, 1, 0], [0, 0, 4], [0, 4, 0]]
NUMBERED = [np.full((1, 1, 1), i, dtype=np.float32) for i in range(4)]


def test_figures_without_labels_are_agreement():
    judge = Judge(Rows(FLOAT), NUMBERED, None, scores=True, number=None)
    figures = judge(Table(INT8))
    assert (figures.kind, figures.compared, figures.after, figures.loss) == ("agreement", 4, 2, 50.0)
    assert figures.relative == 1.0  # 4 of 4
    assert judge(Table(FLOAT)).loss == 0


def test_figures_with_labels_are_top1():
    labelled = calibration.Validation("v", NUMBERED, np.array([0, 1, 0, 1]))
    judge = Judge(Rows(FLOAT), NUMBERED, labelled, scores=True, number=None)
    figures = judge(Table(INT8))
    assert (figures.before, figures.after, figures.to_wrong, figures.to_right) == (2, 2, 1, 1)
    assert figures.loss == 0
    assert figures.to_dict()["top1_before"] == 50.0


def test_figures_of_features_are_relative_differences():
    judge = Judge(Rows(FLOAT), NUMBERED, None, scores=False, number=None)
    figures = judge(Table([[5.0, 0, 0], *FLOAT[1:]]))
    assert figures.kind == "features"
    assert figures.loss == pytest.approx(100 * 0.25 / 4)


def test_what_is_not_finite_fails():
    figures = Judge(Rows(FLOAT), NUMBERED, None, scores=True, number=None)(Table([[np.nan, 0, 0], *FLOAT[1:]]))
    assert figures.relative > 1e6


# --- the search -------------------------------------------------------------------------------------------------------


class Costly(Quantiser):
    """Eight layers, of which given ones change decisions when they are in int8."""

    packages = {"fake": "1"}  # noqa: RUF012

    def __init__(self, costs):
        self.layers = tuple(f"layer{i}" for i in range(8))
        self.costs, self.written = costs, []

    def write(self, path, layers, images, number):
        self.written.append(tuple(layers))
        path.write_text(json.dumps(sum(self.costs.get(layer, 0) for layer in layers)))
        return [path]


@pytest.fixture
def counting_judge(monkeypatch):
    """Reads what ``Costly`` wrote: a loss in points."""
    monkeypatch.setattr("xcit.deploy.quantise.open_session", lambda path: json.loads(path.read_text()))

    class Reading:
        samples = ("a few",)

        def __call__(self, cost):
            return Figures("agreement", 100, None, 100 - int(cost), None, None, cost, 0.01)

        def error(self, cost):
            return cost / 100

    return Reading()


@pytest.mark.parametrize("num_costly", [1, 2, 3, 5, 6, 7])
def test_the_fewest_costly_layers_are_kept(counting_judge, tmp_path, num_costly):
    quantiser = Costly({f"layer{7 - i}": 10 + i for i in range(num_costly)})
    found = quantise(quantiser, tmp_path / "m.onnx", ["all"], counting_judge, limit=1.0, number=1)
    assert {layer.name for layer in found.kept} == set(quantiser.costs)
    assert [layer.error for layer in found.kept] == sorted((c / 100 for c in quantiser.costs.values()), reverse=True)
    assert found.figures.loss == 0
    assert found.all_in_int8.loss == sum(quantiser.costs.values())
    assert found.to_dict()["layers_in_int8"] == 8 - num_costly
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert json.loads((tmp_path / "m.onnx").read_text()) == 0  # the file that was judged


def test_nothing_is_kept_where_the_loss_is_allowed(counting_judge, tmp_path):
    quantiser = Costly({"layer3": 1})
    found = quantise(quantiser, tmp_path / "m.onnx", ["all"], counting_judge, limit=1.0, number=1)
    assert found.kept == ()
    assert len(quantiser.written) == 1


def test_what_loses_too_much_whatever_is_kept_is_refused(counting_judge, tmp_path):
    quantiser = Costly({f"layer{i}": 5 for i in range(8)})
    with pytest.raises(ExportError, match=r"loses 5 points of agreement .* even with 7 of its 8 layers .*--max-loss"):
        quantise(quantiser, tmp_path / "m.onnx", ["all"], counting_judge, limit=1.0, number=1)
    assert list(tmp_path.iterdir()) == []


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", OPENVINO_SLOWLY)
def test_an_int8_file_with_its_proof(model, photos, tmp_path, format):
    path = tmp_path / f"m{SUFFIXES[format]}"
    exported = export(model, path, format=format, dtype="int8", calibration=photos, validation=photos, max_loss=20)
    assert exported.quantised.kept == ()
    assert num_int8_weights(path) > 10
    proof = json.loads((tmp_path / f"{path.name}.proof.json").read_text(encoding="utf-8"))
    assert proof["passed"] is True
    said = proof["int8"]
    assert said["calibration"] == {"folder": photos.name, "images": 18, "unreadable": 1}
    assert said["validation"] == {"folder": photos.name, "images": 18, "unreadable": 1}
    assert said["kind"] == "top-1"
    assert said["layers_in_int8"] > 10
    assert set(said["packages"]) == ({"onnxruntime"} if format == "onnx" else {"nncf", "openvino"})
    images = torch.from_numpy(np.stack(calibration_images(photos, PREPARED)[:4]))
    want = model(images).detach().numpy()
    session = open_session(path)
    got = np.concatenate([session(image[None].numpy())[0] for image in images])
    difference = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < difference < 0.1  # neither float32 in disguise nor wrong
    assert session.arithmetic.startswith("int8")
    assert session.description["dtype"] == "int8"


def test_onnxruntime_computes_products_in_int8(model, tmp_path):
    import onnx
    import onnxruntime

    images = [np.random.default_rng(i).normal(size=(3, 32, 32)).astype(np.float32) for i in range(2)]
    folded = fold(model, image_sizes=((32, 32),)).model
    quantiser = convert.quantiser(folded, torch.zeros(1, 3, 32, 32), format="onnx", calibration=images)
    quantiser.write(tmp_path / "m.onnx", quantiser.layers, images, 1)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    types = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    in_int8 = sum(types.count(name) for name in ("QGemm", "QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat"))
    assert in_int8 == len(quantiser.layers)
    assert "Gemm" not in types
    assert "Conv" not in types


def num_int8_weights(path):
    if path.suffix == ".onnx":
        import onnx

        return sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in onnx.load(path).graph.initializer)
    return path.read_text().count('element_type="i8"')


@pytest.mark.parametrize("format", OPENVINO_SLOWLY)
def test_layers_are_called_as_the_modules(model, format):
    images = [np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)]
    folded = fold(model, image_sizes=((32, 32),)).model
    layers = convert.quantiser(folded, torch.zeros(1, 3, 32, 32), format=format, calibration=images).layers
    assert len(set(layers)) == len(layers)
    wanted = {"patch_embed.proj.0", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.local_mp.conv1"}
    assert {*wanted, "blocks.0.mlp.0", "blocks.0.mlp.2", "cls_attn_blocks.0.mlp.2", "head"} <= set(layers)


@pytest.mark.parametrize("format", FORMATS)
def test_any_module_in_int8(tmp_path, format):
    """As timm's models in the benchmark."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 16)).eval()
    images = [torch.randn(3, 16, 16).numpy() for _ in range(8)]
    path = tmp_path / f"m{SUFFIXES[format]}"
    convert.write_artefact(module, torch.zeros(2, 3, 16, 16), path, format=format, dtype="int8", calibration=images)
    x = np.stack(images[:2])
    (got,) = open_session(path)(x)
    want = module(torch.from_numpy(x)).detach().numpy()
    assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() < 0.05


@pytest.mark.parametrize("format", OPENVINO_SLOWLY)
def test_a_layer_that_is_hard_to_quantise_is_kept(model, photos, tmp_path, format):
    with torch.no_grad():  # a channel that is always 0, with weights so large that int8 leaves nothing of the others
        (_, norm), _, (conv, _) = model.patch_embed.proj[:3]
        norm.weight[0], norm.bias[0] = 0.0, -20.0
        conv.weight[:, 0] = 100.0
    path = tmp_path / f"m{SUFFIXES[format]}"
    exported = export(model, path, format=format, dtype="int8", calibration=photos, features=True, max_loss=1.6)
    quantised = exported.quantised
    assert [layer.name for layer in quantised.kept] == ["patch_embed.proj.2"]
    assert quantised.kept[0].error > 0.01
    assert quantised.all_in_int8.loss > 1.6 >= quantised.figures.loss
    proof = json.loads((tmp_path / f"{path.name}.proof.json").read_text(encoding="utf-8"))
    assert proof["int8"]["layers_kept"] == [
        {"name": "patch_embed.proj.2", "relative_error_alone": quantised.kept[0].error}
    ]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_dynamic_features_and_batches(model, photos, tmp_path, format):
    path = tmp_path / f"m{SUFFIXES[format]}"
    options = {"format": format, "dtype": "int8", "calibration": photos, "max_loss": 20}
    exported = export(model, path, size="dynamic", batch="dynamic", **options)
    assert len({case.shape for case in exported.proof.cases}) > 3
    exported = export(model, path, size=(32, 48), batch=4, features=True, **options)
    assert exported.quantised.figures.kind == "features"
    assert open_session(path)(np.zeros((4, 3, 32, 48), np.float32))[0].shape == (4, 32)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "int8 needs images like those .* --calibration"),
        ({"dtype": "fp32", "calibration": "photos"}, "are for int8; leave them out for fp32"),
        ({"dtype": "fp16", "max_loss": 1.0}, "are for int8; leave them out for fp16"),
        ({"dtype": "int8", "calibration": "photos", "max_loss": -1}, "max_loss is -1"),
        ({"dtype": "int8", "calibration": "photos", "calibration_images": 0}, "calibration images is 0"),
        (
            {"dtype": "int8", "calibration": "photos", "features": True, "validation": "photos"},
            "leave them out for features",
        ),
    ],
)
def test_mistakes(model, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(model, tmp_path / "m.onnx", format="onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_images_without_int8_and_int8_without_images(tmp_path):
    module, example = nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="int8 needs images"):
        convert.write_artefact(module, example, tmp_path / "m.onnx", format="onnx", dtype="int8")
    with pytest.raises(ConfigError, match="leave them out for fp32"):
        convert.write_artefact(module, example, tmp_path / "m.onnx", format="onnx", calibration=[example[0].numpy()])


def test_nncf_is_named_with_its_extra(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"nncf is not installed; pip install \"xcit\[export\]\""):
        export(model, tmp_path / "m.xml", format="openvino", dtype="int8", calibration=photos)


def test_a_model_without_layers_for_int8(tmp_path):
    quantiser = convert.quantiser(
        nn.ReLU(), torch.zeros(1, 3, 8, 8), format="onnx", calibration=[np.zeros((3, 8, 8), np.float32)]
    )
    with pytest.raises(ExportError, match="no layer that can be in int8"):
        quantise(quantiser, tmp_path / "m.onnx", [], None, limit=1, number=1)


def test_a_broken_int8_file_is_caught_and_a_former_one_stays(model, photos, tmp_path, monkeypatch):
    from xcit.deploy.quantise_onnx import OnnxQuantiser

    write = OnnxQuantiser.write

    def damage(self, path, *rest):
        import onnx
        from onnx import numpy_helper

        files = write(self, path, *rest)
        proto = onnx.load(path)
        (tensor,) = [
            t for t in proto.graph.initializer if t.name.startswith("module.head.weight") and "scale" in t.name
        ]
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        onnx.save(proto, path)
        return files

    monkeypatch.setattr(OnnxQuantiser, "write", damage)
    monkeypatch.setattr("xcit.deploy.quantise._Trials.ranked", lambda self: [])
    path = tmp_path / "m.onnx"
    path.write_bytes(b"former")
    with pytest.raises(ExportError, match=r"loses .* in int8"):
        export(model, path, format="onnx", dtype="int8", calibration=photos)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"former"
