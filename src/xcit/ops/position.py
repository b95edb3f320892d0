"""The sinusoids of XCiT's positional encoding, for a grid of any size.

Legend: H, W patch grid, D hidden_dim.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

POSITION_EPS = 1e-6
"""Added to the last position before dividing by it, as in the released code."""


def fourier_position(
    height: int,
    width: int,
    *,
    hidden_dim: int = 32,
    temperature: float = 10000.0,
    device: torch.device | None = None,
) -> Float[Tensor, "height width features"]:
    """Sines and cosines of each patch's row and column, at ``hidden_dim`` wavelengths each.

    A row's position y runs over 1..H and is scaled to 2 pi y / (H + 1e-6), so a grid of any size spans the same angles
    and nothing is interpolated. Feature 2i is sin(y / T^(2i/D)), feature 2i+1 the cosine; columns likewise.

    Args:
        height: rows of the patch grid.
        width: its columns.
        hidden_dim: features of the rows, and of the columns; even.
        temperature: T.
        device: where the result lives.

    Returns:
        (H, W, 2 * hidden_dim), rows' features first, in [-1, 1]; always float32: the released models were trained on
        float32 sinusoids, whatever the precision around them.

    Source: the released code's ``PositionalEncodingFourier``.
    """
    rows = _sinusoids(height, hidden_dim, temperature, device)
    columns = _sinusoids(width, hidden_dim, temperature, device)
    return torch.cat((rows.unsqueeze(1).expand(-1, width, -1), columns.unsqueeze(0).expand(height, -1, -1)), dim=-1)


def _sinusoids(length: int, hidden_dim: int, temperature: float, device: torch.device | None) -> Tensor:
    position = torch.arange(1, length + 1, device=device).to(torch.float32)
    position = position / (position[-1:] + POSITION_EPS) * (2 * math.pi)
    index = torch.arange(hidden_dim, device=device).to(torch.float32)
    wavelength = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / hidden_dim)
    angle = position.unsqueeze(1) / wavelength  # (length, D)
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)
