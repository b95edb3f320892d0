"""Detectors by name and as files: whatever goes in comes out, and what does not fit is refused with the reason."""

import sys
from pathlib import Path

import pytest
import torch

import xcit
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models import detectors
from xcit.models.detectors import create_detector, read_detector, reset_classes, save_detector
from xcit.models.mmdet_files import to_mmdet

sys.path.insert(0, str(Path(__file__).parent))
from test_mask_rcnn import small, targets


def detections(model):
    model.eval().roi_heads.score_thresh = 0.0
    torch.manual_seed(1)
    with torch.no_grad():
        return model([torch.rand(3, 96, 150)])[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_own_file_holds_everything(tmp_path, randomize):
    model = randomize(small(min_size=96, mean=(0.1, 0.2, 0.3), taps=[0, 3, 7, 11], nms_thresh=0.6))
    save_detector(model, tmp_path / "d.safetensors", class_names=["a", "b", "c", "d", "e"])
    loaded = create_detector(tmp_path / "d.safetensors")
    assert loaded.config == model.config
    assert loaded.pretrained_cfg["class_names"] == ["a", "b", "c", "d", "e"]
    assert same(detections(loaded), detections(model))
    wider = create_detector(tmp_path / "d.safetensors", min_size=160, drop_path_rate=0.1)
    assert wider.transform.min_size == 160
    assert wider.config["backbone"]["drop_path_rate"] == 0.1


@pytest.mark.parametrize("wrapped", ["state_dict", "module", "bare"])
def test_mmdetections_files(tmp_path, randomize, wrapped):
    model = randomize(small())
    weights = to_mmdet(model.state_dict())
    if wrapped == "module":
        weights = {f"module.{key}": tensor for key, tensor in weights.items()}
    torch.save(weights if wrapped == "bare" else {"meta": {}, "state_dict": weights}, tmp_path / "d.pth")
    loaded = create_detector("xcit_nano_12_p16", tmp_path / "d.pth", min_size=128, max_size=256)
    assert same(detections(loaded), detections(model))


def test_a_released_name_means_its_file(tmp_path, monkeypatch):
    with torch.device("cpu"):
        model = create_detector("xcit_tiny_12_p16", out_channels=256)
    torch.save({"state_dict": to_mmdet(model.state_dict())}, tmp_path / "maskrcnn_xcit_tiny_12_p16.pth")
    asked = []
    monkeypatch.setattr(detectors, "download", lambda url, sha256=None: asked.append(url) or tmp_path / Path(url).name)
    loaded = create_detector("maskrcnn_xcit_tiny_12_p16", pretrained=True)
    assert asked == ["https://dl.fbaipublicfiles.com/xcit/coco/maskrcnn_xcit_tiny_12_p16.pth"]
    assert loaded.num_classes == 80
    assert loaded.pretrained_cfg["label_set"] == "coco"
    assert loaded.pretrained_cfg["checkpoint"] == "maskrcnn_xcit_tiny_12_p16"
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_the_weights_decide_about_the_patch_size(tmp_path):
    """The released configuration of M24/16 builds patch 8: weights of that are not taken for patch 16."""
    model = small("xcit_nano_12_p8")
    torch.save(to_mmdet(model.state_dict()), tmp_path / "maskrcnn_xcit_nano_12_p16.pth")
    with pytest.raises(CheckpointError, match="is a detector on xcit_nano_12_p8, not on xcit_nano_12_p16"):
        create_detector("xcit_nano_12_p16", tmp_path / "maskrcnn_xcit_nano_12_p16.pth")
    create_detector("xcit_nano_12_p8", tmp_path / "maskrcnn_xcit_nano_12_p16.pth")


def test_an_architecture_with_other_sizes_is_what_was_asked_for(tmp_path, randomize):
    model = randomize(small(depth=3))
    save_detector(model, tmp_path / "d.safetensors")
    loaded = create_detector("xcit_nano_12_p16", tmp_path / "d.safetensors", depth=3)
    assert same(detections(loaded), detections(model))
    for sizes, sentence in (
        ({}, r"depth 3, .*not on xcit_nano_12_p16; name the architecture and the sizes that its weights are of\."),
        ({"depth": 4}, r"not on xcit_nano_12_p16 with depth 4; name the architecture and the sizes that its weights"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            create_detector("xcit_nano_12_p16", tmp_path / "d.safetensors", **sizes)


def test_other_classes_get_new_last_layers(tmp_path):
    model = small()
    save_detector(model, tmp_path / "d.safetensors")
    tuned = create_detector(tmp_path / "d.safetensors", num_classes=2).train()
    assert tuned.num_classes == tuned.config["num_classes"] == 2
    target = targets((96, 128))[0] | {"labels": torch.tensor([1, 2])}
    assert torch.isfinite(sum(tuned([torch.rand(3, 96, 128)], [target]).values()))
    assert torch.equal(tuned.roi_heads.box_predictor.fc6.weight, model.roi_heads.box_predictor.fc6.weight)
    boxes_alone = small(with_masks=False)
    reset_classes(boxes_alone, 3)
    assert boxes_alone.roi_heads.box_predictor.bbox_pred.weight.shape[0] == 12


def test_a_backbone_begins_with_a_classifiers_weights(tmp_path):
    model = xcit.create_model("xcit_nano_12_p16", num_classes=3)
    model.pretrained_cfg = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    xcit.save_checkpoint(model, tmp_path / "c.safetensors")
    detector = create_detector("xcit_nano_12_p16", backbone=tmp_path / "c.safetensors", num_classes=2)
    assert torch.equal(detector.backbone.body.blocks[5].mlp.fc2.weight, model.blocks[5].mlp.fc2.weight)
    assert detector.config["mean"] == [0.4, 0.4, 0.4]


def test_damaged_and_foreign_files(tmp_path):
    state = small().state_dict()
    torch.save(
        {"state_dict": {k: v for k, v in to_mmdet(state).items() if "shared_fcs.1" not in k}}, tmp_path / "a.pth"
    )
    with pytest.raises(CheckpointError, match=r"does not fit .* 2 missing \(first: roi_heads.box_predictor.fc7"):
        create_detector("xcit_nano_12_p16", tmp_path / "a.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"holds no Mask R-CNN on an XCiT: its keys begin with 'conv1\.weight'"):
        read_detector(tmp_path / "b.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_detector(tmp_path / "c.pth")
    bad = dict(state)
    bad["rpn.head.bbox_pred.bias"] = torch.full_like(bad["rpn.head.bbox_pred.bias"], torch.nan)
    torch.save(bad, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="NaN or infinite values in 1 tensors"):
        read_detector(tmp_path / "d.pth")
    xcit.save_checkpoint(xcit.create_model("xcit_nano_12_p16", num_classes=3), tmp_path / "e.safetensors")
    with pytest.raises(CheckpointError, match="holds no Mask R-CNN"):
        create_detector(tmp_path / "e.safetensors")
    segmenter = xcit.create_segmenter("xcit_nano_12_p16", num_classes=3, head="sem_fpn", channels=8, fpn_channels=8)
    xcit.save_segmenter(segmenter, tmp_path / "g.safetensors")
    with pytest.raises(CheckpointError, match=r"g\.safetensors holds a segmenter; xcit\.create_segmenter\("):
        create_detector(tmp_path / "g.safetensors")
    save_detector(small(), tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"a detector, not a classifier; xcit.create_detector opens it"):
        xcit.create_model(tmp_path / "f.safetensors")


def test_names_and_options_that_do_not_exist(tmp_path):
    with pytest.raises(UnknownNameError, match="maskrcnn_xcit_tiny_12_p16"):
        create_detector("maskrcnn_xcit_tiny_12_p61")
    with pytest.raises(ConfigError, match=r"no option 'min_sizes'; did you mean 'min_size'\?"):
        create_detector("xcit_nano_12_p16", min_sizes=3)
    assert create_detector("xcit_nano_12_p16", in_chans=1, mean=[0.5], std=[0.2]).config["backbone"]["in_chans"] == 1
    with pytest.raises(ConfigError, match="XCiT has no option 'colour'"):
        create_detector("xcit_nano_12_p16", colour=3)
    with pytest.raises(ConfigError, match=r"No detector on xcit_nano_12_p16 was .* --pretrained released\."):
        create_detector("xcit_nano_12_p16", pretrained=True)
    with pytest.raises(ConfigError, match="is no detector; create_detector"):
        create_detector("xcit_small_12_p16_224_dist")
    with pytest.raises(ConfigError, match="leave backbone out"):
        create_detector("xcit_tiny_12_p16", pretrained=True, backbone=True)
    with pytest.raises(ConfigError, match="brings its own weights"):
        create_detector("d.safetensors", pretrained=True)
    with pytest.raises(ConfigError, match=r"does not end in \.safetensors"):
        save_detector(small(), tmp_path / "d.pth")
    with pytest.raises(ConfigError, match="2 class_names; the model has 5"):
        save_detector(small(), tmp_path / "d.safetensors", class_names=["a", "b"])
    with pytest.raises(ConfigError, match=r"got XCiT; save_checkpoint"):
        save_detector(xcit.create_model("xcit_nano_12_p16"), tmp_path / "d.safetensors")
