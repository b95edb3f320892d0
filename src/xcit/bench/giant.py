"""Giant images: the memory that the system counts at fixed budgets, and time beside the whole-image path.

Every case runs in a process of its own (``python -m xcit.bench.giant JSON`` is the child, its last line the answer),
whose anonymous memory is looked at every 2 ms. Weights are random, the image is a pattern in a tiled TIFF.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xcit.bench import results
from xcit.bench.anonymous import AnonymousPeak
from xcit.errors import BackendError
from xcit.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    *("date", "case", "model", "task", "height", "width", "tokens", "budget_mib", "on_disk", "band"),
    *("seconds", "us_a_token", "peak_mib", "ratio_to_whole", *results.ENVIRONMENT),
)
WHOLE = "whole"
"""The budget's name of the whole-image path: the folded model on one tensor."""


@dataclass(frozen=True)
class GiantCase:
    """One image through one model.

    Attributes:
        group: "acceptance", "area" (a budget over many sizes) or "speed" (beside the whole-image path).
        model: an architecture.
        height: of the image, in pixels.
        width: likewise.
        budget_mib: of memory; 0 for the whole-image path.
        task: "classify" or "features", which are written to a zarr.
    """

    group: str
    model: str
    height: int
    width: int
    budget_mib: int
    task: str = "classify"

    @property
    def name(self) -> str:
        """Return what its rows are found by."""
        return f"{self.group}/{self.model}/{self.height}x{self.width}/{self.budget_mib or WHOLE}"


AREA_MODEL, AREA_BUDGET = "xcit_nano_12_p16", 900
SIDES = (1024, 2048, 4096, 6144, 8192, 12288, 16384)
CASES = (
    GiantCase("acceptance", "xcit_small_12_p8", 4000, 6000, 3072),
    GiantCase("acceptance", AREA_MODEL, 20_000, 20_000, 2048),
    *(GiantCase("area", AREA_MODEL, side, side, AREA_BUDGET) for side in SIDES),
    *(GiantCase("area", AREA_MODEL, side, side, 0) for side in SIDES if side <= 6144),
    GiantCase("speed", "xcit_small_12_p8", 2048, 2048, 8192),
    GiantCase("speed", AREA_MODEL, 4096, 4096, 8192),
)


def run(cases: Sequence[GiantCase], *, results_dir: Path | None) -> list[dict[str, str]]:
    """Measure cases, print each, and add them to ``giant.csv``.

    Args:
        cases: what to measure.
        results_dir: folder of the CSV file; None to print only.

    Raises:
        BackendError: a child failed, with its last words.
    """
    date, rows = results.now(), []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            path = Path(folder) / f"{case.height}x{case.width}.tif"
            if not path.exists():
                write_pattern(path, case.height, case.width)
            answer = _apart(case, path, Path(folder))
            row = {"date": date, "case": case.name} | {k: str(v) for k, v in asdict(case).items() if k in COLUMNS}
            row |= {key: str(value) for key, value in answer.items()}
            rows.append(row)
            print(
                f"{case.name}: {row['seconds']} s, {row['us_a_token']} us a token, peak {row['peak_mib']} MiB, "
                f"{row['ratio_to_whole'] or '-'} times the whole-image path's time"
            )
            if results_dir is not None:
                results.append(results_dir / "giant.csv", [row], COLUMNS)
    return rows


def write_pattern(path: Path, height: int, width: int) -> None:
    """Write a tiled TIFF with a pattern that differs everywhere."""
    from xcit.data.large_output import open_dense_output

    x = np.arange(width)[None, :, None]
    with open_dense_output(path, (height, width, 3), "uint8") as output:
        for top in range(0, height, 256):
            y = np.arange(top, min(height, top + 256))[:, None, None]
            output.write(top, ((7 * y + 13 * x + 50 * np.arange(3) + (y * x >> 8)) & 255).astype(np.uint8))


