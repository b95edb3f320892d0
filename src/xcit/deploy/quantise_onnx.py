"""int8 for onnxruntime, by its own static quantiser.

In int8 are the convolutions and the products with constant weight matrices: weights with a scale an output channel,
symmetric; activations 8 bits without sign, one scale and zero point a tensor, from the least and largest value on the
calibration images. (Percentiles and entropies need all activations in memory, and gave nothing: logits of a model
trained on the digits differ by 1.0 and 1.1 % against 1.1 %.) Norms, softmax, additions and the products of activations
with each other stay in float32.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from xcit.deploy.calibration import batches
from xcit.deploy.quantise import Quantiser, WeightNames
from xcit.errors import ExportError

TYPES = ("Conv", "Gemm", "MatMul")


class OnnxQuantiser(Quantiser):
    """A float32 ONNX model.

    Args:
        proto: the model, without description.
        weights: the module's, by name, from which layers get their names.
        entries: keys and texts that go into the file's metadata.
    """

    def __init__(self, proto: Any, weights: Mapping[str, Tensor], entries: dict[str, str]) -> None:
        import onnxruntime

        self._proto, self._entries = _prepared(proto), entries
        self._nodes = _named_nodes(self._proto, WeightNames(weights))
        self.layers = tuple(self._nodes)
        self.packages = {"onnxruntime": str(onnxruntime.__version__)}
        self._ranges: list[tuple[Sequence[np.ndarray], bytes]] = []

    def write(
        self, path: Path, layers: Collection[str], images: Sequence[np.ndarray], number: int | None
    ) -> list[Path]:
        """See ``Quantiser.write``."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        with TemporaryDirectory(prefix=".onnx.", dir=path.parent) as folder:
            source, cache = Path(folder) / "float.onnx", Path(folder) / "ranges.json"
            onnx.save(self._proto, source)
            # what activations reach on the same images does not depend on which layers are quantised
            known = next((ranges for of, ranges in self._ranges if of is images), None)
            if known is not None:
                cache.write_bytes(known)
            try:
                with _quiet():
                    quantize_static(
                        source,
                        path,
                        _reader(images, number),
                        quant_format=QuantFormat.QDQ,
                        op_types_to_quantize=list(TYPES),
                        nodes_to_quantize=[self._nodes[layer] for layer in layers],
                        per_channel=True,
                        weight_type=QuantType.QInt8,
                        activation_type=QuantType.QUInt8,
                        calibrate_method=CalibrationMethod.MinMax,
                        calibration_cache_path=cache,
                        extra_options={
                            "MatMulConstBOnly": True,
                            # what follows a product is normalised, added or scaled in float32 anyway
                            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                        },
                    )
            except Exception as error:  # of many kinds
                raise _cannot(error) from error
            if known is None:
                self._ranges.append((images, cache.read_bytes()))
        written = onnx.load(path)
        for key, text in self._entries.items():
            entry = written.metadata_props.add()
            entry.key, entry.value = key, text
        path.write_bytes(written.SerializeToString())
        return [path]


def _prepared(proto: Any) -> Any:
    """Return the model as onnxruntime wants it before it is quantised: products and biases in one node, shapes known.

    Left apart, onnxruntime would join them when it loads the file, and then compute the products in float32.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory(prefix="xcit-onnx-") as folder:
        source, path = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        onnx.save(proto, source)
        try:
            with _quiet():
                # its symbolic shapes fail on LayerNormalization of opset 20; onnx's own inference does for the rest
                quant_pre_process(source, path, skip_symbolic_shape=True)
        except Exception as error:  # of many kinds
            raise _cannot(error) from error
        return onnx.load(path)


def _cannot(error: Exception) -> ExportError:
    lines = str(error).splitlines()
    return ExportError(f"onnxruntime cannot quantise the model: {lines[0] if lines else type(error).__name__}")


def _named_nodes(proto: Any, names: WeightNames) -> dict[str, str]:
    """Return the node of each layer that can be in int8, by the name of its module, or else by its own."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    found: dict[str, str] = {}
    for node in proto.graph.node:
        weight = weights.get(node.input[1]) if node.op_type in TYPES and len(node.input) > 1 else None
        # onnxruntime's kernel takes matrices with a scale a column, not stacks of them
        if weight is None or (node.op_type == "MatMul" and len(weight.dims) != 2):
            continue
        name = names.find(numpy_helper.to_array(weight)) or node.name
        found[name if name not in found else f"{name}, {node.name}"] = node.name
    return found


def _reader(images: Sequence[np.ndarray], number: int | None) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = batches(images, number)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self._batches, None)
            return None if found is None else {"images": found[0]}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice (through the root logger, and printed) to itself: it is about its own insides."""
    root = logging.getLogger()
    before = root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
