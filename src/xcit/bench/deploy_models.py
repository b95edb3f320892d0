"""The models of `xcit bench`, each the same whenever it is built: in the run itself and in a process of its own.

Whatever stands for one XCiT architecture has the same random weights: timm's module, ours, and ours folded.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xcit.bench.contenders import SEED, randomize
from xcit.bench.deploy_cases import Source
from xcit.models.factory import from_timm
from xcit.models.zoo import ARCHITECTURES
from xcit.recipes.peers import create_peer

NUM_CLASSES = 1000
TABLE_UP_TO = 512
"""Side in pixels up to which a folded model keeps its positional encoding as a table; of large images it would take as
much memory as a layer's tokens, for a small part of the time."""


def build(source: Source, model: str, image_size: int) -> nn.Module:
    """Build a competitor's model.

    Args:
        source: see ``xcit.bench.deploy_cases.Entry``.
        model: an XCiT architecture, or timm's name of another model.
        image_size: side of the images in pixels.

    Returns:
        A float32 module on the CPU, in evaluation mode.

    Raises:
        UnknownNameError: timm has no such model.
        ConfigError: the model does not take images of that size, or cannot be folded.
    """
    if model not in ARCHITECTURES:
        return _other(model, image_size)
    torch.manual_seed(SEED)
    reference = create_peer(f"{model}_224", num_classes=NUM_CLASSES)
    randomize(reference)
    reference.eval()
    if source == "timm":
        return reference
    ours = from_timm(reference)
    if source == "ours":
        return ours
    from xcit.deploy.fold import CHECK_SIZES, fold

    tables = [(image_size, image_size)] if image_size <= TABLE_UP_TO else []
    return fold(ours, image_sizes=tables, check_sizes=CHECK_SIZES).model


def make_images(image_size: int, batch_size: int) -> Tensor:
    """Return a batch of noise, (batch, 3, size, size), the same each time."""
    draw = torch.Generator().manual_seed(SEED)
    return torch.randn(batch_size, 3, image_size, image_size, generator=draw)


def make_labels(batch_size: int) -> Tensor:
    """Return a random class of each image, the same each time."""
    return torch.randint(NUM_CLASSES, (batch_size,), generator=torch.Generator().manual_seed(SEED))


def count_multiply_adds(module: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of convolutions and matrix products of one image, in inference.

    Shapes alone are followed; nothing is computed.
    """
    with torch.device("meta"):
        model = copy.deepcopy(module).to("meta").requires_grad_(False)  # which the counter's hooks would follow
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = model.to_empty(device="cpu")
        # attention as one product after the other: not every fused kernel of it is known to the counter
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as flops,
        ):
            model(torch.empty(1, 3, image_size, image_size))
    return flops.get_total_flops() // 2


def _other(name: str, image_size: int) -> nn.Module:
    """One of timm's other models with its own initial values, built for images of that size.

    Without stochastic depth and dropout, which some have as they come: no two steps would be the same.
    """
    import timm

    torch.manual_seed(SEED)
    known = timm.get_pretrained_cfg(name) if name in timm.list_models() else None
    options = {"img_size": image_size} if known is not None and known.fixed_input_size else {}
    model = create_peer(name, num_classes=NUM_CLASSES, options=options).eval()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
