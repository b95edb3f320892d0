"""The second moment of centred tokens, X^T X: what the covariance form asks of the tokens beside their mean.

Legend: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError
from xcit.ops.kernels import KERNELS, Kernels, use_triton


def second_moment(
    xc: Float[Tensor, "batch tokens channels"], *, kernels: Kernels = "plain"
) -> Float[Tensor, "batch channels channels"]:
    """Sum over the tokens of their outer products, X^T X, accumulated and stored in float32 at least.

    Rounding it to bfloat16 would lose what the projections cancel, and float16 would overflow near 65,000 tokens.

    Args:
        xc: tokens, centred already.
        kernels: "plain", or "triton": half the products, the other half being their mirror image; deterministic, first
            derivatives only.

    Returns:
        (B, C, C), symmetric; float64 for float64 tokens, else float32.

    Raises:
        BackendError, ConfigError: "triton", where it cannot run (``use_triton``).

    Cost: N C^2 multiply-adds an image forward (the kernel half of it) and, the gradient being symmetric too, N C^2
        backward, where differentiating the plain product would cost twice that. The kernel's least traffic, with s
        bytes an element of xc: B N C s + 4 B C^2.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}; there are {', '.join(KERNELS)}.")
    if kernels == "triton":
        use_triton("second_moment", xc)
        return torch.ops.xcit.second_moment(xc)
    return (_SecondMoment if torch.compiler.is_compiling() else _SecondMomentForwardAD).apply(xc)


class _SecondMoment(torch.autograd.Function):
    """X -> X^T X with the gradient X (G + G^T): one product with N in its cost instead of two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _wide_bmm(x.transpose(-2, -1), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x.to(grads[0].dtype) @ (grads[0] + grads[0].transpose(-2, -1))).to(x.dtype)


# Dynamo traces no Function that defines a jvp, so what is compiled goes without forward-mode derivatives.


class _SecondMomentForwardAD(_SecondMoment):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        half = _wide_bmm(x.transpose(-2, -1), tangents[0])
        return half + half.transpose(-2, -1)


def _wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with float32 sums and a float32 result where the factors are bfloat16 or float16."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # no other device returns float32 from half-precision factors


# --- the kernel as an operation that torch knows ----------------------------------------------------------------------


@torch.library.custom_op("xcit::second_moment", mutates_args=())
def _second_moment(xc: Tensor) -> Tensor:
    from xcit.ops import moments_triton

    return moments_triton.second_moment(xc)


@_second_moment.register_fake
def _(xc: Tensor) -> Tensor:
    B, _, C = xc.shape
    return xc.new_empty(B, C, C, dtype=torch.float32)


def _save_second_moment(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_second_moment(ctx: Any, grad: Tensor) -> Tensor:
    (xc,) = ctx.saved_tensors
    with torch.autocast(xc.device.type, enabled=False):
        return (xc.to(grad.dtype) @ (grad + grad.mT)).to(xc.dtype)


_second_moment.register_autograd(_differentiate_second_moment, setup_context=_save_second_moment)
