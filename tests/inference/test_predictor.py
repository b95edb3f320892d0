"""The predictor against the model called by hand, and everything that can go wrong on the way."""

import copy
import itertools
import re
import subprocess
import sys
import textwrap
import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from xcit.data.preprocess import Preprocessing
from xcit.errors import BackendError, CheckpointError, ConfigError, DataError, UnknownNameError
from xcit.inference import devices
from xcit.inference.devices import choose_device
from xcit.inference.features import FeatureExtractor
from xcit.inference.predictor import Label, Prediction, Predictor
from xcit.inference.stream import DECODERS
from xcit.models.folded_models import FoldedXCiT
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

CFG = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def model(randomize):
    model = XCiT(embed_dim=32, depth=2, num_heads=4, num_classes=7)
    randomize(model)
    model.pretrained_cfg = {**CFG, "class_names": NAMES}
    return model


@pytest.fixture
def photos(tmp_path):
    """Ten files; numbers 3 and 7 are no images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        if i in (3, 7):
            (folder / f"{i}.png").write_bytes(b"nothing of the kind")
        else:
            Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def by_hand(model, image):
    """Logits and their softmax, through torchvision's transforms."""
    steps = [T.Resize(32, InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor()]
    x = T.Compose([*steps, T.Normalize(CFG["mean"], CFG["std"])])(image)[None]
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x)[0]
    return logits, (logits.exp() / logits.exp().sum()).tolist()


def check(prediction, probabilities, top_k):
    order = sorted(range(7), key=lambda i: -probabilities[i])[:top_k]
    assert prediction.error is None
    assert [label.index for label in prediction.labels] == order
    assert [label.name for label in prediction.labels] == [NAMES[i] for i in order]
    np.testing.assert_allclose([x.probability for x in prediction.labels], [probabilities[i] for i in order], rtol=1e-4)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100, None])
def test_a_folder_in_order_with_its_bad_files(model, photos, batch_size):
    predictions = Predictor(model, batch_size=batch_size)(photos, top_k=3)
    assert [p.path for p in predictions] == [photos / f"{i}.png" for i in range(10)]
    for i, prediction in enumerate(predictions):
        if i in (3, 7):
            assert prediction.labels == []
            assert prediction.error.startswith(f"{photos / str(i)}.png: is not an image")
        else:
            check(prediction, by_hand(model, Image.open(photos / f"{i}.png"))[1], 3)


def test_files_pillow_images_and_arrays_are_the_same_to_it(model, photos):
    image = Image.open(photos / "1.png").convert("RGB")
    array = np.asarray(image)
    predictions = Predictor(model)([photos / "1.png", str(photos / "1.png"), image, array, array / 255])
    assert [p.path for p in predictions] == [photos / "1.png", photos / "1.png", None, None, None]
    for prediction in predictions:
        check(prediction, by_hand(model, image)[1], 5)


def test_one_image_alone(model, photos):
    image = Image.open(photos / "1.png").convert("RGB")
    predict = Predictor(model)
    for one in (image, np.asarray(image), photos / "1.png", str(photos / "1.png"), f"{photos}/1.p?g"):
        (prediction,) = predict(one)
        check(prediction, by_hand(model, image)[1], 5)


def test_no_more_classes_than_there_are(model):
    (prediction,) = Predictor(model)(Image.new("RGB", (9, 9)), top_k=50)
    assert len(prediction.labels) == 7
    assert sum(label.probability for label in prediction.labels) == pytest.approx(1, abs=1e-5)


def test_a_label_is_a_tuple():
    index, name, probability = Label(2, "cat", 0.5)
    assert (index, name, probability) == (2, "cat", 0.5)
    assert Prediction(None) == Prediction(None, [], None)


def test_a_folded_copy_says_the_same_and_leaves_the_model_alone(model, photos):
    path = photos / "0.png"
    folded = Predictor(model, fold=True)
    assert isinstance(folded.model, FoldedXCiT)
    assert isinstance(model, XCiT)
    check(folded(path)[0], by_hand(model, Image.open(path))[1], 5)
    with pytest.raises(ConfigError, match="folded already"):
        Predictor(folded.model, fold=True)


def test_logits(model, photos):
    files = [photos / "1.png", photos / "2.png"]
    want = torch.stack([by_hand(model, Image.open(file))[0] for file in files])
    torch.testing.assert_close(Predictor(model, batch_size=1).logits(files), want, rtol=1e-4, atol=1e-5)
    assert Predictor(model).logits([]).shape == (0, 7)
    with pytest.raises(DataError, match=r"3\.png: is not an image"):
        Predictor(model).logits(photos)


