"""Folded classifiers against the models that they were made of: border, odd sizes and every architecture included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from xcit.deploy.fold import fold
from xcit.errors import ConfigError, ExportError
from xcit.models.folded_models import FoldedXCiT
from xcit.models.variants import VARIANTS
from xcit.models.xcit import XCiT
from xcit.models.zoo import ARCHITECTURES
from xcit.ops.xca import observe_forms

TINY = {"patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def tiny(randomize) -> XCiT:
    return randomize(XCiT(**TINY)).double().eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def sizes(patch: int) -> list[tuple[int, int]]:
    """Whole patches; neither whole patches nor square; a single row of patches."""
    return [(3 * patch, 3 * patch), (2 * patch + 3, 4 * patch - 1), (patch, 5 * patch + 1)]


def check_architecture(name: str, randomize, **overrides: int) -> None:
    model = randomize(XCiT(**ARCHITECTURES[name].config | {"num_classes": 100} | overrides)).eval()
    patch = ARCHITECTURES[name].patch_size
    for dtype, bound in BOUNDS.items():
        model = model.to(dtype)
        folded = FoldedXCiT(model)
        for size in sizes(patch):
            images = torch.randn(1, 3, *size, dtype=dtype)
            with torch.no_grad():
                assert relative(folded(images), model(images)) <= bound, (dtype, size)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_width_gives_the_same_logits(name: str, randomize) -> None:
    check_architecture(name, randomize, depth=1, cls_attn_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_same_logits(name: str, randomize) -> None:
    check_architecture(name, randomize)


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (35, 8), (16, 16), (21, 50)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_norm": False},
        {"global_pool": "avg"},
        {"num_classes": 0},
        {"num_classes": 0, "global_pool": "avg", "tokens_norm": False},
        {"use_pos": False, "qkv_bias": False, "cls_attn_layers": 1},
        {"patch_size": 16, "in_chans": 1, "cls_attn_layers": 3},
        *({"variant": variant} for variant in VARIANTS if variant != "no_qk_norm"),
    ],
    ids=str,
)
def test_logits_and_all_tokens_at_every_border(options: dict, size: tuple[int, int], randomize) -> None:
    model = randomize(XCiT(**TINY | options)).double().eval()
    folded = FoldedXCiT(model)
    scale = model.config["patch_size"] // 8
    images = torch.randn(2, model.config["in_chans"], scale * size[0], scale * size[1], dtype=torch.float64)
    with torch.no_grad():
        assert relative(folded(images), model(images)) <= 1e-12
        assert relative(folded.forward_features(images), model.forward_features(images)) <= 1e-12


def test_the_form_of_xca_is_the_one_asked_for(tiny) -> None:
    images = torch.randn(1, 3, 64, 72, dtype=torch.float64)
    logits = tiny(images)
    for form in ("tokens", "covariance"):
        folded = fold(tiny, form=form).model
        with observe_forms() as forms:
            assert relative(folded(images), logits) <= 1e-12
        assert set(forms) == {form}
    folded.set_attn_form("tokens")
    with observe_forms() as forms:
        folded(images)
    assert set(forms) == {"tokens"}
    with pytest.raises(ConfigError, match="form is 'fast'"):
        folded.set_attn_form("fast")


def test_named_sizes_have_a_table_and_others_are_computed(tiny) -> None:
    folded = fold(tiny, image_sizes=[(32, 48), (30, 41), (16, 16)]).model
    assert folded.pos_embeder.grids == ((4, 6), (2, 2))  # 30 x 41 px are 4 x 6 patches as well
    for size in ((32, 48), (16, 16), (48, 32), (9, 100)):
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        assert relative(folded(images), tiny(images)) <= 1e-12
    # the table is what is used: another one gives another result
    images = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        folded.pos_embeder.table_4x6.add_(1.0 * torch.randn(32))
    assert relative(folded(images), tiny(images)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_the_original(dtype: torch.dtype, randomize) -> None:
    exact = randomize(XCiT(**TINY)).double().eval()
    model = copy.deepcopy(exact).to(dtype)
    folded = fold(model).model
    assert {p.dtype for p in folded.parameters()} == {dtype}
    images = torch.randn(8, 3, 40, 48, dtype=dtype)
    truth = copy.deepcopy(model).double()(images.double())

    def error(model: nn.Module) -> float:
        return ((model(images).double() - truth).norm() / truth.norm()).item()

    assert error(folded) <= 2 * error(model)


def test_the_argument_stays_as_it_is(randomize) -> None:
    model = randomize(XCiT(**TINY)).train()
    model.blocks[1].eval()
    model.blocks[0].gamma1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config)
    modes = [module.training for module in model.modules()]
    needs_grad = [p.requires_grad for p in model.parameters()]
    folded = fold(model, form="covariance").model
    with torch.no_grad():
        for p in folded.parameters():
            p.zero_()  # nothing is shared
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config == config
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs_grad


def test_what_was_folded_is_gone(tiny) -> None:
    folded = fold(tiny).model
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    norms = [module for module in folded.modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert all(norm.weight is None and norm.bias is None for norm in norms)
    assert not any("gamma" in name for name, _ in folded.named_parameters())
    assert not any(p.requires_grad for p in folded.parameters())


def test_the_report_says_what_happened(randomize) -> None:
    model = randomize(XCiT(**TINY | {"depth": 3})).eval()
    report = fold(model, image_sizes=[(64, 64)], check_sizes=[(64, 64), (24, 40)]).report
    assert dict(report.folded) == {
        "layer-norm affines into the linear layer after it": 2 * 3 + 2 + 1,
        "layer-norm affines into the convolution after it": 3,
        "batch norms into the convolution before or after it": 3 + 3,
        "LayerScales into the layer before it": 3 * 3 + 2 * 2,
        "class-attention layers without keys and values": 2,
        "positional encodings into a table": 1,
    }
    N, C, h = 64, 32, 4
    # What is saved: keys and values of the class attention, but for 2 C h and the class token's own, and the position.
    attention = 2 * (2 * (N + 1) * C * C + 2 * (N + 1) * C) - 2 * (2 * (N + 1) * C * h + 2 * C * C)
    assert report.multiply_adds_before - report.multiply_adds_after == attention + N * 64 * C
    assert report.checked_sizes == ((64, 64), (24, 40))
    assert 0 < report.max_relative_difference <= 1e-5
    assert report.num_values_before == sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    text = str(report)
    assert "folded: 3 layer-norm affines into the convolution after it" in text
    assert "multiply-adds at 64 x 64" in text
    assert "largest relative difference in float32" in text
    assert "24 x 40" in text


def test_multiply_adds_are_counted_at_the_size_that_the_weights_expect(tiny) -> None:
    assert fold(tiny).report.image_size == (224, 224)
    tiny.pretrained_cfg = {"input_size": [3, 48, 56]}
    assert fold(tiny).report.image_size == (48, 56)


def test_a_folded_model_has_no_training(tiny) -> None:
    folded = fold(tiny).model
    assert folded.eval() is folded
    with pytest.raises(ConfigError, match="for inference alone"):
        folded.train()
    with pytest.raises(ConfigError, match="backward pass"):
        folded.set_grad_checkpointing()


def test_a_folded_model_can_be_copied_and_moved_to_another_type(tiny) -> None:
    images = torch.randn(1, 3, 24, 32)
    folded = copy.deepcopy(fold(tiny).model).float()
    assert relative(folded(images), tiny.float()(images)) <= 1e-5
    assert folded.num_classes == 5
    assert folded.config["embed_dim"] == 32
    assert folded.patch_size == 8


class Other(nn.Linear):
    """A part that folding does not know."""


def test_what_cannot_be_folded_is_refused(randomize, tiny) -> None:
    with pytest.raises(ExportError, match="no_qk_norm"):
        fold(XCiT(**TINY, variant="no_qk_norm"))
    with pytest.raises(ConfigError, match="got Linear"):
        fold(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="folded already"):
        fold(fold(tiny).model)
    with torch.device("meta"), pytest.raises(ConfigError, match="meta device"):
        fold(XCiT(**TINY))
    tiny.head = Other(32, 5)
    with pytest.raises(ExportError, match="head is of class Other"):
        fold(tiny)


def test_a_batch_norm_without_statistics_is_refused(tiny) -> None:
    tiny.patch_embed.proj[0][1] = nn.BatchNorm2d(8, track_running_stats=False).double()
    with pytest.raises(ConfigError, match="no running statistics"):
        fold(tiny)


def test_another_kernel_than_three_is_refused(tiny) -> None:
    tiny.blocks[0].local_mp.conv2 = nn.Conv2d(32, 32, 5, padding=2, groups=32).double()
    with pytest.raises(ConfigError, match="3 x 3"):
        fold(tiny)


def test_weights_that_are_not_finite_are_refused(tiny) -> None:
    with torch.no_grad():
        tiny.blocks[0].gamma2[0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        fold(tiny)


def test_a_fold_that_changes_the_result_is_refused(tiny, monkeypatch) -> None:
    class Wrong(FoldedXCiT):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.001 * super().forward(x)

    monkeypatch.setattr("xcit.models.folded_copy.FoldedXCiT", Wrong)
    with pytest.raises(ExportError, match="differs from the original by 1"):
        fold(tiny)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "fast"}, "form is 'fast'"),
        ({"small_terms": torch.float16}, "small_terms is torch.float16"),
        ({"image_sizes": [(7, 32)]}, "image_sizes holds 7 x 32; the model takes images of 8 px"),
        ({"image_sizes": [224]}, "image_sizes holds 224"),
        ({"check_sizes": [(32.5, 32)]}, "check_sizes holds"),
        ({"check_sizes": [(32, 32, 3)]}, "check_sizes holds"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str, tiny) -> None:
    with pytest.raises(ConfigError, match=words):
        fold(tiny, **options)
