"""The documents' tables of what was measured on GPUs, from ``gpu*.csv``; ``xcit.bench.tables`` puts them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from xcit.bench import results
from xcit.bench.gpu_cases import (
    CASES,
    COLUMNS,
    ELEMENT_BYTES,
    HEADLINE,
    PRECISIONS,
    Entry,
    GpuCase,
    baseline,
    competitor,
    path,
)
from xcit.bench.gpu_floors import MIB, model_stages
from xcit.bench.gpu_peaks import Peaks

Row = dict[str, str]
Found = dict[str, Row]
"""A case's rows by their competitor."""

TIMMS_COMPILED = ("timm compile", "timm autotune", "timm graphs")


def speed_table(results_dir: Path) -> str:
    """Inference and training of ours against timm's XCiT: a row a case, the best way to run either one."""

    def table(found: dict[GpuCase, Found]) -> list[str]:
        lines = _head(
            (
                *("model", "px", "batch", "precision", "step", "timm eager ms", "timm's best compiled ms"),
                *("ours: eager", "ours: best", "how", "of timm eager", "of timm's best", "of the matrix peak"),
                *("of the floor's speed", "peak MiB: timm, ours"),
            ),
            text=5,
        )
        for case, rows in found.items():
            first = rows[str(baseline(case))]
            compiled = _fastest(rows, TIMMS_COMPILED)
            eager = _fastest(rows, [name for name in rows if _ours(rows[name]) and rows[name]["run"] == "eager"])
            best = _fastest(rows, [name for name in rows if _ours(rows[name])])
            cells = [f"`{case.model}`", str(case.image_size), str(case.batch_size), case.precision, case.mode]
            cells += [_ms(first), _ms(compiled), _ms(eager), _ms(best), competitor(best) if best else ""]
            cells += [_ratio(best, first), _ratio(best, compiled)]
            cells += [_percent(best, "matrix_share"), _percent(best, "floor_share"), _peaks(rows, best)]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_device(results_dir, table)


def competitors_table(results_dir: Path) -> str:
    """Every competitor of the headline's cases: a row each."""

    def table(found: dict[GpuCase, Found]) -> list[str]:
        lines = _head(
            (
                *("case", "competitor", "ms (p10, p90)", "images/s", "of timm eager", "TFLOP/s", "of the matrix peak"),
                *("of the floor's speed", "peak MiB", "differs by"),
            ),
            text=2,
        )
        for case, rows in found.items():
            if case not in HEADLINE:
                continue
            for name, row in rows.items():
                times = f"{_ms(row)} ({float(row['p10_ms']):.2f}, {float(row['p90_ms']):.2f})"
                cells = [f"`{case}`", name, times, f"{float(row['images_per_second']):.0f}"]
                cells += [_ratio(row, rows[str(baseline(case))]), f"{float(row['tflops']):.1f}"]
                cells += [_percent(row, "matrix_share"), _percent(row, "floor_share")]
                cells += [f"{float(row['peak_mib']):.0f}" if row["peak_mib"] else "", row["max_rel_diff"]]
                lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_device(results_dir, table)


def floors_table(results_dir: Path) -> str:
    """The least that each headline case must move and multiply, at what the device reached in copies and products."""

    def table(found: dict[GpuCase, Found]) -> list[str]:
        lines = _head(
            (
                *("case", "stage"),
                *("MiB", "G multiply-adds", "by bytes ms", "by arithmetic ms", "floor ms"),
            ),
            text=2,
        )
        for case, rows in found.items():
            if case not in HEADLINE:
                continue
            first = rows[str(baseline(case))]
            peaks = Peaks(float(first["matrix_tflops"]), float(first["copy_gbs"]))
            for cells in floor_cells(case, peaks):
                lines.append(f"| `{case}` | {' | '.join(cells)} |")
        return lines

    return _per_device(results_dir, table)


def floor_cells(case: GpuCase, peaks: Peaks) -> list[tuple[str, ...]]:
    """Return a case's floor as cells of a table: the stages of one block, then the whole model.

    Args:
        case: which.
        peaks: of a device.
    """
    element = ELEMENT_BYTES[PRECISIONS[case.precision].arithmetic]
    stages, whole = model_stages(case, peaks)
    lines = []
    for stage in stages:
        if stage.name.startswith("block"):
            moved, adds = stage.values(case.mode) * element, stage.operations(case.mode)
            lines.append(_floor_line(stage.name, moved, adds, peaks))
    lines.append((*_floor_line("the model", whole.bytes, whole.multiply_adds, peaks)[:-1], f"{whole.ms:.3f}"))
    return lines


