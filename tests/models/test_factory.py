"""Models by name: what each name means, what it builds, and what is refused."""

import logging
import re

import pytest
import torch

import xcit
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models.factory import create_model, list_models
from xcit.models.weights import save_checkpoint
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS


@pytest.fixture
def released(tmp_path, monkeypatch, randomize):
    """Put a file into the cache as if it had been downloaded, and forbid the network."""
    monkeypatch.setenv("XCIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XCIT_OFFLINE", "1")
    (tmp_path / "cache").mkdir()

    def put(stem, seed=0, **options):
        checkpoint = CHECKPOINTS[stem]
        model = randomize(xcit.XCiT(**ARCHITECTURES[checkpoint.architecture].config | options), seed).eval()
        torch.save({"model": model.state_dict()}, tmp_path / "cache" / f"{stem}.pth")
        return model

    return put


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "xcit")
    return caplog


def same_features(a, b, images):
    with torch.no_grad():
        return torch.equal(a.eval().forward_features(images), b.eval().forward_features(images))


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_nano_12_p16_224", "xcit_nano_12_p16_384.fb_dist_in1k"])
def test_random_weights(name):
    model = create_model(name)
    assert (model.config["depth"], model.config["embed_dim"], model.config["tokens_norm"]) == (12, 128, False)
    assert (model.num_classes, model.pretrained_cfg, model.training) == (1000, {}, True)


def test_options(images):
    model = create_model("xcit_nano_12_p8", num_classes=7, in_chans=1, drop_path_rate=0.1, attn_form="covariance")
    assert model.config["drop_path_rate"] == 0.1
    assert model.config["attn_form"] == "covariance"
    assert model(images[:, :1]).shape == (2, 7)
    assert create_model("xcit_nano_12_p8", num_classes=0)(images).shape == (2, 128)
    assert create_model("dino_xcit_small_12_p16_pretrain").num_classes == 0
    assert len(create_model("xcit_nano_12_p8", depth=3).blocks) == 3


def test_unknown_options_are_told_all_at_once():
    with pytest.raises(ConfigError) as caught:
        create_model("xcit_nano_12_p8", drop_path=0.1, img_sizes=224)
    assert "no option 'drop_path'; did you mean 'drop_path_rate'?" in str(caught.value)
    assert "no option 'img_sizes'" in str(caught.value)


def test_values_are_checked():
    with pytest.raises(ConfigError, match="in_chans is 0"):
        create_model("xcit_nano_12_p8", in_chans=0)


def test_unknown_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'xcit_nano_12_p8'"):
        create_model("xcit_nano_12_p9")


@pytest.mark.parametrize("name", ["maskrcnn_xcit_tiny_12_p16", "sem_fpn_xcit_tiny_12_p8", "upernet_xcit_small_24_p8"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_detectors_and_segmenters_are_refused(name, pretrained):
    with pytest.raises(
        ConfigError, match=f"{name} is a (detector; create_detector|segmentation model; create_segmenter)"
    ):
        create_model(name, pretrained=pretrained)


# --- released weights -------------------------------------------------------------------------------------------------


def test_an_architecture_means_its_distilled_file_and_says_so(released, images, log):
    original = released("xcit_nano_12_p16_224_dist")
    model = create_model("xcit_nano_12_p16", pretrained=True)
    assert same_features(model, original, images)
    assert torch.equal(model(images), original(images))
    assert "xcit_nano_12_p16 with pretrained=True: the weights are those of xcit_nano_12_p16_224_dist" in log.text
    assert model.pretrained_cfg == CHECKPOINTS["xcit_nano_12_p16_224_dist"].pretrained_cfg


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("xcit_nano_12_p16_224", "xcit_nano_12_p16_224"),
        ("xcit_nano_12_p16_224.fb_in1k", "xcit_nano_12_p16_224"),
        ("xcit_nano_12_p16_224.fb_dist_in1k", "xcit_nano_12_p16_224_dist"),
        ("xcit_nano_12_p16_384_dist", "xcit_nano_12_p16_384_dist"),
    ],
)
def test_a_stem_means_exactly_that_file(released, images, log, name, stem):
    files = {s: released(s, seed) for seed, s in enumerate(s for s in CHECKPOINTS if s.startswith("xcit_nano_12_p16"))}
    model = create_model(name, pretrained=True)
    assert [s for s, original in files.items() if same_features(model, original, images)] == [stem]
    assert model.pretrained_cfg["checkpoint"] == stem
    assert model.pretrained_cfg["input_size"] == [3, CHECKPOINTS[stem].image_size, CHECKPOINTS[stem].image_size]
    assert "with pretrained=True" not in log.text


