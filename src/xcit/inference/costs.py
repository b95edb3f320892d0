"""What a model costs before it runs: multiply-adds and memory of one image, counted on tensors without data.

The model is built of PyTorch's fake tensors and really called: shapes and types flow through every operation, no value
is computed, and a counter looks on. Hence the counts are of the code as it is, at any size, within seconds.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from xcit.inference.devices import synchronize
from xcit.models.xcit import XCiT


@dataclass(frozen=True)
class Costs:
    """Of one image through the model, in one form of XCA, in float32."""

    multiply_adds: int
    """Of convolutions and matrix products: half of what ``torch.utils.flop_counter`` counts."""
    inference_bytes: int
    """The most that tensors other than the weights take at once in a forward pass, the image included."""
    training_bytes: int
    """What a forward pass in training keeps for the backward pass, weights aside; every storage counts once."""


def count_costs(config: Mapping[str, Any], image_size: tuple[int, int], form: Literal["tokens", "covariance"]) -> Costs:
    """Count what one image costs.

    The memory is the tensors' own: an allocator's rounding and a library's scratch space come on top of it.

    Args:
        config: the arguments of ``XCiT``, as in ``model.config``.
        image_size: height and width in pixels.
        form: of XCA.

    Raises:
        ShapeError: an image smaller than one patch.
    """
    with torch.device("meta"):
        model = XCiT(**{**config, "attn_form": form}).float()
    return count_model_costs(model, (model.config["in_chans"], *image_size))


def count_model_costs(model: nn.Module, image_shape: tuple[int, int, int]) -> Costs:
    """Count what one image through a model costs, likewise; of any model, whose weights are neither read nor changed.

    Args:
        model: images (1, chans, height, width) to logits; it is copied, without its values.
        image_shape: channels, height and width.
    """
    with torch.device("meta"):
        model = copy.deepcopy(model).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu").eval()
        image = torch.empty(1, *image_shape)
        with torch.no_grad():
            with FlopCounterMode(display=False) as flops:
                model(image)
            with _LiveBytes(image) as memory:
                model(image)
        saved = _saved_bytes(model.train(), image)
    return Costs(flops.get_total_flops() // 2, memory.peak, saved)


def peak_bytes(
    function: Callable[[Tensor], object], shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
) -> int:
    """Count the most that tensors other than the weights take at once while a function runs, its images included.

    Nothing of that size is allocated. For images of many patches it grows in proportion to their pixels. Measured with
    XCiT-N12/16 and S12/8 on 2048 x 3072 to 4096 x 4096 px, a CPU process grew by 1.01 to 1.03 times as much.

    Args:
        function: images to whatever; what is compiled in it runs as it is.
        shape: (batch, chans, height, width).
        dtype: of the model.
        device: of the model.
    """
    # Only where something was compiled is the compiler loaded already, which takes seconds.
    compiled = "torch._dynamo" in sys.modules
    as_it_is = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), as_it_is, FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(shape, dtype=dtype, device=device)
        with _LiveBytes(images) as memory:
            function(images)
    return memory.peak


def time_forward(model: nn.Module, image: Tensor, *, seconds: float = 3.0, max_runs: int = 20) -> float:
    """Return the median time of a forward pass, in seconds, without gradients.

    Args:
        model: in the mode in which it is to be timed.
        image: a batch, on the model's device.
        seconds: stop once this much was spent; one pass to warm up and one timed one are always made.
        max_runs: timed passes at most.
    """
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(max_runs + 1):
            start = time.perf_counter()
            model(image)
            synchronize(image.device)
            times.append(time.perf_counter() - start)
            if len(times) > 1 and sum(times) > seconds:
                break
    return statistics.median(times[1:])


class _LiveBytes(TorchDispatchMode):
    """Follow the storages that operations make until they are freed; ``peak`` is the most that lived at once."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.live = self.peak = image.untyped_storage().nbytes()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):  # weights, buffers, the image: there before
                self.seen.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.discard(key)


def _saved_bytes(model: nn.Module, image: Tensor) -> int:
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(image)
    return sum(storage.nbytes() for storage in storages.values())
