"""Giant images that are stopped, damaged or do not fit: what is kept, and what is said."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from xcit.data.large_output import open_dense_output
from xcit.errors import ConfigError, DataError, ExportError
from xcit.inference import giant_work
from xcit.inference.giant import GiantImages
from xcit.inference.giant_plan import parse_bytes
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

SCALING = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
TINY = {"num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 4, "patch_size": 8}


@pytest.fixture
def model(randomize) -> nn.Module:
    return randomize(XCiT(**TINY)).eval()


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (300, 133, 3), dtype=np.uint8))
    return path


def on_disk(model: nn.Module, **options: Any) -> GiantImages:
    """A budget of nothing; with ``band`` it is not refused."""
    return GiantImages(model, memory=1, **SCALING | {"band": 3} | options)


def stopping_at(layer: int, share: float = 0.0) -> Any:
    def progress(what: str, _: float) -> None:
        nonlocal share
        if what == f"layer {layer} of 4":
            share -= 0.05
            if share < 0:
                raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_going_on_gives_the_same_bytes(layer: int, share: float, model, image, tmp_path, caplog) -> None:
    on_disk(model).features(image, tmp_path / "straight.npy")
    out = tmp_path / "out" / "features.npy"
    with pytest.raises(KeyboardInterrupt):
        on_disk(model, progress=stopping_at(layer, share)).features(image, out)
    (folder,) = out.parent.iterdir()  # the tokens, and nothing under the result's name
    assert folder.name.endswith(".xcit-tokens")
    told: list[str] = []
    caplog.set_level("INFO", logger="xcit")
    on_disk(model, progress=lambda what, _: told.append(what)).features(image, out)
    assert f"Going on after layer {layer - 1}" in caplog.text
    assert "embedding" not in told
    assert f"layer {layer - 1} of 4" not in told
    assert out.read_bytes() == (tmp_path / "straight.npy").read_bytes()
    assert list(out.parent.iterdir()) == [out]


def test_what_was_left_is_left_aside(model, image, tmp_path) -> None:
    """By --fresh; by another model, image or band; and where it is damaged."""
    out = tmp_path / "out" / "features.npy"

    def stop(**options: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            on_disk(model, progress=stopping_at(3), **options).features(image, out)

    def told_of(model: nn.Module, **options: Any) -> list[str]:
        told: list[str] = []
        on_disk(model, progress=lambda what, _: told.append(what), **options).features(image, out)
        return told

    stop()
    assert "embedding" in told_of(model, fresh=True)
    stop()
    assert "embedding" in told_of(model, band=4)
    other = XCiT(**TINY).eval()
    assert "embedding" in told_of(other)
    (folder,) = (each for each in out.parent.iterdir() if each.is_dir())
    (folder / "done.npz").write_bytes(b"PK\x03\x04 damaged")
    assert "embedding" in told_of(model)
    stop()
    image.write_bytes(image.read_bytes())
    assert "embedding" in told_of(model)


def test_tokens_that_have_become_shorter_are_made_anew(model, image, tmp_path) -> None:
    out = tmp_path / "out" / "features.npy"
    on_disk(model).features(image, tmp_path / "straight.npy")
    with pytest.raises(KeyboardInterrupt):
        on_disk(model, progress=stopping_at(3)).features(image, out)
    (folder,) = out.parent.iterdir()
    with (folder / "a.tokens").open("r+b") as file:
        file.truncate(1000)
    told: list[str] = []
    on_disk(model, progress=lambda what, _: told.append(what)).features(image, out)
    assert "embedding" in told
    assert out.read_bytes() == (tmp_path / "straight.npy").read_bytes()


def test_one_process_at_a_time(model, image, tmp_path) -> None:
    out = tmp_path / "out" / "features.npy"

    def progress(what: str, _: float) -> None:
        if what == "layer 2 of 4":
            with pytest.raises(ConfigError, match="Another process"):
                on_disk(model).features(image, out)

    on_disk(model, progress=progress).features(image, out)
    assert list(out.parent.iterdir()) == [out]


def test_a_killed_process_is_gone_on_with(model, image, tmp_path) -> None:
    weights, out = tmp_path / "model.safetensors", tmp_path / "out" / "features.npy"
    save_checkpoint(model, weights)
    program = f"""
import sys, time
from tests.inference.test_giant_runs import on_disk
import xcit
def progress(what, share):
    if what == "layer 3 of 4":
        print("there", flush=True)
        time.sleep(60)
on_disk(xcit.create_model({str(weights)!r}), progress=progress if sys.argv[1:] else lambda w, s: print(w)).features(
    {str(image)!r}, {str(out)!r})
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen([*command, "stop"], stdout=subprocess.PIPE, env=environment, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True)
    assert "embedding" not in done.stdout
    on_disk(model).features(image, tmp_path / "straight.npy")
    assert out.read_bytes() == (tmp_path / "straight.npy").read_bytes()


@pytest.fixture
def small_files(image):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk(model, image, tmp_path) -> None:
    out = tmp_path / "out" / "features.npy"
    with pytest.raises(ExportError, match=r"a.tokens could not be written: .*; make room, or name another folder"):
        on_disk(model).features(image, out)
    with pytest.raises(ExportError, match=r"features.npy could not be written: .*make room"):
        GiantImages(model, band=3, **SCALING).features(image, out)
    assert not out.exists()


