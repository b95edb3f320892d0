"""The tables of README.md and docs/: text between two marks, written from the CSV files and the zoo, never by hand.

``<!-- bench:NAME -->`` opens a region and ``<!-- /bench -->`` closes it; what stands between is replaced by that table.
A figure can thus not differ from what was measured, and a test holds the committed text to it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from xcit.bench import ablations, deploy_tables, giant, gpu_tables, results, self_supervision, tiling
from xcit.bench.cases import (
    BACKBONE,
    LOADING_COLUMNS,
    PYRAMID,
    TRAINING,
    WIDTHS,
    XCA,
    XCA_FORMS,
    XCA_MEMORY,
    Case,
    Suite,
)
from xcit.errors import ConfigError, DataError, UnknownNameError
from xcit.files import write_atomic
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS
from xcit.recipes.registry import recipes_table

Row = dict[str, str]

RESULTS = Path("benchmarks/results")
_REGION = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- bench:")


def rewrite(root: Path, *, write: bool = True) -> list[Path]:
    """Bring the tables of a repository up to date.

    Args:
        root: the repository's root.
        write: False only looks.

    Returns:
        The documents whose text changed or would change, relative to ``root``.

    Raises:
        ConfigError: ``root`` is not the repository's root.
        DataError: a region is not closed, or a CSV file has other columns.
        UnknownNameError: a region asks for a table that does not exist.
    """
    if not (root / "README.md").exists() or not (root / "docs").is_dir():
        raise ConfigError(f"{root} has no README.md and docs/; run this in the root of the xcit repository.")
    changed = []
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = render(old, root / RESULTS, source=path.name)
        if new != old:
            changed.append(path.relative_to(root))
            if write:
                write_atomic(path, new.encode())
    return changed


def render(text: str, results_dir: Path, *, source: str) -> str:
    """Fill every region of a document.

    Args:
        text: the document.
        results_dir: folder of the CSV files.
        source: the document's name, for errors.

    Returns:
        The document with its regions replaced; outside them nothing changes.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UnknownNameError("table", name, TABLES, f"{source} asks for it.")
        return f"{match[1]}{TABLES[name](results_dir).strip()}\n{match[4]}"

    regions = list(_REGION.finditer(text))
    nested = any(_OPENING.search(region["body"]) for region in regions)
    if nested or len(regions) != len(_OPENING.findall(text)):
        raise DataError(f"{source}: a <!-- bench:NAME --> mark has no <!-- /bench --> after it.")
    return _REGION.sub(fill, text)


# --- what is released ------------------------------------------------------------------------------------------------


