"""Folded models as graphs: exported once, right at sizes that the export never saw."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from xcit.models.folded_models import FoldedPyramid, FoldedXCiT
from xcit.models.pyramid import XCiTPyramid
from xcit.models.xcit import XCiT

TINY = {"patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 1, "num_heads": 4}
# torch takes no open size to be one, so an open graph has no grids of a single row.
SHAPES = ((1, 3, 32, 48), (3, 3, 100, 77), (2, 3, 20, 130))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("auto", {}),
        ("covariance", {"tokens_norm": False}),
        ("tokens", {"global_pool": "avg", "patch_size": 16, "num_classes": 0}),
    ],
)
def test_an_export_with_dynamic_sizes_is_right_at_others(form: str, options: dict, randomize) -> None:
    model = randomize(XCiT(**TINY | options)).double().eval()
    folded = FoldedXCiT(model, form, torch.float64, image_sizes=[(96, 64)])
    dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = export(folded, (torch.randn(2, 3, 96, 64).double(),), dynamic_shapes=(dynamic,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batch_norm" in name for name in called)
    # No map is written in slices, and only the definition divides by the norms of whole channels.
    assert not any(name.startswith(("aten.slice_scatter", "aten.add_.", "aten.copy_")) for name in called)
    assert any("clamp.default" in name for name in called) == (form == "covariance")
    module = program.module()
    for shape in SHAPES:
        images = torch.randn(shape).double()
        torch.testing.assert_close(module(images), model(images), rtol=1e-10, atol=1e-11)


def test_an_export_of_one_size_takes_the_table_of_its_grid(randomize) -> None:
    model = randomize(XCiT(**TINY)).double().eval()
    images = torch.randn(1, 3, 40, 27).double()
    folded = FoldedXCiT(model, "covariance", image_sizes=[(40, 27)])
    program = export(folded, (images,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith(("aten.sin", "aten.cos", "aten.arange")) for name in called)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-10, atol=1e-11)


def test_a_pyramid_exports_with_dynamic_sizes(randomize) -> None:
    pyramid = randomize(XCiTPyramid(XCiT(**TINY | {"patch_size": 16}), taps=[0, 0, 0, 0])).double().eval()
    dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = export(FoldedPyramid(pyramid), (torch.randn(2, 3, 96, 64).double(),), dynamic_shapes=(dynamic,))
    module = program.module()
    for shape in ((1, 3, 64, 128), (3, 3, 160, 96)):
        images = torch.randn(shape).double()
        for ours, theirs in zip(module(images), pyramid(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", ["auto", "covariance"])
def test_a_compiled_model_computes_the_same(form: str, randomize) -> None:
    model = randomize(XCiT(**TINY)).double().eval()
    torch._dynamo.reset()
    compiled = torch.compile(FoldedXCiT(model, form), fullgraph=True, backend="eager", dynamic=True)
    for shape in ((1, 3, 40, 48), (2, 3, 64, 24)):
        images = torch.randn(shape).double()
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-10, atol=1e-11)
