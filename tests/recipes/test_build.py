"""Where settings become parts: preprocessing, initial weights, class weights, against plain computation."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.sources import open_data
from xcit.errors import ConfigError, DataError, XCiTError
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.recipes import build as building
from xcit.recipes.build import build, build_model, choose_preprocessing, eval_batch_size, open_splits, schedule_of
from xcit.recipes.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from xcit.recipes.settings import override

SIZES = {"train": (12, 4, 7), "val": (3, 3, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of unequal number, of coloured noise."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for part, sizes in SIZES.items():
        for label, count in enumerate(sizes):
            (root / part / "abc"[label]).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal((60, 120, 200), (20, 30, 10), (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / "abc"[label] / f"{number}.png")
    return root


@pytest.fixture
def config(folder):
    return TrainConfig(
        recipe="mine",
        epochs=4,
        model=ModelConfig(
            name="xcit_nano_12_p8", options={"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2}
        ),
        data=DataConfig(root=str(folder), image_size=16, num_workers=0),
        augment=AugmentConfig(crop="none", rand_augment="", mixup=0, cutmix=0, repeats=1),
        optim=OptimConfig(batch_size=5, lr=1e-3, lr_batch=0, warmup_epochs=1),
    )


@cache
def pixels_of(root):
    files = sorted(root.glob("train/*/*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]).reshape(-1, 3) / 255


# --- preprocessing ---------------------------------------------------------------------------------------------------


def test_statistics_measured_on_the_images_are_theirs(config, folder):
    config = override(config, {"data.normalize": "data"})
    parts = build(config)
    pixels = pixels_of(folder)
    assert parts.preprocessing.mean == pytest.approx(pixels.mean(0), abs=1e-4)
    assert parts.preprocessing.std == pytest.approx(pixels.std(0), abs=1e-4)
    assert parts.preprocessing.image_size == (16, 16)


def test_many_images_are_sampled_evenly_and_broken_ones_left_out(config, monkeypatch):
    splits = open_splits(config)
    opened = []

    class Watched:
        def __len__(self):
            return len(splits.train)

        def open(self, index):
            opened.append(index)
            if index == 11:
                raise DataError("broken")
            return splits.train.open(index)

    monkeypatch.setattr(building, "MEASURED_IMAGES", 5)
    config = override(config, {"data.normalize": "data"})
    found = choose_preprocessing(config, torch.nn.Identity(), Watched())
    assert opened == [0, 5, 11, 16, 22]
    pixels = np.stack([np.asarray(splits.train.open(i)) for i in (0, 5, 16, 22)]).reshape(-1, 3) / 255
    assert found.mean == pytest.approx(pixels.mean(0), abs=1e-4)


def test_images_without_any_contrast_do_not_divide_by_nothing(config, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (16, 16), (10, 20, 30)).save(tmp_path / name / f"{number}.png")
    config = override(config, {"data.normalize": "data", "data.root": str(tmp_path), "data.val_fraction": 0.2})
    found = build(config).preprocessing
    assert found.mean == pytest.approx((10 / 255, 20 / 255, 30 / 255), abs=1e-4)
    assert all(value >= 1e-4 for value in found.std)


def test_nothing_that_can_be_decoded(config, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(b"broken")
    config = override(config, {"data.normalize": "data", "data.root": str(tmp_path), "data.val_fraction": 0.2})
    with pytest.raises(DataError, match="None of the training images can be decoded"):
        build(config)


def test_random_weights_take_imagenets_statistics(config):
    found = build(config).preprocessing
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = build(override(config, {"data.in_chans": 1})).preprocessing
    assert (grey.mean, grey.std) == ((0.449,), (0.226,))


@pytest.fixture
def donor(config, tmp_path):
    """A file of this architecture with statistics and classes of its own."""
    torch.manual_seed(5)
    model = build_model(config, ("x", "y"))
    path = tmp_path / "donor.safetensors"
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    prepared = replace(choose_preprocessing(config, model, open_splits(config).train), **statistics)
    save_checkpoint(model, path, class_names=("x", "y"), preprocessing=prepared)
    return path


def test_weights_bring_their_statistics(config, donor):
    config = override(config, {"model.pretrained": str(donor), "data.image_size": 24, "data.crop_pct": 0.9})
    found = build(config).preprocessing
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.image_size, found.crop_pct) == ((24, 24), 0.9)  # these are the run's


def test_evaluation_takes_fewer_large_images():
    assert [eval_batch_size(size) for size in (16, 112, 224, 448, 4096)] == [256, 256, 64, 16, 1]


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_a_file_are_taken_and_the_head_is_for_the_data(config, donor):
    model = build(override(config, {"model.pretrained": str(donor)})).task.model
    theirs = create_model(str(donor)).state_dict()
    ours = model.state_dict()
    assert [name for name in ours if not name.startswith("head.") and not torch.equal(ours[name], theirs[name])] == []
    assert ours["head.weight"].shape == (3, 32)
    assert model.training


def test_the_seed_and_not_the_data_decides_the_initial_weights(config, folder):
    """Another root, another split, another batch: the same weights."""
    other = {
        "data.root": str(folder / "val"),
        "data.val_fraction": 0.34,
        "data.normalize": "data",
        "optim.batch_size": 3,
    }
    ours = build(config).task.model.state_dict()
    theirs = build(override(config, other)).task.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.manual_seed(99)  # nor what was drawn before
    again = build(config).task.model.state_dict()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    third = build(override(config, {"seed": 1})).task.model.state_dict()
    assert not torch.equal(ours["head.weight"], third["head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.pretrained": "xcit_nano_12_p16_224"}, "xcit_nano_12_p16_224 is of xcit_nano_12_p16, not of xcit_nano"),
        ({"model.name": "xcit_nano_12_p8_224"}, "means weights; name the architecture xcit_nano_12_p8"),
        ({"model.name": "timm:resnet10t", "model.pretrained": "FILE", "model.options": {}}, "none or released"),
        ({"model.surgery": "FILE", "model.options.embed_dim": 48}, "is of another width or patch size"),
        ({"model.pretrained": "FILE", "model.options.embed_dim": 48}, "donor.safetensors"),
        ({"model.name": "xcit_nano_12_p16", "model.pretrained": "FILE"}, "donor.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(config, donor, changes, message):
    changes = {name: str(donor) if value == "FILE" else value for name, value in changes.items()}
    with pytest.raises(XCiTError) as caught:
        build(override(config, changes))
    assert message in str(caught.value)


def test_a_stem_from_another_file_is_copied_and_frozen(config, donor):
    parts = build(override(config, {"model.surgery": str(donor)}))
    theirs = create_model(str(donor)).patch_embed.state_dict()
    for name, value in parts.task.model.patch_embed.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    trained = {name for name, p in parts.task.model.named_parameters() if p.requires_grad}
    assert not [name for name in trained if name.startswith("patch_embed")]
    assert {"head.weight", "cls_token"} <= trained


def test_settings_reach_the_model(config):
    task = build(override(config, {"model.drop_path_rate": 0.3, "model.grad_checkpointing": True})).task
    assert task.model.grad_checkpointing
    assert [block.drop_path.p for block in task.model.blocks] == [0.3]


# --- data ------------------------------------------------------------------------------------------------------------


def test_class_weights_are_the_formula(config):
    """n / (classes · images of the class), as scikit-learn's "balanced"."""
    parts = build(override(config, {"data.class_weights": "balanced"}))
    expected = [23 / (3 * count) for count in SIZES["train"]]
    assert parts.task.class_weights.tolist() == pytest.approx(expected)
    assert build(config).task.class_weights is None


