"""What exists: the 14 architectures and the 70 released checkpoints, one row each.

Only facts that cannot be derived are typed here (parameters, multiply-adds, published metrics); URLs, timm's ids and
the like are built from the names.

How multiply-adds are counted. Every figure is in units of 1e9 multiply-adds (MACs, which the paper calls FLOPs) of one
image at ``image_size``. ``gmacs_port`` is the count that the ports publish: convolutions, linear layers and the
attention products, class attention's query for the class token only, as this package computes it.
``gmacs_official`` adds what the released code spends on queries for all tokens in its two class-attention layers:
2 N C^2 more, N tokens of width C.

Sources: [xcit] the README and code of the released repository, facebookresearch/xcit; [dino] facebookresearch/dino;
[timm] its results tables; [mmpretrain] its model metadata.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from xcit.errors import UnknownNameError

Task = Literal["classification", "self-supervised", "detection", "segmentation"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """One of the 14 released sizes, e.g. ``xcit_small_12_p16``: 12 layers, patches of 16 px."""

    id: str
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool
    num_params: int
    """With a head of 1,000 classes."""

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of ``XCiT`` that make this architecture; all others stay at their defaults."""
        names = ("patch_size", "embed_dim", "depth", "num_heads", "eta", "tokens_norm")
        return {name: getattr(self, name) for name in names}


class Metric(NamedTuple):
    """A published figure: what was measured, how much in percent, and who says so."""

    name: str
    value: float
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """One released file."""

    stem: str
    """The file's name without ``.pth``; ``create_model`` takes it as a name."""
    architecture: str
    """Id of the backbone's architecture."""
    task: Task
    url: str
    image_size: int
    """Side of the square images that the published figures are for; the shorter side in detection (at most 1,333 px
    the longer) and segmentation (at most 2,048 px)."""
    metrics: tuple[Metric, ...]
    distilled: bool = False
    """Trained to follow a RegNetY-16GF teacher as well as the labels."""
    crop_pct: float | None = None
    """Evaluation crops the centre ``image_size`` after resizing the shorter side to ``image_size / crop_pct``. None
    where there is no crop (detection, segmentation)."""
    timm_id: str | None = None
    """timm's name; on the Hugging Face hub the file is ``timm/<timm_id>``. None where timm has no such file."""
    num_params: int | None = None
    """Of the model that the file fits, head included. None for detectors and segmenters."""
    gmacs_port: float | None = None
    gmacs_official: float | None = None
    label_set: str | None = None
    """What the classes are: "imagenet-1k", "coco" or "ade20k"; None where the file has no classifier."""

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What the weights expect of an image and what the classes are, under timm's keys (see ``XCiT``)."""
        return {
            "input_size": [3, self.image_size, self.image_size],
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct,
            "label_set": self.label_set,
            "class_names": None,
            "checkpoint": self.stem,
            "architecture": self.architecture,
        }


# --- typed facts -----------------------------------------------------------------------------------------------------

# [xcit] depth and width of each size; LayerScale's initial value goes with the depth, tokens_norm with the size.
_SIZES: dict[str, tuple[int, int, int]] = {  # embed_dim, num_heads, depth
    "nano_12": (128, 4, 12),
    "tiny_12": (192, 4, 12),
    "tiny_24": (192, 4, 24),
    "small_12": (384, 8, 12),
    "small_24": (384, 8, 24),
    "medium_24": (512, 8, 24),
    "large_24": (768, 16, 24),
}

# [mmpretrain] parameters with 1,000 classes.
_NUM_PARAMS = {
    "xcit_nano_12_p16": 3_053_224,
    "xcit_tiny_12_p16": 6_716_272,
    "xcit_tiny_24_p16": 12_116_896,
    "xcit_small_12_p16": 26_253_304,
    "xcit_small_24_p16": 47_671_384,
    "xcit_medium_24_p16": 84_395_752,
    "xcit_large_24_p16": 189_096_136,
    "xcit_nano_12_p8": 3_049_016,
    "xcit_tiny_12_p8": 6_706_504,
    "xcit_tiny_24_p8": 12_107_128,
    "xcit_small_12_p8": 26_213_032,
    "xcit_small_24_p8": 47_631_112,
    "xcit_medium_24_p8": 84_323_624,
    "xcit_large_24_p8": 188_932_648,
}

