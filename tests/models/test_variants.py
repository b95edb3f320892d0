"""Ablation variants: each against its definition in a few lines, in float64, and on its way through a file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.errors import CheckpointError, ConfigError, ShapeError, UnknownNameError
from xcit.models.factory import create_model
from xcit.models.variants import VARIANTS, apply_variant
from xcit.models.weights import load_checkpoint, save_checkpoint
from xcit.models.xcit import XCiT
from xcit.ops.xca import XCAWeights, observe_forms, xca

TINY = {"patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
NAMES = list(VARIANTS)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture
def variant(randomize):
    """Build a variant in eval mode and float64, every value of its own."""

    def build(name: str, **options) -> XCiT:
        return randomize(XCiT(**TINY | options, variant=name).double()).eval()

    return build


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 1, 37, 24, dtype=torch.float64)


def plain_twin(model: XCiT, **values: float) -> XCiT:
    """Return a plain XCiT with a variant's weights; parameters that the variant lacks get a value by their name."""
    twin = XCiT(**model.config | {"variant": "none", "global_pool": "token"}).double().eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    with torch.no_grad():
        for name in missing:
            if name.rpartition(".")[2] in values:
                twin.state_dict()[name].fill_(values[name.rpartition(".")[2]])
    return twin


# --- what each computes ---------------------------------------------------------------------------------------------


def test_no_lpi_is_xca_and_feed_forward_only(variant, image: Tensor) -> None:
    model = variant("no_lpi")
    block, x = model.blocks[0], torch.randn(2, 6, 16, dtype=torch.float64)
    y = x + block.gamma1 * block.attn(F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6))
    y = y + block.gamma2 * block.mlp(F.layer_norm(y, (16,), block.norm2.weight, block.norm2.bias, 1e-6))
    torch.testing.assert_close(block(x, 2, 3), y, **CLOSE)
    # the whole model is the plain one whose LPI adds nothing
    torch.testing.assert_close(model(image), plain_twin(model, gamma3=0.0)(image), **CLOSE)
    assert not [name for name in model.state_dict() if "local_mp" in name or "norm3" in name or "gamma3" in name]
    # nothing but XCA's statistics and class attention joins the patches: any order of them gives the same class token
    tokens = torch.randn(1, 6, 16, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(block(tokens, 2, 3)[:, order], block(tokens[:, order], 3, 2), **CLOSE)


def test_no_qk_norm_is_the_softmax_of_plain_products(variant) -> None:
    attn = variant("no_qk_norm").blocks[0].attn
    x, h = torch.randn(2, 6, 16, dtype=torch.float64), 4
    q, k, v = (x @ w.T + b for w, b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True))
    heads = []
    for i in range(h):
        a, b, c = (t[:, :, 4 * i : 4 * i + 4] for t in (q, k, v))
        A = (attn.temperature[i] * a.transpose(1, 2) @ b).softmax(-1)
        heads.append((A @ c.transpose(1, 2)).transpose(1, 2))
    expected = torch.cat(heads, dim=2) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(x), expected, **CLOSE)


def test_no_qk_norm_is_not_xca(variant, image: Tensor) -> None:
    model = variant("no_qk_norm")
    assert (model(image) - plain_twin(model)(image)).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["tokens", "covariance"])
def test_no_temperature_is_xca_at_temperature_one(variant, image: Tensor, form: str) -> None:
    model = variant("no_temperature", attn_form=form)
    twin = plain_twin(model, temperature=1.0)
    twin.set_attn_form("tokens")
    with observe_forms() as forms:
        out = model(image)
    assert set(forms) == {form}
    torch.testing.assert_close(out, twin(image), rtol=1e-9, atol=1e-9)
    assert not [name for name in model.state_dict() if "temperature" in name]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (9, 15), (37, 24), (23, 41)])
