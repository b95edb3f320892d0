"""Feature maps at strides 4, 8, 16 and 32 from an XCiT, for decoders that want a pyramid.

The tokens after four of the XCA blocks are laid out as maps and brought to their strides, by learned deconvolutions
upwards and by pooling downwards, as in the released detectors and segmenters. Class attention, final norm and head are
left out.

Legend: B batch, (Hp, Wp) patch grid, C embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from xcit.errors import ConfigError, ShapeError
from xcit.models.factory import create_model
from xcit.models.kernel_layers import choose_kernels
from xcit.models.xcit import XCiT, run_block
from xcit.ops.kernels import Kernels

STRIDES = (4, 8, 16, 32)


def default_taps(depth: int) -> tuple[int, int, int, int]:
    """Return the XCA blocks that the levels are taken from: after a third, a half, two thirds and all of the depth.

    Those of the released models: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, counted from 0.

    Raises:
        ConfigError: fewer than three blocks, which give no four places.
    """
    if depth < 3:
        raise ConfigError(f"A pyramid needs a model of 3 XCA blocks or more; this one has {depth}. Name its taps.")
    return depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1


class XCiTPyramid(nn.Module):
    """An XCiT's blocks, and the operations that make a pyramid of what they compute.

    Level i has stride ``strides[i]`` and ``out_channels[i]`` channels. Of an image of H x W, with Hp = ceil(H / p) and
    Wp = ceil(W / p), patches of p: a level above the stride p has p / stride times as many rows and columns as the
    patch grid, one below it as many as fit wholly. Where H and W are multiples of 32 that is H / stride x W / stride.

    Args:
        model: whose stem, positional encoding and blocks become part of the pyramid; its head is left aside.
        taps: four blocks, from 0, negative from the end, ascending; a block may serve several levels. None for
            ``default_taps``. Blocks after the last one are dropped.

    Attributes:
        config: the arguments of the ``XCiT``.
        taps: as given, from 0.
        strides: 4, 8, 16, 32.
        out_channels: C, four times.
        pretrained_cfg: what the model's weights expect of an image.

    Raises:
        ConfigError: taps that the model does not have, or not four of them.

    Source: section 4.3 of the paper; the released detection backbone.
    """

    def __init__(self, model: XCiT, taps: Sequence[int] | None = None) -> None:
        super().__init__()
        depth, C, patch_size = len(model.blocks), model.embed_dim, model.patch_embed.patch_size
        self.taps = default_taps(depth) if taps is None else _checked_taps(taps, depth)
        self.config = model.config | {"num_classes": 0}
        self.pretrained_cfg = dict(model.pretrained_cfg)
        self.patch_size = patch_size
        self.embed_dim = C
        self.strides = STRIDES
        self.out_channels = (C,) * len(STRIDES)
        self.grad_checkpointing = model.grad_checkpointing

        self.patch_embed = model.patch_embed
        self.pos_embeder = model.pos_embeder
        self.pos_drop = model.pos_drop
        self.blocks = model.blocks[: max(self.taps) + 1]
        # Named as in the released files. Each operation is a Sequential, as there, for its parameters' names.
        if patch_size == 16:
            self.fpn1: nn.Module = nn.Sequential(_double(C), nn.BatchNorm2d(C), nn.GELU(), _double(C))
            self.fpn2: nn.Module = nn.Sequential(_double(C))
            self.fpn3: nn.Module = nn.Identity()
            self.fpn4: nn.Module = nn.MaxPool2d(2)
        else:
            self.fpn1 = nn.Sequential(_double(C))
            self.fpn2 = nn.Identity()
            self.fpn3 = nn.MaxPool2d(2)
            self.fpn4 = nn.MaxPool2d(4)

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> list[Tensor]:
        """Return the four maps, the finest first, each (B, C, H / stride, W / stride).

        Raises:
            ShapeError: an image of which not one cell of the coarsest level is left, or of other channels.
        """
        x, (Hp, Wp) = self.patch_embed(x)
        least = STRIDES[-1] // self.patch_size
        if min(Hp, Wp) < least:
            raise ShapeError(
                f"The image gives a grid of {Hp} x {Wp} patches; the pyramid's coarsest level needs {least} x {least}: "
                f"enlarge or pad the image to more than {STRIDES[-1] - self.patch_size} px each way."
            )
        if self.pos_embeder is not None:
            x = x + self.pos_embeder(Hp, Wp)
        x = self.pos_drop(x)
        levels: list[Tensor] = []
        operations = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        enlarging = [stride < self.patch_size for stride in STRIDES]
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, Hp, Wp, recompute=self.grad_checkpointing)
            for level, tap in enumerate(self.taps):
                if tap == i:
                    # In this order torch sees a map with channels last, also of a single image.
                    grid = x.unflatten(1, (Hp, Wp)).permute(0, 3, 1, 2)
                    # What would be larger than the tokens waits: the blocks that follow need the memory.
                    levels.append(grid if enlarging[level] else operations[level](grid))
        for level, larger in enumerate(enlarging):
            if larger:
                levels[level] = operations[level](levels[level])
        return levels

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep only the blocks' inputs and recompute the rest backward."""
        self.grad_checkpointing = enable

    def set_kernels(self, kernels: Kernels) -> None:
        """Choose what runs the layers: "plain", their definitions in PyTorch, or "triton", the fused kernels for CUDA.

        Raises:
            UnknownNameError: another name.
            ConfigError: a layer that the kernels cannot run.
        """
        choose_kernels(self, kernels)


def create_pyramid(
    name: str | Path, pretrained: bool | str | Path = False, *, taps: Sequence[int] | None = None, **overrides: Any
) -> XCiTPyramid:
    """Build a pyramid on any model that ``create_model`` builds; its deconvolutions are random.

    Args:
        name: as of ``create_model``: an architecture, a released checkpoint (a DINO backbone too), or a file.
        pretrained: as of ``create_model``.
        taps: as of ``XCiTPyramid``.
        **overrides: other arguments of ``XCiT``, such as ``drop_path_rate``.

    Raises:
        XCiTError: as ``create_model`` and ``XCiTPyramid``.
    """
    return XCiTPyramid(create_model(name, pretrained, num_classes=0, **overrides), taps)


def _double(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)


def _checked_taps(taps: Sequence[int], depth: int) -> tuple[int, ...]:
    try:
        numbers = [index(tap) for tap in taps]
    except TypeError:
        numbers = []
    if len(numbers) != len(STRIDES) or not all(-depth <= tap < depth for tap in numbers):
        raise ConfigError(
            f"taps is {taps!r}; it must be {len(STRIDES)} of the model's blocks 0 to {depth - 1} (or -{depth} to "
            f"-1), one a level."
        )
    chosen = tuple(tap % depth for tap in numbers)
    if list(chosen) != sorted(chosen):
        raise ConfigError(f"taps is {taps!r}; the finer level must come from the earlier block: sort them.")
    return chosen
