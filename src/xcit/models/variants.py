"""XCiT with one of its parts taken away or replaced, to measure what that part is worth: the paper's ablations.

A variant is built of a plain model's own modules. What is left keeps its name in the checkpoint and, with the same
seed, its initial values; what is gone has no parameters.
Legend: B batch, N tokens = Hp * Wp, C embed_dim, h num_heads, d head_dim.

Source: the ablations of the paper's section 4 (its text was not at hand); average pooling is not among them.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.errors import ConfigError, ShapeError, UnknownNameError
from xcit.models.kernel_layers import run_block
from xcit.models.layers import XCA, ConvPatchEmbed, XCABlock
from xcit.models.xcit import XCiT
from xcit.ops.kernels import Kernels
from xcit.ops.xca import XCAWeights

VARIANTS: Mapping[str, str] = {
    "no_lpi": "no local patch interaction: patches meet in XCA's statistics and in class attention only",
    "no_qk_norm": "queries and keys are not L2-normalised: the softmax is over t * q^T k",
    "no_temperature": "the temperature of every head is 1, not learned",
    "linear_patch": "one linear projection a patch instead of the convolutional stem",
    "avg_pool": "the mean of the patch tokens instead of class attention",
}
"""What ``apply_variant`` makes, by name."""


def apply_variant(model: XCiT, name: str) -> XCiT:
    """Turn a model into a variant of itself, before it is trained.

    ``XCiT(..., variant=name)`` and ``create_model(..., variant=name)`` do the same; ``model.config`` says so, and files
    that are saved of it load as this variant only.

    Args:
        model: a plain XCiT; it is changed.
        name: one of ``VARIANTS``.

    Returns:
        The same model.

    Raises:
        UnknownNameError: no such variant.
        ConfigError: the model is a variant already, or is set to a form of XCA that the variant does not have.
    """
    if name not in VARIANTS:
        raise UnknownNameError("variant", name, VARIANTS, f"There are {', '.join(VARIANTS)}.")
    if model.config["variant"] != "none":
        raise ConfigError(f"The model is the variant {model.config['variant']} already; variants are not combined.")
    device, dtype, training = model.norm.weight.device, model.norm.weight.dtype, model.training
    _CHANGES[name](model)
    model.config["variant"] = name
    model.to(device, dtype).train(training)
    return model


class BlockWithoutLPI(nn.Module):
    """An XCiT layer of two parts: XCA, then the feed-forward network.

    Args:
        block: whose modules and parameters it takes over, ``norm2`` for the network included.
    """

    kernels: Kernels = "plain"

    def __init__(self, block: XCABlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.gamma1, self.gamma2 = block.gamma1, block.gamma2
        self.drop_path = block.drop_path

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], height: int, width: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """Transform the tokens; where they stand in the (height, width) grid does not matter here."""
        if self.kernels == "triton":
            return run_block(self, x, height, width)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class _Adopted(XCA):
    """Takes over another XCA's settings and projections."""

    def __init__(self, attn: XCA) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.form, self.attn_drop = attn.num_heads, attn.form, attn.attn_drop
        self.qkv, self.proj, self.proj_drop = attn.qkv, attn.proj, attn.proj_drop


