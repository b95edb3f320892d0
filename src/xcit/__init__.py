"""XCiT, the Cross-Covariance Image Transformer, on current PyTorch.

The names below are the public verbs. They are resolved on first use, so that ``import xcit`` stays instant: torch is
imported by the verb that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from xcit.errors import XCiTError as XCiTError
    from xcit.inference.detector import Detector as Detector
    from xcit.inference.features import FeatureExtractor as FeatureExtractor
    from xcit.inference.giant import GiantImages as GiantImages
    from xcit.inference.predictor import Predictor as Predictor
    from xcit.inference.segmenter import Segmenter as Segmenter
    from xcit.models.detectors import create_detector as create_detector
    from xcit.models.detectors import save_detector as save_detector
    from xcit.models.factory import create_model as create_model
    from xcit.models.factory import from_timm as from_timm
    from xcit.models.factory import list_models as list_models
    from xcit.models.hub import push_to_hub as push_to_hub
    from xcit.models.pyramid import create_pyramid as create_pyramid
    from xcit.models.segmenters import create_segmenter as create_segmenter
    from xcit.models.segmenters import save_segmenter as save_segmenter
    from xcit.models.weights import load_checkpoint as load_checkpoint
    from xcit.models.weights import save_checkpoint as save_checkpoint
    from xcit.models.xcit import XCiT as XCiT

_HOME = {
    "XCiTError": "xcit.errors",
    "Detector": "xcit.inference.detector",
    "FeatureExtractor": "xcit.inference.features",
    "Predictor": "xcit.inference.predictor",
    "GiantImages": "xcit.inference.giant",
    "Segmenter": "xcit.inference.segmenter",
    "create_detector": "xcit.models.detectors",
    "save_detector": "xcit.models.detectors",
    "create_segmenter": "xcit.models.segmenters",
    "save_segmenter": "xcit.models.segmenters",
    "create_pyramid": "xcit.models.pyramid",
    "create_model": "xcit.models.factory",
    "from_timm": "xcit.models.factory",
    "list_models": "xcit.models.factory",
    "push_to_hub": "xcit.models.hub",
    "load_checkpoint": "xcit.models.weights",
    "save_checkpoint": "xcit.models.weights",
    "XCiT": "xcit.models.xcit",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'xcit' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
