"""A residual with LayerScale and drop path, and the layer norm that reads it next, in one pass over the tokens.

    x_new  = x + keep * gamma * update
    normed = (x_new - mean) * rstd * weight + bias      mean, rstd: over the channels of one token

Between two layers of an XCiT stand this addition and this norm. As separate operations they read and write the tokens
about seven times; in one kernel x and update are read, x_new and normed written, once each.

Legend: B batch, N tokens, C channels.

Source: section 3.3 of the paper (LayerScale, pre-norm); Touvron et al. 2021, "Going deeper with image transformers".
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError, ShapeError
from xcit.ops.kernels import KERNELS, Kernels, use_triton

Want = Literal["normed", "statistics", "none"]
WANTS: tuple[str, ...] = get_args(Want)


def residual_norm(
    x: Float[Tensor, "batch tokens channels"],
    update: Float[Tensor, "batch tokens channels"],
    gamma: Float[Tensor, " channels"] | None,
    norm_weight: Float[Tensor, " channels"] | None,
    norm_bias: Float[Tensor, " channels"] | None,
    eps: float,
    *,
    keep: Float[Tensor, " batch"] | None = None,
    want: Want = "normed",
    normed_dtype: torch.dtype | None = None,
    kernels: Kernels = "plain",
) -> tuple[Tensor, Tensor | None]:
    """Return ``x + keep * gamma * update`` and its layer norm.

    Args:
        x: the residual stream.
        update: what a layer adds to it.
        gamma: LayerScale; None is 1, as in a folded model.
        norm_weight: scale of the norm that follows; None is 1.
        norm_bias: its shift; None is 0.
        eps: added to the variance, more than 0.
        keep: drop path's factor of each image, 0 or 1 / (survival probability). It gets no gradient.
        want: what comes back beside x_new. "normed": the layer norm. "statistics": each token's mean and rstd, for a
            kernel that norms while it reads. "none": nothing, behind the last layer.
        normed_dtype: of the normed tokens. None is autocast's under autocast, for what reads them casts them to it,
            and otherwise that of x_new.
        kernels: "plain", or "triton" on a CUDA device.

    Returns:
        x_new (B, N, C), whose dtype is what PyTorch makes of x, gamma and update (not of keep), and one of: normed
        (B, N, C); statistics (B, N, 2), mean and rstd = 1 / sqrt(variance + eps) of x_new as it is stored, in float32
        (float64 for float64 tokens), which can be differentiated as well; None.

    Raises:
        ShapeError: shapes that do not fit.
        ConfigError: an unknown ``want`` or ``kernels``; a normed_dtype where no normed tokens are wanted; a keep that
            requires a gradient; a dtype or a width that the kernel does not know.
        BackendError: kernels is "triton", and it cannot run here.

    Cost: of the kernel, with bytes a value s of x, u of update, r of x_new and n of normed: B N C (s + u + r + n) bytes
        forward, and 8 B N for statistics. Backward, g_r and g_n being the gradients' own: B N C (g_r + g_n + r + 2 u +
        s), all read or written once. It keeps x_new, 8 bytes a token, and update if there is a gamma.
    """
    _check(x, update, gamma, norm_weight, norm_bias, eps, keep, want, normed_dtype, kernels)
    dtype = torch.promote_types(x.dtype, update.dtype)
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    if normed_dtype is None:
        autocast = torch.is_autocast_enabled(x.device.type)
        normed_dtype = torch.get_autocast_dtype(x.device.type) if autocast else dtype
    if kernels == "plain":
        return residual_norm_plain(x, update, gamma, norm_weight, norm_bias, eps, keep, want, dtype, normed_dtype)

    given = [t for t in (x, update, gamma, norm_weight, norm_bias, keep) if t is not None]
    use_triton("residual_norm", *given, x.new_empty(0, dtype=normed_dtype))
    from xcit.ops.residual_norm_triton import MAX_CHANNELS, residual_norm_op

    if x.shape[2] > MAX_CHANNELS:
        raise ConfigError(
            f"The kernel 'residual_norm' takes up to {MAX_CHANNELS} channels; got {x.shape[2]}. "
            f'Use kernels="plain" here.'
        )
    x_new, normed, statistics = residual_norm_op(
        x, update, gamma, norm_weight, norm_bias, keep, eps, want, dtype, normed_dtype
    )
    return x_new, {"normed": normed, "statistics": statistics, "none": None}[want]


def residual_norm_plain(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    want: Want,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The definition, line by line; the arguments are those of ``residual_norm``, with the dtypes settled."""
    added = update if gamma is None else gamma * update
    if keep is not None:
        added = keep.view(-1, 1, 1) * added  # whose factor may be float32 beside bfloat16 tokens
    x_new = (x + added).to(dtype)
    if want == "none":
        return x_new, None
    if want == "statistics":
        wide = x_new.to(torch.promote_types(dtype, torch.float32))
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).square().mean(-1, keepdim=True)
        return x_new, torch.cat((mean, (variance + eps).rsqrt()), dim=-1)
    for part in (norm_weight, norm_bias):
        dtype = dtype if part is None else torch.promote_types(dtype, part.dtype)
    weight, bias = (None if part is None else part.to(dtype) for part in (norm_weight, norm_bias))
    return x_new, F.layer_norm(x_new.to(dtype), x.shape[-1:], weight, bias, eps).to(normed_dtype)


def _check(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    want: str,
    normed_dtype: torch.dtype | None,
    kernels: str,
) -> None:
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}; it must be one of {', '.join(KERNELS)}.")
    if want not in WANTS:
        raise ConfigError(f"want is {want!r}; it must be one of {', '.join(WANTS)}.")
    if want != "normed" and normed_dtype is not None:
        raise ConfigError(f"normed_dtype is {normed_dtype}, but want is {want!r}: no normed tokens come back.")
    if want != "normed" and not (norm_weight is None and norm_bias is None):
        raise ConfigError(f"A norm's scale or shift is given, but want is {want!r}: what comes back has neither.")
    if eps <= 0:
        raise ConfigError(f"eps is {eps}; it must be more than 0.")
    if x.ndim != 3 or update.shape != x.shape:
        raise ShapeError(
            f"The residual stream and what is added to it must both be (batch, tokens, channels); got "
            f"{tuple(x.shape)} and {tuple(update.shape)}."
        )
    for name, part, size in (
        ("gamma", gamma, x.shape[2]),
        ("norm_weight", norm_weight, x.shape[2]),
        ("norm_bias", norm_bias, x.shape[2]),
        ("keep", keep, x.shape[0]),
    ):
        if part is not None and part.shape != (size,):
            raise ShapeError(f"{name} must be ({size},) for tokens {tuple(x.shape)}; got {tuple(part.shape)}.")
    if keep is not None and keep.requires_grad:
        raise ConfigError("keep requires a gradient; it is drop path's mask and gets none. Detach it.")
