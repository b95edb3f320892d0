"""Cross-covariance attention (XCA): attention over channels, linear in the number of tokens.

Legend: B batch, N tokens, C channels, h heads, d = C / h head_dim.

One image's tokens X (N, C) give q, k, v = X W_q^T + b_q, ... (N, C each), split into h heads of d channels. Per head

    A = softmax(t * q̂^T k̂)          (d, d)    q̂, k̂: q, k with every channel L2-normalised over the N tokens
    y = (A v^T)^T                    (N, d)
    out = concat_heads(y) P^T + p    (N, C)

Two exact forms of the same function stand below. ``xca_tokens`` is that definition, line by line. ``xca_covariance``
re-associates it: XCA needs only the first two moments of X, so q, k and v never exist (see its docstring).
``xca`` chooses between them by cost (``xcit.ops.xca_form``).

Source: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021, section 3.2, equation 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError, ShapeError
from xcit.ops.kernels import Kernels
from xcit.ops.second_moment import second_moment
from xcit.ops.xca_core import NORM_EPS, xca_attention_core, xca_core
from xcit.ops.xca_form import FORMS, Form, choose_form


class XCAWeights(NamedTuple):
    """The parameters of one XCA layer, as they stand in the released checkpoints."""

    qkv_weight: Float[Tensor, "qkv channels"]
    """W_q, W_k, W_v stacked: (3C, C)."""
    qkv_bias: Float[Tensor, " qkv"] | None
    """b_q, b_k, b_v stacked: (3C,)."""
    proj_weight: Float[Tensor, "channels channels"]
    """P: (C, C)."""
    proj_bias: Float[Tensor, " channels"] | None
    """p: (C,)."""
    temperature: Float[Tensor, "heads 1 1"]
    """t of each head. The cosines are multiplied by it, as in the released code (the paper divides by tau = 1 / t)."""


def xca(
    x: Float[Tensor, "batch tokens channels"],
    weights: XCAWeights,
    *,
    form: Form = "auto",
    attn_drop: float = 0.0,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch tokens channels"]:
    """Cross-covariance attention, in the form that is asked for or that costs less.

    Args:
        x: layer-normed tokens.
        weights: the layer's parameters; the number of heads is that of ``weights.temperature``.
        form: "tokens" (the definition), "covariance" (its re-association), or "auto": ``choose_form`` decides from
            the sizes. Under symbolic sizes (``torch.export`` or ``torch.compile`` with dynamic shapes) "auto" means
            "tokens"; name the other form to have it there.
        attn_drop: probability with which an entry of A is dropped and the others are scaled up; both forms drop the
            same entries for the same seed.
        kernels: "plain", or "triton": fused kernels in the place of what is between the linear layers
            (``xcit.ops.xca_core``), or of the second moment (``xcit.ops.second_moment``).

    Returns:
        Tokens of the same shape; their dtype is that of ``x``, or autocast's.

    Raises:
        ShapeError: x is not (B, N, C) with the weights' C, or C is not a multiple of the number of heads.
        ConfigError: the form is unknown; or the kernels cannot honour an argument.
        BackendError: the kernels cannot run here.

    Source: section 3.2, equation 2.
    """
    form = take_form(x, weights, form)
    of_form = xca_covariance if form == "covariance" else xca_tokens
    return of_form(x, weights, attn_drop=attn_drop, kernels=kernels)


def xca_attention(
    x: Float[Tensor, "batch tokens channels"], weights: XCAWeights, *, form: Form = "auto"
) -> Float[Tensor, "batch heads head_dim head_dim"]:
    """Return the matrices A with which ``xca`` mixes channels, from the very lines that it runs, in the same form.

    Args:
        x: layer-normed tokens.
        weights: the layer's parameters.
        form: as for ``xca``.

    Returns:
        (B, h, d, d), in float32 at least, non-negative. Entry (i, j) is how much of value channel j goes into output
        channel i of the head: the last axis sums to one. Row i belongs to query channel i, column j to key channel j,
        which makes it the transpose of the paper's softmax(K^T Q / tau), whose columns sum to one.

    Raises:
        ShapeError, ConfigError: as ``xca``.

    Source: section 3.2, equation 2.
    """
    if _chosen_form(x, weights, form) == "tokens":
        C = weights.proj_weight.shape[0]
        qkv = F.linear(x, weights.qkv_weight, weights.qkv_bias)
        return xca_attention_core(qkv[..., : 2 * C], weights.temperature)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return _covariance_attention(x, weights).attn


def xca_tokens(
    x: Float[Tensor, "batch tokens channels"],
    weights: XCAWeights,
    *,
    attn_drop: float = 0.0,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch tokens channels"]:
    """The definition: q, k and v of every token, channel-to-channel cosines, softmax, values mixed across channels.

    Norms, cosines and the softmax are computed in float32 where the tokens are bfloat16 or float16: a sum of N squares
    overflows float16, and its epsilon is zero there.

    Cost: 4 N C^2 + 2 N C d multiply-adds an image forward, twice that backward; q, k, v, q̂, k̂ and y are materialised.
    """
    qkv = F.linear(x, weights.qkv_weight, weights.qkv_bias)
    y = xca_core(qkv, weights.temperature, attn_drop=attn_drop, kernels=kernels)
    return F.linear(y, weights.proj_weight, weights.proj_bias)


def xca_covariance(
    x: Float[Tensor, "batch tokens channels"],
    weights: XCAWeights,
    *,
    attn_drop: float = 0.0,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch tokens channels"]:
    """The same function from the tokens' mean and centred second moment; q, k and v never exist.

    With mu = mean_n X_n, C = sum_n (X_n - mu)(X_n - mu)^T and u = W mu + b:

        q^T k   = W_q C W_k^T + N u_q u_k^T               per head
        |q_j|^2 = (W_q C W_q^T)_jj + N u_q,j^2            both terms non-negative; likewise k
        A       = softmax(t * q^T k / (|q| |k|^T))
        M       = P blockdiag(A) W_v
        out     = (X - mu) M^T + P blockdiag(A) u_v + p

    Centring is what keeps it accurate: a common offset of the tokens would otherwise cancel in C. The products with N
    or C^3 in their cost run in the tokens' precision (at least float32); mu, u, the norms and A, which are small, in
    float64, so that offsets of hundreds of standard deviations cost no accuracy. The whole is differentiable, twice
    too, and its intermediates are what autograd saves: X - mu and about five (C, C) matrices an image.

    Cost: 2 N C^2 + 3 C^3 + 2 C^2 d multiply-adds an image forward, 3 N C^2 + 6 C^3 + 4 C^2 d backward.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return _xca_covariance(x, weights, attn_drop, kernels)
    return _xca_covariance(x, weights, attn_drop, kernels)