# [mmpretrain], equal to [timm] to its two decimals: (gmacs_port, gmacs_official) by architecture and image side.
_GMACS = {
    ("xcit_nano_12_p16", 224): (0.557, 0.563),
    ("xcit_nano_12_p16", 384): (1.636, 1.655),
    ("xcit_tiny_12_p16", 224): (1.240, 1.254),
    ("xcit_tiny_12_p16", 384): (3.641, 3.684),
    ("xcit_tiny_24_p16", 224): (2.339, 2.354),
    ("xcit_tiny_24_p16", 384): (6.873, 6.915),
    ("xcit_small_12_p16", 224): (4.815, 4.873),
    ("xcit_small_12_p16", 384): (14.143, 14.313),
    ("xcit_small_24_p16", 224): (9.095, 9.153),
    ("xcit_small_24_p16", 384): (26.721, 26.891),
    ("xcit_medium_24_p16", 224): (16.130, 16.232),
    ("xcit_medium_24_p16", 384): (47.389, 47.691),
    ("xcit_large_24_p16", 224): (35.856, 36.087),
    ("xcit_large_24_p16", 384): (105.345, 106.025),
    ("xcit_nano_12_p8", 224): (2.157, 2.183),
    ("xcit_nano_12_p8", 384): (6.338, 6.413),
    ("xcit_tiny_12_p8", 224): (4.807, 4.865),
    ("xcit_tiny_12_p8", 384): (14.126, 14.296),
    ("xcit_tiny_24_p8", 224): (9.206, 9.264),
    ("xcit_tiny_24_p8", 384): (27.052, 27.222),
    ("xcit_small_12_p8", 224): (18.692, 18.923),
    ("xcit_small_12_p8", 384): (54.924, 55.603),
    ("xcit_small_24_p8", 224): (35.812, 36.043),
    ("xcit_small_24_p8", 384): (105.237, 105.916),
    ("xcit_medium_24_p8", 224): (63.525, 63.936),
    ("xcit_medium_24_p8", 384): (186.673, 187.881),
    ("xcit_large_24_p8", 224): (141.226, 142.151),
    ("xcit_large_24_p8", 384): (415.003, 417.721),
}

