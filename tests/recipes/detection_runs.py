"""A run of detection in small, and the scenes that it learns from."""

from pathlib import Path

from xcit.data.scene_sets import write_scenes
from xcit.recipes.detection_config import (
    AnnotatedDataConfig,
    DetectionAugmentConfig,
    DetectionConfig,
    DetectionOptimConfig,
    DetectorConfig,
)
from xcit.recipes.settings import ComputeConfig


def scenes(root: Path) -> Path:
    """Write fifteen small scenes."""
    write_scenes(root, 12, 3, 0, size=(64, 96), num_digits=(1, 2), height=(20, 40))
    return root


def tiny(scenes: Path) -> DetectionConfig:
    """Return settings of two epochs of three steps."""
    return DetectionConfig(
        recipe="tiny",
        seed=3,
        epochs=2,
        model=DetectorConfig(
            name="xcit_nano_12_p16",
            options={"depth": 3, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2},
            drop_path_rate=0.1,
            out_channels=8, box_width=16, mask_channels=8, mask_convs=1,
            box_samples=32, proposals=50, max_detections=10,
        ),
        data=AnnotatedDataConfig(root=str(scenes), image_size=64, max_size=128, val_fraction=0.2, num_workers=0),
        augment=DetectionAugmentConfig(
            min_short=48, max_short=64, short_step=16, crop_min_short=64, crop_max_short=96, crop_short_step=32,
            crop_min=40, crop_max=64, jitter=0.1,
        ),
        optim=DetectionOptimConfig(batch_size=4, lr=1e-3, warmup_steps=1, first_decay=1, second_decay=2, ema_decay=0.5),
        compute=ComputeConfig(device="cpu", checkpoint_minutes=0),
    )  # fmt: skip
