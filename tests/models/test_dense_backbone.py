"""A detector or a segmenter begins with the backbone of whatever file it is given."""

import pytest
import torch

from xcit.errors import CheckpointError, ConfigError
from xcit.models import dense_backbone as module
from xcit.models.dense_backbone import dense_backbone
from xcit.models.detectors import create_detector, save_detector
from xcit.models.mmdet_files import to_mmdet
from xcit.models.mmseg_files import to_mmseg
from xcit.models.segmenters import create_segmenter, save_segmenter
from xcit.models.zoo import CHECKPOINTS, find

NANO = "xcit_nano_12_p16"
SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 4}
FILES = ("detector", "mmdet", "upernet", "sem_fpn", "mmseg", "parallel")


@pytest.fixture(scope="module")
def givers(tmp_path_factory):
    """Files, and the weights of the pyramid in each."""
    folder, pyramids = tmp_path_factory.mktemp("dense"), {}
    torch.manual_seed(0)
    detector = create_detector(NANO, num_classes=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), **SMALL)
    save_detector(detector, folder / "detector.safetensors")
    torch.save({"state_dict": to_mmdet(detector.state_dict())}, folder / "mmdet.pth")
    pyramids |= dict.fromkeys(("detector", "mmdet"), detector.backbone.body.state_dict())
    for head in ("upernet", "sem_fpn"):
        segmenter = create_segmenter(NANO, num_classes=3, head=head, channels=8, **SMALL)
        save_segmenter(segmenter, folder / f"{head}.safetensors")
        pyramids[head] = segmenter.backbone.state_dict()
    torch.save(to_mmseg(segmenter.state_dict()), folder / "mmseg.pth")
    torch.save({f"module.{key}": value for key, value in segmenter.state_dict().items()}, folder / "parallel.pth")
    pyramids |= dict.fromkeys(("mmseg", "parallel"), pyramids["sem_fpn"])
    return {path.stem: (path, pyramids[path.stem]) for path in folder.iterdir()}


@pytest.mark.parametrize("kind", FILES)
def test_the_whole_pyramid_comes_over(givers, kind):
    path, given = givers[kind]
    segmenter = create_segmenter(NANO, num_classes=5, head="sem_fpn", channels=8, backbone=path, **SMALL)
    detector = create_detector(NANO, num_classes=5, backbone=str(path), **SMALL)
    for got in (segmenter.backbone.state_dict(), detector.backbone.body.state_dict()):
        assert got.keys() == given.keys()
        assert all(torch.equal(got[key], value) for key, value in given.items())
    assert segmenter.num_classes == 5


def test_how_the_giver_saw_images_comes_over(givers):
    segmenter = create_segmenter(NANO, num_classes=5, channels=8, backbone=givers["detector"][0], **SMALL)
    assert (segmenter.mean, segmenter.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    own = create_segmenter(NANO, channels=8, backbone=givers["detector"][0], mean=(0.4, 0.4, 0.4), **SMALL)
    assert own.mean == (0.4, 0.4, 0.4)


def test_a_released_detector_gives_its_backbone(monkeypatch, tmp_path):
    name = "maskrcnn_xcit_tiny_12_p16"
    assert CHECKPOINTS[name].task == "detection"
    giver = create_detector("xcit_tiny_12_p16")
    torch.save({"state_dict": to_mmdet(giver.state_dict())}, tmp_path / "released.pth")
    asked = []
    monkeypatch.setattr(module, "download", lambda url: asked.append(url) or tmp_path / "released.pth")
    pyramid = dense_backbone(find("xcit_tiny_12_p16")[0], name, {})
    assert asked == [CHECKPOINTS[name].url]
    given = giver.backbone.body.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in pyramid.state_dict().items())
    with pytest.raises(ConfigError, match=r"of xcit_tiny_12_p16; the segmenter is to be on xcit_nano_12_p16\."):
        create_segmenter(NANO, backbone=name)


def test_what_does_not_fit_is_refused(givers, tmp_path):
    path, given = givers["detector"]
    with pytest.raises(CheckpointError, match=r"not the one that the segmenter is to have\. .*of another shape"):
        create_segmenter(NANO, backbone=path, **SMALL | {"embed_dim": 64})
    with pytest.raises(CheckpointError, match=r"not the one that the detector is to have\. .*missing \(first: blocks"):
        create_detector(NANO, backbone=path, **SMALL | {"depth": 6})
    broken = {f"backbone.{key}": value for key, value in given.items()}
    broken["backbone.blocks.0.gamma1"] = torch.full((32,), torch.nan)
    broken["decode_head.conv_seg.weight"] = torch.zeros(3, 8, 1, 1)
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"nan\.pth.*training has diverged"):
        create_segmenter(NANO, backbone=tmp_path / "nan.pth", **SMALL)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth"):
        create_segmenter(NANO, backbone=tmp_path / "list.pth", **SMALL)
    with pytest.raises(CheckpointError, match="There is no file"):
        create_segmenter(NANO, backbone=tmp_path / "none.pth", **SMALL)
