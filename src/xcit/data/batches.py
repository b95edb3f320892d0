"""The types of what flows from files to a model."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor


class LabelledImages(NamedTuple):
    """What a classifier is trained and judged on: one image and its class, or a batch of both."""

    images: Float[Tensor, "*batch chans height width"]
    """Normalised pixels."""
    labels: Int64[Tensor, "*batch"] | Float[Tensor, "*batch classes"]
    """Classes, from 0; or 0 and 1 for each class, where an image may have several."""
    indices: Int64[Tensor, "*batch"]
    """Position of each image in its set; of one that was asked for but could not be decoded, its own."""
    decoded: Bool[Tensor, "*batch"]
    """Whether it could be. If not, in training another image and its label stand here; in evaluation zeros do, which
    count for nothing."""


class Crops(NamedTuple):
    """Several distorted views of each image, which a self-supervised model is to see as the same."""

    views: tuple[Float[Tensor, "*batch global_views chans height width"], ...]
    """Normalised pixels: the global crops (..., 2, C, H, W), then, where there are any, the local ones, of another
    size."""
    indices: Int64[Tensor, "*batch"]
    """Position of each image in its set; of one that was asked for but could not be decoded, its own."""
    decoded: Bool[Tensor, "*batch"]
    """Whether it could be. If not, views of another image stand here."""
