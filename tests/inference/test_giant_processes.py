"""Giant images shared by real processes: what the first one gets is what one process alone gets."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.conftest import _randomize

from xcit.errors import ConfigError
from xcit.inference.giant import GiantImages
from xcit.inference.giant_processes import RowProcesses
from xcit.models.pyramid import XCiTPyramid
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.upernet import UperNet
from xcit.models.xcit import XCiT

ROOT = Path(__file__).parents[2]
SCALING = {"mean": (0.4, 0.5, 0.3), "std": (0.2, 0.3, 0.25)}
TINY = {"num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 4}
HEIGHTS = {8: 301, 16: 417}


def everything(processes: RowProcesses | None, folder: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return every kind of output of both patch sizes, from memory and from the disk."""
    found: dict[str, Any] = {}
    for patch_size, height in HEIGHTS.items():
        image = np.random.default_rng(0).integers(0, 256, (height, 45, 3), dtype=np.uint8)
        model = _randomize(XCiT(**TINY | {"patch_size": patch_size})).to(dtype).eval()
        pyramid = _randomize(XCiTPyramid(XCiT(**TINY | {"patch_size": patch_size}))).to(dtype).eval()
        segmenters = {
            kind.__name__: _randomize(
                kind(XCiTPyramid(XCiT(**TINY | {"patch_size": patch_size})), 7, channels=8, **SCALING)
            )
            .to(dtype)
            .eval()
            for kind in (UperNet, SemanticFPN)
        }
        places: list[dict[str, Any]] = [{}] if folder is None else [{}, {"memory": 1, "work": folder}]
        for place in places:
            options = {"band": 3, "processes": processes, "device": "cpu"} | SCALING | place
            name = f"{patch_size} {'disk' if place else 'memory'}"
            giant = GiantImages(model, **options)
            found[f"{name} classify"] = giant.classify(image)
            found[f"{name} features"] = giant.features(image, dtype="float64")
            found[f"{name} block"] = giant.features(image, block=1, dtype="float64")
            found[f"{name} attend"] = giant.attend(image)
            averaging = _randomize(XCiT(**TINY | {"patch_size": patch_size, "global_pool": "avg"})).to(dtype).eval()
            found[f"{name} average"] = GiantImages(averaging, **options).classify(image)
            found[f"{name} pyramid"] = GiantImages(pyramid, **options).pyramid(image, dtype="float64")
            for kind, segmenter in segmenters.items():
                found[f"{name} {kind}"] = GiantImages(segmenter, **options).segment(image, scores=True)
    if folder is not None:
        giant = GiantImages(model, band=3, processes=processes, device="cpu", **SCALING)
        giant.features(image, folder / "features.npy")
        if processes is None or processes.rank == 0:
            found["file"] = np.load(folder / "features.npy")
        with pytest.raises(ConfigError, match="too few for") if processes and processes.size > 2 else _nothing():
            GiantImages(model, processes=processes, **SCALING).classify(np.zeros((5 * 16, 16, 3), np.uint8))
    return found


class _nothing:  # noqa: N801 (as contextlib's)
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def flat(found: Any) -> list[np.ndarray]:
    if isinstance(found, np.ndarray):
        return [found]
    return [each for each in found if each is not None]


def run(size: int, folder: Path, dtype: str) -> tuple[dict[str, Any], list[dict[str, int]]]:
    command = [sys.executable, "-m", "tests.inference.test_giant_processes", str(folder), dtype]
    started = []
    for rank in range(size):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
        }
        started.append(Popen(command, cwd=ROOT, env=environment, stderr=PIPE, text=True))
    for process in started:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    sent = [pickle.loads((folder / f"sent{rank}.pkl").read_bytes()) for rank in range(size)]
    return pickle.loads((folder / "found.pkl").read_bytes()), sent


SLOW = [pytest.param(n, d, marks=pytest.mark.slow) for n, d in ((1, "float64"), (3, "float64"), (4, "float32"))]


@pytest.mark.parametrize(("size", "dtype"), [(2, "float64"), *SLOW])
def test_every_output_is_that_of_one_process(size: int, dtype: str, tmp_path: Path) -> None:
    alone = everything(None, None, torch.float64)
    found, sent = run(size, tmp_path, dtype)
    limit = 1e-11 if dtype == "float64" else 1e-5
    for name, expected in alone.items():
        for place in (name, name.replace("memory", "disk")):
            for a, b in zip(flat(found[place]), flat(expected), strict=True):
                assert a.shape == b.shape
                if a.dtype == np.uint8:
                    assert (a != b).mean() < (1e-9 if dtype == "float64" else 1e-3), place
                    continue
                a, b = a.astype(np.float64), b.astype(np.float64)
                least = 2e-3 if "UperNet" in name or "Semantic" in name else limit  # float16
                if name.endswith("attend") and a.ndim == 3:
                    least = max(limit, 1e-6)  # it is float32
                assert np.abs(a - b).max() <= least * np.abs(b).max(), place
    assert found["file"].shape == (27, 3, 32)
    if size > 1:
        assert all(each["halo"] > 0 for each in sent)
        assert all(each["moments"] > 0 for each in sent)


def test_without_a_group() -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        RowProcesses()


def main(folder: Path, dtype: str) -> None:
    store = dist.FileStore(str(folder / "store"), int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    processes = RowProcesses()
    found = everything(processes, folder, getattr(torch, dtype))
    if processes.rank == 0:
        (folder / "found.pkl").write_bytes(pickle.dumps({k: _plain(v) for k, v in found.items()}))
    (folder / f"sent{processes.rank}.pkl").write_bytes(pickle.dumps(processes.bytes_sent))
    dist.destroy_process_group()


def _plain(found: Any) -> Any:
    return found if isinstance(found, np.ndarray) else list(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
