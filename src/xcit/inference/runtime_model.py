"""An exported classifier in the place of the model that it was exported from."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from xcit.errors import ConfigError
from xcit.inference.runtimes import Session, open_session
from xcit.models.xcit import XCiT


class SessionModel(XCiT):
    """An ``XCiT`` without weights of its own, whose forward pass is an exported file's.

    It stands wherever a model is asked for its logits alone: in a ``Predictor``. Any number of images goes in; a file
    that was made for N at once gets them N by N.

    Args:
        session: of an exported classifier.

    Attributes:
        session: as given.
        config: the arguments of the model that was exported.
        pretrained_cfg: what the file says of the preparation of images and of its classes.
        num_classes: of the logits; 0 where the file returns features.

    Raises:
        ConfigError: the file is no classifier.
    """

    def __init__(self, session: Session) -> None:
        nn.Module.__init__(self)  # and not XCiT's, which makes the weights
        description = session.description
        if description.get("task") not in ("classification", "features"):
            raise ConfigError(
                f"{session.path} holds {description.get('task', 'a model')}, not a classifier, so there are no classes "
                f"of images to predict; run it with xcit.inference.runtimes.open_session."
            )
        self.session = session
        self.config: dict[str, Any] = dict(description["config"])
        self.pretrained_cfg: dict[str, Any] = dict(description["pretrained_cfg"])
        self.num_classes = int(self.config["num_classes"])
        self.embed_dim = int(self.config["embed_dim"])
        # where it is and what it takes, for those who ask the first parameter
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Return the file's logits (B, num_classes), float32."""
        if isinstance(x, FakeTensor):  # of a count of memory; what a runtime takes cannot be told
            return x.new_empty(x.shape[0], self.num_classes)
        images = np.ascontiguousarray(x.detach().numpy())
        at_once = self.session.description["input"]["batch"] or len(images)
        rows = []
        for start in range(0, len(images), at_once):
            part = images[start : start + at_once]
            filled = np.concatenate((part, np.zeros((at_once - len(part), *part.shape[1:]), part.dtype)))
            (logits,) = self.session(filled)
            rows.append(logits[: len(part)])
        return torch.from_numpy(np.concatenate(rows))

    def forward_features(self, x: Tensor) -> NoReturn:
        """Refuse: a file has no layers to stop at.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.session.path} gives its outputs alone, no tokens; use the model it was made of.")


def load_exported(
    path: str | os.PathLike[str], *, device: str = "auto", image_size: int | tuple[int, int] | None = None
) -> SessionModel:
    """Open an exported classifier as a model.

    Args:
        path: of the file.
        device: "auto" or "cpu": exported files run there.
        image_size: at which it is to be used; None for the one that it was made for.

    Raises:
        ConfigError: another device, a file of no classifier, or one made for another size.
        BackendError, CheckpointError: as ``open_session``.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"The device is {device!r}, but exported files run on the CPU; leave it out.")
    model = SessionModel(open_session(path))
    made_for = model.session.description["input"]
    own = (made_for["height"], made_for["width"])
    if image_size is not None and own[0] is not None:
        asked = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if asked != own:
            raise ConfigError(
                f"image_size is {asked[0]} x {asked[1]}, but {path} was exported for {own[0]} x {own[1]} px; export it "
                f"for that size, or with --size dynamic."
            )
    return model
