"""Self-supervision with DINO: the four released backbones, and a user's own folder on one machine.

The settings that the released XCiT backbones were trained with were not published with them. What was:

* the defaults of DINO's own training script, which ``dino_ARCHITECTURE`` has;
* its README's advice for more: 300 epochs, a teacher temperature that rises to 0.07 in 30 epochs, and a last layer
  without fixed norms: ``dino_ARCHITECTURE_boost``;
* the configurations of VISSL, by authors of both papers, for S12/16, M24/16 and M24/8: ``dino_ARCHITECTURE_vissl``.
  Where that of a larger model is silent the S12/16's stand in.

Differences: float16 autocast is replaced by float32, with bfloat16 by --precision bf16.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021; facebookresearch/dino:
main_dino.py, README.md; facebookresearch/vissl: configs/config/pretrain/dino.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from xcit.models.zoo import CHECKPOINTS
from xcit.recipes.dino_config import (
    BackboneConfig,
    CropConfig,
    DinoConfig,
    DinoOptimConfig,
    HeadConfig,
    ProbeConfig,
    TeacherConfig,
    UnlabelledDataConfig,
)
from xcit.recipes.imagenet import NUM_IMAGES
from xcit.recipes.recipe import Recipe, training_cost

RELEASED = ("xcit_small_12_p16", "xcit_small_12_p8", "xcit_medium_24_p16", "xcit_medium_24_p8")


def dino_default(model: str) -> DinoConfig:
    """Return the defaults of DINO's training script, for an XCiT.

    Its batch is 64 a GPU, and the script's example runs on 16; a batch of 1,024 is that of the published XCiT configs
    too.
    """
    return DinoConfig(recipe=f"dino_{model}", epochs=100, model=BackboneConfig(name=model))


def dino_boost(model: str) -> DinoConfig:
    """Return them with what DINO's README advises for better features."""
    config = dino_default(model)
    return replace(
        config,
        recipe=f"dino_{model}_boost",
        epochs=300,
        head=replace(config.head, norm_last_layer=False),
        teacher=replace(config.teacher, temp=0.07, warmup_temp_epochs=30.0),
    )


def dino_vissl(model: str) -> DinoConfig:
    """Return the settings of VISSL's configuration for S12/16, M24/16 or M24/8."""
    config = dino_boost(model)
    medium = model.startswith("xcit_medium")
    p8 = model == "xcit_medium_24_p8"
    end = 1e-5 if medium else 4e-5
    return replace(
        config,
        recipe=f"dino_{model}_vissl",
        model=replace(
            config.model,
            drop_path_rate=0.15 if medium else 0.05,
        ),
        crops=replace(
            config.crops,
            num_local=6 if p8 else 8,
            global_min_area=0.32 if p8 else 0.3,
            local_max_area=0.32 if p8 else 0.3,
        ),
        optim=replace(
            config.optim,
            batch_size=960 if p8 else 1024,
            lr=9.375e-4 if p8 else 1e-3,
            lr_batch=0,
            min_lr=end,
            warmup_lr=end,
            clip_grad=0.0,
        ),
    )


def dino_small() -> DinoConfig:
    """Return settings for a user's own folder of some thousand to some hundred thousand images, on one machine.

    Not from the paper. Small batches move the teacher slowly, few images need few outputs, and a run is short.
    """
    return DinoConfig(
        recipe="dino-small",
        epochs=100,
        model=BackboneConfig(name="xcit_tiny_12_p16", drop_path_rate=0.05),
        data=UnlabelledDataConfig(),
        crops=CropConfig(num_local=6, local_size=96),
        optim=DinoOptimConfig(
            batch_size=64, lr=5e-4, lr_batch=0, min_lr=1e-6, warmup_epochs=5.0, weight_decay=0.04, weight_decay_end=0.2
        ),
        head=HeadConfig(out_dim=4096, hidden_dim=1024),
        teacher=TeacherConfig(momentum=0.998),
        probe=ProbeConfig(every=10),
    )


