"""The detector as a whole: published sizes, a plain reference on mmdetection's weights, targets, training."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

from xcit.errors import ConfigError, ShapeError
from xcit.models.detectors import create_detector
from xcit.models.mask_rcnn import DetectionTransform
from xcit.models.mmdet_files import from_mmdet, to_mmdet
from xcit.ops.image_size import scaled_size

sys.path.insert(0, str(Path(__file__).parent))
import mmdet_reference

SMALL = {"num_classes": 5, "out_channels": 16, "box_width": 32, "mask_channels": 16, "mask_convs": 2}


def small(name="xcit_nano_12_p16", **options):
    torch.manual_seed(0)
    return create_detector(name, **{**SMALL, "min_size": 128, "max_size": 256, **options})


# Millions of parameters of the whole detector, from the released code's modules.
PARAMETERS = {
    "xcit_tiny_12_p16": 26.18,
    "xcit_tiny_12_p8": 25.87,
    "xcit_small_12_p16": 44.39,
    "xcit_small_12_p8": 43.17,
    "xcit_small_24_p16": 65.80,
    "xcit_small_24_p8": 64.58,
    "xcit_medium_24_p16": 101.15,
    "xcit_medium_24_p8": 98.98,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_released_detectors(name):
    with torch.device("meta"):
        model = create_detector(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.0051)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((500, 2000), (333, 1333)), ((800, 1333), (800, 1333)),
     ((9000, 12000), (800, 1067)), ((1, 5000), (1, 1333))],
)  # fmt: skip
def test_images_are_scaled_as_released(size, scaled):
    assert scaled_size(*size, 800, 1333) == scaled


def test_a_batch_is_padded_to_multiples_of_32():
    transform = DetectionTransform(64, 128, (0.5,) * 3, (0.25,) * 3).eval()
    images = [torch.rand(3, 64, 100), torch.rand(3, 70, 64)]
    batch, _ = transform(images)
    assert batch.tensors.shape == (2, 3, 96, 128)
    assert batch.image_sizes == [(64, 100), (70, 64)]
    torch.testing.assert_close(batch.tensors[0, :, :64, :100], (images[0] - 0.5) / 0.25)
    assert (batch.tensors[0, :, 64:] == 0).all()
    assert (batch.tensors[0, :, :, 100:] == 0).all()


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_nano_12_p8"])
def test_it_predicts_what_the_unconverted_weights_predict(name, randomize, tmp_path):
    model = randomize(small(name, score_thresh=0.3)).eval().double()  # ties of float32 may fall either way
    torch.nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.05)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    weights = to_mmdet(model.state_dict())
    torch.save({"meta": {"epoch": 36}, "state_dict": weights}, tmp_path / "theirs.pth")
    loaded = create_detector(name, tmp_path / "theirs.pth", min_size=128, max_size=256, score_thresh=0.3)
    loaded = loaded.double().eval()
    loaded.load_state_dict(from_mmdet(weights))  # in float64, which the loader made float32
    image = torch.rand(3, 150, 211, dtype=torch.float64)
    with torch.no_grad():
        (got,) = loaded([image])
        boxes, labels, scores, masks = mmdet_reference.detect(
            weights, model.backbone.body, image * 255, short=128, long=256, score_thr=0.3, num_classes=5
        )
    assert len(boxes) >= 10
    assert len(labels.unique()) > 1
    torch.testing.assert_close(got["scores"], scores.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(got["labels"], labels + 1)
    torch.testing.assert_close(got["boxes"], boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(got["masks"][:, 0], masks, atol=1e-5, rtol=0)


def test_evaluation_needs_no_context():
    """As in the documents' example: with gradients on, detections are the same."""
    model = small(score_thresh=0.0).eval()
    image = [torch.rand(3, 96, 150)]
    (found,) = model(image)
    with torch.no_grad():
        (same,) = model(image)
    assert len(found["masks"]) > 0
    for key in same:
        torch.testing.assert_close(found[key].detach(), same[key])


