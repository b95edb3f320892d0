"""The tokens' layer norm, mean and centred second moment at once: all that XCA's covariance form asks of them.

Legend: B batch, N tokens, C channels.

One image's tokens x (N, C), not normed yet, and their layer norm without scale and shift (which the weights take up:
W' = W diag(gamma), b' = b + W beta)

    y_n = (x_n - m_n) r_n        m_n = mean over the channels, r_n = 1 / sqrt(variance over them + eps)
    mu  = mean_n y_n             (C)
    S   = sum_n (y_n - mu)(y_n - mu)^T    (C, C), symmetric

Gradients, given d_mu and d_S: dy_n = (d_S + d_S^T)(y_n - mu) + d_mu / N, then those of the layer norm. (The centring
adds nothing: what it would subtract is that sum over all tokens, and centred tokens sum to zero.)

Source: section 3.2 of the paper for XCA; ``xcit.ops.xca.xca_covariance`` for the form.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError
from xcit.ops.kernels import KERNELS, Kernels, use_triton
from xcit.ops.second_moment import second_moment

MAX_CHANNELS = 1024
"""The kernels hold whole tokens in registers."""


def norm_moments(
    x: Float[Tensor, "batch tokens channels"], eps: float = 1e-6, *, kernels: Kernels = "plain"
) -> tuple[
    Float[Tensor, "batch channels"], Float[Tensor, "batch channels channels"], Float[Tensor, "batch tokens two"]
]:
    """Layer-norm tokens, without storing that, and return the normed tokens' mean and centred second moment.

    The centred tokens are multiplied in the dtype of x, or in autocast's, and summed in float32; all else is float32.

    Args:
        x: tokens before the norm. The kernel reads any strides of the batch and the tokens; channels that are not
            contiguous are copied first.
        eps: added to each token's variance.
        kernels: "plain", or "triton": three launches at most, deterministic (its order of summation follows from the
            sizes and the device), at most 1024 channels, first derivatives only, no forward-mode ones.

    Returns:
        mean (B, C), second moment (B, C, C), not divided by N, and statistics (B, N, 2): m_n and r_n of every token.
        float32; float64 for float64 tokens. The statistics carry no gradient.

    Raises:
        BackendError, ConfigError: "triton", where it cannot run (``use_triton``) or with more channels.

    Cost: N C^2 / 2 multiply-adds an image and its backward pass N C^2. The kernel's least traffic, with s bytes an
        element of x: 2 B N C s + 16 B N + 4 B C^2 forward (x is read twice), 2 B N C s + 8 B N + 8 B C^2 backward.
    """
    _check_kernels(kernels)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if kernels == "plain":
        return _plain_norm_moments(x, eps, dtype)
    _check_channels("norm_moments", x)
    use_triton("norm_moments", x)
    return torch.ops.xcit.norm_moments(x, eps, dtype)


def _plain_norm_moments(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.to(torch.promote_types(x.dtype, torch.float32))
    token_mean = tokens.mean(-1, keepdim=True)
    offsets = tokens - token_mean
    rstd = (offsets.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = offsets * rstd
    mean = normed.mean(1)
    centred = (normed - mean.unsqueeze(1)).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        second = second_moment(centred)
    return mean, second, torch.cat((token_mean, rstd), -1).detach()


def _check_kernels(kernels: str) -> None:
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}; there are {', '.join(KERNELS)}.")


def _check_channels(name: str, x: Tensor) -> None:
    if x.shape[2] > MAX_CHANNELS:
        raise ConfigError(
            f"The kernel {name!r} takes tokens of at most {MAX_CHANNELS} channels; got {x.shape[2]}. "
            f'Use kernels="plain" for wider ones.'
        )


# --- the kernels as operations that torch knows: shapes without values, and derivatives -----------------------------


@torch.library.custom_op("xcit::norm_moments", mutates_args=())
def _norm_moments(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    from xcit.ops import moments_triton

    return moments_triton.norm_moments(x, eps, dtype)


@_norm_moments.register_fake
def _(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    wide = torch.float32
    return x.new_empty(B, C, dtype=wide), x.new_empty(B, C, C, dtype=wide), x.new_empty(B, N, 2, dtype=wide)


@torch.library.custom_op("xcit::norm_moments_backward", mutates_args=())
def _norm_moments_backward(
    x: Tensor, stats: Tensor, mean: Tensor, d_mean: Tensor, d_second: Tensor, dtype: torch.dtype
) -> Tensor:
    from xcit.ops import moments_triton

    return moments_triton.norm_moments_backward(x, stats, mean, d_mean, d_second, dtype)


@_norm_moments_backward.register_fake
def _(x: Tensor, stats: Tensor, mean: Tensor, d_mean: Tensor, d_second: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape)


def _save_norm_moments(ctx: Any, inputs: tuple[Tensor, float, torch.dtype], output: tuple[Tensor, ...]) -> None:
    x, _, ctx.dtype = inputs
    mean, _, stats = output
    ctx.save_for_backward(x, stats, mean)
    ctx.mark_non_differentiable(stats)


def _differentiate_norm_moments(
    ctx: Any, d_mean: Tensor, d_second: Tensor, _d_stats: Tensor
) -> tuple[Tensor, None, None]:
    return _norm_moments_backward(*ctx.saved_tensors, d_mean, d_second, ctx.dtype), None, None


_norm_moments.register_autograd(_differentiate_norm_moments, setup_context=_save_norm_moments)
