"""Learning from a teacher: a frozen classifier that is shown what the student sees, and the loss that follows it.

Shapes: B batch, K classes of the data, H × W pixels of the student's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.data.preprocess import Preprocessing

Kind = Literal["hard", "soft"]

LUMINANCE = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey, as in Pillow's conversion (ITU-R 601-2)."""


class Teacher:
    """A frozen classifier that answers for the student's images: in evaluation mode, without gradients.

    The images come as the student gets them, cropped, distorted and mixed. They are taken back from the student's
    normalisation, brought to the teacher's channels (grey repeated, or colours to their luminance) and size
    (antialiased bicubic, without clipping), and normalised as the teacher was trained. What both have alike is not
    touched: with equal preparation the teacher gets the very same numbers.

    It is no ``nn.Module`` itself, so that whoever holds one does not take it for a part of its own: it is in no
    ``state_dict``, optimiser, average of weights or exchange between processes, and stays in evaluation mode when its
    holder is trained. Take it to a device by ``to``.

    Args:
        model: images (B, C, H, W) to logits. It is frozen here.
        name: what it is called in messages.
        student: how the images that come are prepared; only the normalisation and the channels count.
        own: how the model's own are.
        columns: which of the model's outputs stands for each class of the data, in the data's order; None where they
            agree one by one.

    Source: Touvron et al., "Training data-efficient image transformers", 2021, section 4, where the teacher gets the
        student's images as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        student: Preprocessing,
        own: Preprocessing,
        columns: Sequence[int] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.student = student
        self.own = own
        self._columns = None if columns is None else torch.tensor(list(columns), dtype=torch.int64)
        self._in, self._out = _statistics(student), _statistics(own)
        self._luminance = torch.tensor(LUMINANCE).view(1, 3, 1, 1)

    def to(self, device: torch.device | str) -> Teacher:
        """Take the teacher to a device, and return it."""
        self.model.to(device)
        self._columns = None if self._columns is None else self._columns.to(device)
        self._in, self._out = self._in.to(device), self._out.to(device)
        self._luminance = self._luminance.to(device)
        return self

    def __call__(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Return the teacher's logits, (B, K), without gradients.

        Args:
            images: as the student gets them, on the teacher's device.
        """
        # Not inference_mode: the loss keeps what comes out for its backward pass.
        with torch.no_grad():
            logits = self.model(self.prepare(images))
            return logits if self._columns is None else logits.index_select(1, self._columns)

    def prepare(
        self, images: Float[Tensor, "batch chans height width"]
    ) -> Float[Tensor, "batch own_chans own_height own_width"]:
        """Return the student's images as the teacher's."""
        size, chans = self.own.image_size, self.own.in_chans
        if (self.student.mean, self.student.std) != (self.own.mean, self.own.std):
            mean, std = self._in.to(images.dtype)
            pixels = images * std + mean
            if chans < self.student.in_chans:
                pixels = (pixels * self._luminance.to(pixels.dtype)).sum(dim=1, keepdim=True)
            mean, std = self._out.to(images.dtype)
            images = (pixels - mean) / std  # of one channel, it is repeated by the statistics' three
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        return images


def distillation_loss(
    base_loss: Float[Tensor, ""],
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    kind: Kind,
    alpha: float,
    tau: float,
) -> Float[Tensor, ""]:
    """Return (1 − alpha) · base_loss + alpha · the teacher's part.

    With student logits z, teacher logits t, B images and K classes, the teacher's part is

    * hard: the mean over the images of −log softmax(z)[argmax t], without label smoothing;
    * soft: tau² / (B · K) · the sum over images and classes of p · (log p − log q), with p = softmax(t / tau) and
      q = softmax(z / tau). The division by K too is the published code's, so that the soft part is K times smaller than
      a mean over images.

    Args:
        base_loss: of the labels.
        student_logits: with gradients.
        teacher_logits: without.
        kind: "hard" (the paper's) or "soft".
        alpha: weight of the teacher's part, 0 to 1.
        tau: temperature of the soft distributions, more than 0; the hard part has none.

    Source: Touvron et al., "Training data-efficient image transformers", 2021, equations 2 and 3, and its code.
    """
    if kind == "hard":
        part = F.cross_entropy(student_logits, teacher_logits.argmax(dim=1))
    else:
        log_q = F.log_softmax(student_logits / tau, dim=1)
        log_p = F.log_softmax(teacher_logits / tau, dim=1)
        part = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (tau * tau / student_logits.numel())
    return (1 - alpha) * base_loss + alpha * part


def _statistics(preprocessing: Preprocessing) -> Tensor:
    """Mean and standard deviation, (2, 1, C, 1, 1)."""
    return torch.tensor([preprocessing.mean, preprocessing.std]).view(2, 1, -1, 1, 1)
