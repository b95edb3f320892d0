"""A run of segmentation in small; its scenes are those of ``detection_runs``."""

from pathlib import Path

from xcit.recipes.segmentation_config import (
    MaskedDataConfig,
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationOptimConfig,
    SegmenterConfig,
)
from xcit.recipes.settings import ComputeConfig


def tiny(scenes: Path) -> SegmentationConfig:
    """Return settings of two epochs of two steps."""
    return SegmentationConfig(
        recipe="tiny",
        seed=3,
        epochs=2,
        model=SegmenterConfig(
            name="xcit_nano_12_p16",
            head="upernet",
            options={"depth": 4, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2},
            drop_path_rate=0.1,
            channels=8,
            auxiliary_channels=8,
        ),
        data=MaskedDataConfig(root=str(scenes), image_size=64, max_size=128, val_fraction=0.2, num_workers=0),
        augment=SegmentationAugmentConfig(crop_size=48),
        optim=SegmentationOptimConfig(batch_size=4, lr=1e-3, warmup_steps=1, ema_decay=0.5, steps_per_epoch=2),
        compute=ComputeConfig(device="cpu", checkpoint_minutes=0),
    )
