"""The feed-forward network, keeping for its backward pass one map of the hidden width instead of two.

    h = x W_1^T + b_1      (B, N, K)    K hidden channels, 4 C in XCiT
    y = gelu(h) W_2^T + b_2             gelu(h) = h * (1 + erf(h / sqrt 2)) / 2

Differentiated as it stands, it keeps x, h and gelu(h). The last follows from h, by arithmetic that costs nothing beside
the bytes: the backward pass reads h anyway, to get the slope of gelu there.

Source: section 3.3 of the paper; the exact GELU of the released code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ConfigError, ShapeError
from xcit.ops.kernels import KERNELS, Kernels, use_triton


def mlp(
    x: Float[Tensor, "batch tokens channels"],
    fc1_weight: Float[Tensor, "hidden channels"],
    fc1_bias: Float[Tensor, " hidden"] | None,
    fc2_weight: Float[Tensor, "outputs hidden"],
    fc2_bias: Float[Tensor, " outputs"] | None,
    *,
    kernels: Kernels = "plain",
) -> Float[Tensor, "batch tokens outputs"]:
    """Return ``gelu(x W_1^T + b_1) W_2^T + b_2``.

    Args:
        x: tokens.
        fc1_weight: W_1.
        fc1_bias: b_1.
        fc2_weight: W_2.
        fc2_bias: b_2.
        kernels: "plain": as PyTorch differentiates it. "triton": gelu(h) is not kept, and the backward pass makes it
            and the gradient of h in one kernel. Forward, both are the same operations, and without a gradient no
            kernel runs: the matrix products are cuBLAS's, and a compiler's to fuse with what is around them.

    Returns:
        Tokens; their dtype is that of x, or autocast's.

    Raises:
        ShapeError: widths that do not fit.
        ConfigError: an unknown ``kernels``, or a dtype that the kernel does not know.
        BackendError: kernels is "triton", and it cannot run here.

    Cost: 2 N C K multiply-adds an image forward, twice that backward. Kept for the backward pass, with s bytes a value:
        s B N (C + K); plain, s B N (C + 2 K). The kernel reads and writes 4 s B N K bytes, each value once.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"kernels is {kernels!r}; it must be one of {', '.join(KERNELS)}.")
    if x.shape[-1] != fc1_weight.shape[1] or fc1_weight.shape[0] != fc2_weight.shape[1]:
        raise ShapeError(
            f"The tokens {tuple(x.shape)} and the weights {tuple(fc1_weight.shape)} and {tuple(fc2_weight.shape)} do "
            f"not fit: the first takes the tokens' channels, the second what the first puts out."
        )
    hidden = F.linear(x, fc1_weight, fc1_bias)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, fc2_weight, fc2_bias)
    )
    if kernels == "plain" or not needs_grad:
        return F.linear(F.gelu(hidden), fc2_weight, fc2_bias)
    use_triton("gelu_backward", hidden)
    if torch.is_autocast_enabled(x.device.type):  # which does not reach into a Function's backward pass
        dtype = torch.get_autocast_dtype(x.device.type)
        hidden, fc2_weight = hidden.to(dtype), fc2_weight.to(dtype)
        fc2_bias = None if fc2_bias is None else fc2_bias.to(dtype)
    y: Tensor = _GeluLinear.apply(hidden, fc2_weight, fc2_bias)
    return y


def gelu_backward_plain(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return gelu(h), and the gradient of h for a gradient of gelu(h); what the kernel computes.

    gelu'(h) = Phi(h) + h phi(h), Phi and phi being the standard normal's distribution and density.
    """
    return F.gelu(hidden), torch.ops.aten.gelu_backward(grad, hidden)


class _GeluLinear(torch.autograd.Function):
    """(h, W, b) -> gelu(h) W^T + b, which keeps h and W alone."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        hidden, weight, _ = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from xcit.ops.mlp_triton import gelu_backward_op

        hidden, weight = ctx.saved_tensors
        (grad,) = grads
        activated, grad_hidden = gelu_backward_op(hidden, grad @ weight)
        grad_weight = grad.flatten(0, -2).t() @ activated.flatten(0, -2) if ctx.needs_input_grad[1] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias
