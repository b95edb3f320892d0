"""Semantic segmentation: the released schedules on ADE20k, a user's own data set, and the embedded scenes.

Source: facebookresearch/xcit, semantic_segmentation/configs and the configurations that they build on: 80,000 steps
of Semantic FPN or 160,000 of UperNet with 16 crops of 512 px, AdamW at 6e-5 falling in a straight line, validated ten
times. An epoch here is a tenth of the run, as theirs. The released training was in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS
from xcit.recipes.recipe import Recipe
from xcit.recipes.segmentation_config import (
    MaskedDataConfig,
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationOptimConfig,
    SegmenterConfig,
)

Head = Literal["sem_fpn", "upernet"]
STEPS: dict[Head, int] = {"sem_fpn": 8_000, "upernet": 16_000}
"""Between two of the ten validations of a released run."""
DROP_PATH: dict[Head, dict[str, float]] = {
    "sem_fpn": {"tiny_12": 0.0, "small_12": 0.05, "small_24": 0.1, "medium_24": 0.2},
    "upernet": {"tiny_12": 0.0, "small_12": 0.05, "small_24": 0.1, "medium_24": 0.15},
}
"""Stochastic depth of the released configurations."""


def ade20k(head: Head, model: str) -> SegmentationConfig:
    """Return the released schedule of a head on a backbone.

    Args:
        head: which one.
        model: an architecture's id. It begins with its weights distilled at 384 px, as the released README shows.
    """
    size = model.removeprefix("xcit_").rpartition("_p")[0]
    return SegmentationConfig(
        recipe=released_name(head, model),
        epochs=10,
        model=SegmenterConfig(
            name=model, head=head, pretrained=f"{model}_384_dist", drop_path_rate=DROP_PATH[head][size]
        ),
        optim=SegmentationOptimConfig(steps_per_epoch=STEPS[head]),
    )


def released_name(head: Head, model: str) -> str:
    """Return what the recipe is called."""
    return f"{head}_{model}_{10 * STEPS[head] // 1000}k"


def segment_own() -> SegmentationConfig:
    """Return settings of fine-tuning the released UperNet on a user's images and masks.

    Not from the paper: passes over the images instead of steps, a higher rate, clipped gradients.
    """
    config = ade20k("upernet", "xcit_small_12_p16")
    return replace(
        config,
        recipe="segment",
        epochs=50,
        model=replace(config.model, pretrained="ade20k"),
        optim=SegmentationOptimConfig(batch_size=8, lr=1e-4, warmup_steps=200, clip_grad=5.0),
    )


def segment_scenes(head: Head) -> SegmentationConfig:
    """Return settings of a small segmenter for the embedded scenes (``xcit data scenes``), on a CPU.

    A digit mirrored is no digit. Which digit it is has to be learned at every one of its pixels, and nearly all pixels
    are of the background: a run of this length then learns where ink is and not which digit. Hence small crops of
    scenes full of digits (``xcit data scenes --num-digits 16 28 --height 20 64``), a low weight of the background, and
    a backbone that comes from a detector of digits. Their colours vary enough as they are drawn.
    """
    return SegmentationConfig(
        recipe="segment_scenes" if head == "sem_fpn" else "segment_scenes_upernet",
        epochs=16,
        model=SegmenterConfig(
            name="xcit_nano_12_p8",
            head=head,
            options={"depth": 4, "tokens_norm": True},
            channels=64,
            fpn_channels=64 if head == "sem_fpn" else 0,
            auxiliary_channels=64 if head == "upernet" else 256,  # of which Semantic FPN has none
            dropout=0.0,
        ),
        data=MaskedDataConfig(image_size=240, max_size=320, val_fraction=0.02, class_weights={"background": 0.2}),
        augment=SegmentationAugmentConfig(
            crop_size=128, min_ratio=0.9, max_ratio=1.4, cat_max_ratio=1.0, hflip=0.0, distort=0.0
        ),
        optim=SegmentationOptimConfig(batch_size=16, lr=2e-3, warmup_steps=100),
    )


def segmentation_recipes() -> Iterator[Recipe]:
    """Yield the recipes of semantic segmentation."""
    yield Recipe(
        name="segment",
        make=segment_own,
        summary="semantic segmentation on your own images and masks, from the released UperNet",
        source="this package",
        target="",
        cost="",
        status="not run",
        notes="Its released weights could not be had here; from a backbone's: --pretrained xcit_small_12_p16_384_dist.",
    )
    heads: tuple[tuple[Head, str], ...] = (("sem_fpn", "Semantic FPN"), ("upernet", "UperNet"))
    for head, words in heads:
        yield Recipe(
            name=segment_scenes(head).recipe,
            make=partial(segment_scenes, head),
            summary=f"a small {words} on the embedded scenes of digits (xcit data scenes)",
            source="this package",
            target="mIoU of 80 %",
            cost="16 epochs of 2,400 scenes, then 16 of 1,600"
            if head == "sem_fpn"
            else "16 epochs of 2,400 scenes, then 6",
            status="reproduced",
            notes="On 200 held-out scenes, by this run and what follows it in docs/segmentation.md.",
        )
    for checkpoint in CHECKPOINTS.values():
        if checkpoint.task != "segmentation":
            continue
        model = ARCHITECTURES[checkpoint.architecture].id
        kind: Head = "sem_fpn" if checkpoint.stem.startswith("sem_fpn") else "upernet"
        published = ", ".join(f"{metric.value:g} {metric.name}" for metric in checkpoint.metrics)
        yield Recipe(
            name=released_name(kind, model),
            make=partial(ade20k, kind, model),
            summary=f"{dict(heads)[kind]} on {model}, ADE20k, {10 * STEPS[kind]:,} steps",
            source="facebookresearch/xcit, semantic_segmentation/configs",
            target=f"of the released weights: {published}",
            cost="",
            status="not run",
        )
