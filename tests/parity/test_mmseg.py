"""Our segmenters against mmsegmentation's heads, with the same random weights: outputs, gradients, statistics.

Needs mmsegmentation (1.2.2 with mmcv-lite, mmengine and setuptools < 81), which the project does not depend on.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from xcit.models.mmseg_files import to_mmseg
from xcit.models.segmenters import create_segmenter

pytestmark = pytest.mark.filterwarnings("ignore")  # of their imports


class _Nothing(types.ModuleType):
    """Stands in for mmcv.ops, which mmcv-lite lacks: the heads under test import its names and do not use them."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if importlib.util.find_spec("mmseg") is None:
    pytest.skip("mmsegmentation is not installed", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv.ops"] = _Nothing("mmcv.ops")
    import mmseg.models.segmentors  # noqa: F401  it registers what a configuration names
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

TOLERANCE = 1e-9
K = 7
CASES = [
    (head, name, size)
    for head in ("upernet", "sem_fpn")
    for name, size in (("xcit_nano_12_p16", (101, 183)), ("xcit_nano_12_p16", (96, 64)), ("xcit_nano_12_p8", (83, 70)))
]


@MODELS.register_module(name="OurPyramid", force=True)
class _Pyramid(nn.Module):
    """Ours as their backbone: the parts' names are those of the released one."""

    def __new__(cls, like: nn.Module) -> nn.Module:
        return copy.deepcopy(like)


def theirs(ours: nn.Module, head: str) -> nn.Module:
    """Return their model by the released configuration, smaller, on our pyramid, with weights of its own."""
    C = ours.backbone.embed_dim
    shared = {
        "num_classes": K,
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    }
    levels = {"in_channels": [C] * 4, "in_index": [0, 1, 2, 3]}
    if head == "upernet":
        decode = {"type": "UPerHead", **levels, "pool_scales": (1, 2, 3, 6), "channels": 24, **shared}
        fcn = {"type": "FCNHead", "in_channels": C, "in_index": 2, "channels": 16, "num_convs": 1}
        rest = {"auxiliary_head": {**fcn, "concat_input": False, **shared}}
    else:
        own = levels | {"in_channels": [40] * 4}
        decode = {"type": "FPNHead", **own, "feature_strides": [4, 8, 16, 32], "channels": 24, **shared}
        rest = {"neck": {"type": "FPN", "in_channels": [C] * 4, "out_channels": 40, "num_outs": 4}}
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {"type": "OurPyramid", "like": ours.backbone},
            "decode_head": decode,
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
            **rest,
        }
    )


def pair(head: str, name: str, randomize) -> tuple[nn.Module, nn.Module]:
    widths = {"upernet": {"auxiliary_channels": 16}, "sem_fpn": {"fpn_channels": 40}}[head]
    ours = randomize(create_segmenter(name, head=head, num_classes=K, channels=24, depth=4, **widths))
    other = theirs(ours, head)
    randomize(other, seed=1)
    other.load_state_dict(to_mmseg(ours.state_dict())["state_dict"], strict=True)
    return ours.double(), other.double()


def close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    assert a.shape == b.shape, what
    error = (a - b).abs().max().item()
    assert error <= TOLERANCE * max(1.0, b.abs().max().item()), f"{what}: {error}"


@pytest.mark.parametrize(("head", "name", "size"), CASES)
def test_outputs(head: str, name: str, size: tuple[int, int], randomize) -> None:
    ours, other = (model.eval() for model in pair(head, name, randomize))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        features = other.extract_feat(x)
        low, auxiliary = ours.forward_auxiliary(x)
        close(low, other.decode_head(features), "decode head")
        if head == "upernet":
            close(auxiliary, other.auxiliary_head(features), "auxiliary head")
        metas = [{"img_shape": size, "ori_shape": size, "pad_shape": size, "padding_size": [0] * 4}] * 2
        close(ours(x), other.encode_decode(x, metas), "at the image's size")


@pytest.mark.parametrize(("head", "name", "size"), CASES[1::3])
def test_training(head: str, name: str, size: tuple[int, int], randomize) -> None:
    """Outputs, every gradient and the moved statistics; dropout draws the same channels from the same seed."""
    ours, other = (model.train() for model in pair(head, name, randomize))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.manual_seed(5)
    levels = ours.backbone(x)
    low = ours.decode(levels)
    heads = [low] if ours.auxiliary_head is None else [low, ours.auxiliary_head(levels)]
    torch.manual_seed(5)
    features = other.extract_feat(x)
    expected = [other.decode_head(features)] + ([other.auxiliary_head(features)] if len(heads) == 2 else [])
    for a, b in zip(heads, expected, strict=True):
        close(a, b, "training output")
    upstream = [torch.randn_like(a) for a in heads]
    torch.autograd.backward(heads, upstream)
    torch.autograd.backward(expected, upstream)
    gradients = dict(other.named_parameters())
    for key, parameter in ours.named_parameters():
        close(parameter.grad, gradients[key].grad, f"gradient of {key}")
    moved = other.state_dict()
    for key, value in ours.state_dict().items():
        close(value.double(), moved[key].double(), key)


@pytest.mark.parametrize("head", ["upernet", "sem_fpn"])
def test_losses_of_both_heads_add_up_as_theirs(head: str, randomize) -> None:
    """Theirs enlarges the logits to the masks and ignores 255, but divides by the number of all pixels."""
    ours, other = (model.eval() for model in pair(head, "xcit_nano_12_p8", randomize))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    masks = torch.randint(0, K, (2, 64, 96))
    masks[:, :9] = 255
    samples = []
    for mask in masks:
        sample = SegDataSample()
        sample.set_data({"gt_sem_seg": PixelData(data=mask[None])})
        samples.append(sample)
    with torch.no_grad():
        losses = other.loss(x, samples)
        logits = [part for part in ours.forward_auxiliary(x) if part is not None]
        for part, key in zip(logits, ("decode.loss_ce", "aux.loss_ce"), strict=False):
            large = nn.functional.interpolate(part, size=(64, 96), mode="bilinear", align_corners=False)
            loss = nn.functional.cross_entropy(large, masks, ignore_index=255, reduction="sum") / masks.numel()
            close(loss, losses[key], key)
