"""What `import xcit` gives, and what it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import xcit


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_every_public_name_resolves():
    for name in xcit.__all__:
        assert getattr(xcit, name) is not None, name


def test_the_verbs_that_users_rely_on_are_there():
    promised = {"XCiT", "XCiTError", "Predictor", "create_model", "list_models", "from_timm"}
    promised |= {"Detector", "create_detector", "save_detector", "create_pyramid"}
    promised |= {"Segmenter", "create_segmenter", "save_segmenter", "GiantImages"}
    assert promised | {"load_checkpoint", "save_checkpoint", "__version__"} <= set(xcit.__all__)


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse(Path(xcit.__file__).read_text(encoding="utf-8"))
    (checking,) = (n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in checking.body for alias in node.names}
    assert seen == xcit._HOME


def test_import_loads_nothing_heavy():
    heavy = ("torch", "torchvision", "timm", "lightning", "numpy", "PIL", "matplotlib", "rich", "tyro")
    code = f"import sys, xcit; dir(xcit); print(*[m for m in {heavy} if m in sys.modules])"
    assert python(code) == []


def test_errors_are_light_too():
    assert python("import sys; from xcit import XCiTError; print('torch' in sys.modules)") == ["False"]


def test_prediction_loads_neither_timm_nor_lightning():
    code = "import sys, xcit; xcit.Predictor; xcit.create_model; xcit.list_models('*nano*'); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in python(code)}
    assert "torch" in loaded
    assert not loaded & {"timm", "lightning", "pytorch_lightning"}


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="create_model"):
        xcit.create_modle  # noqa: B018
