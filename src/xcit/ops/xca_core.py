"""The middle of XCA's token form: from packed q, k and v to the mixed values, without a copy of any of them.

Legend: B batch, N tokens, C channels, h heads, d = C / h head_dim.

``xcit.ops.xca.xca_tokens`` is this between two linear layers. Per image and head, with q, k, v (N, d)

    cos_ij = sum_n q_ni k_nj / (max(|q_i|, 1e-12) max(|k_j|, 1e-12))     |q_i|: over the tokens
    A      = softmax over j of t cos_ij        (d, d)
    y_n    = A v_n                             (N, d)

Gradients, given dy; q̂_i = q_i / |q_i|, k̂_j likewise:

    dA_ij  = sum_n dy_ni v_nj      dv_n = A^T dy_n
    dL     = A (dA - sum_j A dA)   dt = sum dL cos    dcos = t dL
    dq_i   = (sum_j dcos_ij k̂_j - q̂_i sum_j dcos_ij cos_ij) / |q_i|       and dk_j likewise

The kernel keeps the products q^T k and the norms in float32 and divides afterwards, so that q̂ and k̂ exist nowhere; the
plain version, like the released code, rounds them to the dtype of the tokens first.

Source: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021, section 3.2, equation 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError, ShapeError
from xcit.ops.kernels import KERNELS, Kernels, use_triton

NORM_EPS = 1e-12
"""Smallest norm that q and k are divided by."""

MAX_HEAD_DIM = 128
"""The kernels hold a head's (d, d) matrices in registers."""


def xca_core(
    qkv: Float[Tensor, "batch tokens qkv"],
    temperature: Float[Tensor, "heads 1 1"],
    *,
    attn_drop: float = 0.0,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch tokens channels"]:
    """Mix the values' channels by XCA: everything between the layers ``qkv`` and ``proj``.

    Args:
        qkv: q, k and v side by side (B, N, 3C), as the linear layer gives them. The kernel reads any strides of the
            batch and the tokens; channels that are not contiguous are copied first.
        temperature: t of each head.
        attn_drop: probability with which an entry of A is dropped and the others are scaled up. The kernel has none.
        kernels: "plain", or "triton": one launch where there are enough images and heads to fill the device, else
            three; deterministic; heads of at most 128 channels, first derivatives only, no forward-mode ones.

    Returns:
        (B, N, C), head beside head, in the dtype of qkv (under autocast, autocast's).

    Raises:
        ShapeError: the last axis is not three times a multiple of the heads.
        BackendError, ConfigError: "triton", where it cannot run (``use_triton``), with dropout, or with wider heads.

    Cost: 2 N C d multiply-adds an image forward, 4 N C d backward. The kernel's least traffic, with s bytes an element
        of qkv: 4 B N C s forward (and 4 B C d for what the backward pass needs), 8 B N C s backward; 7 B N C s where
        one program's second reading of dy comes from a cache.
    """
    _check(qkv, temperature, 3, kernels)
    if kernels == "plain":
        q, k, v = _heads(qkv, 3, temperature.shape[0])
        attn = _plain_attention(q, k, temperature)
        attn = F.dropout(attn, attn_drop) if attn_drop > 0 else attn
        return (attn.to(v.dtype) @ v).permute(0, 3, 1, 2).flatten(2)
    if attn_drop > 0:
        raise ConfigError(
            f"attn_drop is {attn_drop}; the kernel 'xca_core' has no dropout. Set it to 0, or use kernels=\"plain\"."
        )
    qkv = _for_kernel("xca_core", qkv, temperature, 3)
    return torch.ops.xcit.xca_core(qkv, temperature, _needs_grad(qkv, temperature))[0]


def xca_attention_core(
    qk: Float[Tensor, "batch tokens qk"], temperature: Float[Tensor, "heads 1 1"], *, kernels: Kernels = "plain"
) -> Float[Tensor, "batch heads head_dim head_dim"]:
    """Return A alone, for a caller that makes one map of P, A and W_v and never needs v.

    Args:
        qk: q and k side by side (B, N, 2C), or that part of a packed qkv (``qkv[..., : 2 * C]``, read in place).
        temperature: t of each head.
        kernels: as for ``xca_core``; one launch, or two.

    Returns:
        (B, h, d, d) in float32 (float64 for float64): rows i sum to one over j, see ``xcit.ops.xca.xca_attention``.

    Raises:
        ShapeError, BackendError, ConfigError: as ``xca_core``.

    Cost: N C d multiply-adds an image forward, 2 N C d backward. The kernel's least traffic, with s bytes an element
        of qk: 2 B N C s + 4 B C d forward, 4 B N C s + 8 B C d backward.
    """
    _check(qk, temperature, 2, kernels)
    if kernels == "plain":
        q, k = _heads(qk, 2, temperature.shape[0])
        return _plain_attention(q, k, temperature)
    qk = _for_kernel("xca_attention_core", qk, temperature, 2)
    return torch.ops.xcit.xca_attention_core(qk, temperature, _needs_grad(qk, temperature))[0]


def _heads(packed: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    return packed.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)  # each (B, h, d, N)


def _plain_attention(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    cosines = _normalized(q) @ _normalized(k).transpose(-2, -1)
    return (_at_least_float32(cosines) * temperature).softmax(dim=-1)


def _normalized(x: Tensor) -> Tensor:
    wide = _at_least_float32(x)  # float16 has neither the range for the sum of squares nor for the epsilon
    return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)).to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(packed: Tensor, temperature: Tensor, parts: int, kernels: str) -> None:
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}; there are {', '.join(KERNELS)}.")
    heads = temperature.shape[0]
    if packed.ndim != 3 or temperature.shape != (heads, 1, 1) or packed.shape[2] % (parts * heads):
        raise ShapeError(
            f"XCA's core takes {parts} C channels a token, C a multiple of the heads, and temperatures (heads, 1, 1); "
            f"got {tuple(packed.shape)} and {tuple(temperature.shape)}."
        )


