"""XCA for inference: the token form and the covariance form of ``xcit.ops.xca``, and the latter once more for graphs.

Runtimes that are given a graph (ONNX Runtime, OpenVINO, inductor) want plain tensor algebra, and some have no float64.

Legend: B batch, N tokens, C channels, h heads, d = C / h head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.errors import ConfigError
from xcit.ops.xca import NORM_EPS, XCAWeights, xca
from xcit.ops.xca_form import FORMS, Form, choose_form

SMALL_TERMS = (torch.float32, torch.float64)


class FoldedXCA(nn.Module):
    """XCA on tokens that are normed without affine, its output scaled by LayerScale.

    Args:
        weights: of the layer, with both folded in.
        form: as of ``xcit.ops.xca.xca``.
        small_terms: as of ``covariance_graph``.
    """

    qkv_weight: nn.Parameter
    qkv_bias: nn.Parameter | None
    proj_weight: nn.Parameter
    proj_bias: nn.Parameter | None
    temperature: nn.Parameter

    def __init__(self, weights: XCAWeights, form: Form, small_terms: torch.dtype) -> None:
        super().__init__()
        if form not in FORMS:
            raise ConfigError(f"form is {form!r}; XCA has the forms {', '.join(FORMS)}.")
        if small_terms not in SMALL_TERMS:
            raise ConfigError(f"small_terms is {small_terms}; it must be torch.float32 or torch.float64.")
        self.form: Form = form
        self.small_terms = small_terms
        for name, value in weights._asdict().items():
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Mix channels by their cross-covariance over the tokens."""
        weights = self.weights()
        if not torch.compiler.is_compiling():
            return xca(x, weights, form=self.form)
        form = self.form
        if form == "auto":
            form = choose_form(
                num_tokens=x.shape[1],
                embed_dim=x.shape[2],
                num_heads=weights.temperature.shape[0],
                batch_size=x.shape[0],
                dtype=x.dtype,
                device_type=x.device.type,
                needs_grad=False,
            )
        if form == "tokens":
            return xca(x, weights, form="tokens")
        return covariance_graph(x, weights, self.small_terms)

    def weights(self) -> XCAWeights:
        """Return the layer's parameters."""
        return XCAWeights(self.qkv_weight, self.qkv_bias, self.proj_weight, self.proj_bias, self.temperature)

    def extra_repr(self) -> str:
        """Show what ``print(model)`` would otherwise hide."""
        return f"num_heads={self.temperature.shape[0]}, form={self.form!r}, small_terms={self.small_terms}"


def covariance_graph(
    x: Float[Tensor, "batch tokens channels"], weights: XCAWeights, small_terms: torch.dtype = torch.float32
) -> Float[Tensor, "batch tokens channels"]:
    """The covariance form (``xcit.ops.xca.xca_covariance``) in operations that every runtime has, for inference alone.

    What passes over the N tokens: their mean, the centring, the second moment, and one (C, C) map an image.

    Args:
        x: normed tokens.
        weights: the layer's parameters.
        small_terms: precision of the mean's products with the weights, of the norms and of A: float64 as in
            ``xca_covariance``, or float32 for runtimes without it. float32 tokens of LayerNorm, whose offsets are
            bounded by their variance, lose nothing by the latter that the token form does not.

    Cost: 2 N C^2 + 3 C^3 + 2 C^2 d multiply-adds an image.
    """
    N, C = x.shape[1], x.shape[2]
    h = weights.temperature.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # torch.promote_types would be in the graph
    small = torch.float64 if wide == torch.float64 else small_terms
    qkv_weight = weights.qkv_weight.to(wide)
    qk_weight, v_weight = qkv_weight[: 2 * C], qkv_weight[2 * C :]

    # q and k take their offsets at the mean, v at the mean as the tokens' dtype holds it, on which they are centred.
    mean = x.mean(dim=1, dtype=wide)  # (B, C)
    center = mean.to(x.dtype)
    xc = x - center.unsqueeze(1)
    wide_xc = xc.to(wide)
    moment = wide_xc.transpose(1, 2) @ wide_xc  # (B, C, C)
    bias = x.new_zeros(3 * C) if weights.qkv_bias is None else weights.qkv_bias
    weight, bias = weights.qkv_weight.to(small), bias.to(small)
    offset = F.linear(mean.to(small), weight[: 2 * C], bias[: 2 * C])  # W mu + b
    v_offset = F.linear(center.to(small), weight[2 * C :], bias[2 * C :])

    projected = qk_weight @ moment  # (B, 2C, C)
    squared_norms = (projected * qk_weight).sum(-1).to(small) + N * offset.square()
    norms = squared_norms.clamp_min(NORM_EPS**2).sqrt().unflatten(1, (2, h, -1))  # (B, 2, h, d)
    q_offset, k_offset = offset[:, :C].unflatten(1, (h, -1)), offset[:, C:].unflatten(1, (h, -1))
    k_weight = qk_weight[C:].unflatten(0, (h, -1))
    gram = (projected[:, :C].unflatten(1, (h, -1)) @ k_weight.transpose(1, 2)).to(small)  # (B, h, d, d)
    gram = gram + N * q_offset.unsqueeze(3) * k_offset.unsqueeze(2)
    cosines = (gram / (norms[:, 0].unsqueeze(3) * norms[:, 1].unsqueeze(2))).clamp(-1, 1)
    attn = (cosines * weights.temperature.to(small)).softmax(dim=-1).to(wide)

    proj = weights.proj_weight.to(wide).unflatten(1, (h, -1)).transpose(0, 1)  # (h, C, d)
    proj_attn = (proj @ attn).transpose(1, 2).flatten(2)  # (B, C, C)
    mixing = (proj_attn @ v_weight).to(x.dtype)
    constant = (proj_attn @ v_offset.to(wide).unsqueeze(2)).squeeze(2)
    if weights.proj_bias is not None:
        constant = constant + weights.proj_bias
    return xc @ mixing.transpose(1, 2) + constant.to(x.dtype).unsqueeze(1)
