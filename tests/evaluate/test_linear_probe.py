"""The linear probe against the same training written down in float64; what it saves, and what Ctrl-C leaves."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.data.random_crop import RandomCrop
from xcit.data.sampling import EpochSampler, derive_seed, seeded
from xcit.errors import CheckpointError, ConfigError, DataError
from xcit.evaluate.embedding import SetFeatures, embed_set
from xcit.evaluate.linear_head import load_linear_head, with_linear_head
from xcit.evaluate.linear_probe import INIT_STD, LinearSettings, train_linear
from xcit.inference.features import FeatureExtractor
from xcit.inference.predictor import Predictor
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

CFG = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.875}
HUES = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200)])


class Pictures:
    """Pictures of a hue a class; those of ``broken`` numbers cannot be read."""

    def __init__(self, broken=()):
        self.broken = broken

    def __call__(self, number):
        if number in self.broken:
            raise DataError(f"picture {number}: is broken.")
        rng = np.random.default_rng(number)
        pixels = 40 + HUES[number % 3] * 0.3 + rng.integers(-40, 60, (20, 24, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pictures(start, count, broken=()):
    numbers = np.arange(start, start + count)
    return ImageSet(("r", "g", "b"), [f"picture {n}" for n in numbers], numbers % 3, Pictures(broken), numbers)


@pytest.fixture
def extract(randomize):
    model = randomize(XCiT(embed_dim=16, depth=1, num_heads=2, num_classes=0, patch_size=8))
    model.pretrained_cfg = dict(CFG)
    return FeatureExtractor(model)


def by_hand(features_of_epoch, labels_of_epoch, dim, settings, lr):
    """SGD with momentum on one head, in float64, by its equations."""
    generator = torch.Generator().manual_seed(derive_seed(settings.seed))
    W = (torch.randn(3, dim, generator=generator) * 0.01).double()
    b = torch.zeros(3, dtype=torch.float64)
    velocity = [torch.zeros_like(W), torch.zeros_like(b)]
    for epoch in range(settings.epochs):
        rate = lr * settings.batch_size / 256 * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
        for x, y in zip(features_of_epoch(epoch), labels_of_epoch(epoch), strict=True):
            x = x.double()
            error = (F.softmax(x @ W.T + b, dim=1) - F.one_hot(y, 3)) / len(y)
            for v, gradient in zip(
                velocity,
                (error.T @ x + settings.weight_decay * W, error.sum(0) + settings.weight_decay * b),
                strict=True,
            ):
                v.mul_(settings.momentum).add_(gradient)
            W, b = W - rate * velocity[0], b - rate * velocity[1]
    return W, b


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_cached_training_is_sgd_as_written_down(extract, decay):
    train, val = embed_set(extract, pictures(0, 26)), embed_set(extract, pictures(100, 30))
    settings = LinearSettings(epochs=5, lrs=(0.5,), batch_size=8, weight_decay=decay, augment=False, seed=3)
    result = train_linear(extract, pictures(0, 26), val, settings, cached=train)

    def order(epoch):
        return torch.from_numpy(np.random.default_rng([3, epoch]).permutation(26)[:24]).split(8)

    features, labels = torch.from_numpy(train.features), torch.from_numpy(train.labels)
    W, b = by_hand(
        lambda epoch: [features[i] for i in order(epoch)], lambda epoch: [labels[i] for i in order(epoch)],
        16, settings, 0.5,
    )  # fmt: skip
    torch.testing.assert_close(result.weight.double(), W, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.bias.double(), b, rtol=1e-4, atol=1e-6)
    right = (torch.from_numpy(val.features).double() @ W.T + b).argmax(1) == torch.from_numpy(val.labels)
    assert result.val.num_correct == result.judge(val).num_correct == int(right.sum())
    assert [e.epoch for e in result.history] == [1, 2, 3, 4, 5]
    assert result.history[-1].loss < result.history[0].loss


def test_augmented_training_sees_other_parts_each_epoch(extract):
    images, val = pictures(0, 18), embed_set(extract, pictures(100, 9))
    settings = LinearSettings(epochs=2, lrs=(0.5,), batch_size=9, seed=1, min_area=0.2)
    result = train_linear(extract, images, val, settings, num_workers=0)
    crop = [T.RandomResizedCrop(16, scale=(0.2, 1.0)), T.RandomHorizontalFlip()]
    distort = T.Compose([*crop, T.ToTensor(), T.Normalize([0.5] * 3, [0.2] * 3)])
    drawn = []
    for epoch in range(2):
        order = np.random.default_rng([1, epoch]).permutation(18)
        pixels = []
        for position, index in enumerate(order):
            with seeded(derive_seed(1, epoch, position)):
                pixels.append(distort(images.open(index)))
        with torch.no_grad():
            tokens = copy.deepcopy(extract.model).eval()(torch.stack(pixels))
        drawn.append((tokens.split(9), torch.from_numpy(images.labels[order]).split(9)))
    assert not torch.equal(drawn[0][0][0], drawn[1][0][0])
    W, b = by_hand(lambda epoch: drawn[epoch][0], lambda epoch: drawn[epoch][1], 16, settings, 0.5)
    torch.testing.assert_close(result.weight.double(), W, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.bias.double(), b, rtol=1e-3, atol=1e-5)


def test_published_settings():
    settings = LinearSettings()
    assert (settings.epochs, settings.lrs, settings.batch_size) == (100, (1e-3,), 1024)
    assert (settings.momentum, settings.weight_decay, settings.min_area, settings.hflip) == (0.9, 0, 0.08, 0.5)
    assert INIT_STD == 0.01


def test_each_learning_rate_trains_as_if_alone_and_validation_chooses(extract):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16))

    def drawn(count):
        labels = np.arange(count) % 3
        features = (centres[labels] + 2 * rng.normal(size=(count, 16))).astype(np.float32)
        return SetFeatures(features, labels, np.ones(count, bool))

    images, cached, val = pictures(0, 24), drawn(24), drawn(300)
    options = {"epochs": 4, "batch_size": 8, "augment": False}
    together = train_linear(extract, images, val, LinearSettings(lrs=(1e-4, 3.0, 0.3), **options), cached=cached)
    alone = {
        lr: train_linear(extract, images, val, LinearSettings(lrs=(lr,), **options), cached=cached)
        for lr in (1e-4, 3.0, 0.3)
    }
    assert together.val_by_lr == {lr: result.val.top1 for lr, result in alone.items()}
    best = max(together.val_by_lr.values())
    assert together.lr == min(lr for lr, accuracy in together.val_by_lr.items() if accuracy == best)
    torch.testing.assert_close(together.weight, alone[together.lr].weight)
    assert len(set(together.val_by_lr.values())) > 1


def test_a_batch_is_no_larger_than_the_set_and_broken_images_are_named(extract):
    val = embed_set(extract, pictures(100, 9))
    result = train_linear(extract, pictures(0, 20, broken=(7,)), val, LinearSettings(epochs=1), num_workers=0)
    assert result.settings.batch_size == 20
    assert result.broken == ("picture 7",)
    cached = embed_set(extract, pictures(0, 20, broken=(7,)))
    settings = LinearSettings(epochs=1, augment=False)
    assert train_linear(extract, pictures(0, 20, broken=(7,)), val, settings, cached=cached).settings.batch_size == 19


def test_the_model_is_left_alone(extract):
    before = {key: value.clone() for key, value in extract.model.state_dict().items()}
    extract.model.train()
    train_linear(extract, pictures(0, 12), embed_set(extract, pictures(50, 6)), LinearSettings(epochs=2), num_workers=0)
    assert extract.model.training
    assert all(torch.equal(value, before[key]) for key, value in extract.model.state_dict().items())
    assert all(parameter.grad is None for parameter in extract.model.parameters())


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_ctrl_c_loses_the_epoch_only(extract, tmp_path):
    images, val = pictures(0, 16), embed_set(extract, pictures(100, 12))
    settings = LinearSettings(epochs=5, lrs=(0.1, 1.0), batch_size=4)
    state = tmp_path / "probe.state"

    def run(**options):
        return train_linear(extract, images, val, settings, num_workers=0, **options)

    whole = run()

    def stop(epoch, done):
        if epoch == 3 and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(state_file=state, on_progress=stop)
    assert state.exists()
    resumed = run(state_file=state)
    assert [figures.epoch for figures in resumed.history] == [4, 5]
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    assert not state.exists()


def test_states_of_other_runs_are_refused(extract, tmp_path):
    images, val = pictures(0, 8), embed_set(extract, pictures(100, 6))
    state = tmp_path / "probe.state"

    def stop(epoch, done):
        if epoch == 1:
            raise KeyboardInterrupt

    def run(images=images, **settings):
        train_linear(
            extract, images, val, LinearSettings(**{"epochs": 3, **settings}), num_workers=0, state_file=state,
            on_progress=stop,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run()
    for change in ({"lrs": (0.1,)}, {"epochs": 4}, {"seed": 1}, {"images": pictures(1, 8)}):
        with pytest.raises(ConfigError, match="another model, other images or other settings; remove it"):
            run(**change)
    state.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="is not the state of a linear probe, or is damaged"):
        run()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0, "lrs": ()}, "epochs is 0; it must be 1 or more; learning rates are ()"),
        ({"lrs": (0.1, 0.0)}, "each more than 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"min_area": 0}, "min_area is 0"),
        ({"hflip": 1.5}, "hflip is 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError) as error:
        LinearSettings(**settings)
    assert message in str(error.value)


def test_what_cannot_be_trained(extract):
    val = embed_set(extract, pictures(100, 6))
    with pytest.raises(ConfigError, match="needs the features of the training images"):
        train_linear(extract, pictures(0, 8), val, LinearSettings(augment=False))
    several = ImageSet(("a", "b"), ["x"], np.ones((1, 2), bool), Pictures(), np.array([0]))
    with pytest.raises(ConfigError, match="one class each"):
        train_linear(extract, several, val)
    cached = embed_set(extract, pictures(0, 8))
    huge = SetFeatures(cached.features * 1e30, cached.labels, cached.decoded)
    with pytest.raises(ConfigError, match=r"loss is not finite with any|diverged with"):
        train_linear(extract, pictures(0, 8), val, LinearSettings(epochs=9, lrs=(1e20,), augment=False), cached=huge)


# --- the head in a classifier -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_saved_classifier_predicts_as_the_head_does(extract, tmp_path, pool):
    extract = FeatureExtractor(extract.model, pool=pool)
    images = pictures(0, 12)
    W, b = torch.randn(3, 16), torch.randn(3)
    classifier = with_linear_head(extract.model, W, b, pool=pool, class_names=("r", "g", "b"))
    assert extract.model.num_classes == 0
    path = save_checkpoint(classifier, tmp_path / "linear.safetensors", preprocessing=extract.preprocessing)
    predictor = Predictor(path, device="cpu")
    assert predictor.class_names == ["r", "g", "b"]
    assert predictor.preprocessing == Preprocessing.from_cfg(CFG)
    shown = [images.open(n) for n in range(12)]
    want = torch.from_numpy(extract(shown)) @ W.T + b
    torch.testing.assert_close(predictor.logits(shown), want, rtol=1e-4, atol=1e-5)


def test_heads_that_fit_no_classifier(extract):
    W, b = torch.zeros(3, 16), torch.zeros(3)
    for pool in ("both", "gem"):
        with pytest.raises(ConfigError, match=f"pool='{pool}' cannot be part of one"):
            with_linear_head(extract.model, W, b, pool=pool)
    with pytest.raises(ConfigError, match="2 class_names; the head has 3 classes"):
        with_linear_head(extract.model, W, b, class_names=("a", "b"))
    with pytest.raises(CheckpointError, match="of 32 numbers, the model has 16"):
        with_linear_head(extract.model, torch.zeros(3, 32), b)


@pytest.fixture
def dino():
    model = create_model("xcit_nano_12_p16", num_classes=0)
    model.pretrained_cfg = dict(CFG) | {"checkpoint": "dino_xcit_pretrain"}
    return model.eval()


def test_released_heads_are_fitted_onto_their_backbone(dino, tmp_path):
    W, b = torch.randn(1000, 128), torch.randn(1000)
    torch.save({"state_dict": {"module.linear.weight": W, "module.linear.bias": b}}, tmp_path / "a_linearweights.pth")
    classifier = load_linear_head(dino, tmp_path / "a_linearweights.pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(x), dino(x) @ W.T + b, rtol=1e-4, atol=1e-4)
    assert classifier.pretrained_cfg["label_set"] == "imagenet-1k"
    assert classifier.pretrained_cfg["checkpoint"] is None
    assert dino.num_classes == 0
    torch.save({"weight": W, "bias": b}, tmp_path / "plain.pth")
    assert torch.equal(load_linear_head(dino, tmp_path / "plain.pth").head.weight, W)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"module.linear.weight": torch.zeros(10, 128)},
            "is not the head of a linear probe, which is a weight and a bias",
        ),
        (
            {"module.linear.weight": torch.zeros(10, 512), "module.linear.bias": torch.zeros(10)},
            "of 512 numbers, the model",
        ),
        (
            {"module.linear.weight": torch.zeros(10, 128), "module.linear.bias": torch.zeros(9)},
            "a head has (classes, features)",
        ),
        ({"linear.weight": torch.zeros(5, 128), "linear.bias": torch.full((5,), float("nan"))}, "NaN or infinite"),
        (
            {"linear.weight": torch.zeros(5, 128), "linear.bias": torch.zeros(5), "x": torch.zeros(1)},
            "is not the head of",
        ),
        ([torch.zeros(3)], "holds a list, not the head"),
    ],
)
def test_files_that_are_no_head(dino, tmp_path, content, message):
    torch.save({"state_dict": content} if isinstance(content, dict) else content, tmp_path / "head.pth")
    with pytest.raises(CheckpointError) as error:
        load_linear_head(dino, tmp_path / "head.pth")
    assert message in str(error.value)


def test_grey_images_and_oblong_ones_are_cropped_too():
    grey = Preprocessing((16, 24), mean=(0.5,), std=(0.5,), in_chans=1)
    tensor = RandomCrop(grey)(Image.new("L", (50, 9), 255))
    assert tensor.shape == (1, 16, 24)
    assert tensor.unique().tolist() == [1.0]
    assert len(list(EpochSampler(10, 5, seed=0))) == 10