def test_extreme_images_are_predicted(model, tmp_path):
    for i, size in enumerate([(1, 1), (20_000, 30), (30, 20_000)]):
        Image.new("RGB", size, (200, 30, 60)).save(tmp_path / f"{i}.png")
    predictions = Predictor(model)(tmp_path, top_k=7)
    assert [p.error for p in predictions] == [None] * 3
    # of one colour, hence the same once preprocessed
    assert len({tuple(label.index for label in p.labels) for p in predictions}) == 1


def test_grey_model(randomize):
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3, in_chans=1)
    model.pretrained_cfg = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    (prediction,) = Predictor(randomize(model))(Image.new("RGB", (9, 9), (0, 255, 0)), top_k=3)
    grey = torch.full((1, 1, 32, 32), (150 / 255 - 0.5) / 0.5)  # 0.587 * 255 rounds to 150
    with torch.no_grad():
        want = model.eval()(grey).softmax(1).max().item()
    assert prediction.labels[0].probability == pytest.approx(want, rel=1e-4)
    assert {label.name for label in prediction.labels} == {"0", "1", "2"}


def test_image_size_and_preprocessing_can_be_given(model):
    assert Predictor(model, image_size=48).preprocessing.image_size == (48, 48)
    assert Predictor(model, image_size=(48, 64)).preprocessing.image_size == (48, 64)
    own = Preprocessing((64, 64), crop_pct=0.5)
    assert Predictor(model, preprocessing=own).preprocessing == own


def test_batch_size_follows_the_pixels(model):
    assert Predictor(model, image_size=224).batch_size == 32
    assert Predictor(model, image_size=448).batch_size == 8
    assert Predictor(model, image_size=4480).batch_size == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_models_dtype_is_kept(model, dtype):
    logits = Predictor(model.to(dtype)).logits(Image.new("RGB", (9, 9), (200, 100, 0)))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want, _ = by_hand(model.float(), Image.new("RGB", (9, 9), (200, 100, 0)))
    torch.testing.assert_close(logits[0].float(), want, rtol=0.1 if dtype == torch.bfloat16 else 1e-4, atol=0.1)


# --- the caller's model -----------------------------------------------------------------------------------------------


def test_every_module_is_left_in_its_mode(model, photos):
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = model.blocks[1].local_mp.bn.running_mean.clone()
    check(Predictor(model)(photos / "1.png")[0], by_hand(model, Image.open(photos / "1.png"))[1], 5)
    predict = Predictor(model).stream(photos)
    next(predict)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model.blocks[1].local_mp.bn.running_mean, statistics)
    assert all(p.requires_grad for p in model.parameters())


def test_the_mode_is_restored_after_an_error(model, monkeypatch):
    model.train()
    monkeypatch.setattr(model, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Predictor(model)(Image.new("RGB", (9, 9)))
    assert model.training


def test_a_checkpoint_alone_suffices(model, photos, tmp_path):
    save_checkpoint(model, tmp_path / "m.safetensors", class_names=NAMES)
    loaded = Predictor(tmp_path / "m.safetensors", device="cpu")
    assert not loaded.model.training
    assert loaded.class_names == NAMES
    check(loaded(photos / "1.png")[0], by_hand(model, Image.open(photos / "1.png"))[1], 5)


def test_imagenet_names():
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=1000)
    model.pretrained_cfg = {**CFG, "label_set": "imagenet-1k"}
    names = Predictor(model).class_names
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"image_size": 8}, "image_size is 8 x 8; it must be at least one patch of 16 x 16"),
        ({"image_size": -5}, r"image_size is \(-5, -5\)"),
        ({"preprocessing": Preprocessing((32, 32), (0.5,), (0.5,), in_chans=1)}, "of 1 channels; the model takes 3"),
        ({"device": "gpu"}, "The device is 'gpu'; it must be auto, cpu, cuda"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Predictor(model, **arguments)


def test_models_that_cannot_predict(model):
    with pytest.raises(ConfigError, match="no classifier"):
        Predictor(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=0))
    with pytest.raises(ConfigError, match="takes 4 channels"):
        Predictor(XCiT(embed_dim=32, depth=1, num_heads=4, in_chans=4))
    with pytest.raises(ConfigError, match="does not say what images"):
        Predictor(XCiT(embed_dim=32, depth=1, num_heads=4))
    with pytest.raises(ConfigError, match="Expected an XCiT"):
        Predictor(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="on the meta device"):
        Predictor(model.to("meta"))
    with pytest.raises(ConfigError, match="dino_xcit_small_12_p16 is a backbone without classifier"):
        Predictor("dino_xcit_small_12_p16")
    with pytest.raises(UnknownNameError, match="xcit_nano_12_p16"):
        Predictor("xcit_nano_12_p61")