def test_names_go_both_ways():
    state = small().state_dict()
    theirs = to_mmdet(state)
    assert {key.split(".")[0] for key in theirs} == {"backbone", "neck", "rpn_head", "roi_head"}
    assert torch.equal(
        theirs["roi_head.bbox_head.fc_cls.weight"][-1], state["roi_heads.box_predictor.cls_score.weight"][0]
    )
    back = from_mmdet(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def targets(*sizes):
    made = []
    for H, W in sizes:
        masks = torch.zeros(2, H, W, dtype=torch.uint8)
        masks[0, 10:60, 10:50], masks[1, 20:90, 60:110] = 1, 1
        boxes = torch.tensor([[10.0, 10, 50, 60], [60, 20, 110, 90]])
        made.append({"boxes": boxes, "labels": torch.tensor([1, 5]), "masks": masks})
    return made


def test_training_gives_losses_and_every_weight_a_gradient():
    model = small().train()
    images = [torch.rand(3, 96, 128), torch.rand(3, 100, 120)]
    losses = model(images, targets((96, 128), (100, 120)))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_an_image_without_instances_trains():
    model = small().train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 96, 96)}
    losses = model([torch.rand(3, 96, 96)], [empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_boxes_alone():
    model = small(with_masks=False).train()
    target = targets((96, 128))[0]
    del target["masks"]
    assert "loss_mask" not in model([torch.rand(3, 96, 128)], [target])
    model.eval().roi_heads.score_thresh = 0.0
    with torch.no_grad():
        (found,) = model([torch.rand(3, 96, 128)])
    assert "masks" not in found
    assert found["boxes"].shape == (100, 4)


def test_it_learns_one_scene():
    """Two blocks of colour are found, named and outlined after some steps on them."""
    model = small(num_classes=2, min_size=96, max_size=128, score_thresh=0.5).train()
    image = torch.full((3, 96, 128), 0.5)
    image[:, 16:48, 16:56] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    image[:, 40:88, 72:112] = torch.tensor([0.0, 0, 1]).view(3, 1, 1)
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[0, 16:48, 16:56], masks[1, 40:88, 72:112] = 1, 1
    boxes = torch.tensor([[16.0, 16, 56, 48], [72, 40, 112, 88]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 100)
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    for number, label in enumerate((1, 2)):  # 0.8 and more of both are usual
        best = torch.where(found["labels"] == label)[0][0]  # scores fall
        assert box_iou(found["boxes"][best][None], boxes[number][None]) > 0.6
        mask, truth = found["masks"][best, 0] >= 0.5, masks[number].bool()
        assert (mask & truth).sum() / (mask | truth).sum() > 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, r"Target 0: labels \[0, 1\]; they must be 1 to 5"),
        ({"labels": torch.tensor([1, 6])}, "must be 1 to 5"),
        ({"boxes": torch.tensor([[10.0, 10, 10, 20], [0, 0, 1, 1]])}, r"box \[10.0, 10.0, 10.0, 20.0\] has no extent"),
        ({"boxes": torch.zeros(2, 5)}, r"must be \(n, 4\)"),
        ({"masks": torch.zeros(2, 96, 100)}, r"masks are \(2, 96, 100\); they must be \(2, 96, 128\)"),
    ],
)
def test_targets_that_cannot_be_learned(change, message):
    model = small().train()
    with pytest.raises(ShapeError, match=message):
        model([torch.rand(3, 96, 128)], [targets((96, 128))[0] | change])


def test_other_mistakes():
    model = small()
    with pytest.raises(ShapeError, match="1 images and none targets"):
        model.train()([torch.rand(3, 96, 128)])
    with pytest.raises(ConfigError, match=r"model.eval\(\)"):
        model.detect([torch.rand(3, 96, 128)])
    with pytest.raises(ShapeError, match=r"\(1, 96, 128\)"):
        model.eval()([torch.rand(1, 96, 128)])
    with pytest.raises(ShapeError, match=r"uint8"):
        model([torch.zeros(3, 96, 128, dtype=torch.uint8)])
    with pytest.raises(
        ConfigError, match=r"min_size is 8; it must be 32 or more; score_thresh is 2; it must be between"
    ):
        small(score_thresh=2, min_size=8)


def test_half_precision_keeps_places():
    """Under autocast boxes stay float32: bfloat16 has steps of 4 px beyond 512."""
    model = small(score_thresh=0.0).eval()
    image = [torch.rand(3, 128, 256)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model.detect(image)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert (found["boxes"] != found["boxes"].bfloat16()).any()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(image, targets((128, 256)))
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