# ImageNet-1k validation, percent: top-1 [xcit README]; top-1, top-5 [timm]; top-1 on ImageNet-V2 (matched frequency)
# and on ImageNet-ReaL [timm].
_IMAGENET = {
    "xcit_nano_12_p16_224": (69.9, 69.982, 89.780, 58.410, 77.906),
    "xcit_nano_12_p16_224_dist": (72.2, 72.318, 90.826, 60.350, 80.246),
    "xcit_nano_12_p16_384_dist": (75.4, 75.460, 92.672, 64.250, 83.139),
    "xcit_tiny_12_p16_224": (77.1, 77.122, 93.728, 65.630, 84.104),
    "xcit_tiny_12_p16_224_dist": (78.6, 78.572, 94.210, 66.970, 85.219),
    "xcit_tiny_12_p16_384_dist": (80.9, 80.954, 95.430, 69.480, 87.209),
    "xcit_tiny_24_p16_224": (79.4, 79.474, 94.878, 68.380, 85.751),
    "xcit_tiny_24_p16_224_dist": (80.4, 80.462, 95.202, 69.740, 86.538),
    "xcit_tiny_24_p16_384_dist": (82.6, 82.580, 96.254, 72.080, 88.195),
    "xcit_small_12_p16_224": (82.0, 81.982, 95.814, 71.090, 86.995),
    "xcit_small_12_p16_224_dist": (83.3, 83.354, 96.420, 72.540, 88.283),
    "xcit_small_12_p16_384_dist": (84.7, 84.734, 97.136, 74.390, 89.243),
    "xcit_small_24_p16_224": (82.6, 82.588, 95.996, 71.130, 87.151),
    "xcit_small_24_p16_224_dist": (83.9, 83.880, 96.734, 73.150, 88.539),
    "xcit_small_24_p16_384_dist": (85.1, 85.102, 97.318, 74.650, 89.312),
    "xcit_medium_24_p16_224": (82.7, 82.630, 95.978, 70.940, 86.942),
    "xcit_medium_24_p16_224_dist": (84.3, 84.292, 96.936, 73.670, 88.802),
    "xcit_medium_24_p16_384_dist": (85.4, 85.434, 97.408, 75.190, 89.472),
    "xcit_large_24_p16_224": (82.9, 82.886, 95.880, 71.530, 86.963),
    "xcit_large_24_p16_224_dist": (84.9, 84.936, 97.128, 74.560, 89.053),
    "xcit_large_24_p16_384_dist": (85.8, 85.778, 97.530, 75.830, 89.675),
    "xcit_nano_12_p8_224": (73.8, 73.900, 92.154, 62.380, 81.675),
    "xcit_nano_12_p8_224_dist": (76.3, 76.330, 93.070, 64.510, 83.748),
    "xcit_nano_12_p8_384_dist": (77.8, 77.810, 94.036, 66.800, 85.008),
    "xcit_tiny_12_p8_224": (79.7, 79.710, 95.058, 68.590, 86.160),
    "xcit_tiny_12_p8_224_dist": (81.2, 81.214, 95.614, 70.960, 87.226),
    "xcit_tiny_12_p8_384_dist": (82.4, 82.394, 96.222, 71.800, 88.103),
    "xcit_tiny_24_p8_224": (81.9, 81.888, 95.978, 71.330, 87.384),
    "xcit_tiny_24_p8_224_dist": (82.6, 82.578, 96.186, 72.410, 88.054),
    "xcit_tiny_24_p8_384_dist": (83.7, 83.784, 96.716, 73.450, 88.804),
    "xcit_small_12_p8_224": (83.4, 83.354, 96.472, 72.670, 87.830),
    "xcit_small_12_p8_224_dist": (84.2, 84.252, 96.874, 73.910, 89.019),
    "xcit_small_12_p8_384_dist": (85.1, 85.068, 97.264, 75.040, 89.521),
    "xcit_small_24_p8_224": (83.9, 83.854, 96.636, 73.140, 87.984),
    "xcit_small_24_p8_224_dist": (84.9, 84.878, 97.200, 74.980, 89.224),
    "xcit_small_24_p8_384_dist": (85.6, 85.580, 97.572, 75.810, 89.752),
    "xcit_medium_24_p8_224": (83.7, 83.744, 96.394, 73.140, 87.636),
    "xcit_medium_24_p8_224_dist": (85.1, 85.078, 97.274, 75.660, 89.297),
    "xcit_medium_24_p8_384_dist": (85.8, 85.842, 97.602, 76.300, 89.809),
    "xcit_large_24_p8_224": (84.4, 84.380, 96.664, 74.170, 88.163),
    "xcit_large_24_p8_224_dist": (85.4, 85.396, 97.418, 76.060, 89.519),
    "xcit_large_24_p8_384_dist": (86.0, 86.024, 97.690, 76.750, 89.897),
}

# ImageNet-1k without labels, percent: k-NN and linear top-1 of frozen features [xcit README, dino README].
_DINO = {
    "xcit_small_12_p16": (76.0, 77.8),
    "xcit_small_12_p8": (77.1, 79.2),
    "xcit_medium_24_p16": (76.4, 78.8),
    "xcit_medium_24_p8": (77.9, 80.3),
}

