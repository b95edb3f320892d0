"""A Mask R-CNN written down plainly from mmdetection's configuration, on weights under mmdetection's names.

It shares nothing with ``xcit.models.mask_rcnn`` but the backbone's blocks: the background is the last class, and every
step is spelt out.
"""

import math

import torch
import torch.nn.functional as F
from torchvision.ops import nms, roi_align

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
LIMIT = abs(math.log(16 / 1000))


def prepared(image, short, long):
    """Pixels 0 to 255 scaled, normalised, padded to multiples of 32; also the size before padding."""
    H, W = image.shape[1:]
    scale = min(long / max(H, W), short / min(H, W))
    h, w = int(H * scale + 0.5), int(W * scale + 0.5)
    x = (F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)[0] - MEAN) / STD
    assert x.dtype == torch.float64
    return F.pad(x, (0, -w % 32, 0, -h % 32))[None], (h, w)


def decode(codes, boxes, stds):
    d = codes * torch.tensor(stds, dtype=codes.dtype)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + w / 2 + d[:, 0] * w, boxes[:, 1] + h / 2 + d[:, 1] * h
    w, h = w * d[:, 2].clamp(-LIMIT, LIMIT).exp(), h * d[:, 3].clamp(-LIMIT, LIMIT).exp()
    return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 1)


def clipped(boxes, size):
    h, w = size
    return torch.stack([boxes[:, i].clamp(0, w if i % 2 == 0 else h) for i in range(4)], 1)


def pooled(levels, boxes, side):
    out = []
    for box in boxes:
        edge = ((box[2] - box[0]) * (box[3] - box[1])).sqrt()
        i = int((edge / 56 + 1e-6).log2().floor().clamp(0, 3))
        out.append(roi_align(levels[i], [box[None]], side, 1 / 2 ** (i + 2), 0, True))
    return torch.cat(out)


def detect(weights, pyramid, image, *, short, long, score_thr, num_classes):
    """Return boxes in the image's pixels, labels from 0, scores and whole masks, the best 100."""
    w = weights

    def conv(x, name, padding=0):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding)

    x, size = prepared(image, short, long)
    lateral = [conv(x, f"neck.lateral_convs.{i}.conv") for i, x in enumerate(pyramid(x))]
    for i in (3, 2, 1):
        lateral[i - 1] = lateral[i - 1] + F.interpolate(lateral[i], lateral[i - 1].shape[2:], mode="nearest")
    levels = [conv(x, f"neck.fpn_convs.{i}.conv", 1) for i, x in enumerate(lateral)]
    levels.append(F.max_pool2d(levels[-1], 1, 2))

    candidates, scores, numbers = [], [], []
    for i, level in enumerate(levels):
        stride, (rows, columns) = 4 * 2**i, level.shape[2:]
        hidden = conv(level, "rpn_head.rpn_conv", 1).relu()
        score = conv(hidden, "rpn_head.rpn_cls")[0].permute(1, 2, 0).flatten().sigmoid()
        codes = conv(hidden, "rpn_head.rpn_reg")[0].permute(1, 2, 0).reshape(-1, 4)
        sides = [(8 * stride / math.sqrt(r), 8 * stride * math.sqrt(r)) for r in (0.5, 1.0, 2.0)]
        base = torch.tensor([[-a / 2, -b / 2, a / 2, b / 2] for a, b in sides], dtype=score.dtype)
        y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
        anchors = (torch.stack((x, y, x, y), -1).view(-1, 1, 4) + base).view(-1, 4)
        best = score.argsort(descending=True)[:1000]
        candidates.append(clipped(decode(codes[best], anchors[best], (1.0, 1, 1, 1)), size))
        scores.append(score[best])
        numbers.append(torch.full_like(best, i))
    candidates, scores, numbers = torch.cat(candidates), torch.cat(scores), torch.cat(numbers)
    extent = ((candidates[:, 2:] - candidates[:, :2]) > 1e-3).all(1)  # those beyond the image's rim have none
    candidates, scores, numbers = candidates[extent], scores[extent], numbers[extent]
    kept = torch.cat([(found := torch.where(numbers == i)[0])[nms(candidates[found], scores[found], 0.7)]
                      for i in range(5)])  # fmt: skip
    proposals = candidates[kept[scores[kept].argsort(descending=True)[:1000]]]

    x = pooled(levels, proposals, 7).flatten(1)
    for i in (0, 1):
        name = f"roi_head.bbox_head.shared_fcs.{i}"
        x = F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"]).relu()
    logits, codes = (F.linear(x, w[f"roi_head.bbox_head.{n}.weight"], w[f"roi_head.bbox_head.{n}.bias"])
                     for n in ("fc_cls", "fc_reg"))  # fmt: skip
    probabilities = logits.softmax(1)
    found = []
    for k in range(num_classes):  # the background is class num_classes
        boxes = clipped(decode(codes[:, 4 * k : 4 * k + 4], proposals, (0.1, 0.1, 0.2, 0.2)), size)
        over = torch.where(probabilities[:, k] > score_thr)[0]
        kept = over[nms(boxes[over], probabilities[over, k], 0.5)]
        found += [(float(probabilities[i, k]), k, boxes[i]) for i in kept]
    found = sorted(found, key=lambda f: -f[0])[:100]
    scores, labels = torch.tensor([f[0] for f in found]), torch.tensor([f[1] for f in found])
    boxes = torch.stack([f[2] for f in found])

    x = pooled(levels, boxes, 14)
    for i in range(sum(".mask_head.convs." in key for key in w) // 2):
        x = conv(x, f"roi_head.mask_head.convs.{i}.conv", 1).relu()
    name = "roi_head.mask_head.upsample"
    x = F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], 2).relu()
    squares = conv(x, "roi_head.mask_head.conv_logits")[torch.arange(len(labels)), labels].sigmoid()
    H, W = image.shape[1:]
    boxes = boxes * torch.tensor([W / size[1], H / size[0]] * 2)
    masks = []
    for box, square in zip(boxes, squares, strict=True):
        y = (torch.arange(H).double() + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        x = (torch.arange(W).double() + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack((x[None].expand(H, -1), y[:, None].expand(-1, W)), -1)[None]
        masks.append(F.grid_sample(square[None, None], grid, align_corners=False)[0, 0])
    return boxes, labels, scores, torch.stack(masks)
