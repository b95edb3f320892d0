"""`xcit doctor`: what this machine and this installation offer."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import TYPE_CHECKING

from xcit.cli.output import mib, print_facts

if TYPE_CHECKING:
    import torch

Fact = tuple[str, str]

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "huggingface-hub", "tyro", "rich")

LARGEST_ERROR = 1e-4
"""Relative error in float32 beyond which something is broken rather than rounded."""

NUM_TOKENS = (196, 576, 784, 2304, 4096, 16384)
"""Of images of 224 and 384 px in patches of 16 and 8, and of larger ones."""

INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_", "neon", "sve", "bf16", "i8mm")
"""How the names of those extensions begin that matrix products gain from."""

EXTRAS = {
    "train": (("lightning", "torchmetrics", "scikit-learn", "matplotlib", "tensorboard"), "xcit train and quickstart"),
    "retrieval": (("faiss-cpu", "pyarrow"), "xcit embed, index, search and duplicates"),
    "video": (("av",), "xcit attend on videos"),
    "detection": (("faster-coco-eval",), "COCO-format masks, and average precision"),
    "export": (
        ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"),
        "xcit export, and xcit predict of what it wrote",
    ),
    "edge": (("executorch",), "xcit export to ExecuTorch"),
    "giant": (("tifffile", "zarr", "imagecodecs", "rasterio"), "xcit.data.large_image: large images by windows"),
}
"""Of each extra: the packages that it installs, and the verbs that need them."""


def doctor() -> int:
    """Show versions, devices, which fast paths work here, and which extras are installed.

    Both forms of XCA are run here and compared with float64. Exit status: 0, or 1 if a form is wrong.
    """
    from xcit.inference.devices import choose_device

    device = choose_device("auto")
    print_facts("Versions", _versions())
    print_facts("Devices", _devices())
    print_facts("CPU", _cpu())
    errors = _errors_of_forms(device)
    print_facts("Cross-covariance attention", [*_forms(device, errors), *_choices(device)])
    print_facts("torch.compile", _compilers())
    print_facts("Extras", _extras())
    print_facts("Downloads", _downloads())
    return 1 if max(errors.values()) > LARGEST_ERROR else 0


def _versions() -> list[Fact]:
    from xcit import __version__

    return [
        ("xcit", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name) or "missing") for name in PACKAGES),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Fact]:
    import torch

    if torch.version.cuda:
        built = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    else:
        built = "no CUDA"
    facts = [("pytorch built for", built)]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        detail = f"{card.name}, {mib(card.total_memory)}, compute capability {card.major}.{card.minor}"
        facts.append((f"cuda:{i}", detail))
    if not torch.cuda.is_available():
        facts.append(("cuda", "not available"))
    facts.append(("mps", "available" if torch.backends.mps.is_available() else "not available"))
    return facts


def _cpu() -> list[Fact]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # a young function of torch's
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    capabilities = sorted(name for name, there in known.items() if there is True and name.startswith(INSTRUCTIONS))
    return [
        ("threads", f"{torch.get_num_threads()} an operation ({usable} cores usable by this process)"),
        ("kernels", torch.backends.cpu.get_cpu_capability()),
        ("instructions", ", ".join(capabilities) or "not known"),
        (
            "libraries",
            f"oneDNN {_yes(torch.backends.mkldnn.is_available())}, MKL {_yes(torch.backends.mkl.is_available())}",
        ),
    ]


def _errors_of_forms(device: torch.device) -> dict[str, float]:
    """Return each form's relative error here, in float32, against the definition in float64 on the CPU."""
    import torch

    from xcit.ops.xca import XCAWeights, xca_covariance, xca_tokens

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    C, h = 128, 4
    x = random(1, 1024, C)
    weights = XCAWeights(random(3 * C, C) / 8, random(3 * C), random(C, C) / 8, random(C), 1 + random(h, 1, 1).abs())
    with torch.inference_mode():
        exact = xca_tokens(x, weights)
        low = x.to(device, torch.float32), XCAWeights(*(w.to(device, torch.float32) for w in weights if w is not None))
        return {
            name: float((form(*low).cpu().double() - exact).norm() / exact.norm())
            for name, form in (("tokens", xca_tokens), ("covariance", xca_covariance))
        }


def _forms(device: torch.device, errors: dict[str, float]) -> list[Fact]:
    return [
        (f"{name} form", f"{'works' if error <= LARGEST_ERROR else 'WRONG'} on {device}, relative error {error:.0e}")
        for name, error in errors.items()
    ]


def _choices(device: torch.device) -> list[Fact]:
    """Say which form is chosen for one float32 image, for each width of the zoo."""
    import torch

    from xcit.models.zoo import ARCHITECTURES
    from xcit.ops.xca_form import choose_form

    facts = []
    for width, heads in sorted({(a.embed_dim, a.num_heads) for a in ARCHITECTURES.values()}):
        for use, needs_grad in (("inference", False), ("training", True)):
            chosen: dict[str, list[str]] = {"tokens": [], "covariance": []}
            for num_tokens in NUM_TOKENS:
                form = choose_form(
                    num_tokens=num_tokens,
                    embed_dim=width,
                    num_heads=heads,
                    batch_size=1,
                    dtype=torch.float32,
                    device_type=device.type,
                    needs_grad=needs_grad,
                )
                chosen[form].append(f"{num_tokens:,}")
            texts = [f"{form} form at {' '.join(numbers)}" for form, numbers in chosen.items() if numbers]
            facts.append((f"width {width}, {use}", "; ".join(texts) + " tokens"))
    return facts


def _compilers() -> list[Fact]:
    compiler = next((found for name in ("c++", "g++", "clang++", "cl") if (found := shutil.which(name))), None)
    return [
        ("c++ (for the CPU)", compiler or "not found: torch.compile on the CPU needs one"),
        ("triton (for GPUs)", _version("triton") or "not installed"),
    ]


def _extras() -> list[Fact]:
    facts = []
    for extra, (packages, verbs) in EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        state = f"missing {', '.join(missing)}; pip install 'xcit[{extra}]'" if missing else "installed"
        facts.append((extra, f"{state} (for {verbs})"))
    return facts


def _downloads() -> list[Fact]:
    from xcit.models.download import cache_dir, offline_variable

    variable = offline_variable()
    return [
        ("cache", str(cache_dir())),
        ("network", f"forbidden by {variable}" if variable else "allowed"),
    ]


def _yes(there: bool) -> str:
    return "yes" if there else "no"
