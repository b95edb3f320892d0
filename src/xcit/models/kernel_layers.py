"""XCiT's layers run by the fused kernels of ``xcit.ops``: the modules' own functions in fewer passes over the tokens.

A layer computes what its module's plain ``forward`` says, with the same parameters, and draws the same stochastic
depth. What the kernels cannot do (another activation, dropout in the network, batch norm over several processes) is
refused, never computed in another way.

Legend: B batch, N tokens = Hp * Wp, C embed_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from xcit.errors import ConfigError, UnknownNameError
from xcit.ops.class_tokens import class_attention_core
from xcit.ops.kernels import KERNELS, Kernels
from xcit.ops.lpi import (
    LPITrainingWeights,
    LPIWeights,
    batch_norm_affine,
    lpi_residual,
    lpi_residual_training,
    token_statistics,
)
from xcit.ops.mlp import mlp
from xcit.ops.norm_moments import norm_moments
from xcit.ops.residual_norm import residual_norm
from xcit.ops.xca import take_form
from xcit.ops.xca_core import xca_core
from xcit.ops.xca_moments import Moments, channel_map

if TYPE_CHECKING:
    from xcit.models.folded_layers import FoldedBlock, FoldedClassBlock, FoldedLPI
    from xcit.models.layers import LPI, Mlp, XCABlock
    from xcit.models.variants import BlockWithoutLPI


def choose_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Set what runs a model's layers: their plain definitions, or the fused kernels.

    Args:
        model: an XCiT, a pyramid, a folded one of these, or a model that has one inside.
        kernels: "plain" or "triton".

    Raises:
        UnknownNameError: another name.
        ConfigError: no layer of the model knows kernels, or one of them cannot be run by them.
    """
    if kernels not in KERNELS:
        raise UnknownNameError("kernels", kernels, KERNELS)
    layers = [module for module in model.modules() if hasattr(module, "kernels")]
    if not layers:
        raise ConfigError(f"No layer of {type(model).__name__} can be run by the fused kernels.")
    if kernels == "triton":
        for layer in layers:
            refuse = getattr(layer, "refuse_kernels", None)
            if refuse is not None:
                refuse()
    for layer in layers:
        layer.kernels = kernels  # type: ignore[assignment]


def run_block(block: XCABlock | BlockWithoutLPI, x: Tensor, height: int, width: int) -> Tensor:
    """Transform the tokens (B, N, C) of a (height, width) patch grid as the layer does.

    Raises:
        ConfigError: a part that the kernels do not have; a gradient through LPI with running statistics.
        BackendError: the kernels cannot run here.
    """
    lpi: LPI | None = getattr(block, "local_mp", None)
    update = block.attn(block.norm1(x))
    keep = _keep(block.drop_path, x)
    if lpi is None:
        x, _ = residual_norm(
            x, update, block.gamma1, None, None, block.norm2.eps, keep=keep, want="none", kernels="triton"
        )
    else:
        x = _with_lpi(block, lpi, x, update, keep, height, width)  # type: ignore[arg-type]
    update = _network(block.mlp, block.norm2(x))
    keep = _keep(block.drop_path, x)
    return residual_norm(
        x, update, block.gamma2, None, None, block.norm2.eps, keep=keep, want="none", kernels="triton"
    )[0]


def _with_lpi(
    block: XCABlock, lpi: LPI, x: Tensor, update: Tensor, keep: Tensor | None, height: int, width: int
) -> Tensor:
    """Add XCA's output, and then LPI's of the result."""
    norm, bn, eps = block.norm3, lpi.bn, block.norm3.eps
    convs = (lpi.conv1.weight, lpi.conv1.bias, lpi.conv2.weight, lpi.conv2.bias)
    _expect_gelu(lpi.act)
    if not bn.training and bn.running_mean is not None and bn.running_var is not None:
        x, found = residual_norm(
            x, update, block.gamma1, None, None, eps, keep=keep, want="statistics", kernels="triton"
        )
        scale, shift = batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        weights = LPIWeights(norm.weight, norm.bias, eps, *convs[:2], scale, shift, *convs[2:], block.gamma3)
        # no stochastic depth: it is for training alone
        return lpi_residual(x, height, width, weights, statistics=found, kernels="triton")
    if type(bn) is not nn.BatchNorm2d:
        raise ConfigError(
            f"LPI's batch norm is a {type(bn).__name__}; the kernels' statistics are of one process. Train without "
            f'synchronised batch norm, or with kernels="plain".'
        )
    x, _ = residual_norm(x, update, block.gamma1, None, None, eps, keep=keep, want="none", kernels="triton")
    training = LPITrainingWeights(
        norm.weight, norm.bias, eps, *convs[:2], bn.weight, bn.bias, bn.eps, *convs[2:], block.gamma3
    )
    trained = lpi_residual_training(x, height, width, training, keep=_keep(block.drop_path, x), kernels="triton")
    if bn.training:
        _move_statistics(bn, trained.batch_mean, trained.batch_var)
    return trained.y