def _for_kernel(name: str, packed: Tensor, temperature: Tensor, parts: int) -> Tensor:
    head_dim = packed.shape[2] // (parts * temperature.shape[0])
    if head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"The kernel {name!r} takes heads of at most {MAX_HEAD_DIM} channels; these have {head_dim}. "
            f'Use kernels="plain" for wider ones.'
        )
    if torch.is_autocast_enabled(packed.device.type):  # as for the plain version's products; t stays as it is
        packed = packed.to(torch.get_autocast_dtype(packed.device.type))
    use_triton(name, packed, temperature)
    return packed


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# --- the kernels as operations that torch knows: shapes without values, and derivatives -----------------------------
#
# For the backward pass the cosines are kept, not A: A follows from them by a softmax of (d, d) in registers, while they
# do not follow from A. Where no backward pass will come (`save` is False) nothing is.


def _empty_saved(packed: Tensor, temperature: Tensor, parts: int, save: bool) -> tuple[Tensor, Tensor]:
    B, h = packed.shape[0] if save else 0, temperature.shape[0]
    d = packed.shape[2] // (parts * h)
    return packed.new_empty(B, h, d, d, dtype=torch.float32), packed.new_empty(B, h, 2, d, dtype=torch.float32)


@torch.library.custom_op("xcit::xca_core", mutates_args=())
def _xca_core(qkv: Tensor, temperature: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the cosines (B, h, d, d) and the norms of q and k (B, h, 2, d)."""
    from xcit.ops import xca_triton

    y = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    cosines, norms = _empty_saved(qkv, temperature, 3, save)
    xca_triton.mix(qkv, temperature, y, cosines, norms, save)
    return y, cosines, norms


@_xca_core.register_fake
def _(qkv: Tensor, temperature: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    return y, *_empty_saved(qkv, temperature, 3, save)


@torch.library.custom_op("xcit::xca_core_backward", mutates_args=())
def _xca_core_backward(
    dy: Tensor, qkv: Tensor, temperature: Tensor, cosines: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    from xcit.ops import xca_grad_triton

    return xca_grad_triton.mix_backward(dy, qkv, temperature, cosines, norms)


@_xca_core_backward.register_fake
def _(dy: Tensor, qkv: Tensor, temperature: Tensor, cosines: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), temperature.new_empty(temperature.shape)


@torch.library.custom_op("xcit::xca_attention_core", mutates_args=())
def _xca_attention_core(qk: Tensor, temperature: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, the cosines and the norms of q and k."""
    from xcit.ops import xca_triton

    attn, _ = _empty_saved(qk, temperature, 2, True)
    cosines, norms = _empty_saved(qk, temperature, 2, save)
    xca_triton.attend(qk, temperature, attn, cosines, norms, save)
    return attn, cosines, norms


@_xca_attention_core.register_fake
def _(qk: Tensor, temperature: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    attn, _ = _empty_saved(qk, temperature, 2, True)
    return attn, *_empty_saved(qk, temperature, 2, save)


@torch.library.custom_op("xcit::xca_attention_core_backward", mutates_args=())
def _xca_attention_core_backward(
    d_attn: Tensor, qk: Tensor, temperature: Tensor, cosines: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    from xcit.ops import xca_grad_triton

    return xca_grad_triton.attend_backward(d_attn, qk, temperature, cosines, norms)


@_xca_attention_core_backward.register_fake
def _(d_attn: Tensor, qk: Tensor, temperature: Tensor, cosines: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    return qk.new_empty(qk.shape), temperature.new_empty(temperature.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    packed, temperature, _ = inputs
    _, cosines, norms = output
    ctx.save_for_backward(packed, temperature, cosines, norms)
    ctx.mark_non_differentiable(cosines, norms)


def _differentiate_core(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_xca_core_backward(dy, *ctx.saved_tensors), None


def _differentiate_attention(ctx: Any, d_attn: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_xca_attention_core_backward(d_attn, *ctx.saved_tensors), None


_xca_core.register_autograd(_differentiate_core, setup_context=_save)
_xca_attention_core.register_autograd(_differentiate_attention, setup_context=_save)
