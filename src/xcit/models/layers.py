"""The modules that an XCiT is made of, in the order in which an image meets them.

Parameters are named as in the released checkpoints, quirks included, so that those load strictly and without mapping.
Legend: B batch, N tokens = Hp * Wp, C embed_dim, h num_heads, d head_dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from xcit.errors import ConfigError, ShapeError
from xcit.models import kernel_layers
from xcit.ops.kernels import Kernels
from xcit.ops.position import fourier_position
from xcit.ops.xca import XCAWeights, xca, xca_attention
from xcit.ops.xca_form import FORMS, Form

NORM_EPS = 1e-6  # of every LayerNorm in the released models
STEM_WIDTHS = {16: (8, 4, 2, 1), 8: (4, 2, 1)}
"""Output channels of the stem's convolutions, as divisors of embed_dim. Each convolution halves the image."""


class ConvPatchEmbed(nn.Module):
    """The convolutional stem: 3x3 convolutions of stride 2, each halving the image, to one token a patch.

    An image of H x W gives ceil(H / p) x ceil(W / p) tokens: the padded convolutions round an odd size up, as in the
    released code, and nothing is cropped.

    Source: section 3.1 and appendix A of the paper; the released code's ``ConvPatchEmbed``.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if patch_size not in STEM_WIDTHS:
            raise ConfigError(f"patch_size is {patch_size}; XCiT's stem exists for {sorted(STEM_WIDTHS)}.")
        divisors = STEM_WIDTHS[patch_size]
        if embed_dim % divisors[0]:
            raise ConfigError(
                f"embed_dim is {embed_dim}; the stem for patch size {patch_size} needs a multiple of {divisors[0]}."
            )
        self.patch_size = patch_size
        self.in_chans = in_chans
        layers: list[nn.Module] = []
        width = in_chans
        for divisor in divisors:
            layers += [_conv_bn(width, embed_dim // divisor), nn.GELU()]
            width = embed_dim // divisor
        self.proj = nn.Sequential(*layers[:-1])  # no activation after the last convolution

    def forward(
        self, x: Float[Tensor, "batch chans height width"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], tuple[int, int]]:
        """Return the tokens and the patch grid (Hp, Wp).

        Raises:
            ShapeError: not (B, in_chans, H, W), or an image smaller than one patch.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ShapeError(f"The model takes images (batch, {self.in_chans}, H, W); got {tuple(x.shape)}.")
        # During export a comparison of symbolic sizes would become a constraint on the caller's Dim.
        if not torch.compiler.is_exporting() and (x.shape[2] < self.patch_size or x.shape[3] < self.patch_size):
            raise ShapeError(
                f"The image is {x.shape[2]} x {x.shape[3]} px, less than one patch of "
                f"{self.patch_size} x {self.patch_size}; enlarge it first."
            )
        # A channels-last map is a contiguous sequence of tokens. The residual stream keeps the layout that it starts
        # with, and every norm would copy a transposed one.
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return _to_tokens(x), (x.shape[2], x.shape[3])


