from xcit.bench import deploy_tables, results
from xcit.bench.deploy_cases import COLUMNS, DeployCase, entries

DATE = "2026-01-02T03:04:05Z"
XCIT = DeployCase("xcit", "xcit_small_12_p8", 512, 1)
PEERS = DeployCase("peers", "xcit_small_12_p16", 224, 1)


def rows_of(case, *, runtimes=("eager", "openvino"), date=DATE, dtype="float32", hardware="Some CPU", **others):
    """Rows whose competitors take 100, 50, 33.3, ... ms, and 60, 30, 20, ... MiB."""
    rows = []
    for number, entry in enumerate(entries(case, runtimes), 1):
        rows.append(
            dict.fromkeys(COLUMNS, "1")
            | {"date": date, "case": str(case), "model": entry.model, "source": entry.source, "mode": case.mode}
            | {"runtime": entry.runtime, "dtype": dtype, "image_size": str(entry.image_size), "device": "cpu"}
            | {"batch_size": str(case.batch_size), "hardware": hardware, "threads": "2", "matrix_gflops": "123.4"}
            | {"median_ms": f"{100 / number:.3f}", "peak_mib": f"{60 / number:.1f}", "multiply_adds": "98000000000"}
            | {f"ratio_vs_{runtime}": f"{number:.3f}" for runtime in ("eager", "openvino")}
            | others
        )
    return rows


def test_nothing_measured_says_how(tmp_path):
    for table in (deploy_tables.xcit_table, deploy_tables.growth_table, deploy_tables.training_table):
        assert table(tmp_path).startswith("Not measured yet: `xcit bench ")
    odd = rows_of(DeployCase("xcit", "xcit_nano_12_p8", 224, 1))
    results.append(deploy_tables.path(tmp_path), odd, COLUMNS)
    assert deploy_tables.xcit_table(tmp_path).startswith("Not measured yet")  # no listed case


def test_ours_against_timm(tmp_path):
    results.append(deploy_tables.path(tmp_path), rows_of(XCIT), COLUMNS)
    head, _, row, _, note = deploy_tables.xcit_table(tmp_path).splitlines()
    assert head.count("|") == row.count("|")
    assert row == (
        "| `xcit_small_12_p8` | 512 | 1 | float32 | 100.0, 33.3 (3.00×), 25.0 (4.00×) |  |  | 50.0, 20.0 (5.00×) | "
        "60, 15 (0.25×) | 98.0, 98.0 |"
    )
    assert note.startswith("Some CPU, 2 threads; products of large matrices reached, in GFLOP/s, float32 123; torch 1")
    assert note.endswith("; 2026-01-02.")


def test_each_case_and_precision_shows_its_last_run(tmp_path):
    file = deploy_tables.path(tmp_path)
    results.append(file, rows_of(XCIT, date="2026-03-01T00:00:00Z"), COLUMNS)
    results.append(file, rows_of(XCIT, median_ms="7"), COLUMNS)
    results.append(file, rows_of(XCIT, dtype="bfloat16", median_ms="9"), COLUMNS)
    text = deploy_tables.xcit_table(tmp_path)
    assert "| float32 | 100.0," in text
    assert "| bfloat16 | 9.0," in text
    assert "7.0" not in text
    assert "2026-01-02 / 2026-03-01" in text


def test_peers(tmp_path):
    results.append(deploy_tables.path(tmp_path), rows_of(PEERS, runtimes=("eager",)), COLUMNS)
    text = deploy_tables.peers_table(tmp_path)
    assert (
        "| `xcit_small_12_p16`, 224 px | xcit_small_12_p16, folded | 83.4 | 224 | 1 | float32 | 98.0 | 100.0 (1.00×) |"
        in text
    )
    assert "| convnext_small | 83.7 | 288 | 1 | float32 |" in text
    assert "| cait_s24_224 | 83.5 | 224 |" in text
    large = rows_of(DeployCase("peers", "xcit_small_12_p16", 1024, 1), runtimes=("eager",))
    results.append(deploy_tables.path(tmp_path), large, COLUMNS)
    assert "| convnext_small |  | 1024 |" in deploy_tables.peers_table(tmp_path)  # its accuracy there is unknown


def test_precisions_are_measured_by_bfloat16_in_openvino(tmp_path):
    case = DeployCase("precisions", "xcit_small_12_p8", 512, 1)
    rows = rows_of(case, runtimes=("openvino", "onnxruntime"), max_rel_diff="2.0e-02")
    rows = [
        row | {"dtype": entry.dtype}
        for row, entry in zip(rows, entries(case, ("openvino", "onnxruntime")), strict=True)
    ]
    results.append(deploy_tables.path(tmp_path), rows, COLUMNS)
    text = deploy_tables.precisions_table(tmp_path)
    assert (
        "| `xcit_small_12_p8` | 512 | 1 | 50.0 (2.00×) | 100.0 (1.00×) | 33.3 (3.00×) | 25.0 (4.00×) | 20.0 (5.00×) | "
        "2.0e-02, 2.0e-02 |" in text
    )
    assert "bfloat16 123" in text


def test_training(tmp_path):
    case = DeployCase("training", "xcit_small_12_p8", 224, 2)
    results.append(deploy_tables.path(tmp_path), rows_of(case, runtimes=("eager", "openvino")), COLUMNS)
    text = deploy_tables.training_table(tmp_path)
    assert "| `xcit_small_12_p8` | timm | 224 | 2 | float32 | 100.0 (1.00×) |  | 60 |" in text
    assert "| `xcit_small_12_p8` | ours | 224 | 2 | float32 | 50.0 (2.00×) |  | 30 |" in text


def test_growth(tmp_path):
    rows = []
    for size in (512, 768, 1024, 2048):
        n = (size // 16) ** 2
        for row in rows_of(DeployCase("linear", "xcit_small_12_p16", size, 1), runtimes=("eager",)):
            power = 1.5 if row["source"] == "timm" else 1.0
            rows.append(row | {"median_ms": f"{4 + 0.01 * n**power:.5f}", "peak_mib": f"{3 + 0.02 * n:.5f}"})
    results.append(deploy_tables.path(tmp_path), rows, COLUMNS)
    text = deploy_tables.growth_table(tmp_path)
    assert "| xcit_small_12_p16, timm | eager | float32 | 512 to 2048 | 1.50 | 4.0 | 1.00 | 3.0 |" in text
    assert "| xcit_small_12_p16, folded | eager | float32 | 512 to 2048 | 1.00 | 4.0 | 1.00 | 3.0 |" in text


def test_each_machine_has_its_own_table(tmp_path):
    for hardware in ("CPU one", "CPU two"):
        results.append(deploy_tables.path(tmp_path), rows_of(XCIT, hardware=hardware), COLUMNS)
    assert deploy_tables.xcit_table(tmp_path).count("| model |") == 2