def test_the_schedule_counts_whole_steps(config):
    assert schedule_of(config, 23)._asdict() == {
        "lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 4, "total_steps": 16,
    }  # fmt: skip
    assert len(list(build(config).train_loader)) == 4


def test_data_that_contradicts_the_settings_is_refused_all_at_once(config, tmp_path):
    (tmp_path / "only").mkdir()
    for number in range(10):
        Image.new("RGB", (16, 16)).save(tmp_path / "only" / f"{number}.png")
    with pytest.raises(DataError, match="all images are of one class"):
        open_splits(override(config, {"data.root": str(tmp_path), "data.format": "folder"}))

    lines = ["path,labels", *(f"only/{i}.png,{'a|b' if i % 2 else 'a'}" for i in range(10))]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    several = {"data.root": str(tmp_path / "labels.csv"), "augment.mixup": 0.5, "distill.kind": "hard"}
    with pytest.raises(ConfigError) as caught:
        open_splits(override(config, several | {"data.class_weights": "balanced"}))
    for part in ("distill.kind is for images of one class", "data.class_weights is for", "mixup and cutmix are for"):
        assert part in str(caught.value)


def test_the_split_is_the_settings(config, tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(20):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / label / f"{number}.png")
    config = override(config, {"data.root": str(tmp_path), "data.val_fraction": 0.25, "data.split_seed": 3})
    ours = open_splits(config)
    theirs = open_data(str(tmp_path), "auto", val_fraction=0.25, split_seed=3, in_chans=3, download=False)
    assert list(ours.val.names) == list(theirs.val.names)
    assert len(ours.val) == 10
    assert list(open_splits(override(config, {"data.split_seed": 4})).val.names) != list(ours.val.names)