class XCAWithoutNorm(_Adopted):
    """XCA whose logits are t * q^T k, sums over all N tokens instead of cosines.

    They grow with the number of tokens, and nothing bounds them: the paper has it (unverified) that training fails.
    There is the token form only.
    """

    def __init__(self, attn: XCA) -> None:
        super().__init__(attn)
        self.temperature = attn.temperature
        self._check_form()

    def refuse_kernels(self) -> None:
        """Say that there are none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError('The variant no_qk_norm has no fused kernels; leave kernels at "plain".')

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Mix channels by their products over the tokens, per head y = (softmax(t * q^T k) v^T)^T."""
        attn, v = self._attention(x)
        y = F.dropout(attn.to(v.dtype), self.attn_drop, self.training) @ v
        return self.proj_drop(self.proj(y.flatten(1, 2).transpose(1, 2)))

    def attention(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch heads head_dim head_dim"]:
        """How much of each value channel (last axis, which sums to one) goes into each output channel, per head."""
        return self._attention(x)[0]

    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_form()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)  # (B, h, d, N)
        products = q @ k.transpose(-2, -1)  # (B, h, d, d)
        wide = torch.promote_types(products.dtype, torch.float32)
        return (products.to(wide) * self.temperature).softmax(dim=-1), v

    def _check_form(self) -> None:
        if self.form == "covariance":
            raise ConfigError("The variant no_qk_norm has the token form only; leave attn_form at auto, or tokens.")


class XCAWithoutTemperature(_Adopted):
    """XCA whose softmax is over the cosines themselves, in both forms."""

    def _weights(self) -> XCAWeights:
        ones = self.qkv.weight.new_ones(self.num_heads, 1, 1)
        return XCAWeights(self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias, ones)


class LinearPatchEmbed(nn.Module):
    """Each patch's pixels, by one linear map, to a token: a p x p convolution of stride p, as in ViT.

    An image of H x W gives ceil(H / p) x ceil(W / p) tokens, as many as the convolutional stem: what a last patch lacks
    is filled with zeros on the right and at the bottom.

    Args:
        stem: whose place it takes.
    """

    def __init__(self, stem: ConvPatchEmbed) -> None:
        super().__init__()
        self.patch_size, self.in_chans = stem.patch_size, stem.in_chans
        last = [m for m in stem.modules() if isinstance(m, nn.Conv2d)][-1]
        self.proj = nn.Conv2d(self.in_chans, last.out_channels, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(
        self, x: Float[Tensor, "batch chans height width"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], tuple[int, int]]:
        """Return the tokens and the patch grid (Hp, Wp).

        Raises:
            ShapeError: not (B, in_chans, H, W), or an image smaller than one patch.
        """
        p = self.patch_size
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ShapeError(f"The model takes images (batch, {self.in_chans}, H, W); got {tuple(x.shape)}.")
        H, W = x.shape[2:]
        if min(H, W) < p:
            raise ShapeError(f"The image is {H} x {W} px, less than one patch of {p} x {p}; enlarge it first.")
        x = self.proj(F.pad(x, (0, -W % p, 0, -H % p)).contiguous(memory_format=torch.channels_last))
        return x.permute(0, 2, 3, 1).flatten(1, 2), (x.shape[2], x.shape[3])


def _remove_lpi(model: XCiT) -> None:
    for i, block in enumerate(model.blocks):
        assert isinstance(block, XCABlock)
        model.blocks[i] = BlockWithoutLPI(block)


def _remove_qk_norm(model: XCiT) -> None:
    _replace_xca(model, XCAWithoutNorm)


def _remove_temperature(model: XCiT) -> None:
    _replace_xca(model, XCAWithoutTemperature)


def _replace_xca(model: XCiT, kind: Callable[[XCA], XCA]) -> None:
    for block in model.blocks:
        assert isinstance(block, XCABlock)
        block.attn = kind(block.attn)


def _make_stem_linear(model: XCiT) -> None:
    model.patch_embed = LinearPatchEmbed(model.patch_embed)  # type: ignore[assignment]


def _pool_patches(model: XCiT) -> None:
    model.cls_token = None
    model.cls_attn_blocks = nn.ModuleList()
    model.num_prefix_tokens = 0
    model.global_pool = model.config["global_pool"] = "avg"


_CHANGES: dict[str, Callable[[XCiT], None]] = {
    "no_lpi": _remove_lpi,
    "no_qk_norm": _remove_qk_norm,
    "no_temperature": _remove_temperature,
    "linear_patch": _make_stem_linear,
    "avg_pool": _pool_patches,
}
