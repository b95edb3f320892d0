"""Which form of XCA costs less: a rule in multiply-adds, with constants fitted to measurements.

Legend: B batch_size, N num_tokens, C embed_dim, h num_heads, d = C / h.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from xcit.errors import ConfigError

Form = Literal["auto", "tokens", "covariance"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Overheads:
    """What the forms cost beyond their multiply-adds, in multiply-adds that take the same time."""

    token: float
    """The definition, for each of the B N C elements: q, k, v, their norms and copies pass through memory."""
    call: float
    """The covariance form, once a call: it has about three times as many steps, most of them small."""
    weight: float
    """The covariance form, once a call for each of the C^2 entries of a weight: their float64 copies."""


CPU_OVERHEADS = {
    False: Overheads(token=334.0, call=5.1e7, weight=1260.0),
    True: Overheads(token=366.0, call=8.9e7, weight=2540.0),
}
"""By whether gradients are needed. Fitted to benchmarks/results/xca_forms.csv (``python -m xcit.bench calibrate``):
with these constants the rule picks the better form in every case of it, or one within 5 % (tests/bench)."""

UNMEASURED_MARGIN = 1.25
"""On devices without measurements the covariance form must save this factor of multiply-adds."""


def multiply_adds(form: Form, *, num_tokens: int, embed_dim: int, num_heads: int, needs_grad: bool = False) -> float:
    """Return the multiply-adds of one image through one XCA layer.

    Args:
        form: "tokens" or "covariance".
        num_tokens: N.
        embed_dim: C.
        num_heads: h.
        needs_grad: count the backward pass as well.

    Raises:
        ConfigError: another form.
    """
    N, C, d = num_tokens, embed_dim, embed_dim / num_heads
    if form == "tokens":
        return (4 * N * C**2 + 2 * N * C * d) * (3 if needs_grad else 1)
    if form == "covariance":
        forward = 2 * N * C**2 + 3 * C**3 + 2 * C**2 * d
        return forward + (3 * N * C**2 + 6 * C**3 + 4 * C**2 * d if needs_grad else 0)
    raise ConfigError(f"form is {form!r}; multiply-adds are those of 'tokens' or of 'covariance'.")


def choose_form(
    *,
    num_tokens: int,
    embed_dim: int,
    num_heads: int,
    batch_size: int,
    dtype: torch.dtype,
    device_type: str,
    needs_grad: bool,
) -> Literal["tokens", "covariance"]:
    """Return the form of XCA that takes less time at these sizes.

    On a CPU in float32 or float64, the multiply-adds of both forms are compared, each with its measured overheads. In
    half precision a CPU takes the definition: it has fast products of such matrices only with a rounded result, and
    the second moment must not be rounded. Elsewhere nothing is measured yet, and multiply-adds decide with a margin.

    Args:
        num_tokens: N. Where it (or the batch size) is symbolic, the answer is "tokens" unless it is the same for all
            sizes: no guard is added.
        embed_dim: C.
        num_heads: h.
        batch_size: B.
        dtype: of the tokens, autocast's where that is on.
        device_type: "cpu", "cuda", ...
        needs_grad: whether a backward pass will follow.
    """

    def cost(form: Form) -> float:
        return batch_size * multiply_adds(
            form, num_tokens=num_tokens, embed_dim=embed_dim, num_heads=num_heads, needs_grad=needs_grad
        )

    tokens, covariance = cost("tokens"), cost("covariance")
    if device_type == "cpu":
        if dtype not in (torch.float32, torch.float64):
            return "tokens"
        overheads = CPU_OVERHEADS[needs_grad]
        tokens = tokens + overheads.token * batch_size * num_tokens * embed_dim
        covariance = covariance + overheads.call + overheads.weight * embed_dim**2
    else:
        covariance = UNMEASURED_MARGIN * covariance
    return "covariance" if statically_known_true(covariance < tokens) else "tokens"