def profile_table(results_dir: Path) -> str:
    """Where a step's time goes, by what kernels do: a row a competitor, of the last profile of each."""
    from xcit.bench import gpu_profile  # which imports timm, as what follows does

    rows = results.read(gpu_profile.path(results_dir), gpu_profile.COLUMNS)
    if not rows:
        return "Not measured yet: `python -m xcit.bench gpu-profile CASE` measures it, `make tables` writes it here."
    kinds = [*dict.fromkeys(kind for kind, _ in gpu_profile.CLASSES), gpu_profile.OTHER]
    blocks = []
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        newest: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["hardware"] != hardware:
                continue
            key = row["case"], row["competitor"]
            if row["rank"] == "1":
                newest[key] = []
            newest[key].append(row)
        lines = _head(("case", "competitor", "ms", "kernels", *kinds), text=2)
        for (case, name), kernels in newest.items():
            total = float(kernels[0]["step_ms"])
            shares = {kind: sum(float(k["ms"]) for k in kernels if k["class"] == kind) / total for kind in kinds}
            calls = sum(float(k["calls"]) for k in kernels)
            cells = [f"`{case}`", name, f"{total:.2f}", f"{calls:.0f}"]
            cells += [f"{100 * shares[kind]:.0f} %" if shares[kind] else "" for kind in kinds]
            lines.append(f"| {' | '.join(cells)} |")
        last = [kernels[0] for kernels in newest.values()]
        blocks.append("\n".join((*lines, "", _note(hardware, last))))
    return "\n\n".join(blocks)


def largest_table(results_dir: Path) -> str:
    """The largest square image that one device takes whole: a row a model."""
    from xcit.bench import gpu_largest

    rows = results.read(gpu_largest.path(results_dir), gpu_largest.COLUMNS)
    if not rows:
        return "Not measured yet: `python -m xcit.bench gpu-largest` measures it, `make tables` writes it here."
    shown = (("timm", "plain"), ("folded", "plain"), ("folded", "triton"))
    blocks = []
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        newest = {(r["model"], r["source"], r["kernels"]): r for r in rows if r["hardware"] == hardware}
        titles = ("timm", "ours, folded", "ours, folded, with kernels")
        lines = _head(("model", "memory GiB", *(f"{title}: px" for title in titles), "pixels, ours of timm's"), text=1)
        for model in dict.fromkeys(model for model, *_ in newest):
            found = [newest.get((model, *key)) for key in shown]
            memory = next(row["memory_mib"] for row in found if row)
            sides = [int(row["side"]) if row else 0 for row in found]
            ratio = f"{(max(sides[1:]) / sides[0]) ** 2:.2f}×" if sides[0] and max(sides[1:]) else ""
            cells = [f"`{model}`", f"{float(memory) / 1024:.0f}" if memory else ""]
            cells += [_side(row) for row in found]
            lines.append(f"| {' | '.join((*cells, ratio))} |")
        blocks.append("\n".join((*lines, "", _note(hardware, list(newest.values())))))
    return "\n\n".join(blocks)


def forms_table(results_dir: Path) -> str:
    """How many times faster the covariance form is than the token form, on a GPU, over the grid."""
    from xcit.bench import gpu_calibrate

    rows = results.read(gpu_calibrate.path(results_dir), gpu_calibrate.COLUMNS)
    if not rows:
        return "Not measured yet: `python -m xcit.bench gpu-calibrate` measures it, `make tables` writes it here."
    blocks = []
    for hardware, dtype in dict.fromkeys((row["hardware"], row["dtype"]) for row in rows):
        of_device = [row for row in rows if (row["hardware"], row["dtype"]) == (hardware, dtype)]
        times: dict[tuple[str, str, str, str], dict[tuple[int, int], dict[str, float]]] = {}
        for row in of_device:  # the last one of each counts
            way = row["embed_dim"], row["num_heads"], row["mode"], row["kernels"]
            shape = int(row["num_tokens"]), int(row["batch_size"])
            times.setdefault(way, {}).setdefault(shape, {})[row["form"]] = float(row["median_ms"])
        shapes = sorted({shape for of_way in times.values() for shape in of_way})
        lines = _head(("width / heads, pass, kernels", *(f"{batch} × {n}" for n, batch in shapes)), text=1)
        for way in sorted(times, key=lambda way: (way[3], way[2], int(way[0]))):
            width, heads, mode, kernels = way
            cells = []
            for shape in shapes:
                found = times[way].get(shape, {})
                both = "tokens" in found and "covariance" in found
                cells.append(f"{found['tokens'] / found['covariance']:.2f}×" if both else "")
            lines.append(f"| {width} / {heads}, {mode}, {kernels} | {' | '.join(cells)} |")
        blocks.append("\n".join((*lines, "", _note(f"{hardware}; {dtype}", of_device))))
    return "\n\n".join(blocks)


