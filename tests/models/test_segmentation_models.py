"""UperNet and Semantic FPN: published sizes, a plain reference on the released names, training, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xcit.errors import ConfigError, ShapeError
from xcit.models.factory import create_model
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmenters import build, create_segmenter
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.upernet import UperNet

TINY = {"depth": 3, "num_classes": 5}
OWN = {"upernet": {"channels": 12, "auxiliary_channels": 8}, "sem_fpn": {"channels": 12, "fpn_channels": 20}}


def tiny(head="upernet", name="xcit_nano_12_p16", **options):
    torch.manual_seed(0)
    return create_segmenter(name, head=head, **TINY | OWN[head] | options)


# Millions of parameters, the auxiliary head included: from the released code's modules.
PARAMETERS = {
    "sem_fpn_xcit_tiny_12_p16": 8.90,
    "sem_fpn_xcit_tiny_12_p8": 8.59,
    "sem_fpn_xcit_small_12_p16": 32.22,
    "sem_fpn_xcit_small_12_p8": 31.00,
    "sem_fpn_xcit_small_24_p16": 53.64,
    "sem_fpn_xcit_small_24_p8": 52.42,
    "sem_fpn_xcit_medium_24_p16": 94.04,
    "sem_fpn_xcit_medium_24_p8": 91.86,
    "upernet_xcit_tiny_12_p16": 34.17,
    "upernet_xcit_tiny_12_p8": 33.87,
    "upernet_xcit_small_12_p16": 54.20,
    "upernet_xcit_small_12_p8": 52.98,
    "upernet_xcit_small_24_p16": 75.62,
    "upernet_xcit_small_24_p8": 74.40,
    "upernet_xcit_medium_24_p16": 112.18,
    "upernet_xcit_medium_24_p8": 110.01,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_released_segmenters(name):
    with torch.device("meta"):
        model = create_segmenter(name)
    assert isinstance(model, UperNet if name.startswith("upernet") else SemanticFPN)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.0051)


# --- the heads, written down plainly on weights under the released names ----------------------------------------------


class Plain:
    """Layers by name, in evaluation."""

    def __init__(self, weights):
        self.w = weights

    def block(self, x, name):
        """Convolution, batch norm, rectifier."""
        w, kernel = self.w, self.w[f"{name}.conv.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        mean, var = (w[f"{name}.bn.running_{s}"].view(-1, 1, 1) for s in ("mean", "var"))
        gain, bias = (w[f"{name}.bn.{s}"].view(-1, 1, 1) for s in ("weight", "bias"))
        return ((x - mean) / (var + 1e-5).sqrt() * gain + bias).clamp(min=0)

    def conv(self, x, name):
        kernel = self.w[f"{name}.weight"]
        return F.conv2d(x, kernel, self.w[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def enlarged(x, size):
    """Bilinear with half-pixel centres: two products with matrices of weights."""
    for axis, out in zip((2, 3), size, strict=True):
        n = x.shape[axis]
        at = ((torch.arange(out, dtype=x.dtype) + 0.5) * n / out - 0.5).clamp(0, n - 1)
        matrix = (1 - (at[:, None] - torch.arange(n, dtype=x.dtype)).abs()).clamp(min=0)  # (out, n)
        x = torch.einsum("on,bcnw->bcow" if axis == 2 else "on,bchn->bcho", matrix, x)
    return x


def averaged(x, scale):
    """Means over scale x scale parts, each from floor to ceil of its borders."""
    h, w = x.shape[2:]
    rows = [(i * h // scale, -((-(i + 1) * h) // scale)) for i in range(scale)]
    columns = [(i * w // scale, -((-(i + 1) * w) // scale)) for i in range(scale)]
    return torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], -1) for a, b in rows], -2)


def uper_head(weights, levels):
    p, n = Plain(weights), "decode_head"
    top = levels[3]
    pools = [
        enlarged(p.block(averaged(top, s), f"{n}.psp_modules.{i}.1"), top.shape[2:]) for i, s in enumerate((1, 2, 3, 6))
    ]
    laterals = [p.block(levels[i], f"{n}.lateral_convs.{i}") for i in range(3)]
    laterals.append(p.block(torch.cat([top, *pools], 1), f"{n}.bottleneck"))
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + enlarged(laterals[i + 1], laterals[i].shape[2:])
    outs = [p.block(laterals[i], f"{n}.fpn_convs.{i}") for i in range(3)] + [laterals[3]]
    outs = [enlarged(x, outs[0].shape[2:]) for x in outs]
    return p.conv(p.block(torch.cat(outs, 1), f"{n}.fpn_bottleneck"), f"{n}.conv_seg")


def fpn_head(weights, levels):
    p = Plain(weights)
    laterals = [p.conv(x, f"neck.lateral_convs.{i}.conv") for i, x in enumerate(levels)]
    for i in (2, 1, 0):
        (h, w), (H, W) = laterals[i + 1].shape[2:], laterals[i].shape[2:]
        rows, columns = torch.arange(H) * h // H, torch.arange(W) * w // W
        laterals[i] = laterals[i] + laterals[i + 1][:, :, rows][:, :, :, columns]
    maps = [p.conv(x, f"neck.fpn_convs.{i}.conv") for i, x in enumerate(laterals)]
    total = p.block(maps[0], "decode_head.scale_heads.0.0")
    for i in (1, 2, 3):
        x = maps[i]
        for step in range(i):
            x = p.block(x, f"decode_head.scale_heads.{i}.{2 * step}")
            x = enlarged(x, (2 * x.shape[2], 2 * x.shape[3]))
        total = total + enlarged(x, total.shape[2:])
    return p.conv(total, "decode_head.conv_seg")


CASES = [(head, f"xcit_nano_12_p{p}", size) for head in OWN for p, size in ((16, (101, 183)), (8, (64, 70)))]


@pytest.mark.parametrize(("head", "name", "size"), CASES)
def test_the_heads_equal_a_plain_reference(head, name, size, randomize):
    model = randomize(tiny(head, name)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        levels = model.backbone(x)
        expected = {"upernet": uper_head, "sem_fpn": fpn_head}[head](model.state_dict(), levels)
        low, auxiliary = model.forward_auxiliary(x)
        assert low.shape == (2, 5, *levels[0].shape[2:])
        torch.testing.assert_close(low, expected, rtol=0, atol=1e-10)
        assert torch.equal(model.forward_low(x), low)
        torch.testing.assert_close(model(x), enlarged(expected, size), rtol=0, atol=1e-10)
        if head == "sem_fpn":
            assert auxiliary is None
            return
        p = Plain(model.state_dict())
        expected = p.conv(p.block(levels[2], "auxiliary_head.convs.0"), "auxiliary_head.conv_seg")
        torch.testing.assert_close(auxiliary, expected, rtol=0, atol=1e-10)


def test_released_numbers_are_the_defaults():
    with torch.device("meta"):
        uper, fpn = create_segmenter("xcit_small_12_p16"), create_segmenter("xcit_small_12_p16", head="sem_fpn")
    assert uper.decode_head.conv_seg.weight.shape == (150, 512, 1, 1)
    assert [pool[0].output_size for pool in uper.decode_head.psp_modules] == [1, 2, 3, 6]
    assert uper.auxiliary_head.conv_seg.weight.shape == (150, 256, 1, 1)
    assert fpn.decode_head.conv_seg.weight.shape == (150, 128, 1, 1)
    assert {tuple(c.conv.weight.shape[:2]) for c in fpn.neck.fpn_convs} == {(384, 384)}
    for model in (uper, fpn):
        assert model.decode_head.dropout.p == 0.1
        assert (model.image_size, model.max_size) == (512, 2048)
        assert model.mean == (0.485, 0.456, 0.406)
        assert model.std == (0.229, 0.224, 0.225)
        assert model.pretrained_cfg["mean"] == list(model.mean)


def test_initial_values():
    """mmcv's: He's, for the width that comes out, before a norm; 0.01 in the classifiers; Glorot's in the neck."""
    model, other = tiny(channels=64, auxiliary_channels=64, num_classes=40), tiny("sem_fpn", fpn_channels=64)
    weight = model.decode_head.fpn_bottleneck.conv.weight  # (64, 256, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    for head in (model.decode_head, model.auxiliary_head):
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not head.conv_seg.bias.any()
    neck = other.neck.fpn_convs[0].conv  # (64, 64, 3, 3)
    assert neck.weight.abs().max().item() == pytest.approx((6 / (2 * 64 * 9)) ** 0.5, rel=0.01)
    assert not neck.bias.any()