def test_linear_patch_is_one_matrix_for_every_patch(variant, height: int, width: int) -> None:
    model = variant("linear_patch", in_chans=3)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    rows, columns = -(-height // 8), -(-width // 8)
    padded = torch.zeros(2, 3, 8 * rows, 8 * columns, dtype=torch.float64)
    padded[:, :, :height, :width] = x
    patches = padded.reshape(2, 3, rows, 8, columns, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, rows * columns, 3 * 64)
    matrix, bias = model.patch_embed.proj.weight.reshape(16, -1), model.patch_embed.proj.bias
    tokens, grid = model.patch_embed(x)
    assert grid == (rows, columns)
    torch.testing.assert_close(tokens, patches @ matrix.T + bias, **CLOSE)
    assert model.forward_features(x).shape == (2, 1 + rows * columns, 16)


@pytest.mark.parametrize("shape", [(1, 1, 7, 64), (1, 3, 64, 64), (1, 64, 64)])
def test_linear_patch_refuses_what_the_stem_refuses(shape: tuple[int, ...]) -> None:
    for name in ("none", "linear_patch"):
        with pytest.raises(ShapeError, match=r"less than one patch|takes images \(batch, 1, H, W\)"):
            XCiT(**TINY, variant=name).eval()(torch.randn(shape))


def test_avg_pool_is_the_mean_of_the_normed_patches(variant, image: Tensor) -> None:
    model = variant("avg_pool")
    tokens = model.forward_intermediates(image, indices=1, output_fmt="NLC", intermediates_only=True)[0]
    normed = F.layer_norm(tokens, (16,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(image), normed, **CLOSE)
    torch.testing.assert_close(model(image), model.head(normed.mean(dim=1)), **CLOSE)
    assert model.num_prefix_tokens == 0
    assert not [name for name in model.state_dict() if name.startswith("cls_")]


def test_one_head_attends_over_all_channels_and_several_over_blocks_of_them() -> None:
    """What the recipe with one head compares: all C x C cosines, or those of the block diagonal."""
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    qkv, proj = torch.randn(36, 12, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)

    def full(mask: Tensor) -> Tensor:
        q, k, v = (x @ qkv).chunk(3, dim=-1) if qkv.shape[0] == 12 else (x @ qkv.T).chunk(3, dim=-1)
        cosines = F.normalize(q, dim=1).transpose(1, 2) @ F.normalize(k, dim=1)
        A = cosines.masked_fill(~mask, -torch.inf).softmax(-1)
        return (A @ v.transpose(1, 2)).transpose(1, 2) @ proj.T

    for heads in (1, 3, 12):
        blocks = torch.block_diag(*[torch.ones(12 // heads, 12 // heads)] * heads).bool()
        weights = XCAWeights(qkv, None, proj, None, torch.ones(heads, 1, 1, dtype=torch.float64))
        for form in ("tokens", "covariance"):
            torch.testing.assert_close(xca(x, weights, form=form), full(blocks), rtol=1e-9, atol=1e-9)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(variant, name: str) -> None:
    model = variant(name, depth=1, embed_dim=8, num_heads=2)
    x = torch.randn(1, 1, 9, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x)[0, :2], (x,))
    model.zero_grad()
    model(x).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_gradients_are_the_same(variant, image: Tensor, name: str) -> None:
    grads = []
    for enable in (False, True):
        model = variant(name).train()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, **CLOSE)


# --- what a variant is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_keeps_its_name_and_its_initial_values(name: str) -> None:
    torch.manual_seed(5)
    plain = XCiT(**TINY).state_dict()
    torch.manual_seed(5)
    model = XCiT(**TINY, variant=name)
    new = {key for key in model.state_dict() if key not in plain}
    assert new == ({"patch_embed.proj.weight", "patch_embed.proj.bias"} if name == "linear_patch" else set())
    for key in model.state_dict().keys() - new:
        assert torch.equal(model.state_dict()[key], plain[key]), key
    gone = set(plain) - set(model.state_dict())
    assert bool(gone) == (name != "no_qk_norm")
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_three_ways_to_the_same_model(name: str) -> None:
    options = {"num_classes": 3, "depth": 2}
    models = []
    for build in (
        lambda: apply_variant(create_model("xcit_nano_12_p8", **options), name),
        lambda: create_model("xcit_nano_12_p8", variant=name, **options),
        lambda: XCiT(**models[0].config),
    ):
        torch.manual_seed(1)
        models.append(build().eval())
    x = torch.randn(1, 3, 16, 16)
    expected = models[0](x)
    for model in models[1:]:
        assert model.config == models[0].config
        assert model.config["variant"] == name
        assert torch.equal(model(x), expected)
    models[1].load_state_dict(models[0].state_dict())


def test_a_variant_keeps_device_dtype_and_mode() -> None:
    for name in NAMES:
        model = apply_variant(XCiT(**TINY).to(torch.float16).eval(), name)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert not any(m.training for m in model.modules())
        with torch.device("meta"):
            assert all(p.is_meta for p in XCiT(**TINY, variant=name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_learns(name: str) -> None:
    model = XCiT(**TINY, drop_path_rate=0.1, variant=name)
    images, labels = torch.randn(9, 1, 24, 24), torch.arange(9) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_attention_dropout_acts_without_norm(variant) -> None:
    attn = variant("no_qk_norm", attn_drop_rate=0.5).blocks[0].attn
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    assert torch.equal(attn(x), attn(x))
    attn.train()
    assert not torch.equal(attn(x), attn(x))


def test_mistakes_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown variant 'no_lip'\. Did you mean 'no_lpi'"):
        XCiT(**TINY, variant="no_lip")
    with pytest.raises(ConfigError, match="is the variant no_lpi already"):
        apply_variant(XCiT(**TINY, variant="no_lpi"), "avg_pool")
    with pytest.raises(ConfigError, match="token form only"):
        XCiT(**TINY, variant="no_qk_norm", attn_form="covariance")
    model = XCiT(**TINY, variant="no_qk_norm")
    model.set_attn_form("covariance")
    with pytest.raises(ConfigError, match="token form only"):
        model(torch.randn(1, 1, 16, 16))


def test_without_class_attention_what_needs_it_is_refused() -> None:
    model, x = XCiT(**TINY, variant="avg_pool"), torch.randn(1, 1, 16, 16)
    for call in (
        lambda: model.class_attention(x),
        lambda: model.forward_intermediates(x, return_prefix_tokens=True),
        lambda: model.reset_classifier(4, global_pool="token"),
    ):
        with pytest.raises(ConfigError, match="variant avg_pool"):
            call()
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_variant_builds_the_variant(variant, name: str, tmp_path) -> None:
    model = variant(name).float()
    x = torch.randn(2, 1, 24, 24)
    path = save_checkpoint(model, tmp_path / "variant.safetensors", class_names=("a", "b", "c"))
    again = create_model(path).eval()
    assert again.config == model.config
    assert again.pretrained_cfg["class_names"] == ["a", "b", "c"]
    assert torch.equal(again(x), model(x))
    load_checkpoint(XCiT(**model.config), path)
    assert create_model(path, num_classes=5).eval()(x).shape == (2, 5)
    grey = create_model(path, in_chans=3).eval()
    torch.testing.assert_close(grey(x.expand(-1, 3, -1, -1)), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_variants_file_is_not_taken_for_the_plain_model_nor_the_reverse(variant, name: str, tmp_path) -> None:
    for saved, built in ((name, "none"), ("none", name)):
        path = save_checkpoint(variant(saved).float(), tmp_path / f"{saved}.safetensors")
        model = XCiT(**TINY, variant=built)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="variant"):
            load_checkpoint(model, path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_released_weights_are_not_taken_for_a_variants(variant, tmp_path) -> None:
    """A released file does not say that it is no variant; it is taken for the plain model all the same."""
    torch.save(variant("none").float().state_dict(), tmp_path / "raw.pth")
    with pytest.raises(CheckpointError, match="variant"):
        load_checkpoint(XCiT(**TINY, variant="no_qk_norm"), tmp_path / "raw.pth")


def test_files_from_before_there_were_variants_are_plain(variant, tmp_path, monkeypatch) -> None:
    model = variant("none").float()
    del model.config["variant"]
    path = save_checkpoint(model, tmp_path / "old.safetensors")
    again = create_model(path)
    assert again.config["variant"] == "none"
    assert isinstance(again.cls_token, nn.Parameter)