# COCO 2017 validation, Mask R-CNN 3x: box AP, mask AP [xcit detection/README].
_COCO = {
    "xcit_tiny_12_p16": (42.7, 38.5),
    "xcit_tiny_12_p8": (44.5, 40.3),
    "xcit_small_12_p16": (45.3, 40.8),
    "xcit_small_12_p8": (47.0, 42.3),
    "xcit_small_24_p16": (46.5, 41.8),
    "xcit_small_24_p8": (48.1, 43.0),
    "xcit_medium_24_p16": (46.7, 42.0),
    "xcit_medium_24_p8": (48.5, 43.7),
}

# ADE20k validation, single scale, mIoU: Semantic FPN, UperNet [xcit semantic_segmentation/README].
_ADE20K = {
    "xcit_tiny_12_p16": (38.1, 41.5),
    "xcit_tiny_12_p8": (39.9, 43.5),
    "xcit_small_12_p16": (43.9, 45.9),
    "xcit_small_12_p8": (44.2, 46.6),
    "xcit_small_24_p16": (44.6, 46.9),
    "xcit_small_24_p8": (47.1, 48.1),
    "xcit_medium_24_p16": (45.9, 47.6),
    "xcit_medium_24_p8": (46.9, 48.4),
}

# --- rows derived from them ------------------------------------------------------------------------------------------

_FILES = "https://dl.fbaipublicfiles.com"


def _architecture(id: str) -> Architecture:
    size, patch = id.removeprefix("xcit_").rsplit("_p", 1)
    embed_dim, num_heads, depth = _SIZES[size]
    return Architecture(
        id=id,
        patch_size=int(patch),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        eta=1.0 if depth == 12 else 1e-5,
        tokens_norm=not size.startswith("nano"),
        num_params=_NUM_PARAMS[id],
    )


def _imagenet(stem: str) -> Checkpoint:
    name, dist, _ = stem.partition("_dist")
    architecture, image_size = name.rsplit("_", 1)
    readme, top1, top5, v2, real = _IMAGENET[stem]
    gmacs_port, gmacs_official = _GMACS[architecture, int(image_size)]
    return Checkpoint(
        stem=stem,
        architecture=architecture,
        task="classification",
        url=f"{_FILES}/xcit/{stem}.pth",
        image_size=int(image_size),
        metrics=(
            Metric("ImageNet top-1", readme, "xcit README"),
            Metric("ImageNet top-1", top1, "timm"),
            Metric("ImageNet top-5", top5, "timm"),
            Metric("ImageNet-V2 top-1", v2, "timm"),
            Metric("ImageNet-ReaL top-1", real, "timm"),
        ),
        distilled=bool(dist),
        crop_pct=1.0,
        timm_id=f"{name}.{'fb_dist_in1k' if dist else 'fb_in1k'}",
        num_params=_NUM_PARAMS[architecture],
        gmacs_port=gmacs_port,
        gmacs_official=gmacs_official,
        label_set="imagenet-1k",
    )


def _dino(architecture: str) -> Checkpoint:
    # The same backbones also lie under /xcit/ as *_dino.pth; whether those are the teacher's weights or, as the first
    # published ones were, the student's is not known. These are the teacher's.
    run = f"dino_{architecture}"
    knn, linear = _DINO[architecture]
    head = 1000 * (ARCHITECTURES[architecture].embed_dim + 1)  # which a backbone does not have
    gmacs_port, gmacs_official = (round(g - head / 1e9, 3) for g in _GMACS[architecture, 224])
    return Checkpoint(
        stem=f"{run}_pretrain",
        architecture=architecture,
        task="self-supervised",
        url=f"{_FILES}/dino/{run}_pretrain/{run}_pretrain.pth",
        image_size=224,
        metrics=(
            Metric("ImageNet k-NN top-1", knn, "dino README"),
            Metric("ImageNet linear top-1", linear, "dino README"),
        ),
        crop_pct=0.875,  # shorter side to 256, crop of 224: how the figures were measured
        num_params=_NUM_PARAMS[architecture] - head,
        gmacs_port=gmacs_port,
        gmacs_official=gmacs_official,
    )