def dino_digits() -> DinoConfig:
    """Return settings for the embedded digits, without their labels: a small XCiT, some minutes on two CPU cores.

    A part of a digit is another digit, so there are no local crops, and the global ones keep most of it. The teacher is
    sharp: at the usual temperature the outputs stay flat for longer than this run is. Brightness and contrast change
    much, or the features tell the digits apart by the amount of ink alone.
    """
    return DinoConfig(
        recipe="dino_digits",
        epochs=40,
        model=BackboneConfig(name="xcit_nano_12_p8", drop_path_rate=0.0, options={"depth": 4, "tokens_norm": True}),
        data=UnlabelledDataConfig(format="digits", val_fraction=0.2, in_chans=1, crop_pct=1.0, normalize="data"),
        crops=CropConfig(
            global_size=32,
            num_local=0,
            global_min_area=0.8,
            hflip=0.0,
            degrees=15.0,
            brightness=0.4,
            contrast=0.4,
            saturation=0.0,
            hue=0.0,
            jitter_prob=0.8,
            grey_prob=0.0,
            blur_first=0.0,
            blur_second=0.0,
            blur_local=0.0,
            solarize=0.0,
        ),
        optim=DinoOptimConfig(
            batch_size=32,
            lr=1e-3,
            lr_batch=0,
            min_lr=1e-5,
            warmup_epochs=1.0,
            weight_decay=0.04,
            weight_decay_end=0.04,
        ),
        head=HeadConfig(out_dim=512, hidden_dim=512, bottleneck_dim=128),
        teacher=TeacherConfig(momentum=0.995, temp=0.02, warmup_temp=0.02),
        probe=ProbeConfig(every=5),
    )


def dino_recipes() -> Iterator[Recipe]:
    """Yield the recipes of self-supervised training."""
    yield Recipe(
        name="dino-small",
        make=dino_small,
        summary="self-supervision (DINO) of xcit_tiny_12_p16 on your own images, which need no labels",
        source="this package",
        target="",
        cost="",
        status="not run",
        notes="Defaults for one machine; from released weights: --model xcit_small_12_p16 --pretrained "
        "dino_xcit_small_12_p16_pretrain.",
    )
    yield Recipe(
        name="dino_digits",
        make=dino_digits,
        summary="self-supervision (DINO) of a small XCiT on the embedded digits",
        source="this package",
        target="k-NN accuracy above that of random weights",
        cost="",
        status="reproduced",
    )
    for model in RELEASED:
        checkpoint = CHECKPOINTS[f"dino_{model}_pretrain"]
        published = ", ".join(f"{metric.value:g} % {metric.name}" for metric in checkpoint.metrics)
        makers = [("", dino_default, "DINO's default settings"), ("_boost", dino_boost, "its README's advice for more")]
        if model != "xcit_small_12_p8":
            makers.append(("_vissl", dino_vissl, "VISSL's settings"))
        for suffix, make, words in makers:
            config = make(model)
            yield Recipe(
                name=f"dino_{model}{suffix}",
                make=partial(make, model),
                summary=f"self-supervision (DINO) of {model}, {words}",
                source="facebookresearch/vissl" if suffix == "_vissl" else "facebookresearch/dino, main_dino.py",
                target=f"ImageNet-1k, of the released weights: {published}",
                cost=training_cost(config.epochs, NUM_IMAGES, _gmacs_of_views(config, checkpoint.gmacs_port or 0.0)),
                status="not run",
                notes="The released weights' own settings were not published.",
            )


def _gmacs_of_views(config: DinoConfig, gmacs: float) -> float:
    """Return what stands for one image's forward pass: the student's views, and a third of the teacher's two.

    The teacher has no backward pass, which ``training_cost`` counts as twice the forward one.
    """
    crops = config.crops
    local = crops.num_local * (crops.local_size / crops.global_size) ** 2
    return gmacs * (2 + local + 2 / 3)
