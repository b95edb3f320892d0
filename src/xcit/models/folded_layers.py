"""The modules of a folded XCiT, each made of the module whose function it computes. Inference only.

Norms are without affine: their scale and shift, LayerScale and batch norm have gone into the weights beside them, by
products in float64 that are rounded once.

Legend: B batch, N tokens = Hp * Wp, C embed_dim, h num_heads, d head_dim. A norm gives g * n + beta, n without affine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.modules.batchnorm import _BatchNorm

from xcit.errors import ConfigError
from xcit.models import kernel_layers
from xcit.models.folded_inplace import attend_in_place, can_run_in_place, carry_bias, overwrite_patches, run_in_place
from xcit.models.folded_xca import FoldedXCA
from xcit.models.layers import LPI, XCA, ClassAttention, ClassAttentionBlock, Mlp, PositionalEncodingFourier, XCABlock
from xcit.models.variants import BlockWithoutLPI, XCAWithoutTemperature
from xcit.ops.kernels import Kernels
from xcit.ops.position import fourier_position
from xcit.ops.xca import XCAWeights
from xcit.ops.xca_form import Form


class InferenceModule(nn.Module):
    """A module without a training mode."""

    def train(self, mode: bool = True) -> InferenceModule:
        """Refuse training mode.

        Raises:
            ConfigError: ``mode`` is True.
        """
        if mode:
            raise ConfigError("A folded model is for inference alone; train the model that it was folded from.")
        super().train(False)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse what is for training.

        Raises:
            ConfigError: ``enable`` is True.
        """
        if enable:
            raise ConfigError("A folded model keeps nothing for a backward pass; there is nothing to recompute.")


