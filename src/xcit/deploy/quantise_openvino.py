"""int8 for OpenVINO, by NNCF's post-training quantisation.

NNCF decides which operations are quantised: convolutions, products with weights, and those products of activations that
OpenVINO computes in int8. Its settings are chosen here:

* ``TRANSFORMER`` leaves the norms' own arithmetic and the additions in float: XCiT-S12/8 at 512 px differs from float32
  by half as much. Of its smoothing of activations into weights nothing is gained: in a folded model the norms have no
  channels that stand out, and each smoothing is one more pass over the tokens.
* ``PERFORMANCE`` makes activations symmetric; otherwise OpenVINO takes a slower kernel for the products (there 1.28
  instead of 1.43 times bfloat16's speed), and gains no accuracy.
* Ranges reach from the least to the largest value of all images instead of the mean of each image's: logits of a model
  trained on the digits differ by 2.0 % instead of 4.8 %. Without NNCF's correction of biases they do by 1.0 %.
* One range a tensor of activations. NNCF would give a depthwise convolution's input one for every index of its second
  axis; the tokens that LPI convolves have their channels last, and each token would get its own, which OpenVINO does
  not compute in int8.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xcit.deploy.calibration import batches
from xcit.deploy.quantise import Quantiser, WeightNames
from xcit.errors import ExportError

TYPES = ("Convolution", "GroupConvolution", "MatMul")
_BETWEEN = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "VariadicSplit", "Split", "Concat",
            "Multiply", "Convert", "Gather")  # fmt: skip
"""What may stand between a quantiser and the operation that it is for; Multiply is a smoothing, or a weight's scale."""


class OpenVinoQuantiser(Quantiser):
    """A float32 OpenVINO model.

    Args:
        model: which says what it is already.
        weights: the module's, by name, from which layers get their names.
        images: to calibrate on; needed to find out what NNCF quantises.
        number: of images that the file takes at once; None for any.
    """

    def __init__(
        self, model: Any, weights: Mapping[str, Tensor], images: Sequence[np.ndarray], number: int | None
    ) -> None:
        with _quiet():
            import nncf
        import openvino

        self.packages = {"nncf": str(nncf.__version__), "openvino": str(openvino.__version__)}
        self._model = model
        self._candidates = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() in TYPES]
        # a single image tells which operations are quantised; the ranges do not matter here
        sample = self._quantised((), images[:1], number)
        in_int8 = {op.get_friendly_name() for op in sample.get_ops() if op.get_type_name() in TYPES and _is_int8(op)}
        names = _names(model, weights)
        self._nodes: dict[str, str] = {}
        for node in self._candidates:
            if node in in_int8:
                name = names[node]
                self._nodes[name if name not in self._nodes else f"{name}, {node.partition('/')[0]}"] = node
        self.layers = tuple(self._nodes)

    def write(
        self, path: Path, layers: Collection[str], images: Sequence[np.ndarray], number: int | None
    ) -> list[Path]:
        """See ``Quantiser.write``."""
        import openvino

        taken = {self._nodes[layer] for layer in layers}
        model = self._quantised([node for node in self._candidates if node not in taken], images, number)
        try:
            # what is not int8 stays in float32: it is little, and what scales are made of
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportError(f"{path} could not be written: {_line(error)}.") from error
        return [path, path.with_suffix(".bin")]

    def _quantised(self, ignored: Sequence[str], images: Sequence[np.ndarray], number: int | None) -> Any:
        import nncf
        from nncf.quantization.advanced_parameters import QuantizationParameters
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        num_batches = sum(1 for _ in batches(images, number)) if number else len(images)
        try:
            with _quiet():
                return nncf.quantize(
                    self._model,
                    # of a file for any number of images, one at a time: NNCF's statistics are of one
                    nncf.Dataset(_Batches(images, number or 1)),
                    preset=nncf.QuantizationPreset.PERFORMANCE,
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=num_batches,
                    ignored_scope=nncf.IgnoredScope(names=list(ignored)) if ignored else None,
                    advanced_parameters=nncf.AdvancedQuantizationParameters(
                        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
                        activations_quantization_params=QuantizationParameters(per_channel=False),
                        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                        disable_bias_correction=True,
                    ),
                )
        except Exception as error:  # of many kinds
            raise ExportError(f"NNCF cannot quantise the model: {_line(error)}.") from error


class _Batches(Iterable[np.ndarray]):
    """Batches, as often as they are asked for."""

    def __init__(self, images: Sequence[np.ndarray], number: int) -> None:
        self._images, self._number = images, number

    def __iter__(self) -> Iterator[np.ndarray]:
        return (images for images, _ in batches(self._images, self._number))


def _is_int8(op: Any) -> bool:
    """Return whether an input of an operation comes from a quantiser."""
    waiting = [value.get_source_output().get_node() for value in op.inputs()]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "FakeQuantize":
            return True
        if node.get_type_name() in _BETWEEN:
            waiting += [value.get_source_output().get_node() for value in node.inputs()]
    return False


def _names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what each product and convolution is called in the words of the modules.

    By its weights, if it has some; a product of activations by the nearest module's, with the graph's own name.
    """
    known = WeightNames(weights)
    ops = [op for op in model.get_ordered_ops() if op.get_type_name() in TYPES]
    weighted = {op.get_friendly_name(): _by_weight(op, known) for op in ops}
    own = {node: name for node, name in weighted.items() if name}
    found = {}
    for op in ops:
        node = op.get_friendly_name()
        # of an unfolded model OpenVINO folds batch norms into weights, which nothing knows again
        where = f"near {_nearest(op, own)}" if weighted[node] == "" else _nearest(op, own)
        found[node] = own.get(node) or f"{where} ({node.partition('/')[0]})"
    return found


def _by_weight(op: Any, known: WeightNames) -> str | None:
    """Return the name of an operation's weights: "" for unknown ones, None for a product of activations."""
    for value in op.inputs():
        node = value.get_source_output().get_node()
        while node.get_type_name() in ("Reshape", "Transpose", "Convert"):
            node = node.input_value(0).get_node()
        if node.get_type_name() == "Constant":
            return known.find(np.asarray(node.data)) or ""
    return None


def _nearest(op: Any, own: Mapping[str, str]) -> str:
    """Return the module of the nearest operation, before or after, that has a name of its own."""
    waiting, seen = deque([op]), {op.get_friendly_name()}
    while waiting:
        node = waiting.popleft()
        name = own.get(node.get_friendly_name())
        if name:
            return name.rpartition(".")[0] or name
        after = [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
        before = [value.get_source_output().get_node() for value in node.inputs()]
        for near in (*after, *before):
            if near.get_friendly_name() not in seen:
                seen.add(near.get_friendly_name())
                waiting.append(near)
    return "model"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".:") if lines else type(error).__name__


_CI = "NNCF_CI"
"""With this variable set when it is imported, NNCF reports no usage to its makers."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's log lines and progress bars to itself, and let it not call home.

    At its import NNCF also makes its own class that of all later loggers; that is put back.
    """
    before, logger_class = os.environ.get(_CI), logging.getLoggerClass()
    os.environ[_CI] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            importlib.import_module("nncf").set_log_level(logging.ERROR)
            yield
    finally:
        logging.setLoggerClass(logger_class)
        if before is None:
            del os.environ[_CI]
        else:
            os.environ[_CI] = before
