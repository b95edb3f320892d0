"""Other classes and other channels for a model that has learned something."""

import pytest
import torch

from xcit.models.adapt import adapted_weight, change_classes, change_in_chans


def test_one_channel_is_the_sum(small, images):
    model, grey = small(), small()
    change_in_chans(grey, 1)
    one = images[:, :1]
    torch.testing.assert_close(grey(one), model(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert grey.config["in_chans"] == 1
    assert type(model)(**grey.config).state_dict().keys() == grey.state_dict().keys()


def test_six_channels_are_two_images_averaged(small, images):
    model, six = small(), small()
    change_in_chans(six, 6)
    torch.testing.assert_close(six(images.repeat(1, 2, 1, 1)), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("in_chans", "expected"), [(1, [9.0]), (2, [3.0, 4.5]), (4, [1.5, 2.25, 3.0, 1.5])])
def test_the_rule(in_chans, expected):
    weight = torch.tensor([2.0, 3.0, 4.0]).reshape(1, 3, 1, 1)
    assert adapted_weight(weight, in_chans).flatten().tolist() == pytest.approx(expected)


def test_the_description_follows(small):
    model = small()
    model.pretrained_cfg = {"input_size": [3, 40, 24], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    change_in_chans(model, 4)
    assert model.pretrained_cfg == {
        "input_size": [4, 40, 24],
        "mean": [0.1, 0.2, 0.3, 0.1],
        "std": [0.4, 0.5, 0.6, 0.4],
    }
    change_in_chans(model, 1)
    assert model.pretrained_cfg["mean"] == [pytest.approx(0.175)]


def test_dtype_and_gradients_stay(small, images):
    model = small().double()
    change_in_chans(model, 2)
    model(images[:, :2].double()).sum().backward()
    weight = model.patch_embed.proj[0][0].weight
    assert weight.dtype == torch.float64
    assert weight.grad.abs().sum() > 0


def test_other_classes(small, images):
    model = small()
    model.pretrained_cfg = {"class_names": list("abcde"), "label_set": "imagenet-1k", "mean": [0.5]}
    change_classes(model, 3)
    assert model(images).shape == (2, 3)
    assert model.pretrained_cfg == {"class_names": None, "label_set": None, "mean": [0.5]}