def _xca_covariance(x: Tensor, weights: XCAWeights, attn_drop: float, kernels: Kernels) -> Tensor:
    C, h = x.shape[2], weights.temperature.shape[0]
    attn, xc, center = _covariance_attention(x, weights, kernels)
    wide, fine = torch.promote_types(x.dtype, torch.float32), attn.dtype
    v_offset = _offset(center.to(fine), weights.qkv_weight[2 * C :], _part(weights.qkv_bias, slice(2 * C, None)))
    attn = _dropout(attn.to(wide), attn_drop)

    # One (C, C) map an image, applied to the centred tokens.
    proj_attn = weights.proj_weight.to(wide).unflatten(1, (h, -1)).transpose(0, 1) @ attn  # (B, h, C, d)
    proj_attn = proj_attn.transpose(1, 2).flatten(2)  # (B, C, C)
    mixing = (proj_attn @ weights.qkv_weight[2 * C :].to(wide)).to(x.dtype)
    bias = (proj_attn @ v_offset.to(wide).unsqueeze(-1)).squeeze(-1)
    if weights.proj_bias is not None:
        bias = bias + weights.proj_bias
    return torch.baddbmm(bias.to(x.dtype).unsqueeze(1), xc, mixing.transpose(-2, -1))


class _Covariance(NamedTuple):
    attn: Tensor  # A (B, h, d, d), in the fine precision
    xc: Tensor  # the centred tokens (B, N, C)
    center: Tensor  # on which they are centred (B, C)


def _covariance_attention(x: Tensor, weights: XCAWeights, kernels: Kernels = "plain") -> _Covariance:
    wide = torch.promote_types(x.dtype, torch.float32)  # of everything whose cost has N or C^3 in it
    fine = torch.float64 if x.device.type != "mps" else wide  # of what is small; MPS has no float64

    # The tokens are centred on the mean as their own dtype can hold it (`center`), the offsets of q and k are taken at
    # the unrounded mean: the two differ by less than the second moment's own rounding.
    mean = x.mean(dim=1, dtype=fine)  # (B, C)
    center = mean.to(x.dtype)
    xc = x - center.unsqueeze(1)
    moment = second_moment(xc, kernels=kernels)
    return _Covariance(attention_of_moments(x.shape[1], mean, moment, weights), xc, center)


