"""The documents' tables of what `xcit bench` measured, from ``deploy.csv``; ``xcit.bench.tables`` puts them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from xcit.bench import results
from xcit.bench.deploy_cases import CASES, COLUMNS, OWN_SIZE, PEERS, PRECISIONS, RUNTIMES, DeployCase
from xcit.bench.linear_cost import COSTS, fit_growth, series_of
from xcit.models.zoo import CHECKPOINTS

Row = dict[str, str]

TITLES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO", "eager": "eager", "compile": "torch.compile"}


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "deploy.csv"


def xcit_table(results_dir: Path) -> str:
    """Ours, as it is and folded, against timm's XCiT: a row a case and precision."""

    def table(rows: list[Row]) -> list[str]:
        head = (
            *("model", "px", "batch", "dtype", "eager ms: timm, ours, folded"),
            *(f"{TITLES[runtime]} ms: timm, folded" for runtime in RUNTIMES[1:]),
            *("peak MiB, eager: timm, folded", "GMACs: timm, folded"),
        )
        lines = _head(head, text=4)
        for case, dtype, found in _by_case(rows, "xcit"):
            cells = [f"`{case.model}`", str(case.image_size), str(case.batch_size), dtype]
            cells.append(_times(found, ("timm eager", "ours eager", "folded eager")))
            cells += [_times(found, (f"timm {runtime}", f"folded {runtime}")) for runtime in RUNTIMES[1:]]
            cells.append(_peaks(found, "timm eager", "folded eager"))
            work = [_of_source(found, source) for source in ("timm", "folded")]
            cells.append(", ".join(f"{int(row['multiply_adds']) / 1e9:.1f}" for row in work if row))
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_machine(results_dir, "xcit", table)


def precisions_table(results_dir: Path) -> str:
    """Our folded XCiT in float32, bfloat16 and int8, measured in turns: a row a case."""
    shown = (
        *("openvino float32", "openvino bfloat16", "openvino int8"),
        *("onnxruntime float32", "onnxruntime int8"),
    )

    def table(rows: list[Row]) -> list[str]:
        head = (
            *("model", "px", "batch"),
            *(f"{TITLES[runtime]} {dtype} ms" for runtime, dtype in (name.split() for name in shown)),
            "int8 differs by",
        )
        lines = _head(head, text=3)
        for case in CASES:
            found = {f"{row['runtime']} {row['dtype']}": row for row in rows if row["case"] == str(case)}
            if case.group != PRECISIONS or not found:
                continue
            cells = [f"`{case.model}`", str(case.image_size), str(case.batch_size)]
            cells += [_time_and_ratio(found.get(name), "openvino") for name in shown]
            in_int8 = (found[name]["max_rel_diff"] for name in shown if name.endswith("int8") and name in found)
            cells.append(", ".join(in_int8))
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_machine(results_dir, PRECISIONS, table)


def training_table(results_dir: Path) -> str:
    """A training step of ours against timm's XCiT and against models of like accuracy."""

    def table(rows: list[Row]) -> list[str]:
        lines = _head(
            ("case", "model", "px", "batch", "dtype", "eager ms", "torch.compile ms", "peak MiB, eager"), text=5
        )
        for group in ("training", "training-peers"):
            for case, dtype, found in _by_case(rows, group):
                for source, model in dict.fromkeys((row["source"], row["model"]) for row in found):
                    of_model = {
                        row["runtime"]: row for row in found if (row["source"], row["model"]) == (source, model)
                    }
                    any_row = next(iter(of_model.values()))
                    cells = [
                        f"`{case.model}`",
                        model if source == "peer" else source,
                        any_row["image_size"],
                        str(case.batch_size),
                        dtype,
                        *(_time_and_ratio(of_model.get(runtime)) for runtime in ("eager", "compile")),
                        _peak(of_model.get("eager")),
                    ]
                    lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_machine(results_dir, "training", table)