def _coco(architecture: str) -> Checkpoint:
    stem = f"maskrcnn_{architecture}"
    box, mask = _COCO[architecture]
    return Checkpoint(
        stem=stem,
        architecture=architecture,
        task="detection",
        url=f"{_FILES}/xcit/coco/{stem}.pth",
        image_size=800,
        metrics=(
            Metric("COCO box AP", box, "xcit detection/README"),
            Metric("COCO mask AP", mask, "xcit detection/README"),
        ),
        label_set="coco",
    )


def _ade20k(head: str, architecture: str, miou: float) -> Checkpoint:
    stem = f"{head}_{architecture}"
    return Checkpoint(
        stem=stem,
        architecture=architecture,
        task="segmentation",
        url=f"{_FILES}/xcit/ade/{stem}.pth",
        image_size=512,
        metrics=(Metric("ADE20k mIoU", miou, "xcit semantic_segmentation/README"),),
        label_set="ade20k",
    )


ARCHITECTURES: dict[str, Architecture] = {id: _architecture(id) for id in _NUM_PARAMS}
"""The 14 released architectures by id."""

CHECKPOINTS: dict[str, Checkpoint] = {
    checkpoint.stem: checkpoint
    for checkpoint in (
        *(_imagenet(stem) for stem in _IMAGENET),
        *(_dino(architecture) for architecture in _DINO),
        *(_coco(architecture) for architecture in _COCO),
        *(_ade20k("sem_fpn", architecture, miou) for architecture, (miou, _) in _ADE20K.items()),
        *(_ade20k("upernet", architecture, miou) for architecture, (_, miou) in _ADE20K.items()),
    )
}
"""The 70 released files by stem: 42 ImageNet classifiers, 4 DINO backbones, 8 COCO detectors, 16 ADE20k segmenters."""

_ALIASES: dict[str, str] = {
    **{c.timm_id: c.stem for c in CHECKPOINTS.values() if c.timm_id},
    # timm's untagged names mean its first tag: the plain file at 224 px, where the name equals the stem, and the
    # distilled one at 384 px, where no other exists.
    **{f"{id}_384": f"{id}_384_dist" for id in ARCHITECTURES},
    # what torch.hub calls the DINO backbones
    **{c.stem.removesuffix("_pretrain"): c.stem for c in CHECKPOINTS.values() if c.task == "self-supervised"},
}


def find(name: str) -> tuple[Architecture, Checkpoint | None]:
    """Return the architecture that a name means, and the checkpoint where the name is one of a checkpoint.

    Args:
        name: an architecture's id (``xcit_small_12_p16``); a checkpoint's stem (``xcit_small_12_p16_384_dist``); a name
            of timm's, with a tag (``xcit_small_12_p16_224.fb_dist_in1k``) or without; or a DINO entry point of
            torch.hub (``dino_xcit_small_12_p16``). ``xcit_small_12_p16_224`` is both a stem and an untagged name of
            timm's; both mean the file of that stem, which is not distilled.

    Raises:
        UnknownNameError: with the nearest known names.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name], None
    stem = _ALIASES.get(name, name)
    if stem in CHECKPOINTS:
        return ARCHITECTURES[CHECKPOINTS[stem].architecture], CHECKPOINTS[stem]
    known = [*ARCHITECTURES, *CHECKPOINTS, *_ALIASES]
    raise UnknownNameError("model", name, known, "`xcit models` and xcit.list_models() show all names.")


def default_checkpoint(architecture: Architecture) -> Checkpoint:
    """Return the file that ``pretrained=True`` means for an architecture's id: the distilled one at 224 px."""
    return CHECKPOINTS[f"{architecture.id}_224_dist"]
