"""The part of class attention that passes over the patch tokens, in one pass and without keys or values.

``class_attention_core`` is given all tokens at once; a ``Softmax`` takes them band after band.

With one query a head, scores are products of the normed tokens n_i with one direction a head, and what the values give
is a map of the tokens' weighted mean (``xcit.models.folded_layers.FoldedClassAttention`` derives it):

    a_h    = softmax_i(direction_h . n_i)     over the class token and the patch tokens
    mean_h = sum_i a_h,i n_i

Legend: B batch, N patch tokens, C channels, h heads.

Source: Touvron et al. 2021, "Going deeper with image transformers"; section 3.3 of the paper.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError, ShapeError
from xcit.ops.kernels import KERNELS, Kernels, use_triton


def class_attention_core(
    direction: Float[Tensor, "batch heads channels"],
    tokens: Float[Tensor, "batch tokens channels"],
    own: Float[Tensor, "batch channels"],
    *,
    statistics: Float[Tensor, "batch tokens 2"] | None = None,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch heads channels"]:
    """Return the tokens' mean as each head weighs them.

    Args:
        direction: what a head's scores are products with, scale included; a term common to all scores may be left out.
        tokens: the patch tokens, normed without affine; or as they are, if their statistics are given.
        own: the class token, normed, which attends to itself as well.
        statistics: mean and rstd of each patch token, as ``residual_norm(want="statistics")`` returns them.
        kernels: "plain", or "triton" on a CUDA device, for inference only.

    Returns:
        (B, h, C), in float32 (float64 for float64 tokens).

    Raises:
        ShapeError: shapes that do not fit.
        ConfigError: an unknown ``kernels``; a gradient asked of the kernel; a dtype or a width that it does not know.
        BackendError: kernels is "triton", and it cannot run here.

    Cost: 2 N C h multiply-adds an image. The kernel reads the tokens once for every 8 heads or fewer, B N C s bytes at
        s a value, and writes and reads 4 B S h C bytes for S parts that the tokens are split into.
    """
    _check(direction, tokens, own, statistics, kernels)
    if kernels == "plain":
        return class_attention_core_plain(direction, tokens, own, statistics)
    given = [t for t in (direction, tokens, own, statistics) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ConfigError(
            "The kernel 'class_attention_core' has no gradient. Run it under torch.no_grad() or "
            'torch.inference_mode(), or use kernels="plain".'
        )
    use_triton("class_attention_core", *given)
    from xcit.ops.class_tokens_triton import MAX_CHANNELS, class_attention_core_op

    if tokens.shape[2] > MAX_CHANNELS:
        raise ConfigError(
            f"The kernel 'class_attention_core' takes up to {MAX_CHANNELS} channels; got {tokens.shape[2]}. "
            f'Use kernels="plain" here.'
        )
    result: Tensor = class_attention_core_op(direction, tokens, own, statistics)
    return result


def class_attention_core_plain(
    direction: Tensor, tokens: Tensor, own: Tensor, statistics: Tensor | None = None
) -> Tensor:
    """The definition; the arguments are those of ``class_attention_core``."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    tokens = tokens.to(wide)
    if statistics is not None:
        tokens = (tokens - statistics[..., :1]) * statistics[..., 1:]
    both = torch.cat((own.to(wide).unsqueeze(1), tokens), dim=1)
    with torch.autocast(tokens.device.type, enabled=False):
        attn = (direction.to(wide) @ both.transpose(1, 2)).softmax(dim=-1)
        return attn @ both


class Softmax(NamedTuple):
    """Class attention over some tokens, such that that over more can be added."""

    top: Tensor
    """(..., h): the highest score."""
    total: Tensor
    """(..., h): the sum of exp(score - top)."""
    weighted: Tensor
    """(..., h, C): the sum of exp(score - top) times the normed token."""

    def mean(self) -> Tensor:
        """Return the tokens' mean as each head weighs them, (..., h, C)."""
        return self.weighted / self.total.unsqueeze(-1)


def softmax_of(
    direction: Float[Tensor, "*batch heads channels"], normed: Float[Tensor, "*batch tokens channels"]
) -> Softmax:
    """Return the attention over normed tokens, in float64.

    Args:
        direction: what a head's scores are products with.
        normed: the tokens.
    """
    scores = (direction @ normed.mT).double()  # (..., h, N)
    top = scores.amax(dim=-1)
    shares = (scores - top.unsqueeze(-1)).exp()
    return Softmax(top, shares.sum(dim=-1), (shares.to(normed.dtype) @ normed).double())


def merge_softmax(a: Softmax, b: Softmax) -> Softmax:
    """Return the attention over the tokens of both."""
    top = torch.maximum(a.top, b.top)
    of_a, of_b = (a.top - top).exp(), (b.top - top).exp()
    weighted = a.weighted * of_a.unsqueeze(-1) + b.weighted * of_b.unsqueeze(-1)
    return Softmax(top, a.total * of_a + b.total * of_b, weighted)


def _check(direction: Tensor, tokens: Tensor, own: Tensor, statistics: Tensor | None, kernels: str) -> None:
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}; it must be one of {', '.join(KERNELS)}.")
    if tokens.ndim != 3:
        raise ShapeError(f"The patch tokens must be (batch, tokens, channels); got {tuple(tokens.shape)}.")
    B, N, C = tokens.shape
    if direction.ndim != 3 or direction.shape[0] != B or direction.shape[2] != C:
        raise ShapeError(
            f"The directions must be ({B}, heads, {C}) for tokens {tuple(tokens.shape)}; got {tuple(direction.shape)}."
        )
    if own.shape != (B, C):
        raise ShapeError(
            f"The class tokens must be ({B}, {C}) for tokens {tuple(tokens.shape)}; got {tuple(own.shape)}."
        )
    if statistics is not None and statistics.shape != (B, N, 2):
        raise ShapeError(
            f"The statistics must be ({B}, {N}, 2) for tokens {tuple(tokens.shape)}; got {tuple(statistics.shape)}."
        )