def test_a_disk_with_too_little_room_is_refused_at_once(model, image, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(giant_work.shutil, "disk_usage", lambda path: _Usage(1000))
    with pytest.raises(ExportError, match=r"The tokens take 0.0 GiB in .*; make room"):
        on_disk(model).features(image, tmp_path / "out" / "features.npy")


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize("change", ["truncated", "gone"])
def test_an_image_that_breaks_on_the_way(change: str, model, tmp_path) -> None:
    path, out = tmp_path / "image.npy", tmp_path / "out" / "features.zarr"
    np.save(path, np.zeros((300, 133, 3), np.uint8))

    def progress(what: str, share: float) -> None:
        if what == "embedding" and 0 < share < 0.1:
            path.unlink(missing_ok=True) if change == "gone" else os.truncate(path, 20_000)

    if change == "gone":  # an open file stays readable; with the next run it is missed
        GiantImages(model, band=1, progress=progress, **SCALING).features(path, out)
        with pytest.raises(DataError, match="there is no such file"):
            GiantImages(model, **SCALING).features(path, out)
        return
    with pytest.raises(DataError, match=r"image.npy: the window of .* cannot be read"):
        GiantImages(model, band=1, progress=progress, **SCALING).features(path, out)
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_former_result_stays_when_a_run_fails(model, image, tmp_path) -> None:
    out = tmp_path / "features.npy"
    np.save(out, np.ones(3))
    former = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        GiantImages(model, band=3, progress=stopping_at(2), **SCALING).features(image, out)
    assert out.read_bytes() == former
    assert {each.name for each in tmp_path.iterdir()} == {"features.npy", "image.npy"}


def test_too_small_a_budget_is_refused_with_one_that_works(model, image) -> None:
    with pytest.raises(
        ConfigError, match=r"1 MiB of memory are too little .*: \d+ MiB is the least that works"
    ) as error:
        GiantImages(model, memory="1MiB", **SCALING).classify(image)
    least = str(error.value).split("--memory ")[1].rstrip(").")
    generous = GiantImages(model, memory="40GiB", **SCALING)
    plan = generous.plan(image, "classify")
    assert not plan.on_disk
    # what the process holds has grown meanwhile
    tight = GiantImages(model, memory=parse_bytes(least) + (64 << 20), **SCALING)
    np.testing.assert_allclose(tight.classify(image).logits, generous.classify(image).logits, rtol=1e-4, atol=1e-5)


def test_a_plan_shrinks_with_its_budget(model) -> None:
    class Wide:
        size, channels, scale, nodata, bytes_in_memory = (100_000, 60_000), 3, 255.0, None, 0

    big = XCiT(**TINY | {"embed_dim": 384, "num_heads": 8}).eval()
    least = GiantImages(big, memory="900GiB", **SCALING).plan(Wide(), "classify").least
    bands = []
    least += 32 << 20  # what the process holds grows meanwhile
    for budget in (least, 2 * least, 4 * least, "900GiB"):
        plan = GiantImages(big, memory=budget, **SCALING).plan(Wide(), "classify")
        assert plan.needed <= plan.budget
        assert plan.on_disk == (budget != "900GiB")
        assert (plan.disk_bytes > 0) == plan.on_disk
        bands.append(plan.band)
    assert bands == sorted(bands)
    assert bands[0] < bands[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GiB", 4 << 30), ("1.5g", 3 << 29), ("500 MB", 500_000_000), ("800MiB", 800 << 20), (1024, 1024), ("12", 12)],
)
def test_amounts_of_memory(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "4 gigs", "-1GiB", "0", 0, True, "GiB"])
def test_amounts_that_are_none(text: Any) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)


def test_results_keep_the_georeference(model, tmp_path) -> None:
    from xcit.data.large_georeference import Georeference
    from xcit.data.large_image import open_large_image

    place = Georeference("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0))
    path, out = tmp_path / "image.zarr", tmp_path / "out.zarr"
    values = np.random.default_rng(0).integers(0, 256, (100, 75, 3), dtype=np.uint8)
    with open_dense_output(path, values.shape, "uint8", georeference=place) as output:
        output.write(0, values)
    GiantImages(model, **SCALING).features(path, out)
    with open_large_image(out) as found:
        assert found.georeference is not None
        assert found.georeference.transform == (80.0, 0.0, 500_000.0, 0.0, -80.0, 5_000_000.0)
        assert found.size == (13, 10)


def test_bands_levels_and_axes_are_passed_on(randomize, tmp_path) -> None:
    model = randomize(XCiT(**TINY | {"in_chans": 2})).eval()
    values = np.random.default_rng(0).integers(0, 2000, (5, 60, 75), dtype=np.uint16)
    np.save(tmp_path / "image.npy", values)
    giant = GiantImages(model, mean=(0.1, 0.1), std=(0.2, 0.2))
    found = giant.classify(tmp_path / "image.npy", axes="CYX", bands=[4, 2])
    expected = giant.classify(np.ascontiguousarray(values[[3, 1]].transpose(1, 2, 0)))
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_time_is_not_spent_on_layers_that_are_not_needed(model, image) -> None:
    told: list[str] = []
    GiantImages(model, progress=lambda what, _: told.append(what), **SCALING).features(image, block=1)
    assert "layer 2 of 2" in told
    assert not any(what.startswith("layer 3") for what in told)