def test_class_names_that_are_not_as_many(model):
    model.pretrained_cfg["class_names"] = ["a", "b"]
    with pytest.raises(ConfigError, match="7 classes, but 2 class names"):
        Predictor(model)


def test_top_k_and_objects_that_are_no_images(model):
    with pytest.raises(ConfigError, match="top_k is 0"):
        Predictor(model)([], top_k=0)
    with pytest.raises(ConfigError, match="got Tensor"):
        Predictor(model)([torch.zeros(3, 32, 32)])
    (prediction,) = Predictor(model)(np.zeros((3, 32, 32), np.uint8))
    assert prediction.error.startswith("image 0: The array's shape is (3, 32, 32)")


def test_weights_that_are_not_finite(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(first: blocks\.1\.mlp\.fc1\.weight\)"):
        Predictor(model)(Image.new("RGB", (9, 9)))


def test_logits_that_overflow_cost_only_their_image(model, monkeypatch):
    forward = model.forward

    def overflowing(x):
        logits = forward(x).clone()
        logits[x.mean(dim=(1, 2, 3)) > 1] = float("inf")
        return logits

    monkeypatch.setattr(model, "forward", overflowing)
    dark, bright = Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "white")
    first, second = Predictor(model)([dark, bright])
    assert first.error is None
    assert second.error.startswith("image 1: the model's logits are NaN or infinite")


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_logged", set())


def test_auto_without_a_gpu_is_the_cpu_and_says_so_once(no_gpu, caplog):
    caplog.set_level("INFO", logger="xcit")
    assert choose_device() == choose_device("auto") == torch.device("cpu")
    assert [record.message.split(" (")[0] for record in caplog.records] == ["Device: cpu"]


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(no_gpu, name):
    with pytest.raises(BackendError, match=f"The device '{name}' is not available: .*Use cpu or auto"):
        choose_device(name)


def test_a_card_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BackendError, match="2 cards, cuda:0 to cuda:1"):
        choose_device("cuda:2")


def test_a_model_passed_is_not_moved(model, no_gpu):
    assert Predictor(model, device="cpu").device == torch.device("cpu")
    with pytest.raises(BackendError):
        Predictor(model, device="cuda")


def test_a_model_passed_that_lies_elsewhere(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"on cpu, not on cuda; move it first"):
        Predictor(model, device="cuda")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_an_endless_source_is_read_only_a_little_ahead(model):
    taken = itertools.count()
    source = (Image.new("RGB", (9, 9)) for _ in iter(lambda: next(taken), -1))
    stream = Predictor(model, batch_size=4).stream(source)
    for _ in range(40):
        next(stream)
    assert next(taken) <= 40 + 4 + 4 + DECODERS + 1
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("xcit-decode") and t.is_alive() and _busy(t)]


def _busy(thread):
    thread.join(timeout=5)
    return thread.is_alive()


def limited(model, monkeypatch, max_pixels):
    """A model that has memory for so many pixels."""
    forward = model.forward

    def forward_if_it_fits(x):
        if x.shape[0] * x.shape[2] * x.shape[3] > max_pixels:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes.")
        return forward(x)

    monkeypatch.setattr(model, "forward", forward_if_it_fits)
    return model


@pytest.mark.parametrize(
    ("max_pixels", "message"),
    [
        (3 * 32 * 32, r"with 8 images of 32 x 32 px at once; 2 fit .* batch_size=2 \(--batch-size\)"),
        (20 * 20, r"at once; one of 16 x 16 fits .* image_size=16 \(--image-size\)"),
        (10, r"not even one of 16 x 16 fits"),
    ],
)
def test_out_of_memory_names_what_fits(model, monkeypatch, max_pixels, message):
    predict = Predictor(limited(model, monkeypatch, max_pixels), batch_size=8)
    with pytest.raises(ConfigError, match=message) as error:
        predict([Image.new("RGB", (9, 9))] * 8)
    assert error.value.__context__ is None  # it would keep the memory of the failed batch


def free(monkeypatch, num_bytes):
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: num_bytes)