class FoldedDepthwise(nn.Module):
    """A depthwise 3x3 convolution of an affine map of its input, ``conv(s * x + t)``, with zeros around ``s * x + t``.

    The scale goes into the weights. The shift's share is one constant a channel where all nine taps fall inside, and
    less at the border. There are two exact ways, one for each kind of execution:

    * ``forward``: the constant is in the bias, and the two outer rows, columns and the corners are corrected in place
      (inclusion and exclusion). Of the map nothing but its border is touched.
    * ``of_shifted``, for graphs, where writing into slices would copy the whole map: the caller adds ``shift`` = t / s
      to x, which runtimes fuse into the operation before.

    Args:
        conv: 3 x 3, stride 1, one channel a group.
        scale: s (C,), float64.
        shift: t (C,), float64.
        gain: factor of the output (C,), float64.
    """

    def __init__(self, conv: nn.Conv2d, scale: Tensor, shift: Tensor, gain: Tensor | None = None) -> None:
        super().__init__()
        taps, like = _exact(conv.weight).squeeze(1), conv.weight  # (C, 3, 3)
        bias = _exact_bias(conv)
        if gain is not None:
            taps, bias = taps * gain.view(-1, 1, 1), bias * gain
        # t / s where s is almost nothing beside t: an s below the rounding of t changes no result.
        floor = shift.abs() * torch.finfo(like.dtype).eps / 8
        scale = torch.where(scale.abs() < floor, floor, scale)
        self.weight = _rounded((taps * scale.view(-1, 1, 1)).unsqueeze(1), like)
        self.shift = _rounded(torch.where(scale == 0, 0.0, shift / scale), like)
        self.bias = _rounded(bias, like)
        constant = taps * shift.view(-1, 1, 1)
        self.inner_bias = _rounded(bias + constant.sum((1, 2)), like)
        ends = constant[:, ::2]
        self.rows = _rounded(-ends.sum(2).T.unsqueeze(1), like)  # (2, 1, C): the top row's, the bottom row's
        self.columns = _rounded(-constant[:, :, ::2].sum(1).T, like)  # (2, C): left, right
        self.corners = _rounded(ends[:, :, ::2].permute(1, 2, 0), like)  # (2, 2, C)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return ``conv(s * x + t)``."""
        y = F.conv2d(x, self.weight, self.inner_bias, padding=1, groups=x.shape[1])
        H, W = y.shape[2:]
        rows: Tensor = self.rows
        columns: Tensor = self.columns
        corners: Tensor = self.corners
        if H == 1:  # both outer rows are the same
            rows, corners = rows.sum(0, keepdim=True), corners.sum(0, keepdim=True)
        if W == 1:
            columns, corners = columns.sum(0, keepdim=True), corners.sum(1, keepdim=True)
        grid = y.permute(0, 2, 3, 1)
        grid[:, :: max(H - 1, 1)] += rows
        grid[:, :, :: max(W - 1, 1)] += columns
        grid[:, :: max(H - 1, 1), :: max(W - 1, 1)] += corners
        return y

    def of_shifted(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return ``conv(s * (x - t / s) + t)``: that of an x to which ``shift`` was added."""
        return F.conv2d(x, self.weight, self.bias, padding=1, groups=x.shape[1])


class FoldedLPI(nn.Module):
    """``gamma3 * local_mp(norm3(x))``.

    Raises:
        ConfigError: another kernel than 3 x 3.
    """

    def __init__(self, norm: nn.LayerNorm, lpi: LPI, gamma: Tensor) -> None:
        super().__init__()
        for conv in (lpi.conv1, lpi.conv2):
            if conv.kernel_size != (3, 3) or conv.groups != conv.in_channels:
                raise ConfigError(
                    f"An LPI convolution is {conv}; folding knows those of 3 x 3 with one channel a group."
                )
        self.norm = without_affine(norm)
        self.conv1 = FoldedDepthwise(lpi.conv1, *_affine(norm))
        self.act = copy.deepcopy(lpi.act)
        self.conv2 = FoldedDepthwise(lpi.conv2, *batch_norm_affine(lpi.bn), gain=_exact(gamma))

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], height: int, width: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return what is added to the tokens of the (height, width) grid."""
        if torch.compiler.is_compiling():
            # As the norm's bias the first shift costs nothing.
            y = F.layer_norm(x, self.norm.normalized_shape, None, self.conv1.shift, self.norm.eps)
            y = self.act(self.conv1.of_shifted(_to_grid(y, height, width)))
            y = self.conv2.of_shifted(y + self.conv2.shift.view(-1, 1, 1))
        else:
            y = self.conv2(self.act(self.conv1(_to_grid(self.norm(x), height, width))))
        return y.permute(0, 2, 3, 1).flatten(1, 2)


class FoldedBlock(nn.Module):
    """One XCiT layer. ``block`` is an ``XCABlock``, or the variant without LPI."""

    kernels: Kernels = "plain"

    def __init__(self, block: XCABlock | BlockWithoutLPI, form: Form, small_terms: torch.dtype) -> None:
        super().__init__()
        self.norm1 = without_affine(block.norm1)
        self.attn = FoldedXCA(_xca_weights(block.norm1, block.attn, block.gamma1), form, small_terms)
        self.local_mp = None
        if isinstance(block, XCABlock):
            self.local_mp = FoldedLPI(block.norm3, block.local_mp, block.gamma3)
        self.norm2 = without_affine(block.norm2)
        self.mlp = _folded_mlp(block.mlp, block.norm2, block.gamma2)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], height: int, width: int, *, overwrite: bool = False
    ) -> Float[Tensor, "batch tokens channels"]:
        """Transform the tokens of a (height, width) patch grid.

        Args:
            x: tokens.
            height: of the grid, in patches.
            width: likewise.
            overwrite: whether x may be overwritten with the result, which saves memory and time where that is possible
                (``xcit.models.folded_inplace``).
        """
        if self.kernels == "triton":
            return kernel_layers.run_folded_block(self, x, height, width)
        if overwrite and can_run_in_place(x):
            run_in_place(self, x, height, width)
            return x
        x = x + self.attn(self.norm1(x))
        if self.local_mp is not None:
            x = x + self.local_mp(x, height, width)
        return x + self.mlp(self.norm2(x))