def test_other_classes_get_a_new_head_because_the_caller_asked(released, images, log):
    original = released("xcit_nano_12_p8_224_dist")
    model = create_model("xcit_nano_12_p8", pretrained=True, num_classes=10).eval()
    assert model(images).shape == (2, 10)
    assert model.config["num_classes"] == 10
    assert same_features(model, original, images)
    assert 0 < model.head.weight.std() < 0.05
    assert "a new classifier for 10 classes" in log.text
    assert model.pretrained_cfg["label_set"] is None
    assert create_model("xcit_nano_12_p8", pretrained=True, num_classes=0)(images).shape == (2, 128)
    assert torch.equal(
        create_model("xcit_nano_12_p8", pretrained=True, num_classes=1000).eval()(images), original(images)
    )


def test_other_channels_adapt_the_first_convolution(released, images, log):
    original = released("xcit_nano_12_p8_224_dist")
    model = create_model("xcit_nano_12_p8", pretrained=True, in_chans=1)
    grey = images[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(grey), original(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    assert "adapted from 3 channels to 1" in log.text
    assert model.pretrained_cfg["input_size"] == [1, 224, 224]


def test_dino_has_no_classifier_unless_one_is_asked_for(released, images):
    original = released("dino_xcit_small_12_p16_pretrain", num_classes=0)
    model = create_model("dino_xcit_small_12_p16", pretrained=True)
    assert model.num_classes == 0
    assert same_features(model, original, images)
    assert model.pretrained_cfg["crop_pct"] == 0.875
    assert create_model("dino_xcit_small_12_p16", pretrained=True, num_classes=3)(images).shape == (2, 3)


def test_options_apply_to_released_weights(released):
    released("xcit_nano_12_p8_224_dist")
    model = create_model("xcit_nano_12_p8", pretrained=True, drop_path_rate=0.2, global_pool="avg")
    assert (model.config["drop_path_rate"], model.global_pool) == (0.2, "avg")


def test_a_size_of_ones_own_has_no_released_weights(released):
    released("xcit_nano_12_p8_224_dist")
    with pytest.raises(CheckpointError, match="is another architecture: it looks like xcit_nano_12_p8"):
        create_model("xcit_nano_12_p8", pretrained=True, depth=3)


def test_offline_without_the_file_says_where_to_put_it(released, tmp_path):
    with pytest.raises(CheckpointError, match="XCIT_OFFLINE is set") as caught:
        create_model("xcit_tiny_12_p8", pretrained=True)
    assert str(tmp_path / "cache" / "xcit_tiny_12_p8_224_dist.pth") in str(caught.value)


def test_random_numbers_are_not_touched_by_loading(released):
    released("xcit_nano_12_p8_224_dist")
    state = torch.get_rng_state()
    create_model("xcit_nano_12_p8", pretrained=True)
    assert torch.equal(torch.get_rng_state(), state)


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_from_a_file_for_a_name(tmp_path, randomize, images):
    original = randomize(create_model("xcit_nano_12_p8", num_classes=4)).eval()
    torch.save(original.state_dict(), tmp_path / "mine.pth")
    model = create_model("xcit_nano_12_p8", pretrained=tmp_path / "mine.pth")
    assert torch.equal(model.eval()(images), original(images))  # four classes, as the file has
    assert model.pretrained_cfg["label_set"] is None
    named = create_model("xcit_nano_12_p8_384_dist", pretrained=str(tmp_path / "mine.pth"))
    assert named.pretrained_cfg["input_size"] == [3, 384, 384]  # prepared as the name says
    assert named.pretrained_cfg["label_set"] is None
    with pytest.raises(CheckpointError, match=r"looks like xcit_nano_12_p8 .*the model is xcit_tiny_12_p16"):
        create_model("xcit_tiny_12_p16", pretrained=tmp_path / "mine.pth")


def test_a_file_of_ours_is_a_name(small, tmp_path, images):
    original = small()
    path = save_checkpoint(original, tmp_path / "it.safetensors", class_names="abcde")
    assert torch.equal(create_model(str(path)).eval()(images), original(images))
    assert create_model(path, pretrained=True).num_classes == 5
    assert create_model(path, num_classes=2)(images).shape == (2, 2)
    assert create_model(path, num_classes=2).pretrained_cfg["class_names"] is None
    assert create_model(path, global_pool="avg").global_pool == "avg"
    with pytest.raises(ConfigError, match="brings its own weights"):
        create_model(path, pretrained="other.pth")


def test_a_file_of_others_names_the_call_that_works(tmp_path):
    model = create_model("xcit_nano_12_p16")
    path = tmp_path / "xcit_nano.pth"
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(CheckpointError) as caught:
        create_model(path)
    (call,) = re.findall(r"create_model\(.*\)", str(caught.value))
    assert call == f"create_model('xcit_nano_12_p16', pretrained={str(path)!r})"
    assert eval(f"xcit.{call}").num_classes == 1000


@pytest.mark.parametrize("name", ["nothing.safetensors", "./nothing", "folder/nothing.pth"])
def test_a_file_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="There is no file"):
        create_model(name)


def test_what_is_there_but_no_checkpoint_is_not_called_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "text.index").write_bytes(b"XCITINDX" + bytes(100))
    (tmp_path / "xcit_nano_12_p8").mkdir()
    for pretrained in (False, True):
        with pytest.raises(CheckpointError, match=r"^photos is a folder, .* name a file, such as photos/model\.safe"):
            create_model("photos", pretrained=pretrained)
        with pytest.raises(CheckpointError, match=r"^text\.index is a file, .* if it is one, write \./text\.index\."):
            create_model("text.index", pretrained=pretrained)
    with pytest.raises(CheckpointError, match=r"text\.index"):  # the advice leads to a sentence of its own
        create_model("./text.index")
    with pytest.raises(UnknownNameError, match="Unknown model 'photo'"):
        create_model("photo")
    assert create_model("xcit_nano_12_p8").num_classes == 1000  # a folder of a model's name hides nothing


def test_a_file_with_options_of_the_future(small, tmp_path):
    model = small()
    model.config["flux_capacity"] = 1.21
    path = save_checkpoint(model, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match="options that this xcit does not have: 'flux_capacity'"):
        create_model(path)


def test_the_default_dtype_is_honoured(small, tmp_path):
    path = save_checkpoint(small(), tmp_path / "it.safetensors")
    torch.set_default_dtype(torch.float64)
    try:
        assert create_model(path).cls_token.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- names ------------------------------------------------------------------------------------------------------------


def test_list_models():
    names = list_models()
    assert names[:14] == list(ARCHITECTURES)
    assert len(names) == 14 + 42 + 4
    assert list_models("*large*p8*dist") == ["xcit_large_24_p8_224_dist", "xcit_large_24_p8_384_dist"]
    assert list_models("dino*") == [c.stem for c in CHECKPOINTS.values() if c.task == "self-supervised"]
    assert list_models("resnet*") == []


def test_the_public_verbs():
    assert xcit.create_model is create_model
    assert xcit.list_models is list_models
