"""What folding did: counted, and measured against the model that was folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from xcit.errors import ExportError


@dataclass(frozen=True)
class FoldReport:
    """What was folded, what it saves, and how much it changes."""

    folded: Mapping[str, int]
    """How many of what: "layer-norm affines into linear layers" and so on."""
    image_size: tuple[int, int]
    """Height and width for which multiply-adds are counted."""
    multiply_adds_before: int
    """Of one image, in convolutions and matrix products, each model in its own form of XCA. Of a detector: of its
    backbone."""
    multiply_adds_after: int
    num_values_before: int
    """Numbers that the model keeps: parameters, and buffers of floating point."""
    num_values_after: int
    max_relative_difference: float
    """The largest difference between the outputs of both, relative to the output's largest magnitude."""
    checked_sizes: tuple[tuple[int, int], ...]
    """Heights and widths of the random images on which that was measured."""
    dtype: torch.dtype
    """Of the model's weights, in which that was measured."""

    def __str__(self) -> str:
        """Return a few lines that say all of it."""
        saved = 1 - self.multiply_adds_after / self.multiply_adds_before
        height, width = self.image_size
        sizes = ", ".join(f"{rows} x {columns}" for rows, columns in self.checked_sizes)
        lines = [f"folded: {count} {what}" for what, count in self.folded.items()]
        lines += [
            f"multiply-adds at {height} x {width}: {self.multiply_adds_before / 1e9:.3f} G before, "
            f"{self.multiply_adds_after / 1e9:.3f} G after ({100 * saved:.1f} % saved)",
            f"numbers kept: {self.num_values_before:,} before, {self.num_values_after:,} after",
            f"largest relative difference in {str(self.dtype).removeprefix('torch.')}: "
            f"{self.max_relative_difference:.1e} (random images of {sizes})",
        ]
        return "\n".join(lines)


def relative_difference(
    folded: Callable[[Tensor], Any], original: Callable[[Tensor], Any], images: Sequence[Tensor]
) -> float:
    """Return the largest difference of two models' outputs, relative to the original's largest magnitude.

    Args:
        folded: images to a tensor, or to several.
        original: likewise, in eval mode.
        images: batches.

    Raises:
        ExportError: values that are not finite.
    """
    worst = 0.0
    with torch.no_grad():
        for batch in images:
            for ours, theirs in zip(_tensors(folded(batch)), _tensors(original(batch)), strict=True):
                wide = theirs.to(torch.promote_types(theirs.dtype, torch.float32))
                difference, largest = (ours.to(wide) - wide).abs().max(), wide.abs().max()
                if not largest.isfinite():
                    raise ExportError(
                        "The model itself returns values that are not finite for a random image, in "
                        f"{str(theirs.dtype).removeprefix('torch.')}: mend its weights, or take a wider type."
                    )
                worst = max(worst, (difference / largest).item() if largest > 0 else difference.item())
                if not difference.isfinite():
                    return float("inf")
    return worst


def count_multiply_adds(model: Callable[[Tensor], object], shape: tuple[int, ...], like: Tensor) -> int:
    """Return the multiply-adds of convolutions and matrix products of a forward pass, without making it.

    Args:
        model: as it is; its weights are not read.
        shape: of the images.
        like: a tensor of the model's type and device.
    """
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(shape, dtype=like.dtype, device=like.device)
        with FlopCounterMode(display=False) as flops:
            model(image)
    return flops.get_total_flops() // 2


def count_values(model: nn.Module) -> int:
    """Return how many numbers a model keeps: parameters, and buffers of floating point."""
    return sum(t.numel() for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
