"""XCA in two passes over the tokens, for inference: what it must know of them, and what it does to each.

The covariance form (``xcit.ops.xca.xca_covariance``) needs the tokens' number, mean and centred second moment. They can
be gathered from parts of an image, in any order and in several places, and are then merged; out of them follows one
linear map, the same for every token.

Legend: B batch, N tokens, C channels, h heads, d = C / h head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from xcit.ops.xca import XCAWeights, attention_of_moments


class Moments(NamedTuple):
    """What XCA needs to know of tokens."""

    num_tokens: int
    """N."""
    mean: Float[Tensor, "batch channels"]
    """Of each channel."""
    second: Float[Tensor, "batch channels channels"]
    """The sum over the tokens of (x - mean)(x - mean)^T."""


class ChannelMap(NamedTuple):
    """XCA of known moments: x -> x W^T + b, for every token x alike."""

    weight: Float[Tensor, "batch channels channels"]
    bias: Float[Tensor, "batch channels"]


def moments_of(
    x: Float[Tensor, "batch tokens channels"], dtype: torch.dtype = torch.float64, *, overwrite: bool = False
) -> Moments:
    """Return the moments of tokens.

    Args:
        x: layer-normed tokens. Their products are made in float32 at least.
        dtype: in which the moments come; float64 where many are to be merged.
        overwrite: x may be lost: no second tensor of its size is made for it, if it is of float32 or wider.

    Cost: 3/4 N C^2 multiply-adds.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean(dim=1, dtype=wide)
    mean_of_each = mean.unsqueeze(1)
    centered = x.sub_(mean_of_each) if overwrite and x.dtype == wide else x - mean_of_each  # in the wide type
    return Moments(x.shape[1], mean.to(dtype), _gram(centered).to(dtype))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of the tokens of both.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    count = a.num_tokens + b.num_tokens
    step = b.mean - a.mean
    between = a.num_tokens * b.num_tokens / count
    second = torch.addcmul(a.second + b.second, step.unsqueeze(2), step.unsqueeze(1), value=between)
    return Moments(count, a.mean + (b.num_tokens / count) * step, second)


def channel_map(moments: Moments, weights: XCAWeights, *, small_terms: torch.dtype = torch.float64) -> ChannelMap:
    """Return the map that XCA is for tokens of these moments: weight P blockdiag(A) W_v, bias P blockdiag(A) b_v + p.

    Args:
        moments: of all tokens.
        weights: the layer's parameters, whose dtype the map has.
        small_terms: precision of the offsets, the norms and A. The products of C^3 multiply-adds are made in float32
            at least.

    Cost: 3 C^3 + 2 C^2 d multiply-adds an image.
    """
    dtype = weights.qkv_weight.dtype
    C, h = moments.mean.shape[1], weights.temperature.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    small = torch.promote_types(wide, small_terms)
    attn = attention_of_moments(moments.num_tokens, moments.mean.to(small), moments.second.to(wide), weights).to(wide)
    proj_attn = weights.proj_weight.to(wide).unflatten(1, (h, -1)).transpose(0, 1) @ attn  # (B, h, C, d)
    proj_attn = proj_attn.transpose(1, 2).flatten(2)  # (B, C, C)
    weight = proj_attn @ weights.qkv_weight[2 * C :].to(wide)
    bias = weight.new_zeros(weight.shape[:2])
    if weights.qkv_bias is not None:
        bias = proj_attn @ weights.qkv_bias[2 * C :].to(wide)
    if weights.proj_bias is not None:
        bias = bias + weights.proj_bias
    return ChannelMap(weight.to(dtype), bias.to(dtype))


def _gram(x: Tensor) -> Tensor:
    """Return X^T X, of whose four quarters one is another's transpose."""
    half = x.shape[2] // 2
    left, right = x[..., :half], x[..., half:]
    gram = x.new_empty(x.shape[0], x.shape[2], x.shape[2])
    gram[:, :half] = left.transpose(1, 2) @ x
    gram[:, half:, half:] = right.transpose(1, 2) @ right
    gram[:, half:, :half] = gram[:, :half, half:].transpose(1, 2)
    return gram