# --- parts of all of them ---------------------------------------------------------------------------------------------


def _per_device(results_dir: Path, table: Callable[[dict[GpuCase, Found]], list[str]]) -> str:
    """One table a device, of listed cases; of each competitor the last row counts."""
    listed = {str(case): case for case in CASES}
    rows = [row for row in results.read(path(results_dir), COLUMNS) if row["case"] in listed]
    if not rows:
        return "Not measured yet: `python -m xcit.bench gpu` measures it, `make tables` writes it here."
    blocks = []
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        by_case: dict[GpuCase, Found] = {}
        for row in rows:
            if row["hardware"] == hardware:
                by_case.setdefault(listed[row["case"]], {})[competitor(row)] = row
        # timm's eager model is in every round; the order is the list's
        found = {case: by_case[case] for case in CASES if str(baseline(case)) in by_case.get(case, {})}
        last = [row for of_case in found.values() for row in of_case.values()]
        peaks: dict[str, Row] = {}
        for row in last:
            peaks[row["precision"].removeprefix("amp-")] = row
        reached = ", ".join(f"{name} {float(row['matrix_tflops']):.0f}" for name, row in peaks.items())
        copies = _joined(f"{float(row['copy_gbs']):.0f}" for row in peaks.values())
        note = f"products of large matrices reached, in TFLOP/s, {reached}; copies {copies} GB/s"
        blocks.append("\n".join((*table(found), "", _note(f"{hardware}; {note}", last))))
    return "\n\n".join(blocks)


def _note(what: str, rows: Sequence[Row]) -> str:
    versions = ", ".join(
        f"{name} {_joined(row[name] for row in rows)}"
        for name in ("torch", "timm", "triton", "xcit")
        if any(row[name] for row in rows)
    )
    return f"{what}; {versions}; {_joined(row['date'][:10] for row in rows)}."


def _ours(row: Row) -> bool:
    return Entry(row["source"], row["model"], row["run"]).is_ours  # type: ignore[arg-type]


def _fastest(rows: Found, names: Iterable[str]) -> Row | None:
    """Return the row that is furthest ahead of timm's eager model in its own round."""
    found = [rows[name] for name in names if name in rows]
    return max(found, key=lambda row: float(row["ratio_vs_timm_eager"]), default=None)


def _ratio(row: Row | None, other: Row | None) -> str:
    """How many times faster a row is than another, both against timm's eager model in their own rounds."""
    if row is None or other is None:
        return ""
    return f"{float(row['ratio_vs_timm_eager']) / float(other['ratio_vs_timm_eager']):.2f}×"


def _ms(row: Row | None) -> str:
    return f"{float(row['median_ms']):.2f}" if row else ""


def _percent(row: Row | None, column: str) -> str:
    return f"{100 * float(row[column]):.0f} %" if row and row[column] else ""


def _peaks(rows: Found, best: Row | None) -> str:
    """Memory of timm's eager model and of ours, both as they ran; of a graph ours eager, whose memory can be told."""
    timm = next((row["peak_mib"] for row in rows.values() if row["source"] == "timm" and row["run"] == "eager"), "")
    if best is not None and not best["peak_mib"]:
        same = [r for r in rows.values() if (r["source"], r["kernels"]) == (best["source"], best["kernels"])]
        best = next((row for row in same if row["peak_mib"]), None)
    if not timm or best is None:
        return ""
    return f"{float(timm):.0f}, {float(best['peak_mib']):.0f} ({float(best['peak_mib']) / float(timm):.2f}×)"


def _floor_line(name: str, moved: float, adds: float, peaks: Peaks) -> tuple[str, ...]:
    by_bytes, by_adds = moved / peaks.copy_gbs / 1e6, 2 * adds / peaks.matrix_tflops / 1e9
    floor = max(by_bytes, by_adds)
    return name, f"{moved / MIB:.1f}", f"{adds / 1e9:.2f}", f"{by_bytes:.3f}", f"{by_adds:.3f}", f"{floor:.3f}"


def _side(row: Row | None) -> str:
    if row is None:
        return ""
    limit = "" if row["refused_by"] in ("memory", "") else " (not memory)"
    return f"{int(row['side']):,}{limit}".replace(",", " ")


def _head(names: tuple[str, ...], *, text: int) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * text + "--:|" * (len(names) - text)]


def _joined(values: Iterable[str]) -> str:
    return " / ".join(sorted({value for value in values if value}))