class PositionalEncodingFourier(nn.Module):
    """Fourier features of a patch's row and column, projected to the tokens' width; any grid, nothing interpolated.

    Source: the released code's class of this name.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 32) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.token_projection = nn.Conv2d(2 * hidden_dim, embed_dim, kernel_size=1)

    def forward(self, height: int, width: int) -> Float[Tensor, "1 tokens channels"]:
        """Return the encoding of an (height, width) patch grid, one row a token."""
        weight = self.token_projection.weight
        features = fourier_position(height, width, hidden_dim=self.hidden_dim, device=weight.device)
        encoding = self.token_projection(features.to(weight.dtype).permute(2, 0, 1).unsqueeze(0))
        return _to_tokens(encoding)


class XCA(nn.Module):
    """Cross-covariance attention with its weights; the equation, in both its forms, is ``xcit.ops.xca``."""

    kernels: Kernels = "plain"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        if form not in FORMS:
            raise ConfigError(f"attn_form is {form!r}; XCA has the forms {', '.join(FORMS)}.")
        self.num_heads = num_heads
        self.form: Form = form
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Mix channels by their cross-covariance over the tokens."""
        attn_drop = self.attn_drop if self.training else 0.0
        return self.proj_drop(xca(x, self._weights(), form=self.form, attn_drop=attn_drop, kernels=self.kernels))

    def attention(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch heads head_dim head_dim"]:
        """How much of each value channel (last axis, which sums to one) goes into each output channel, per head."""
        return xca_attention(x, self._weights(), form=self.form)

    def _weights(self) -> XCAWeights:
        return XCAWeights(self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias, self.temperature)

    def extra_repr(self) -> str:
        """Show what ``print(model)`` would otherwise hide."""
        return f"num_heads={self.num_heads}, form={self.form!r}, attn_drop={self.attn_drop}"


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3x3 convolutions, through which tokens see their neighbours.

    conv 3x3 -> GELU -> batch norm -> conv 3x3, on the tokens laid out as their patch grid.

    Source: section 3.3 of the paper; the released code's ``LPI``.
    """

    def __init__(self, embed_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(embed_dim, embed_dim, kernel_size, padding=padding, groups=embed_dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(embed_dim)
        self.conv2 = nn.Conv2d(embed_dim, embed_dim, kernel_size, padding=padding, groups=embed_dim)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], height: int, width: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """Convolve the (height, width) grid of tokens."""
        # The tokens' own layout is a channels-last image: no copy here, nor on the way back.
        x = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return _to_tokens(self.conv2(self.bn(self.act(self.conv1(x)))))


class Mlp(nn.Module):
    """The feed-forward network: linear -> GELU -> linear."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Apply the network to every token."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class XCABlock(nn.Module):
    """One XCiT layer: XCA, then LPI, then the feed-forward network, each on a norm and scaled into a residual.

    ``norm3`` belongs to LPI, which comes second, and ``norm2`` to the network, which comes third: the released order
    and names, which the weights need.

    Source: section 3.3 and figure 1 of the paper.
    """

    kernels: Kernels = "plain"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        eta: float,
        attn_form: Form,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = XCA(embed_dim, num_heads, qkv_bias, attn_drop, proj_drop, attn_form)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), proj_drop)
        self.norm3 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.local_mp = LPI(embed_dim)
        self.gamma1 = nn.Parameter(torch.full((embed_dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((embed_dim,), eta))
        self.gamma3 = nn.Parameter(torch.full((embed_dim,), eta))

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], height: int, width: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """Transform the tokens of a (height, width) patch grid."""
        if self.kernels == "triton":
            return kernel_layers.run_block(self, x, height, width)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), height, width))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """Attention with one query, the class token's, over all tokens.

    ``qkv`` holds the query's weights for all tokens, as the released checkpoints do; only the class token's query is
    computed, since no other is used.

    Source: Touvron et al., "Going deeper with image transformers", 2021; section 3.3 of the paper.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.scale = (embed_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch 1 channels"]:
        """Return the new class token; ``x`` holds the class token first, then the patch tokens."""
        attn, v = self._attention(x)
        cls = (self.attn_drop(attn) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(cls))

    def attention(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch heads tokens"]:
        """How much of each token the class token takes, per head; sums to one over the tokens (itself the first)."""
        return self._attention(x)[0].squeeze(2)

    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        C, h = x.shape[2], self.num_heads
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :1], weight[:C], None if bias is None else bias[:C])
        kv = F.linear(x, weight[C:], None if bias is None else bias[C:])
        q = q.unflatten(-1, (h, -1)).transpose(1, 2)  # (B, h, 1, d)
        k, v = kv.unflatten(-1, (2, h, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return attn, v


class ClassAttentionBlock(nn.Module):
    """A layer in which the class token gathers from the patch tokens, with the released models' quirks.

    They are part of what the weights were trained with, and none may be cleaned up:
    1. the patch tokens' share of the attention residual is their norm, x_patch + gamma1 * norm1(x_patch);
    2. ``norm2`` replaces the tokens (all of them, or the class token only where ``tokens_norm`` is False: nano), so
       that the residual after it is the normed one;
    3. only the class token passes through the network, and the patch tokens are then added to themselves.

    Source: facts of the released code's class of this name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        eta: float,
        tokens_norm: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = ClassAttention(embed_dim, num_heads, qkv_bias, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), proj_drop)
        self.gamma1 = nn.Parameter(torch.full((embed_dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((embed_dim,), eta))
        self.tokens_norm = tokens_norm

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Transform the class token (first) and the patch tokens (after it)."""
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat((self.attn(normed), normed[:, 1:]), dim=1)
        # not in place: the released nano could not be trained for that
        x = self.norm2(x) if self.tokens_norm else torch.cat((self.norm2(x[:, :1]), x[:, 1:]), dim=1)
        return x + torch.cat((self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]), dim=1)


def _to_tokens(x: Tensor) -> Tensor:
    """Map (B, C, H, W) to tokens (B, H * W, C), for free where it is channels-last.

    Not ``flatten(2).transpose(1, 2)``: for a single channels-first image that gives its gradient a stride which torch's
    batch norm on the CPU misreads, and every gradient before it comes out wrong, silently (torch 2.15).
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _conv_bn(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_chans)
    )


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if num_heads < 1 or embed_dim % num_heads:
        raise ConfigError(f"num_heads is {num_heads}; it must divide embed_dim, which is {embed_dim}.")