def test_an_image_size_without_the_memory_for_it_is_refused_before_anything_is_read(model, monkeypatch):
    """20000 x 20000 px would be killed by the system, without a word."""
    free(monkeypatch, 8 * 2**20)
    monkeypatch.setattr("xcit.inference.stream.open_image", lambda *_: pytest.fail("read"))
    with pytest.raises(
        ConfigError,
        match=r"^One image of 20000 x 20000 px would take about [\d.]+ GiB of memory on cpu, where 8 MiB are free: use "
        r"image_size=\d+ \(--image-size\) or less\.$",
    ) as error:
        Predictor(model, image_size=20000)("cat.jpg")
    fits = int(re.search(r"image_size=(\d+)", str(error.value))[1])
    image = Image.new("RGB", (9, 9))
    assert Predictor(model, image_size=fits)(image)[0].error is None
    with pytest.raises(ConfigError, match="would take"):
        Predictor(model, image_size=fits + 16)(image)
    with pytest.raises(ConfigError, match=r"One image of 20000 x 9984 px .* use image_size=\(\d+, \d+\)"):
        Predictor(model, image_size=(20000, 9984))(image)
    free(monkeypatch, 1000)
    with pytest.raises(ConfigError, match="not even one patch would fit"):
        Predictor(model)(image)


def test_a_batch_without_the_memory_for_it_is_refused_with_one_that_fits(model, monkeypatch):
    image = Image.new("RGB", (9, 9))
    free(monkeypatch, 2**20)
    with pytest.raises(
        ConfigError, match=r"^500 images of 32 x 32 px at once would take .* use batch_size=\d+"
    ) as error:
        Predictor(model, batch_size=500)([image] * 600)
    fits = int(re.search(r"batch_size=(\d+)", str(error.value))[1])
    assert 1 < fits < 500
    assert len(Predictor(model, batch_size=fits)([image] * 600)) == 600
    assert len(Predictor(model, batch_size=500)([image] * fits)) == fits  # fewer images than a batch


def test_a_feature_extractors_scales_count(monkeypatch):
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4)
    extract = partial(FeatureExtractor, model, preprocessing=Preprocessing((64, 64)))
    free(monkeypatch, 64 * 64 * 2048)  # ample for the image as it is, not for one of 64 times as many pixels
    assert extract()(Image.new("RGB", (9, 9))).shape == (1, 32)
    with pytest.raises(ConfigError, match="One image of 64 x 64 px would take"):
        extract(scales=(1.0, 8.0))(Image.new("RGB", (9, 9)))


def test_a_compiled_model_is_counted_as_it_is(model, monkeypatch):
    free(monkeypatch, 8 * 2**20)
    with pytest.raises(ConfigError, match="One image of 8000 x 8000 px would take"):
        Predictor(torch.compile(model), image_size=8000)("cat.jpg")


def test_large_images_are_prepared_one_by_one(model, monkeypatch):
    monkeypatch.setattr("xcit.inference.stream.PIXELS_AHEAD", 32 * 32 - 1)
    taken = itertools.count()
    stream = Predictor(model, batch_size=1).stream(Image.new("RGB", (9, 9)) for _ in iter(lambda: next(taken), -1))
    for i in range(5):
        next(stream)
        assert next(taken) == 2 * i + 1  # this question counts as well
    stream.close()


def test_what_came_before_the_memory_ran_out_is_kept(model, monkeypatch):
    stream = Predictor(model, batch_size=2).stream([Image.new("RGB", (9, 9))] * 6)
    first = [next(stream), next(stream)]
    limited(model, monkeypatch, 1)
    assert [p.error for p in first] == [None, None]
    with pytest.raises(ConfigError, match="Out of memory"):
        list(stream)


def test_other_errors_of_the_model_stay_what_they_are(model, monkeypatch):
    def broken(x):
        raise RuntimeError("a bug")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        Predictor(model)(Image.new("RGB", (9, 9)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on a process's memory")
def test_real_exhaustion_of_the_memory_is_recognised():
    code = """
        import resource, torch
        from PIL import Image
        from xcit.errors import ConfigError
        from xcit.data.preprocess import Preprocessing
        from xcit.inference.predictor import Predictor
        from xcit.models.xcit import XCiT

        torch.set_num_threads(1)
        model = XCiT(embed_dim=32, depth=1, num_heads=4)
        predict = Predictor(model, preprocessing=Preprocessing((256, 256)), batch_size=64)
        image = Image.new("RGB", (9, 9))
        predict([image])
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, resource.RLIM_INFINITY))
        try:
            predict([image] * 64)
        except ConfigError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "Out of memory on cpu with 64 images of 256 x 256 px at once; " in done.stdout, done.stderr
    assert "(tried just now): use batch_size=" in done.stdout


def test_predicting_loads_neither_timm_nor_lightning(model, tmp_path):
    save_checkpoint(model, tmp_path / "m.safetensors")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    code = (
        "import sys, xcit; p = xcit.Predictor(sys.argv[1], device='cpu')(sys.argv[2]); assert not p[0].error;"
        "from xcit.data.labels import imagenet_names; imagenet_names();"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'timm', 'lightning', 'pytorch_lightning'}))"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "m.safetensors", tmp_path / "a.png"]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout == "[]\n"