class FoldedClassAttention(nn.Module):
    """``gamma1 * attn(norm1(x))``, without ever making keys or values of the tokens.

    With one query q a head, its scores are q^T (W_k n + b_k) = (W_k^T q)^T n + q^T b_k, whose last term is the same for
    all tokens and leaves the softmax as it is; and sum_n a_n (W_v n + b_v) = W_v (sum_n a_n n) + b_v, as the a_n sum to
    one. So all that passes over the tokens is 2 N C h multiply-adds, where keys and values take 2 N C^2.
    """

    def __init__(self, norm: nn.LayerNorm, attn: ClassAttention, gamma: Tensor) -> None:
        super().__init__()
        C, h = attn.proj.in_features, attn.num_heads
        weight, bias = _after_norm(attn.qkv, norm)
        self.query = _linear(weight[:C] * attn.scale, bias[:C] * attn.scale, attn.qkv.weight)
        self.key_weight = _rounded(weight[C : 2 * C].unflatten(0, (h, -1)), attn.qkv.weight)  # (h, d, C)
        self.value_weight = _rounded(weight[2 * C :].unflatten(0, (h, -1)), attn.qkv.weight)
        self.value_bias = _rounded(bias[2 * C :], attn.qkv.weight)
        self.proj = _scaled(attn.proj, gamma)

    def forward(
        self, cls: Float[Tensor, "batch 1 channels"], patches: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch 1 channels"]:
        """Return what is added to the class token, of the class token and the patch tokens, normed without affine."""
        direction = self.direction(cls)
        scores = torch.cat((direction @ cls.transpose(1, 2), direction @ patches.transpose(1, 2)), dim=-1)
        attn = scores.softmax(dim=-1)  # (B, h, 1 + N)
        return self.of_mean(attn[..., :1] @ cls + attn[..., 1:] @ patches)

    def direction(self, cls: Float[Tensor, "batch 1 channels"]) -> Float[Tensor, "batch heads channels"]:
        """Return what each head's scores are products of the normed tokens with, but for a term common to all."""
        q = self.query(cls).unflatten(-1, (self.key_weight.shape[0], -1)).transpose(1, 2)  # (B, h, 1, d)
        return (q @ self.key_weight).squeeze(2)

    def of_mean(self, mean: Float[Tensor, "batch heads channels"]) -> Float[Tensor, "batch 1 channels"]:
        """Return what is added to the class token, of the normed tokens' mean as each head weighs them."""
        value = (self.value_weight @ mean.unsqueeze(-1)).flatten(1) + self.value_bias  # (B, C)
        return self.proj(value).unsqueeze(1)


class FoldedClassBlock(nn.Module):
    """A class-attention layer with the released models' quirks, the class token and the patch tokens held apart.

    Of the patch tokens, an XCiT that reads its class token needs nothing of the last layer but their norm.
    """

    kernels: Kernels = "plain"

    def __init__(self, block: ClassAttentionBlock) -> None:
        super().__init__()
        self.norm1 = without_affine(block.norm1)
        self.attn = FoldedClassAttention(block.norm1, block.attn, block.gamma1)
        # norm2's affine stands in the residual stream and so stays, doubled for the patch tokens.
        self.tokens_norm = block.tokens_norm
        self.eps = block.norm2.eps
        scale, shift = _affine(block.norm2)
        like = block.gamma1
        self.scale2, self.shift2 = _rounded(scale, like), _rounded(shift, like)
        if self.tokens_norm:
            self.patch_scale2, self.patch_shift2 = _rounded(2 * scale, like), _rounded(2 * shift, like)
        self.mlp = _folded_mlp(block.mlp, None, block.gamma2)
        # x_patch + gamma1 * norm1(x_patch), which is then doubled where norm2 leaves the patch tokens out
        gamma = _exact(block.gamma1) * (1 if self.tokens_norm else 2)
        scale, shift = _affine(block.norm1)
        self.patch_scale, self.patch_shift = _rounded(gamma * scale, like), _rounded(gamma * shift, like)

    def forward(
        self,
        cls: Float[Tensor, "batch 1 channels"],
        patches: Float[Tensor, "batch tokens channels"],
        *,
        overwrite: bool = False,
    ) -> tuple[Float[Tensor, "batch 1 channels"], Float[Tensor, "batch tokens channels"]]:
        """Return the class token and the patch tokens after the layer; the latter may be in the old ones' place."""
        if overwrite and can_run_in_place(patches):
            return attend_in_place(self, cls, patches, overwrite=True), patches
        normed = self.norm1(patches)
        return self.class_token_of_normed(cls, normed), self._patches(patches, normed)

    def class_token(
        self, cls: Float[Tensor, "batch 1 channels"], patches: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch 1 channels"]:
        """Return the class token alone."""
        if self.kernels == "triton":
            own = self.norm1(cls)
            mean = kernel_layers.folded_class_mean(self, self.attn.direction(own), own, patches)
            return self.class_token_of_mean(cls, mean)
        if can_run_in_place(patches):
            return attend_in_place(self, cls, patches, overwrite=False)
        return self.class_token_of_normed(cls, self.norm1(patches))

    def patch_tokens(
        self, patches: Float[Tensor, "batch tokens channels"], *, overwrite: bool = False
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the patch tokens alone, to which class attention contributes nothing; ``overwrite`` as forward's."""
        if overwrite and can_run_in_place(patches):
            overwrite_patches(self, patches)
            return patches
        return self._patches(patches, self.norm1(patches))

    def overwrite(self, patches: Tensor, normed: Tensor) -> None:
        """Put patch tokens (..., C) after the layer in their place, given what they are after its first norm."""
        if not self.tokens_norm:
            patches.mul_(2)
        patches.add_(self.patch_shift).addcmul_(normed, self.patch_scale)
        if self.tokens_norm:
            patches.copy_(F.layer_norm(patches, patches.shape[-1:], self.patch_scale2, self.patch_shift2, self.eps))

    def class_token_of_mean(
        self, cls: Float[Tensor, "batch 1 channels"], mean: Float[Tensor, "batch heads channels"]
    ) -> Float[Tensor, "batch 1 channels"]:
        """Return the class token alone, of the mean of ``FoldedClassAttention.of_mean``."""
        return self._after_attention(cls + self.attn.of_mean(mean))

    def class_token_of_normed(
        self, cls: Float[Tensor, "batch 1 channels"], normed: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch 1 channels"]:
        """Return the class token alone, of the patch tokens after the layer's first norm."""
        return self._after_attention(cls + self.attn(self.norm1(cls), normed))

    def _after_attention(self, cls: Tensor) -> Tensor:
        cls = F.layer_norm(cls, cls.shape[-1:], self.scale2, self.shift2, self.eps)
        return cls + self.mlp(cls)

    def _patches(self, patches: Tensor, normed: Tensor) -> Tensor:
        if not self.tokens_norm:
            return torch.addcmul(2 * patches + self.patch_shift, normed, self.patch_scale)
        patches = torch.addcmul(patches + self.patch_shift, normed, self.patch_scale)
        return F.layer_norm(patches, patches.shape[-1:], self.patch_scale2, self.patch_shift2, self.eps)


class FoldedPosition(nn.Module):
    """The positional encoding: a table for each of the grids named, computed for the others.

    A patch's encoding is a function of its row plus one of its column, so that of a whole grid takes products for its
    Hp rows and Wp columns only, not for its Hp * Wp patches.

    Args:
        embeder: the encoding.
        grids: (Hp, Wp) of those that get a table.
    """

    def __init__(self, embeder: PositionalEncodingFourier, grids: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.hidden_dim = embeder.hidden_dim
        conv = embeder.token_projection
        weight = _exact(conv.weight).flatten(1)  # (C, 2 * hidden_dim)
        self.weight = _rounded(weight, conv.weight)
        self.bias = _rounded(_exact_bias(conv), conv.weight)
        self.grids = tuple(grids)
        for height, width in self.grids:
            features = fourier_position(height, width, hidden_dim=self.hidden_dim).flatten(0, 1)
            table = F.linear(features.to(weight), weight, _exact_bias(conv))
            setattr(self, _table_name(height, width), _rounded(table.unsqueeze(0), conv.weight))

    def forward(self, height: int, width: int) -> Float[Tensor, "1 tokens channels"]:
        """Return the encoding of a (height, width) patch grid, one row a token."""
        for grid in self.grids:
            # where a size is symbolic, without a guard on it
            if statically_known_true(height == grid[0]) and statically_known_true(width == grid[1]):
                table: Tensor = getattr(self, _table_name(*grid))
                return table
        rows, columns = self.parts(height, width)
        return (rows.unsqueeze(1) + columns).flatten(0, 1).unsqueeze(0)

    def parts(
        self, height: int, width: int
    ) -> tuple[Float[Tensor, "height channels"], Float[Tensor, "width channels"]]:
        """Return what a patch's row and its column contribute; the encoding is their sum."""
        D, device = self.hidden_dim, self.weight.device
        rows = fourier_position(height, 1, hidden_dim=D, device=device)[:, 0, :D].to(self.weight.dtype)
        columns = fourier_position(1, width, hidden_dim=D, device=device)[0, :, D:].to(self.weight.dtype)
        return F.linear(rows, self.weight[:, :D]), F.linear(columns, self.weight[:, D:], self.bias)


def conv_with_batch_norm(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """Return one convolution that computes ``norm(conv(x))`` with the norm's running statistics."""
    scale, shift = batch_norm_affine(norm)
    folded = copy.deepcopy(conv)
    folded.weight = _rounded(_exact(conv.weight) * scale.view(-1, 1, 1, 1), conv.weight)
    folded.bias = _rounded(_exact_bias(conv) * scale + shift, conv.weight)
    return folded


def transposed_conv_with_batch_norm(conv: nn.ConvTranspose2d, norm: _BatchNorm) -> nn.ConvTranspose2d:
    """Return one transposed convolution (of one group) that computes ``norm(conv(x))``."""
    scale, shift = batch_norm_affine(norm)
    folded = copy.deepcopy(conv)
    folded.weight = _rounded(_exact(conv.weight) * scale.view(1, -1, 1, 1), conv.weight)
    folded.bias = _rounded(_exact_bias(conv) * scale + shift, conv.weight)
    return folded


def linear_after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> nn.Linear:
    """Return a linear layer that computes of n, the norm without affine, what ``linear`` does of the whole norm."""
    return _linear(*_after_norm(linear, norm), linear.weight)


def without_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    """Return a norm that leaves out the scale and the shift."""
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift, in float64, that batch norm with running statistics is.

    Raises:
        ConfigError: it keeps none.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError(
            "A batch norm keeps no running statistics, so it is not the same for every batch; no folding."
        )
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -_exact(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _exact(norm.bias)


def _xca_weights(norm: nn.LayerNorm, attn: XCA, gamma: Tensor) -> XCAWeights:
    weight, bias = _after_norm(attn.qkv, norm)
    proj = _scaled(attn.proj, gamma)
    like = attn.qkv.weight
    ones = like.new_ones(attn.num_heads, 1, 1)
    temperature = ones if isinstance(attn, XCAWithoutTemperature) else attn.temperature.detach().clone()
    return XCAWeights(_rounded(weight, like), _rounded(bias, like), proj.weight, proj.bias, temperature)


def _folded_mlp(mlp: Mlp, norm: nn.LayerNorm | None, gamma: Tensor) -> nn.Sequential:
    if norm is None:
        first = _scaled(mlp.fc1, None)
    else:
        weight, bias = _after_norm(mlp.fc1, norm)
        first = _linear(carry_bias(weight, bias), bias, mlp.fc1.weight)
    return nn.Sequential(first, copy.deepcopy(mlp.act), _scaled(mlp.fc2, gamma))


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    scale, shift = _affine(norm)
    weight = _exact(linear.weight)
    return weight * scale, _exact_bias(linear) + weight @ shift


def _scaled(linear: nn.Linear, gamma: Tensor | None) -> nn.Linear:
    weight, bias = _exact(linear.weight), _exact_bias(linear)
    if gamma is not None:
        weight, bias = weight * _exact(gamma).unsqueeze(1), bias * _exact(gamma)
    return _linear(weight, bias, linear.weight)


def _linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = _rounded(weight, like), _rounded(bias, like)
    return layer


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    scale = torch.ones(norm.normalized_shape, dtype=torch.float64) if norm.weight is None else _exact(norm.weight)
    return scale, torch.zeros_like(scale) if norm.bias is None else _exact(norm.bias)


def _exact_bias(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return torch.zeros(channels, dtype=torch.float64) if layer.bias is None else _exact(layer.bias)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)  # not every device has float64


def _rounded(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.dtype).to(like.device).contiguous(), requires_grad=False)


def _to_grid(x: Tensor, height: int, width: int) -> Tensor:
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _table_name(height: int, width: int) -> str:
    return f"table_{height}x{width}"
