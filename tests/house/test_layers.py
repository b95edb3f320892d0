"""Imports between rooms go down only, lazy ones included.

import-linter checks the contracts in pyproject.toml. The check here is its own: it also follows names that are imported
by string and names taken from the package's root, and it is shown to catch what it forbids.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "xcit"

LEVELS = (
    ("errors",),
    ("files",),
    ("ops",),
    ("models", "data"),
    ("inference",),
    ("evaluate", "report"),
    ("tasks", "deploy"),
    ("recipes",),
    ("bench",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

FORBIDDEN = {
    "timm": {"errors", "ops", "data", "inference", "report"},
    "lightning": {"errors", "ops", "models", "data", "inference", "evaluate", "report"},
}
"""Packages that take seconds to import, and the rooms that must not wait for them."""


def imported(tree, package):
    """Yield (line, dotted name) of every import in a module of ``package``, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def violations(package):
    """Return 'file:line: room imports name' for every import that the house forbids."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public verbs: the root stands above all rooms
        room = parts[0]
        where = f"{path.relative_to(package)}"
        if room not in LEVEL:
            found.append(f"{where}: {room} is not a room of the house")
            continue
        own_package = ".".join(("xcit", *parts[:-1]))
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), own_package):
            head, *rest = name.split(".")
            if head in FORBIDDEN and room in FORBIDDEN[head]:
                found.append(f"{where}:{line}: {room} imports {name}")
            if head != "xcit":
                continue
            target = rest[0] if rest else ""
            if target == "__version__" or target == room:
                continue
            if target not in LEVEL:
                found.append(f"{where}:{line}: {room} imports {name}, from the package's root")
            elif LEVEL[target] >= LEVEL[room]:
                found.append(f"{where}:{line}: {room} imports {name}")
    return found


def test_imports_go_down_only():
    assert violations(PACKAGE) == []


def test_import_linter_keeps_its_contracts():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "code", "caught"),
    [
        ("ops/a.py", "import xcit.models.xcit", "ops imports xcit.models.xcit"),
        ("ops/a.py", "def f():\n    from xcit.models import layers", "ops imports xcit.models.layers"),
        ("models/a.py", "def f():\n    from xcit.data.images import open_image", "models imports xcit.data.images"),
        ("data/a.py", "from ..models import zoo", "data imports xcit.models.zoo"),
        ("data/a.py", "from .. import models", "data imports xcit.models"),
        ("models/a.py", "import importlib\nimportlib.import_module('xcit.cli.main')", "models imports xcit.cli.main"),
        ("inference/a.py", "def f():\n    import timm.models", "inference imports timm.models"),
        ("data/a.py", "def f():\n    from lightning.pytorch import Trainer", "data imports lightning"),
        ("evaluate/a.py", "from xcit.report import curves", "evaluate imports xcit.report"),
        ("models/a.py", "from xcit import Predictor", "from the package's root"),
        ("models/a.py", "import xcit", "from the package's root"),
        ("tricks/a.py", "", "tricks is not a room"),
    ],
)
def test_the_check_catches(tmp_path, file, code, caught):
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(code)
    (found,) = violations(tmp_path)
    assert caught in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("models/a.py", "from xcit.ops.xca import xca\nfrom xcit import __version__\nfrom . import layers"),
        ("cli/a.py", "def f():\n    from xcit.recipes import quickstart"),
        ("models/sub/a.py", "from .b import c\nfrom ..layers import XCA\nfrom ...ops import xca"),
    ],
)
def test_the_check_lets_pass(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []


def test_import_linter_catches_a_lazy_violation(tmp_path):
    package = tmp_path / "src" / "xcit"
    for room in LEVEL:
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "ops" / "__init__.py").write_text("def f():\n    from xcit.models import layers\n")
    (package / "models" / "layers.py").touch()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text[text.index("[tool.importlinter]") :])
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "xcit.ops -> xcit.models.layers" in done.stdout
