"""The types of what flows from files to a model."""

from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor


class LabelledImages(NamedTuple):
    """What a classifier is trained on: one image and its class, or a batch of both."""

    images: Float[Tensor, "*batch chans height width"]
    """Normalised pixels."""
    labels: Int64[Tensor, "*batch"]
    """Classes, from 0."""