def peers_table(results_dir: Path) -> str:
    """Our folded XCiT against timm's models of like accuracy: a row a model."""

    def table(rows: list[Row]) -> list[str]:
        head = (
            *("case", "model", "top-1", "px", "batch", "dtype", "GMACs"),
            *(f"{TITLES[runtime]} ms" for runtime in RUNTIMES),
            "peak MiB, eager",
        )
        lines = _head(head, text=6)
        for case, dtype, found in _by_case(rows, "peers"):
            accuracies = {peer.name: f"{peer.top1:.1f}" for peer in PEERS[case.model]}
            for source, model in dict.fromkeys((row["source"], row["model"]) for row in found):
                of_model = {row["runtime"]: row for row in found if row["model"] == model}
                any_row = next(iter(of_model.values()))
                at_home = case.image_size == OWN_SIZE
                cells = [
                    f"`{case.model}`, {case.image_size} px",
                    model if source == "peer" else f"{model}, folded",
                    (accuracies.get(model) or _own_accuracy(model)) if at_home else "",
                    any_row["image_size"],
                    str(case.batch_size),
                    dtype,
                    f"{int(any_row['multiply_adds']) / 1e9:.1f}",
                    *(_time_and_ratio(of_model.get(runtime)) for runtime in RUNTIMES),
                    _peak(of_model.get("eager")),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_machine(results_dir, "peers", table)


def growth_table(results_dir: Path) -> str:
    """How time and memory grow with the number of tokens, as fitted by ``xcit.bench.linear_cost``."""

    def table(rows: list[Row]) -> list[str]:
        lines = _head(
            ("model", "runtime", "dtype", "px", "time: exponent", "intercept ms", "memory: exponent", "intercept MiB"),
            text=4,
        )
        fits = {
            column: {
                (series.name, series.runtime, series.dtype): (series, fit_growth(series.num_tokens, series.costs))
                for series in series_of(rows, column)
            }
            for column in COSTS
        }
        for key, (series, growth) in fits["median_ms"].items():
            memory = fits["peak_mib"].get(key)
            of_memory = (f"{memory[1].exponent:.2f}", f"{memory[1].intercept:.1f}") if memory else ("", "")
            sizes = f"{series.image_sizes[0]} to {series.image_sizes[-1]}"
            cells = [series.name, TITLES[series.runtime], series.dtype, sizes]
            cells += [f"{growth.exponent:.2f}", f"{growth.intercept:.1f}", *of_memory]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_machine(results_dir, "linear", table)


# --- parts of all of them ---------------------------------------------------------------------------------------------


def _per_machine(results_dir: Path, verb: str, table: Callable[[list[Row]], list[str]]) -> str:
    """One table a machine, with what it is and when it measured; only rows of listed cases of that group."""
    groups = {"training": ("training", "training-peers")}.get(verb, (verb,))
    listed = {str(case) for case in CASES if case.group in groups}
    rows = [row for row in results.read(path(results_dir), COLUMNS) if row["case"] in listed]
    if not rows:
        return f'Not measured yet: `xcit bench "{verb}*/*" --out {path(Path("benchmarks/results"))}` measures it.'
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        machines.setdefault((row["hardware"], row["threads"], row["device"]), []).append(row)
    blocks = []
    for (hardware, threads, device), of_machine in machines.items():
        last = _last_runs(of_machine)
        where = hardware if device == "cuda" else f"{hardware}, {threads} threads"
        peaks = {
            dtype: _joined(f"{float(row['matrix_gflops']):.0f}" for row in last if row["dtype"] == dtype)
            for dtype in dict.fromkeys(row["dtype"] for row in last)
        }
        reached = ", ".join(f"{dtype} {peak}" for dtype, peak in peaks.items())
        packages = ("torch", "timm", "xcit", "onnxruntime", "openvino")
        versions = ", ".join(f"{name} {_joined(row[name] for row in last)}" for name in packages if last[0][name])
        days = _joined(row["date"][:10] for row in last)
        note = f"{where}; products of large matrices reached, in GFLOP/s, {reached}; {versions}; {days}."
        blocks.append("\n".join((*table(last), "", note)))
    return "\n\n".join(blocks)


def _last_runs(rows: list[Row]) -> list[Row]:
    newest: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row["case"], row["dtype"]
        newest[key] = max(newest.get(key, ""), row["date"])
    return [row for row in rows if row["date"] == newest[row["case"], row["dtype"]]]


def _by_case(rows: list[Row], group: str) -> Iterable[tuple[DeployCase, str, list[Row]]]:
    """Yield the listed cases of a group with each precision that was measured, and its rows."""
    for case in CASES:
        of_case = [row for row in rows if row["case"] == str(case)] if case.group == group else []
        for dtype in dict.fromkeys(row["dtype"] for row in of_case):
            yield case, dtype, [row for row in of_case if row["dtype"] == dtype]


def _find(rows: list[Row], name: str) -> Row | None:
    source, runtime = name.split()
    return next((row for row in rows if (row["source"], row["runtime"]) == (source, runtime)), None)


def _of_source(rows: list[Row], source: str) -> Row | None:
    return next((row for row in rows if row["source"] == source), None)


def _times(rows: list[Row], names: tuple[str, ...]) -> str:
    """The first one's time, and each other's with how many times faster it is."""
    found = [_find(rows, name) for name in names]
    if found[0] is None:
        return ""
    return ", ".join([f"{float(found[0]['median_ms']):.1f}", *filter(None, map(_time_and_ratio, found[1:]))])


def _time_and_ratio(row: Row | None, runtime: str | None = None) -> str:
    """A time, with how many times faster that is than the case's baseline in a runtime, by default its own."""
    if row is None:
        return ""
    ratio = row[f"ratio_vs_{runtime or row['runtime']}"]
    return f"{float(row['median_ms']):.1f}" + (f" ({float(ratio):.2f}×)" if ratio else "")


def _peaks(rows: list[Row], first: str, second: str) -> str:
    before, after = _find(rows, first), _find(rows, second)
    if before is None or after is None or not (before["peak_mib"] and after["peak_mib"]):
        return ""
    share = float(after["peak_mib"]) / float(before["peak_mib"])
    return f"{float(before['peak_mib']):.0f}, {float(after['peak_mib']):.0f} ({share:.2f}×)"


def _peak(row: Row | None) -> str:
    return f"{float(row['peak_mib']):.0f}" if row and row["peak_mib"] else ""


def _own_accuracy(architecture: str) -> str:
    metrics = CHECKPOINTS[f"{architecture}_224_dist"].metrics
    return next(f"{m.value:.1f}" for m in metrics if m.name == "ImageNet top-1" and m.source == "timm")


def _head(names: tuple[str, ...], *, text: int) -> list[str]:
    """A table's first two lines; the first columns are text, the others figures."""
    return [f"| {' | '.join(names)} |", "|" + "---|" * text + "--:|" * (len(names) - text)]


def _joined(values: Iterable[str]) -> str:
    return " / ".join(sorted(set(values)))
