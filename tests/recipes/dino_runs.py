"""A small run of DINO that several test files use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import runs

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
from xcit.recipes.settings import ComputeConfig

TINY_DINO = DinoConfig(
    recipe="tiny_dino",
    seed=4,
    epochs=3,
    model=BackboneConfig(
        name="xcit_nano_12_p8",
        options={"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2},
        drop_path_rate=0.1,
    ),
    data=UnlabelledDataConfig(
        root=str(runs.digits_folder()), in_chans=1, normalize="data", num_workers=0, crop_pct=1.0
    ),
    crops=CropConfig(global_size=16, local_size=8, num_local=2, hflip=0, blur_max_radius=1.0, degrees=10.0),
    optim=DinoOptimConfig(batch_size=38, lr=1e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=0.5, freeze_last_layer=0.5),
    head=HeadConfig(out_dim=24, hidden_dim=32, bottleneck_dim=16, norm_last_layer=False),
    teacher=TeacherConfig(momentum=0.9, temp=0.05, warmup_temp=0.04, warmup_temp_epochs=1.0),
    probe=ProbeConfig(every=2, k=5),
    compute=ComputeConfig(device="cpu", checkpoint_minutes=0),
)
STEPS = 190 // 38
"""Steps an epoch."""