@pytest.mark.parametrize("head", OWN)
def test_training_reaches_every_parameter_and_checkpointing_changes_no_gradient(head, randomize):
    model = randomize(tiny(head, dropout=0.0)).double().train()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    start = {k: t.clone() for k, t in model.state_dict().items()}

    def gradients():
        model.load_state_dict(start)
        model.zero_grad()
        low, auxiliary = model.forward_auxiliary(x)
        loss = low.square().mean() + (0 if auxiliary is None else auxiliary.square().mean())
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    # a bias before batch norm in training is taken out again: the pyramid's last ones are before UperNet's 1 x 1 layers
    silent = ("fpn1.0.bias", *(("fpn1.3.bias", "fpn2.0.bias") if head == "upernet" else ()))
    assert [n for n, g in plain.items() if g.abs().max() < 1e-12] == [f"backbone.{name}" for name in silent]
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    again = gradients()
    assert all(torch.allclose(again[name], g, rtol=1e-9, atol=1e-12) for name, g in plain.items())


def test_one_pass_of_the_backbone_serves_both_heads():
    model, passes = tiny(), []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    low, auxiliary = model.forward_auxiliary(torch.randn(2, 3, 64, 64))
    assert (low.shape, auxiliary.shape, passes) == ((2, 5, 16, 16), (2, 5, 4, 4), [1])
    assert tiny(auxiliary_channels=0).auxiliary_head is None


