"""What classes are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xcit.errors import ConfigError


def class_names(cfg: Mapping[str, Any], num_classes: int) -> list[str]:
    """Return one name a class, in the order of the logits.

    Args:
        cfg: a model's ``pretrained_cfg``: its ``class_names`` if it has any, else those of its ``label_set``
            ("imagenet-1k"), else the classes' numbers as text.
        num_classes: outputs of the classifier.

    Raises:
        ConfigError: names that are not as many as the classes, or a label set without names here.
    """
    names = cfg.get("class_names")
    label_set = cfg.get("label_set")
    if not names and label_set == "imagenet-1k":
        names = imagenet_names()
    elif not names and label_set:
        raise ConfigError(f"The names of the label set {label_set!r} are not known here; give class_names.")
    if not names:
        return [str(index) for index in range(num_classes)]
    if len(names) != num_classes:
        raise ConfigError(
            f"The model has {num_classes} classes, but {len(names)} class names; save it with as many class_names as "
            f"it has classes."
        )
    return [str(name) for name in names]


def imagenet_names() -> list[str]:
    """Return the 1,000 names of ImageNet-1k in the usual order: 0 is "tench", 999 "toilet tissue".

    Two names stand for two classes each ("crane", "maillot"); their numbers tell them apart.

    Source: the metadata that torchvision publishes with its ImageNet weights.
    """
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
