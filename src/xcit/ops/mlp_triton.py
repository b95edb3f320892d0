"""The kernel of ``xcit.ops.mlp``: gelu and its gradient in one pass over the hidden layer."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Values a program takes. A benchmark may put another power of two in its place."""
WARPS = 4
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the standard normal at 0


@triton.jit
def _gelu_backward_kernel(hidden_ptr, grad_ptr, activated_ptr, grad_hidden_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    h = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(h * SQRT_HALF))
    slope = below + h * (DENSITY * tl.exp(-0.5 * h * h))
    tl.store(activated_ptr + at, (h * below).to(activated_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_hidden_ptr + at, (grad * slope).to(grad_hidden_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("xcit::gelu_backward", mutates_args=())
def gelu_backward_op(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return gelu(hidden) and the gradient of hidden, both contiguous; grad is that of gelu(hidden)."""
    activated, grad_hidden = _outputs(hidden, grad)
    hidden, grad = hidden.contiguous(), grad.contiguous()
    if hidden.numel():
        with torch.cuda.device_of(hidden):
            _gelu_backward_kernel[(triton.cdiv(hidden.numel(), BLOCK),)](
                hidden,
                grad,
                activated,
                grad_hidden,
                hidden.numel(),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return activated, grad_hidden


@gelu_backward_op.register_fake
def _outputs(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