def models_table(results_dir: Path) -> str:
    """The 42 ImageNet classifiers, one row an architecture."""
    lines = [
        "| architecture | parameters | GMACs at 224 / 384 px | top-1: 224 px | 224 px, distilled | 384 px, distilled |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for id, architecture in ARCHITECTURES.items():
        plain, distilled, large = (CHECKPOINTS[f"{id}_{kind}"] for kind in ("224", "224_dist", "384_dist"))
        accuracies = (
            next(m.value for m in c.metrics if m.name == "ImageNet top-1" and m.source == "xcit README")
            for c in (plain, distilled, large)
        )
        lines.append(
            f"| `{id}` | {architecture.num_params / 1e6:.1f} M | {plain.gmacs_port:.1f} / {large.gmacs_port:.1f} | "
            + " | ".join(f"{accuracy:.1f}" for accuracy in accuracies)
            + " |"
        )
    return "\n".join(lines)


# --- what was measured -----------------------------------------------------------------------------------------------


def xca_table(results_dir: Path) -> str:
    """One XCA layer against timm's."""
    return _competition(XCA, results_dir, ("width / heads", "batch × tokens", "pass"), _xca_cells)


def backbone_table(results_dir: Path) -> str:
    """Whole models against timm's."""
    return _competition(BACKBONE, results_dir, ("model", "px", "batch", "mode"), _backbone_cells)


def training_table(results_dir: Path) -> str:
    """The whole step of a training run, our model's against timm's."""
    return _competition(
        TRAINING,
        results_dir,
        ("model", "px", "batch"),
        lambda row: (f"`{row['architecture']}`", row["image_size"], row["batch_size"]),
    )


def pyramid_table(results_dir: Path) -> str:
    """The maps of a detector's image, our pyramid's against the same on timm's model."""
    return _competition(PYRAMID, results_dir, ("model", "image", "batch", "pass"), _pyramid_cells)


def loading_table(results_dir: Path) -> str:
    """How fast files become batches, our loader's rate against timm's."""
    rows = results.read(results_dir / "loading.csv", LOADING_COLUMNS)
    if not rows:
        return "Not measured yet: `python -m xcit.bench loading` measures it, `make tables` writes it here."
    blocks = []
    for (hardware, python), group in itertools.groupby(
        sorted(rows, key=lambda row: (row["hardware"], row["python"], row["date"])),
        key=lambda row: (row["hardware"], row["python"]),
    ):
        last = {(row["num_workers"], row["competitor"]): row for row in group}  # of each, the last run's
        lines = ["| worker processes | timm, images/s | ours, images/s | ratio |", "|--:|--:|--:|--:|"]
        for workers in sorted({workers for workers, _ in last}, key=int):
            timm, ours = last[workers, "timm"], last[workers, "xcit"]
            rates = f"{float(timm['images_per_second']):.0f} | {float(ours['images_per_second']):.0f}"
            lines.append(f"| {workers} | {rates} | {float(ours['ratio_vs_timm']):.2f}× |")
        row = next(iter(last.values()))
        versions = ", ".join(f"{name} {_joined(r[name] for r in last.values())}" for name in ("torch", "timm", "xcit"))
        days = _joined(r["date"][:10] for r in last.values())
        what = f"{row['num_images']} JPEG files of 500 × 375 px to {row['image_size']} px, batch {row['batch_size']}"
        lines += ["", f"{what}; {hardware}; Python {python}, {versions}; {days}."]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def memory_table(results_dir: Path) -> str:
    """What one layer saves for the backward pass, for every width."""

    def table(rows: list[Row]) -> list[str]:
        lines = [
            "| width / heads | batch × tokens | timm: saved, peak MiB | token form | covariance form | automatic | "
            "automatic saves, of timm's |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for case in _by_case(XCA_MEMORY, rows):
            memory = {
                name: f"{float(row['saved_mib']):.1f}, {float(row['peak_mib']):.1f}" for name, row in case.items()
            }
            share = float(case["auto"]["saved_mib"]) / float(case["timm"]["saved_mib"])
            cells = _xca_cells(case["timm"])[:2]
            columns = (memory[name] for name in ("timm", "tokens", "covariance", "auto"))
            lines.append(f"| {' | '.join((*cells, *columns))} ({case['auto']['form']}) | {share:.2f}× |")
        return lines

    return _per_machine(XCA_MEMORY, results_dir, table)


def forms_table(results_dir: Path) -> str:
    """How many times faster the covariance form is than the token form, over the grid."""

    def table(rows: list[Row]) -> list[str]:
        speedup = {
            (row["mode"], row["embed_dim"], row["num_heads"], row["batch_size"], row["num_tokens"]): row[
                "ratio_vs_tokens"
            ]
            for row in rows
            if row["competitor"] == "covariance"
        }
        shapes = sorted({(int(tokens), int(batch)) for *_, batch, tokens in speedup})
        head = " | ".join(f"{batch} × {tokens}" for tokens, batch in shapes)
        lines = [f"| width / heads, pass | {head} |", "|---" + "|--:" * len(shapes) + "|"]
        for mode in ("inference", "training"):
            for width, heads in WIDTHS:
                keys = [(mode, str(width), str(heads), str(batch), str(tokens)) for tokens, batch in shapes]
                if any(key in speedup for key in keys):
                    cells = (f"{float(speedup[key]):.2f}×" if key in speedup else "" for key in keys)
                    lines.append(f"| {width} / {heads}, {mode} | {' | '.join(cells)} |")
        return lines

    return _per_machine(XCA_FORMS, results_dir, table)


TABLES: dict[str, Callable[[Path], str]] = {
    "models": models_table,
    "recipes": lambda results_dir: recipes_table(),
    "xca": xca_table,
    "backbone": backbone_table,
    "training": training_table,
    "pyramid": pyramid_table,
    "ablations": ablations.table,
    "self-supervision": self_supervision.table,
    "loading": loading_table,
    "memory": memory_table,
    "forms": forms_table,
    "deploy": deploy_tables.xcit_table,
    "deploy-precisions": deploy_tables.precisions_table,
    "deploy-peers": deploy_tables.peers_table,
    "deploy-growth": deploy_tables.growth_table,
    "deploy-training": deploy_tables.training_table,
    "giant": giant.table,
    "tiling": tiling.table,
    "gpu": gpu_tables.speed_table,
    "gpu-competitors": gpu_tables.competitors_table,
    "gpu-floors": gpu_tables.floors_table,
    "gpu-profile": gpu_tables.profile_table,
    "gpu-largest": gpu_tables.largest_table,
    "gpu-forms": gpu_tables.forms_table,
}
"""The tables by the name that a document asks for."""


def _competition(
    suite: Suite, results_dir: Path, case_head: tuple[str, ...], case_cells: Callable[[Row], tuple[str, ...]]
) -> str:
    def table(rows: list[Row]) -> list[str]:
        ours = [name for name in _competitors(rows) if name != "timm"]
        head = (
            *case_head,
            "timm ms",
            *(f"{_TITLES.get(name, name)} ms" for name in ours),
            "peak MiB, timm → automatic",
        )
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(case_head) + "--:|" * (len(ours) + 2)]
        for case in _by_case(suite, rows):
            timm = case["timm"]
            cells = [*case_cells(timm), f"{float(timm['median_ms']):.1f}"]
            for name in ours:
                if name not in case:
                    cells.append("")
                    continue
                row = case[name]
                ratio = f"{float(row['ratio_vs_timm']):.2f}×"
                chosen = f" ({row['form']})" if name == "auto" else ""
                cells.append(f"{float(row['median_ms']):.1f}, {ratio}{chosen}")
            cells.append(f"{float(timm['peak_mib']):.0f} → {float(case['auto']['peak_mib']):.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return _per_machine(suite, results_dir, table)


_TITLES = {"tokens": "token form", "covariance": "covariance form", "auto": "automatic"}


_PASSES = {"inference": "forward", "training": "forward + backward"}


def _xca_cells(row: Row) -> tuple[str, ...]:
    shape = f"{row['batch_size']} × {row['num_tokens']}"
    return f"{row['embed_dim']} / {row['num_heads']}", shape, _PASSES[row["mode"]]


def _pyramid_cells(row: Row) -> tuple[str, ...]:
    return f"`{row['architecture']}`", f"{row['height']} × {row['width']}", row["batch_size"], _PASSES[row["mode"]]


def _backbone_cells(row: Row) -> tuple[str, ...]:
    modes = {"inference": "inference", "training": "training step"}
    return f"`{row['architecture']}`", row["image_size"], row["batch_size"], modes[row["mode"]]


def _per_machine(suite: Suite, results_dir: Path, table: Callable[[list[Row]], list[str]]) -> str:
    """One table for each machine and precision; of the suite's cases only, each from the last run that measured it."""
    known = {_key(suite, case) for case in suite.cases}
    rows = [row for row in results.read(suite.path(results_dir), suite.columns) if _key(suite, row) in known]
    if not rows:
        verb = {"xca_forms": "calibrate", "xca_memory": "memory"}.get(suite.name, suite.name)
        return f"Not measured yet: `python -m xcit.bench {verb}` measures it, `make tables` writes it here."
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        machines.setdefault((row["hardware"], row["threads"], row["device"], row["dtype"]), []).append(row)
    blocks = []
    for (hardware, threads, device, dtype), all_rows in machines.items():
        last = _last_runs(suite, all_rows)
        where = hardware if device == "cuda" else f"{hardware}, {threads} threads"
        versions = ", ".join(f"{name} {_joined(row[name] for row in last)}" for name in ("torch", "timm", "xcit"))
        days = _joined(row["date"][:10] for row in last)
        blocks.append("\n".join((*table(last), "", f"{where}; {dtype}; {versions}; {days}.")))
    return "\n\n".join(blocks)


def _last_runs(suite: Suite, rows: list[Row]) -> list[Row]:
    newest: dict[tuple[str, ...], str] = {}
    for row in rows:
        newest[_key(suite, row)] = max(newest.get(_key(suite, row), ""), row["date"])
    return [row for row in rows if row["date"] == newest[_key(suite, row)]]


def _by_case(suite: Suite, rows: list[Row]) -> list[dict[str, Row]]:
    measured: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        measured.setdefault(_key(suite, row), {})[row["competitor"]] = row
    return [measured[key] for case in suite.cases if (key := _key(suite, case)) in measured]


def _key(suite: Suite, case: Row | Case) -> tuple[str, ...]:
    values = case if isinstance(case, dict) else vars(case)
    return tuple(str(values[column]) for column in suite.case_columns)


def _competitors(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["competitor"] for row in rows))


def _joined(values: Iterable[str]) -> str:
    return " / ".join(sorted(set(values)))
