"""Local patch interaction (LPI) with its norm, LayerScale and residual, on tokens in their own layout.

Legend: B batch, N tokens = Hp * Wp, C channels.

The tokens x (B, N, C) are the (Hp, Wp) patch grid, row by row. With depthwise 3 x 3 convolutions, zeros around both
their inputs:

    y = x + keep * gamma * conv2(bn(gelu(conv1(layer_norm(x)))))

``lpi_residual`` is that at inference, batch norm being a factor and a shift; ``lpi_residual_training`` takes the
batch's statistics, and has a gradient. The plain definitions below are the meaning. The kernels
(``kernels="triton"``) read the tokens where they lie and keep everything between in registers, in float32; they follow
one rule for types, under autocast too: tokens are read in their own type, all arithmetic is float32, the result is
written in the tokens' type. So nothing is rounded between, which the plain version under autocast does five times.

Source: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021, section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError, ShapeError, UnknownNameError
from xcit.ops.kernels import KERNELS, Kernels, use_triton


class LPIWeights(NamedTuple):
    """The parameters of one LPI at inference. None stands for a part that is left out, as folding does."""

    norm_weight: Float[Tensor, " channels"] | None
    norm_bias: Float[Tensor, " channels"] | None
    norm_eps: float
    conv1_weight: Float[Tensor, "channels 1 3 3"]
    conv1_bias: Float[Tensor, " channels"] | None
    scale: Float[Tensor, " channels"] | None
    """The factor that batch norm with running statistics is (``batch_norm_affine``), in float32."""
    shift: Float[Tensor, " channels"] | None
    """What it adds, in float32."""
    conv2_weight: Float[Tensor, "channels 1 3 3"]
    conv2_bias: Float[Tensor, " channels"] | None
    gamma: Float[Tensor, " channels"] | None
    """LayerScale."""


class LPITrainingWeights(NamedTuple):
    """The parameters of one LPI in training, where batch norm takes the batch's own statistics."""

    norm_weight: Float[Tensor, " channels"] | None
    norm_bias: Float[Tensor, " channels"] | None
    norm_eps: float
    conv1_weight: Float[Tensor, "channels 1 3 3"]
    conv1_bias: Float[Tensor, " channels"] | None
    bn_weight: Float[Tensor, " channels"] | None
    bn_bias: Float[Tensor, " channels"] | None
    bn_eps: float
    conv2_weight: Float[Tensor, "channels 1 3 3"]
    conv2_bias: Float[Tensor, " channels"] | None
    gamma: Float[Tensor, " channels"] | None


class LPITrained(NamedTuple):
    """What a training step gives: the tokens, and the statistics by which batch norm's running ones move."""

    y: Float[Tensor, "batch tokens channels"]
    batch_mean: Float[Tensor, " channels"]
    """Of gelu(conv1(...)), float32 at least, without gradient."""
    batch_var: Float[Tensor, " channels"]
    """Its unbiased variance, as running statistics take it: ``running_var.lerp_(batch_var, momentum)``."""