def attention_of_moments(
    num_tokens: int,
    mean: Float[Tensor, "batch channels"],
    moment: Float[Tensor, "batch channels channels"],
    weights: XCAWeights,
) -> Float[Tensor, "batch heads head_dim head_dim"]:
    """Return A of the covariance form, of what it needs to know of the tokens.

    Args:
        num_tokens: N.
        mean: of the tokens; its dtype is that of what is small: the offsets, the norms and A.
        moment: their centred second moment; its dtype, float32 at least, is that of the products of C^3.
        weights: the layer's parameters.

    Returns:
        (B, h, d, d), in the mean's dtype.

    Cost: 2 C^3 + C^2 d multiply-adds an image.
    """
    C, h = mean.shape[1], weights.temperature.shape[0]
    fine, wide = mean.dtype, moment.dtype
    qk_weight = weights.qkv_weight[: 2 * C].to(wide)
    k_weight = qk_weight[C:].unflatten(0, (h, -1))  # (h, d, C)
    offset = _offset(mean, weights.qkv_weight[: 2 * C], _part(weights.qkv_bias, slice(None, 2 * C)))  # (B, 2C)

    projected = qk_weight @ moment  # (B, 2C, C): W_q C and W_k C
    squared_norms = (projected * qk_weight).sum(-1).to(fine) + num_tokens * offset.square()
    # clamp before the root: the same floor as max(norm, eps), and a finite gradient at a norm of zero
    norms = squared_norms.clamp_min(NORM_EPS**2).sqrt()
    q_norm, k_norm = norms.unflatten(-1, (2, h, -1)).unbind(1)  # each (B, h, d)
    q_offset, k_offset = offset.unflatten(-1, (2, h, -1)).unbind(1)
    gram = (projected[:, :C].unflatten(1, (h, -1)) @ k_weight.transpose(-2, -1)).to(fine)  # (B, h, d, d)
    gram = gram + num_tokens * q_offset.unsqueeze(-1) * k_offset.unsqueeze(-2)
    # a cosine leaves [-1, 1] only by rounding, which N = 1 or 2 can blow up
    cosines = (gram / (q_norm.unsqueeze(-1) * k_norm.unsqueeze(-2))).clamp(-1, 1)
    return (cosines * weights.temperature).softmax(dim=-1)


class _Offset(torch.autograd.Function):
    """mu W^T + b in mu's precision, saving W as it is: autograd would keep a float64 copy of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(mean, weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        mean, weight, bias = inputs
        ctx.save_for_backward(mean, weight)
        ctx.save_for_forward(mean, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, weight = ctx.saved_tensors
        (grad,) = grads
        grad_bias = None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)
        return grad @ weight.to(grad.dtype), (grad.transpose(0, 1) @ mean).to(weight.dtype), grad_bias


# Dynamo traces no Function that defines a jvp, so what is compiled goes without forward-mode derivatives.


class _OffsetForwardAD(_Offset):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        mean, weight = ctx.saved_tensors
        d_mean, d_weight, d_bias = tangents
        tangent = torch.zeros_like(mean[:, :1]) * weight[:, 0].to(mean.dtype)
        if d_mean is not None:
            tangent = tangent + F.linear(d_mean, weight.to(mean.dtype))
        if d_weight is not None:
            tangent = tangent + F.linear(mean, d_weight.to(mean.dtype))
        return tangent if d_bias is None else tangent + d_bias.to(mean.dtype)


def _offset(mean: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (_Offset if torch.compiler.is_compiling() else _OffsetForwardAD).apply(mean, weight, bias)


def _dropout(attn: Tensor, p: float) -> Tensor:
    return F.dropout(attn, p) if p > 0 else attn


def _part(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


def take_form(x: Tensor, weights: XCAWeights, form: Form) -> Form:
    """Return the form in which ``xca`` would mix these tokens, and let ``observe_forms`` see it.

    Raises:
        ShapeError, ConfigError: as ``xca``.
    """
    form = _chosen_form(x, weights, form)
    if _observer is not None:
        _observer.append(form)
    return form


def _chosen_form(x: Tensor, weights: XCAWeights, form: Form) -> Form:
    """Check the arguments, and put in auto's place what it stands for here."""
    _check(x, weights, form)
    if form != "auto":
        return form
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weights.qkv_weight.requires_grad)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return choose_form(
        num_tokens=x.shape[1],
        embed_dim=x.shape[2],
        num_heads=weights.temperature.shape[0],
        batch_size=x.shape[0],
        dtype=dtype,
        device_type=x.device.type,
        needs_grad=needs_grad,
    )


def _check(x: Tensor, weights: XCAWeights, form: str) -> None:
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; XCA has the forms {', '.join(FORMS)}.")
    C, h = weights.proj_weight.shape[0], weights.temperature.shape[0]
    if x.ndim != 3 or x.shape[-1] != C:
        raise ShapeError(
            f"XCA takes tokens of shape (batch, tokens, {C}), as wide as its weights; got {tuple(x.shape)}."
        )
    if C % h:
        raise ShapeError(f"{C} channels cannot be split into {h} heads of equal size; take a divisor of {C}.")


_observer: list[str] | None = None


@contextmanager
def observe_forms() -> Iterator[list[str]]:
    """Record which form every call of ``xca`` ran, in order.

    Example:
        >>> with observe_forms() as forms:
        ...     model(images)
        >>> set(forms)
        {'tokens'}
    """
    global _observer
    outer, _observer = _observer, []
    try:
        yield _observer
    finally:
        _observer = outer
