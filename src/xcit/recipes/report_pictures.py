"""Which images a run's report shows, and how: thumbnails, mistakes, sheets of attention, samples."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from xcit.data.image_set import ImageSet
from xcit.data.images import convert_image
from xcit.data.preprocess import Preprocessing
from xcit.errors import DataError
from xcit.evaluate.classification import predicted
from xcit.inference.attention_maps import attention_maps, overlay
from xcit.models.xcit import XCiT
from xcit.report.html import Thumbnail
from xcit.report.overlays import Example
from xcit.report.style import drawable, shorten

THUMBNAIL = 160
"""Pixels of a picture's longer side."""
MAX_CLASSES = 10
"""Classes that an example or a sample is shown of."""
CAPTION = 34
"""Characters above the two pictures of an example."""
AT_ONCE = 8
"""Images whose attention is computed together."""
QUALITY = 88
"""Of JPEG files."""


class Answer(NamedTuple):
    """What the model said of one image and what is right, in words."""

    position: int
    """Of the image in its set."""
    wrong: bool
    caption: str
    """A sentence, names in full."""
    label: str
    """The same above a picture: one line or two, in characters that can be drawn."""


@dataclass(frozen=True)
class Shown:
    """A set of images as a model sees them.

    Attributes:
        images: each could be decoded when the model was evaluated.
        preprocessing: how the model takes images.
        model: an ``XCiT``, whose attention is shown, or another classifier.
    """

    images: ImageSet
    preprocessing: Preprocessing
    model: nn.Module

    @property
    def shows_attention(self) -> bool:
        """Whether the model has class attention to look at."""
        return isinstance(self.model, XCiT) and self.model.cls_token is not None

    @property
    def names(self) -> list[str]:
        """The classes as a picture can show them."""
        return [drawable(name, f"class {i}") for i, name in enumerate(self.images.class_names)]

    def pictures(
        self, positions: Sequence[int], *, heads: int = 0, attention: bool = True
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Yield each image as the model sees it, sharper, and with its attention laid over it.

        An image that cannot be read any more is left out.

        Args:
            positions: of the images.
            heads: yield this many heads' attention too, after that of all together.
            attention: False for the plain images only; of a model without class attention these are all there is.
        """
        for start in range(0, len(positions), AT_ONCE):
            opened = []
            for position in positions[start : start + AT_ONCE]:
                try:
                    image = convert_image(self.images.open(position), self.preprocessing.in_chans)
                    opened.append((position, image, self.preprocessing(image)))
                except DataError:
                    continue
            if not opened:
                continue
            shown = [self._thumbnail(image) for _, image, _ in opened]
            if not (attention and self.shows_attention):
                yield from ((position, [picture]) for (position, _, _), picture in zip(opened, shown, strict=True))
                continue
            assert isinstance(self.model, XCiT)
            width, height = shown[0].size
            maps = attention_maps(self.model, torch.stack([tensor for *_, tensor in opened]), (height, width))
            for (position, _, _), picture, each in zip(opened, shown, maps, strict=True):
                yield position, [picture, *(overlay(picture, one) for one in (each.mean(dim=0), *each[:heads]))]

    def _thumbnail(self, image: Image.Image) -> Image.Image:
        """The part of an image that the model sees, at the thumbnails' size."""
        scale = THUMBNAIL / max(self.preprocessing.image_size)
        height, width = (max(1, round(side * scale)) for side in self.preprocessing.image_size)
        return replace(self.preprocessing, image_size=(height, width)).resize_and_crop(image)


@dataclass(frozen=True)
class Judged(Shown):
    """A set of images with a model's answers.

    Attributes:
        logits: (n, classes), in the images' order, on the CPU.
    """

    logits: Float[Tensor, "images classes"]
    guesses: np.ndarray = field(init=False)
    """(n,) the most probable class."""
    confidences: np.ndarray = field(init=False)
    """(n,) its probability."""
    errors: np.ndarray = field(init=False)
    """(n,) how sure the model is of what is wrong: of its guess, or with several labels how far the probability of
    the worst class is from the truth; 0 where all is right."""

    def __post_init__(self) -> None:
        if self.images.multi_label:
            probabilities = torch.sigmoid(self.logits.float())
            sure, guess = probabilities.max(dim=1)
            distance = (probabilities - torch.from_numpy(self.images.labels).float()).abs().max(dim=1).values
            errors = torch.where(distance > 0.5, distance, 0)
        else:
            guess, sure = predicted(self.logits)
            errors = torch.where(guess == torch.from_numpy(self.images.labels), 0, sure)
        for name, value in (("guesses", guess), ("confidences", sure), ("errors", errors)):
            object.__setattr__(self, name, value.numpy())

    def mistakes(self) -> np.ndarray:
        """Return the positions of the images that the model is wrong about, the surest mistakes first."""
        wrong = np.flatnonzero(self.errors > 0)
        return wrong[np.argsort(-self.errors[wrong], kind="stable")]

    def one_of_each_class(self, *, right: bool) -> dict[int, int]:
        """Return the position of the first image of each class; of many classes only some, spread evenly.

        Args:
            right: take only images that the model is right about; classes without one are left out.
        """
        labels = self.images.labels
        taken = np.flatnonzero(self.errors == 0) if right else np.arange(len(labels))
        if self.images.multi_label:
            known = np.flatnonzero(labels[taken].any(axis=0))
            found = {int(number): int(taken[labels[taken, number].argmax()]) for number in known}
        else:
            known, firsts = np.unique(labels[taken], return_index=True)
            found = {int(number): int(taken[first]) for number, first in zip(known, firsts, strict=True)}
        chosen = sorted(found)
        if len(chosen) > MAX_CLASSES:
            chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, MAX_CLASSES).round().astype(int)]
        return {number: found[number] for number in chosen}

    def answer(self, position: int) -> Answer:
        """Put into words what the model said of an image."""
        if self.images.multi_label:
            return self._answer_of_several(position)
        truth, guess = int(self.images.labels[position]), int(self.guesses[position])
        sure = percent(self.confidences[position])
        names, drawn = self.images.class_names, self.names
        if truth == guess:
            label = f"{shorten(drawn[truth], CAPTION - len(sure) - 7)}, {sure} sure"
            return Answer(position, False, f"{names[truth]}, {sure} sure", label)
        label = f"{drawn[truth]} taken for {drawn[guess]}, {sure}"
        if len(label) > CAPTION:
            second = shorten(drawn[guess], CAPTION - len(sure) - 12)
            label = f"{shorten(drawn[truth], CAPTION)}\ntaken for {second}, {sure}"
        return Answer(position, True, f"{names[truth]} taken for {names[guess]}, {sure} sure", label)

    def _answer_of_several(self, position: int) -> Answer:
        probabilities = torch.sigmoid(self.logits[position].float()).numpy()
        truth = self.images.labels[position].astype(bool)
        names, drawn = self.images.class_names, self.names
        if self.errors[position] == 0:
            having = np.flatnonzero(truth)
            listed = ", ".join(names[i] for i in having) or "none of the classes"
            label = shorten(", ".join(drawn[i] for i in having) or "none of the classes", CAPTION)
            return Answer(position, False, listed, label)
        worst = int(np.abs(probabilities - truth).argmax())
        sure = percent(probabilities[worst])
        what = "overlooked" if truth[worst] else "not there"
        label = f"{shorten(drawn[worst], CAPTION - len(what) - len(sure) - 4)} {what}, {sure}"
        return Answer(position, True, f"{names[worst]}: {what}, probability {sure}", label)

    def examples(self, positions: Sequence[int], *, heads: int = 0) -> list[Example]:
        """Return the rows of a sheet: each image, its attention and, if asked for, that of its heads."""
        found = []
        for position, pictures in self.pictures(positions, heads=heads):
            answer = self.answer(position)
            found.append(Example(pictures, answer.label, not answer.wrong))
        return found

    def thumbnails(self, positions: Sequence[int]) -> list[Thumbnail]:
        """Return images with their attention beside them, for a page."""
        found = []
        for position, pictures in self.pictures(positions):
            answer = self.answer(position)
            alt = f"{self.images.names[position]}: {answer.caption}"
            found.append(Thumbnail([jpeg(picture) for picture in pictures], alt, answer.caption, answer.wrong))
        return found

    def samples(self) -> dict[str, bytes]:
        """Return an image of each class (of many classes, of some) as a PNG, by a name for its file.

        Prepared for the model, they are what the image they come from is: with a full crop to the last bit.
        """
        size, crop = self.preprocessing.image_size, self.preprocessing.crop_pct
        whole = replace(
            self.preprocessing, image_size=(int(size[0] / crop), int(size[1] / crop)), crop_pct=1.0
        )  # what is resized before the crop
        chosen = self.one_of_each_class(right=False)
        digits = len(str(max(chosen, default=0)))
        files = {}
        for number, position in chosen.items():
            try:
                image = convert_image(self.images.open(position), self.preprocessing.in_chans)
            except DataError:
                continue
            buffer = io.BytesIO()
            whole.resize_and_crop(image).save(buffer, "PNG")
            word = re.sub(r"[^\w-]+", "_", self.images.class_names[number])[:40].strip("_")
            stem = f"{number:0{digits}d}"
            files[f"{stem}_{word}.png" if word not in ("", stem) else f"{stem}.png"] = buffer.getvalue()
        return files


def percent(share: float) -> str:
    """Return a probability in words that do not round the last doubt away."""
    text = f"{100 * share:.0f} %"
    return "over 99 %" if text == "100 %" else text


def jpeg(image: Image.Image) -> bytes:
    """Return a picture as a JPEG file."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()
