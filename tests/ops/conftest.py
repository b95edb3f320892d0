"""What the kernels' tests ask of Triton's interpreter; nothing where it does not run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def patch_once_a_launch() -> Iterator[None]:
    """Save most of the interpreter's time: it patches triton.language anew for every helper that a kernel calls."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # other versions of Triton do it otherwise
        yield
        return
    original = interpreter._patch_lang

    def patch_all(function: Any) -> Any:
        scope = original(function)
        scope._changes += original(tl.sum.fn)._changes  # triton.language.core, which the helpers in it refer to
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_all)
        patch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
        yield


@pytest.fixture
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to the nearest bfloat16, as a GPU does; it cuts digits off."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    inherited = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return inherited(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def _unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a kernel reads before anything wrote it be plus and minus infinity, not whatever lies there."""
    if not INTERPRETED:
        return

    signs = np.random.default_rng(0)

    def poisoned(allocate: Any) -> Any:
        def allocated(*args: Any, **options: Any) -> torch.Tensor:
            made: torch.Tensor = allocate(*args, **options)
            if not torch.compiler.is_compiling() and type(made) is torch.Tensor and made.is_floating_point():
                # in no order, so that any sum over them has both
                made.copy_(torch.from_numpy(signs.choice([np.inf, -np.inf], tuple(made.shape))))
            return made

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