def batch_norm_affine(
    running_mean: Float[Tensor, " channels"],
    running_var: Float[Tensor, " channels"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    eps: float,
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Return the factor and the shift that batch norm with running statistics is, in float32 at least.

    They are products in float64 (not on MPS, which has none), rounded once.
    """
    wide = torch.promote_types(running_var.dtype, torch.float32)
    fine = torch.float64 if running_var.device.type != "mps" else wide
    scale = (running_var.to(fine) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(fine)
    shift = -running_mean.to(fine) * scale
    if bias is not None:
        shift = shift + bias.to(fine)
    return scale.to(wide), shift.to(wide)


def token_statistics(
    x: Float[Tensor, "batch tokens channels"], eps: float, *, kernels: Kernels = "plain"
) -> Float[Tensor, "batch tokens 2"]:
    """Return what layer norm needs to know of each token: its mean, and 1 / sqrt(variance + eps).

    Args:
        x: tokens.
        eps: of the norm.
        kernels: "plain" or "triton".

    Returns:
        (B, N, 2), float32 at least. The gradient is not defined: they are an argument of ``lpi_residual``.

    Raises:
        ShapeError: x is not (B, N, C).
        ConfigError, BackendError: the kernel cannot run (``xcit.ops.kernels.use_triton``).

    Cost: reads x; writes 8 B N bytes.
    """
    if x.ndim != 3:
        raise ShapeError(f"Tokens are (batch, tokens, channels); got {tuple(x.shape)}.")
    if _asks_for_triton(kernels):
        use_triton("token_statistics", x)
        _refuse_gradients(x)
        from xcit.ops.lpi_triton import token_statistics as op

        return op(x, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=-1, correction=0)
    return torch.stack((mean, (var + eps).rsqrt()), dim=-1)


def lpi_residual(
    x: Float[Tensor, "batch tokens channels"],
    height: int,
    width: int,
    weights: LPIWeights,
    *,
    statistics: Float[Tensor, "batch tokens 2"] | None = None,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch tokens channels"]:
    """Return x + gamma * conv2(scale * gelu(conv1(layer_norm(x))) + shift), on the (height, width) grid.

    Args:
        x: tokens, of any strides; the kernel copies them only where channels are not contiguous.
        height: Hp, rows of patches.
        width: Wp, patches in a row.
        weights: the parameters.
        statistics: ``token_statistics(x, weights.norm_eps)``, where whatever made x has them already.
        kernels: "plain", the definition, or "triton": one kernel, for inference (a gradient is refused).

    Returns:
        Tokens of x's shape and type.

    Raises:
        ShapeError: x is not (B, height * width, C), or the weights are not those of C channels and 3 x 3 taps.
        ConfigError, BackendError: the kernel cannot run, or was asked for a gradient.

    Source: section 3.3.

    Cost: 18 multiply-adds an element. The kernel reads x twice (once for the statistics, unless they are given) and
    writes y: with s bytes an element, 3 s B N C + 16 B N bytes, or 2 s B N C + 8 B N where the statistics are given.
    """
    _check(x, height, width, weights, statistics)
    if not _asks_for_triton(kernels):
        return _plain(x, height, width, weights, statistics)
    use_triton("lpi", x, *_tensors(weights))
    _refuse_gradients(x, *_tensors(weights))
    from xcit.ops.lpi_triton import lpi_residual as op

    return op(x, height, width, *weights, statistics)


def lpi_residual_training(
    x: Float[Tensor, "batch tokens channels"],
    height: int,
    width: int,
    weights: LPITrainingWeights,
    *,
    keep: Float[Tensor, " batch"] | None = None,
    kernels: Kernels = "plain",
) -> LPITrained:
    """Return x + keep * gamma * conv2(bn(gelu(conv1(layer_norm(x))))), and the batch's statistics.

    No buffer is written: the caller moves batch norm's running statistics. Statistics over several processes
    (SyncBatchNorm) are not in it; who needs them calls the modules one by one.

    Args:
        x: tokens, of any strides.
        height: Hp, rows of patches.
        width: Wp, patches in a row.
        weights: the parameters.
        keep: factor of each image's branch, as stochastic depth draws it: 0, or 1 / (1 - rate). No gradient.
        kernels: "plain", the definition, or "triton".

    Raises:
        ShapeError: as ``lpi_residual``; keep is not (B,); or there is but one value a channel, which has no variance.
        ConfigError, BackendError: the kernel cannot run.

    Source: section 3.3.

    Cost: 18 multiply-adds an element forward and 36 backward, of which the kernels make 27 and 63: what they need again
    they compute again. Of token-sized maps (s B N C bytes) they read x three times and write y forward, keeping x alone
    for the backward pass; that reads seven and writes two, and holds these two beside x and the gradient of y: the
    gradient of conv1's output, and the result. To keep gelu's output rather than compute it twice would write one map
    more forward, read one more, and hold it.
    """
    _check(x, height, width, weights, None)
    if keep is not None and keep.shape != x.shape[:1]:
        raise ShapeError(f"keep is one factor an image, {tuple(x.shape[:1])}; got {tuple(keep.shape)}.")
    count = x.shape[0] * x.shape[1]
    if not torch.compiler.is_exporting() and count == 1:
        raise ShapeError("Batch norm in training needs more than one token in the batch; got one image of one token.")
    if not _asks_for_triton(kernels):
        return _plain_training(x, height, width, weights, keep)
    use_triton("lpi_training", x, *_tensors(weights), *(() if keep is None else (keep,)))
    from xcit.ops.lpi_training_triton import lpi_training as op

    y, moments, _ = op(x, height, width, *weights, keep)
    return LPITrained(y, moments[0], moments[1] * (count / (count - 1)))


def _plain(x: Tensor, height: int, width: int, weights: LPIWeights, statistics: Tensor | None) -> Tensor:
    h = _first_half(x, height, width, weights, statistics)
    z = h
    if weights.scale is not None:
        z = z * weights.scale.view(-1, 1, 1)
    if weights.shift is not None:
        z = z + weights.shift.view(-1, 1, 1)
    return _second_half(x, z.to(h.dtype), weights, None)


def _plain_training(x: Tensor, height: int, width: int, weights: LPITrainingWeights, keep: Tensor | None) -> LPITrained:
    h = _first_half(x, height, width, weights, None)
    # With a momentum of one, the running statistics become the batch's.
    like = h if weights.bn_weight is None else weights.bn_weight
    mean, var = like.new_zeros(x.shape[2]), like.new_ones(x.shape[2])
    z = F.batch_norm(h, mean, var, weights.bn_weight, weights.bn_bias, training=True, momentum=1.0, eps=weights.bn_eps)
    wide = torch.promote_types(like.dtype, torch.float32)
    return LPITrained(_second_half(x, z, weights, keep), mean.to(wide), var.to(wide))


def _first_half(
    x: Tensor, height: int, width: int, weights: LPIWeights | LPITrainingWeights, statistics: Tensor | None
) -> Tensor:
    """Return gelu(conv1(layer_norm(x))), (B, C, height, width)."""
    C = x.shape[2]
    if statistics is None:
        normed = F.layer_norm(x, (C,), weights.norm_weight, weights.norm_bias, weights.norm_eps)
    else:
        mean, rstd = statistics.unsqueeze(-2).unbind(-1)
        normed = (x - mean) * rstd
        if weights.norm_weight is not None:
            normed = normed * weights.norm_weight
        if weights.norm_bias is not None:
            normed = normed + weights.norm_bias
        normed = normed.to(x.dtype)
    grid = normed.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return F.gelu(F.conv2d(grid, weights.conv1_weight, weights.conv1_bias, padding=1, groups=C))


def _second_half(x: Tensor, z: Tensor, weights: LPIWeights | LPITrainingWeights, keep: Tensor | None) -> Tensor:
    """Return x + keep * gamma * conv2(z), in x's type."""
    v = F.conv2d(z, weights.conv2_weight, weights.conv2_bias, padding=1, groups=x.shape[2])
    v = v.permute(0, 2, 3, 1).flatten(1, 2)
    if weights.gamma is not None:
        v = weights.gamma * v
    if keep is not None:
        v = v * keep.view(-1, 1, 1)
    return (x + v).to(x.dtype)


def _check(
    x: Tensor, height: int, width: int, weights: LPIWeights | LPITrainingWeights, statistics: Tensor | None
) -> None:
    if x.ndim != 3:
        raise ShapeError(f"LPI takes tokens (batch, tokens, channels); got {tuple(x.shape)}.")
    C = x.shape[2]
    for name, weight in (("conv1_weight", weights.conv1_weight), ("conv2_weight", weights.conv2_weight)):
        if weight.shape != (C, 1, 3, 3):
            raise ShapeError(
                f"{name} is {tuple(weight.shape)}; for tokens of {C} channels a depthwise 3 x 3 convolution has "
                f"{(C, 1, 3, 3)}."
            )
    for name, value in weights._asdict().items():
        if isinstance(value, Tensor) and not name.startswith("conv") and value.shape != (C,):
            raise ShapeError(f"{name} is {tuple(value.shape)}; the tokens have {C} channels.")
    # During export a comparison of symbolic sizes would become a constraint on the caller's Dim.
    if torch.compiler.is_exporting():
        return
    if x.shape[1] != height * width:
        raise ShapeError(f"There are {x.shape[1]} tokens; a grid of {height} x {width} has {height * width}.")
    if statistics is not None and statistics.shape != (*x.shape[:2], 2):
        raise ShapeError(f"statistics is {tuple(statistics.shape)}; these tokens have {(*x.shape[:2], 2)}.")


def _asks_for_triton(kernels: str) -> bool:
    if kernels not in KERNELS:
        raise UnknownNameError("kernels", kernels, KERNELS)
    return kernels == "triton"


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ConfigError(
            "LPI's inference kernel has no gradient. Call it under torch.no_grad(), train with "
            'lpi_residual_training, or use kernels="plain".'
        )


def _tensors(weights: LPIWeights | LPITrainingWeights) -> list[Tensor]:
    return [value for value in weights if isinstance(value, Tensor)]