def table(results_dir: Path) -> str:
    """The acceptance cases and the speed beside the whole-image path."""
    rows = _newest(results_dir)
    chosen = [row for row in rows if not row["case"].startswith("area/")]
    if not chosen:
        return "Not measured yet: `python -m xcit.bench giant` measures it."
    lines = [
        "| model | image | tokens | budget | tokens lie | peak, anonymous | time | a token | whole-image path |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in chosen:
        ratio = f"{float(row['ratio_to_whole']):.2f}×" if row["ratio_to_whole"] else ""
        where = "on disk" if row["on_disk"] == "True" else "in memory"
        cells = (
            *(f"`{row['model']}`", f"{row['width']} × {row['height']}", f"{int(row['tokens']):,}"),
            *(f"{row['budget_mib']} MiB", where, f"{row['peak_mib']} MiB", f"{row['seconds']} s"),
            *(f"{row['us_a_token']} µs", ratio),
        )
        lines.append(f"| {' | '.join(cells)} |")
    last = max(chosen, key=lambda row: row["date"])
    lines += ["", f"{last['hardware']}, {last['threads']} threads; torch {last['torch']}, xcit {last['xcit']}; "
                  f"{last['date'][:10]}."]  # fmt: skip
    return "\n".join(lines)


def figure(results_dir: Path) -> Figure:
    """Draw peak memory against the image's area: at a fixed budget, and of the whole-image path."""
    from xcit.report.style import BLUE, GRID, INK, ORANGE, new_figure

    rows = [row for row in _newest(results_dir) if row["case"].startswith("area/")]
    drawing = new_figure(6.4, 4.2)
    axes = drawing.subplots()
    for label, colour, mark, chosen in (
        (f"xcit giant, a budget of {AREA_BUDGET} MiB", BLUE, "o-", [r for r in rows if r["budget_mib"] != "0"]),
        ("the whole image at once", ORANGE, "s--", [r for r in rows if r["budget_mib"] == "0"]),
    ):
        points = sorted((int(r["height"]) * int(r["width"]) / 1e6, float(r["peak_mib"])) for r in chosen)
        axes.plot(*zip(*points, strict=True), mark, color=colour, label=label, markersize=4.5, linewidth=1.4)
    axes.axhline(AREA_BUDGET, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0)
    axes.set_xlabel("image, megapixels", color=INK)
    axes.set_title(f"peak of anonymous memory, MiB ({AREA_MODEL}, classify)", loc="left", color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return drawing


def write_figure(results_dir: Path, out: Path) -> None:
    """Write ``figure`` as a PNG."""
    from xcit.report.style import png

    write_atomic(out, png(figure(results_dir)))


def _newest(results_dir: Path) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in results.read(results_dir / "giant.csv", COLUMNS):
        found[row["case"]] = row
    order = {case.name: i for i, case in enumerate(CASES)}
    return sorted(found.values(), key=lambda row: order.get(row["case"], len(order)))


def _apart(case: GiantCase, path: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "xcit.bench.giant", json.dumps([asdict(case), str(path), str(folder)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BackendError(f"{case.name} could not be measured: {said}")
    return json.loads(lines[-1])


def measure_here(case: GiantCase, path: Path, folder: Path) -> dict[str, Any]:
    """Measure a case in this process, which should have done nothing else."""
    import torch

    from xcit.inference.giant import GiantImages
    from xcit.models.factory import create_model

    torch.manual_seed(0)
    model = create_model(case.model).eval()
    budget = f"{case.budget_mib or 64 * 1024}MiB"
    giant = GiantImages(model, memory=budget, work=folder, device="cpu", mean=(0.5,) * 3, std=(0.25,) * 3)
    h, w = (-(-side // giant.setup.trunk.patch_size) for side in (case.height, case.width))
    plan = giant.plan(path, "classify")

    def whole() -> None:
        from xcit.data.large_image import open_large_image

        with open_large_image(path) as image, torch.inference_mode():
            x = torch.from_numpy(image.read(0, 0, case.height, case.width)).float()
            x = x.div_(255).sub_(0.5).div_(0.25).permute(2, 0, 1).unsqueeze(0)
            giant.model(x)

    def streamed() -> None:
        giant.classify(path) if case.task == "classify" else giant.features(path, folder / "features.zarr")

    seconds, ratios = [], []
    with AnonymousPeak() as peak:
        for _ in range(3 if case.group == "speed" else 1):
            took = {}
            for name, step in (("streamed", streamed), (WHOLE, whole)):
                if (name == WHOLE) == (case.budget_mib == 0) or case.group == "speed":
                    started = time.perf_counter()
                    step()
                    took[name] = time.perf_counter() - started
            seconds.append(took.get("streamed", took.get(WHOLE, 0.0)))
            if len(took) == 2:
                ratios.append(took["streamed"] / took[WHOLE])
    middle = sorted(seconds)[len(seconds) // 2]
    return {
        "tokens": h * w,
        "on_disk": plan.on_disk,
        "band": plan.band,
        "seconds": round(middle, 2),
        "us_a_token": round(middle / (h * w) * 1e6, 1),
        "peak_mib": round(peak.highest / 2**20),
        "ratio_to_whole": round(sorted(ratios)[len(ratios) // 2], 3) if ratios else "",
    } | results.environment("cpu")


if __name__ == "__main__":
    asked, image, place = json.loads(sys.argv[1])
    print(json.dumps(measure_here(GiantCase(**asked), Path(image), Path(place))))