def _move_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """Move batch norm's running statistics as it does itself."""
    if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        return
    with torch.no_grad():
        momentum: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:
                momentum = 1.0 / bn.num_batches_tracked.to(mean)
        bn.running_mean.lerp_(mean.to(bn.running_mean), momentum)
        bn.running_var.lerp_(var.to(bn.running_var), momentum)


def _keep(drop_path: StochasticDepth, x: Tensor) -> Tensor | None:
    """Draw stochastic depth's factor of each image, as ``torchvision.ops.stochastic_depth`` draws it; None for 1."""
    if not drop_path.training or drop_path.p == 0:
        return None
    survival = 1.0 - drop_path.p
    keep = x.new_empty(x.shape[0]).bernoulli_(survival)
    return keep.div_(survival) if survival > 0 else keep


def _network(network: Mlp, normed: Tensor) -> Tensor:
    _expect_gelu(network.act)
    if network.training and network.drop.p > 0:
        raise ConfigError(
            f"The network drops out {network.drop.p:g} of its units; the kernels have no dropout there. Set "
            f'proj_drop_rate to 0, or use kernels="plain".'
        )
    fc1, fc2 = network.fc1, network.fc2
    return mlp(normed, fc1.weight, fc1.bias, fc2.weight, fc2.bias, kernels="triton")


def _expect_gelu(act: nn.Module) -> None:
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        raise ConfigError(f'The activation is {act}; the kernels know the exact GELU. Use kernels="plain".')


# --- folded layers ----------------------------------------------------------------------------------------------------


def run_folded_block(block: FoldedBlock, x: Tensor, height: int, width: int) -> Tensor:
    """Transform the tokens (B, N, C) of a (height, width) patch grid as the folded layer does.

    Raises:
        ConfigError, BackendError: as ``run_block``.
    """
    update, eps = _folded_attention(block, x), block.norm2.eps
    lpi: FoldedLPI | None = block.local_mp
    if lpi is None:
        x, _ = residual_norm(x, update, None, None, None, eps, want="none", kernels="triton")
    else:
        x, found = residual_norm(x, update, None, None, None, lpi.norm.eps, want="statistics", kernels="triton")
        x = lpi_residual(x, height, width, _folded_lpi(lpi), statistics=found, kernels="triton")
    first, act, second = block.mlp
    _expect_gelu(act)
    update = mlp(block.norm2(x), first.weight, first.bias, second.weight, second.bias, kernels="triton")  # type: ignore[arg-type]
    return residual_norm(x, update, None, None, None, eps, want="none", kernels="triton")[0]


def folded_class_mean(block: FoldedClassBlock, direction: Tensor, cls: Tensor, patches: Tensor) -> Tensor:
    """Return the mean (B, h, C) of the normed tokens as each head weighs them, of patch tokens that are not normed yet.

    Args:
        block: the layer.
        direction: of the class token, (B, h, C).
        cls: the class token, normed, (B, 1, C).
        patches: (B, N, C).
    """
    found = token_statistics(patches, block.norm1.eps, kernels="triton")
    return class_attention_core(direction, patches, cls[:, 0], statistics=found, kernels="triton").to(cls.dtype)


def _folded_attention(block: FoldedBlock, x: Tensor) -> Tensor:
    attn, weights = block.attn, block.attn.weights()
    if take_form(x, weights, attn.form) == "tokens":
        qkv = F.linear(block.norm1(x), weights.qkv_weight, weights.qkv_bias)
        return F.linear(xca_core(qkv, weights.temperature, kernels="triton"), weights.proj_weight, weights.proj_bias)
    mean, second, _ = norm_moments(x, block.norm1.eps, kernels="triton")
    moments = Moments(x.shape[1], mean, second)
    weight, bias = channel_map(moments, weights, small_terms=attn.small_terms)
    return torch.baddbmm(bias.unsqueeze(1), block.norm1(x), weight.transpose(1, 2))


def _folded_lpi(lpi: FoldedLPI) -> LPIWeights:
    """Return the parameters of an LPI whose norm's and batch norm's scales are in the convolutions' weights."""
    _expect_gelu(lpi.act)
    first, second = lpi.conv1, lpi.conv2
    return LPIWeights(
        None, first.shift, lpi.norm.eps, first.weight, first.bias, None, second.shift, second.weight, second.bias, None
    )