def test_dropout_leaves_out_whole_channels_in_training_only():
    model = tiny(dropout=0.5)
    seen = []
    model.decode_head.conv_seg.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    x = torch.randn(8, 3, 64, 64)
    model(x)
    left_out = (seen[0] == 0).all(-1).all(-1)
    assert 0.3 < left_out.float().mean() < 0.7
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_a_single_image_cannot_train_upernet():
    model = tiny()
    with pytest.raises(ShapeError, match=r"one image a batch .* take two images or more"):
        model(torch.randn(1, 3, 64, 64))
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5, 64, 64)
    tiny("sem_fpn").train()(torch.randn(1, 3, 64, 64))
    frozen = tiny()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    frozen(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("head", OWN)
def test_any_channels_taps_and_config(head, randomize):
    options = {"in_chans": 2, "mean": (0.1, 0.2), "std": [0.3, 0.4], "taps": [0, 0, 1, -2], "drop_path_rate": 0.1}
    model = randomize(tiny(head, image_size=64, max_size=128, **options)).eval()
    assert model.config["head"] == head
    assert model.config["taps"] == [0, 0, 1, 1]
    assert (model.mean, model.std) == ((0.1, 0.2), (0.3, 0.4))
    twin = build(model.config).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 2, 40, 70)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_images_that_do_not_fit():
    model = tiny().eval()
    with pytest.raises(ShapeError, match=r"takes images \(batch, 3, H, W\); got \(1, 4, 64, 64\)"):
        model(torch.randn(1, 4, 64, 64))
    with pytest.raises(ShapeError, match="got \\(3, 64, 64\\)"):
        model(torch.randn(3, 64, 64))
    with pytest.raises(ShapeError, match="enlarge or pad"):
        model(torch.randn(1, 3, 16, 64))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_classes": 1}, "num_classes is 1; it must be a whole number, 2 or more"),
        (
            {"channels": 0, "dropout": 1.0},
            "channels is 0; .* dropout is 1.0; it must be a number, 0 or more and less than 1",
        ),
        ({"auxiliary_channels": -1}, "auxiliary_channels is -1"),
        ({"pool_scales": (0, 2)}, r"pool_scales is \[0, 2\]"),
        ({"pool_scales": (1, 2.5)}, r"pool_scales is \[1, 2.5\]"),
        ({"channels": "many", "dropout": None}, "channels is 'many'; .* dropout is None"),
        ({"pool_scales": ()}, r"pool_scales is \[\]"),
        ({"pool_scales": 3}, r"pool_scales is 3; it must be a list of whole numbers of 1 or more\."),
        ({"pool_scales": "12"}, "pool_scales is '12'; it must be a list"),
        ({"image_size": 16}, "image_size is 16; it must be a whole number, 32 or more"),
        ({"image_size": 64, "max_size": 48}, "max_size is 48, less than image_size, 64"),
        ({"in_chans": 1}, r"mean is \(0.485, .*\); the images have 1 channels, give a number for each; std is \(0.229"),
        ({"mean": [0.5, 0.5]}, r"mean is \[0.5, 0.5\]; the images have 3 channels"),
        ({"mean": 0.5, "std": ("a", "b", "c")}, r"mean is 0.5; .* std is \('a', 'b', 'c'\)"),
        ({"std": (0.5, 0.5, 0.0)}, r"std is \(0.5, 0.5, 0.0\); its numbers must be more than 0"),
        ({"head": "sem_fpn", "fpn_channels": 0}, "fpn_channels is 0"),
    ],
)
def test_arguments_out_of_range(options, sentence):
    body = XCiTPyramid(create_model("xcit_nano_12_p16", depth=3, num_classes=0, in_chans=options.pop("in_chans", 3)))
    kind = SemanticFPN if options.pop("head", "upernet") == "sem_fpn" else UperNet
    with pytest.raises(ConfigError, match=sentence):
        kind(body, **options)
