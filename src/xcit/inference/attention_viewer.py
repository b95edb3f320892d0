"""Everything to see of a model's attention in an image, under the names of the files that `xcit attend` writes.

========  ==============================================================================================================
kind      what it is
========  ==============================================================================================================
overlay   the attention map laid over the image: ``_overlay.png``, of one head ``_overlay_head3.png``
mask      the patches that hold most of the attention, white on black: ``_mask.png``, ``_mask_head3.png``
heads     one figure of the image, the heads' mean and every head: ``_heads.png``
raw       ``_attention.npy``, (heads, Hp, Wp) float32, each head's shares of its patches; ``_attention.json`` beside it
xca       the channel attention of every block and head: ``_xca.png`` and ``_xca.npy``, (blocks, heads, d, d) float32
pca       the patch features' three main directions as red, green and blue: ``_pca.png``
========  ==============================================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import nn

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError, UnknownNameError
from xcit.inference.attention_maps import ClassAttention, channel_attention, class_attention, mass_mask, overlay
from xcit.inference.attention_names import KINDS, Head, file_ends, head_end
from xcit.inference.attention_pictures import channels_sheet, colours_picture, heads_sheet, mask_picture, side_by_side
from xcit.inference.attention_room import ViewerRoom
from xcit.inference.devices import choose_device, is_out_of_memory
from xcit.inference.feature_pca import FeatureBasis, feature_colours, fit_basis, patch_features
from xcit.inference.whole_image import Size, WholeImage
from xcit.models.factory import create_model
from xcit.models.weights import bare
from xcit.models.xcit import XCiT

OF_CLASS_ATTENTION = frozenset(("overlay", "mask", "heads", "raw"))


class Looked(NamedTuple):
    """What was computed of one image."""

    attention: ClassAttention | None
    """Of a batch of this image alone."""
    features: np.ndarray | None
    """(Hp, Wp, C) patch features."""
    seen: tuple[int, int]
    """Height and width at which the model saw it."""


class AttentionViewer:
    """Look at images with a model: numbers and pictures.

    Args:
        model: what ``create_model`` takes as a name (with ``pretrained=True``), the path of a checkpoint, or an
            ``XCiT`` itself, which stays the caller's and is used where it lies.
        kinds: some of ``KINDS``.
        layer: of the class-attention layers, from 0; -1 is the last.
        head: what overlays and masks show.
        keep: share of the attention that a mask holds, more than 0 and up to 1.
        opacity: of the overlay's brightest colour, 0 to 1.
        size: at which images are looked at; see ``WholeImage``.
        beside: put overlays, masks and feature colours to the right of the image instead of alone.
        foreground: draw feature colours of the foreground alone (``fit_basis``).
        preprocessing: instead of the one that ``model.pretrained_cfg`` describes.
        device: "auto" or a device's name; a model that is passed stays where it is.

    Raises:
        UnknownNameError: no such model or kind.
        CheckpointError: its weights cannot be had.
        ConfigError: an argument out of its range, or a model without what is to be seen.
        BackendError: the device is not available here.

    Example:
        >>> viewer = AttentionViewer("xcit_small_12_p8_224_dist", kinds=["overlay", "heads"])
        >>> viewer.pictures(Image.open("dog.jpg"))["_heads.png"].show()
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        kinds: Sequence[str] = ("overlay",),
        layer: int = -1,
        head: Head = "mean",
        keep: float = 0.6,
        opacity: float = 0.75,
        size: Size = None,
        beside: bool = False,
        foreground: bool = False,
        preprocessing: Preprocessing | None = None,
        device: str = "auto",
    ) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise UnknownNameError("kind of picture", kind, KINDS, f"There are {', '.join(KINDS)}.")
        if not kinds:
            raise ConfigError(f"No kind of picture was asked for; there are {', '.join(KINDS)}.")
        if not 0 < keep <= 1:
            raise ConfigError(f"keep is {keep}; it must be more than 0 and at most 1.")
        if not 0 <= opacity <= 1:
            raise ConfigError(f"opacity is {opacity}; it must be between 0 and 1.")
        if isinstance(model, nn.Module):
            self.name, found = "", bare(model)
        else:
            self.name = os.fspath(model)
            chosen = choose_device(device)  # before a download that could turn out useless
            found = bare(create_model(self.name, pretrained=True).eval().to(chosen))
        if not isinstance(found, XCiT):
            raise ConfigError(f"Attention is looked at in an XCiT; got {type(found).__name__}.")
        self.model = found
        self.kinds = tuple(dict.fromkeys(kinds))
        self.keep, self.opacity, self.beside, self.foreground = keep, opacity, beside, foreground
        self.whole = WholeImage(
            preprocessing or Preprocessing.from_cfg(found.pretrained_cfg), found.config["patch_size"], size
        )
        self.basis: FeatureBasis | None = None
        """Of the feature colours; None for one of each image's own."""
        self._room = ViewerRoom(found, self.kinds)
        if OF_CLASS_ATTENTION & set(self.kinds) and not self.num_layers:
            raise ConfigError(
                "The model has no class attention to look at (variant avg_pool); xca and pca are what it has."
            )
        self.layer = layer
        self.heads: list[int | None] = [None]
        self.choose(layer, head)

    @property
    def num_layers(self) -> int:
        """Class-attention layers of the model."""
        return len(self.model.cls_attn_blocks)

    @property
    def num_heads(self) -> int:
        """Heads of each."""
        return self.model.config["num_heads"]

    def choose(self, layer: int = -1, head: Head = "mean") -> None:
        """Look at another layer and other heads; without a kind that shows class attention nothing changes.

        Args:
            layer: of the class-attention layers, from 0; -1 is the last.
            head: what overlays and masks show.

        Raises:
            ConfigError: the model has no such layer or head.
        """
        if not OF_CLASS_ATTENTION & set(self.kinds):
            return
        if not -self.num_layers <= layer < self.num_layers:
            raise ConfigError(
                f"layer is {layer}; the model's class-attention layers are 0 to {self.num_layers - 1}, or "
                f"-{self.num_layers} to -1."
            )
        if head == "mean":
            heads: list[int | None] = [None]
        elif head == "all":
            heads = list(range(self.num_heads))
        elif isinstance(head, int) and 0 <= head < self.num_heads:
            heads = [head]
        else:
            raise ConfigError(f"head is {head}; the model's heads are 0 to {self.num_heads - 1}, or mean, or all.")
        self.layer, self.heads = layer % self.num_layers, heads

    # --- names --------------------------------------------------------------------------------------------------------

    def maps(self) -> dict[str, int | None]:
        """Return the ends of overlays' and masks' names ("" or "_head3") and the head of each; None is the mean."""
        return {head_end(head): head for head in self.heads}

    def names(self, picture: str = ".png") -> list[str]:
        """Return the ends of the names of all files of one image, or of a video, whose pictures end in another way."""
        return file_ends(self.kinds, self.heads, picture)

    # --- looking ------------------------------------------------------------------------------------------------------

    def look(self, images: Sequence[Image.Image]) -> list[Looked]:
        """Run the model on images of one size and return what the kinds need, image by image.

        Raises:
            DataError: they do not fit into memory at this size, or cannot be converted.
            CheckpointError: attention or features are not finite.
        """
        seen = self.whole.seen_size(images[0].height, images[0].width)
        self._room.check(self.whole, images[0].height, images[0].width, len(images))
        with _memory(seen):
            batch = torch.stack([self.whole(image) for image in images])
            attention = None
            if OF_CLASS_ATTENTION & set(self.kinds):
                attention = class_attention(self.model, batch, self.layer)
            features = patch_features(self.model, batch) if "pca" in self.kinds else None
        return [
            Looked(
                None if attention is None else ClassAttention(attention.patches[i : i + 1], attention.own[i : i + 1]),
                None if features is None else features[i],
                seen,
            )
            for i in range(len(images))
        ]

    def features(self, image: Image.Image) -> Float[np.ndarray, "rows columns channels"]:
        """Return one image's patch features, for ``fit_basis``."""
        self._room.check(self.whole, image.height, image.width)
        with _memory(self.whole.seen_size(image.height, image.width)):
            return patch_features(self.model, self.whole(image)[None])[0]

    def fit_basis(self, features: Sequence[np.ndarray]) -> None:
        """Give feature colours one meaning in all images from here on."""
        self.basis = fit_basis(features, foreground=self.foreground)

    def moving_pictures(self, image: Image.Image, looked: Looked) -> dict[str, Image.Image]:
        """Return the pictures of one image that a video has too, by the ends of their names without a suffix."""
        shown = self.whole.shown(image)
        size = (shown.height, shown.width)
        drawn: dict[str, Image.Image] = {}
        for kind in self.kinds:
            if kind == "pca":
                assert looked.features is not None
                basis = self.basis or fit_basis([looked.features], foreground=self.foreground)
                drawn["_pca"] = colours_picture(feature_colours(looked.features, basis), size)
            if kind not in ("overlay", "mask"):
                continue
            assert looked.attention is not None
            for end, head in self.maps().items():
                one = looked.attention.mean[0] if head is None else looked.attention.patches[0, head]
                if kind == "overlay":
                    drawn[f"_overlay{end}"] = overlay(shown, torch.from_numpy(one), self.opacity)
                else:
                    drawn[f"_mask{end}"] = mask_picture(mass_mask(one, self.keep), size)
        if self.beside:
            drawn = {name: side_by_side(shown, picture) for name, picture in drawn.items()}
        if "heads" in self.kinds:
            assert looked.attention is not None
            drawn["_heads"] = heads_sheet(shown, looked.attention.patches[0], self.opacity, self.title(looked.seen))
        return drawn

    def pictures(self, image: Image.Image, looked: Looked | None = None) -> dict[str, Image.Image]:
        """Return all pictures of one image, by the ends of their names.

        Args:
            image: of any size, in mode RGB.
            looked: what ``look`` returned of it; None to look now.

        Raises:
            DataError, CheckpointError: as ``look``.
        """
        looked = looked or self.look([image])[0]
        drawn = {f"{name}.png": picture for name, picture in self.moving_pictures(image, looked).items()}
        if "xca" in self.kinds:
            drawn["_xca.png"] = self.channels_picture(self.channels(image))
        return drawn

    def channels(self, image: Image.Image) -> list[np.ndarray]:
        """Return XCA's matrices of one image: of each block (heads, d, d)."""
        self._room.check(self.whole, image.height, image.width)
        with _memory(self.whole.seen_size(image.height, image.width)):
            return [matrix[0] for matrix in channel_attention(self.model, self.whole(image)[None])]

    def channels_picture(self, matrices: Sequence[np.ndarray]) -> Image.Image:
        """Return the figure of what ``channels`` returned."""
        return channels_sheet(matrices, "Channel attention of block.head, largest entry in multiples of an even one")

    def facts(self, looked: Looked) -> dict[str, Any]:
        """Return what stands beside a raw array."""
        assert looked.attention is not None
        return {
            "model": self.name,
            "layer": self.layer + 1,
            "seen": list(looked.seen),
            "patch_size": self.whole.patch_size,
            "class_token_keeps": [float(share) for share in looked.attention.own[0]],
        }

    def title(self, seen: tuple[int, int]) -> str:
        """Return what stands above a sheet of heads."""
        return f"Class attention, layer {self.layer + 1} of {len(self.model.cls_attn_blocks)}, at {seen[0]} x {seen[1]}"


@contextmanager
def _memory(seen: tuple[int, int]) -> Iterator[None]:
    """Turn a lack of memory into a sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(f"does not fit into memory at {seen[0]} x {seen[1]} px; choose a smaller size.") from None
