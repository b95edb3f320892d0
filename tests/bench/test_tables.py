import pytest

from xcit.bench import cases, results, tables
from xcit.errors import ConfigError, DataError, UnknownNameError


def xca_rows(case, date, *, timm_ms=10.0, hardware="Some CPU"):
    rows = []
    for name, ratio in (("timm", 1.0), ("tokens", 0.9), ("covariance", 2.5), ("auto", 2.5)):
        rows.append(
            dict.fromkeys(results.ENVIRONMENT, "1")
            | {column: str(getattr(case, column)) for column in cases.XCA.case_columns}
            | {"date": date, "dtype": "float32", "competitor": name, "hardware": hardware, "device": "cpu"}
            | {"form": {"timm": "", "auto": "covariance"}.get(name, name), "ratio_vs_timm": f"{ratio:.3f}"}
            | {"median_ms": f"{timm_ms / ratio:.3f}", "p25_ms": "0", "p75_ms": "0", "rounds": "7"}
            | {"peak_mib": "30.40" if name == "timm" else "12.00", "saved_mib": "0.00", "max_rel_diff": "1e-7"}
        )
    return rows


CASE, OTHER = cases.XCA.cases[:2]
DOCUMENT = "before\n<!-- bench:xca -->\nold\n<!-- /bench -->\nafter\n"


def test_a_region_is_filled_from_the_rows_and_nothing_else_changes(tmp_path):
    results.append(tmp_path / "xca.csv", xca_rows(CASE, "2026-01-02T03:04:05Z"), cases.XCA.columns)
    text = tables.render(DOCUMENT, tmp_path, source="README.md")
    assert text.startswith("before\n<!-- bench:xca -->\n|")
    assert text.endswith("\n<!-- /bench -->\nafter\n")
    assert (
        "| 384 / 8 | 4 × 2304 | forward | 10.0 | 11.1, 0.90× | 4.0, 2.50× | 4.0, 2.50× (covariance) | 30 → 12 |" in text
    )
    assert "Some CPU, 1 threads; float32; torch 1, timm 1, xcit 1; 2026-01-02." in text
    assert "old" not in text
    assert tables.render(text, tmp_path, source="README.md") == text


def test_each_case_shows_its_last_run(tmp_path):
    for date, ms in (("2026-01-01T00:00:00Z", 10), ("2026-01-03T00:00:00Z", 30), ("2026-01-02T00:00:00Z", 20)):
        results.append(tmp_path / "xca.csv", xca_rows(CASE, date, timm_ms=ms), cases.XCA.columns)
    results.append(tmp_path / "xca.csv", xca_rows(OTHER, "2026-01-01T00:00:00Z", timm_ms=50), cases.XCA.columns)
    text = tables.xca_table(tmp_path)
    assert "| 30.0 |" in text
    assert "| 10.0 |" not in text
    assert "| 20.0 |" not in text
    assert "| 50.0 |" in text  # measured in another run, and still the last of its case
    assert "2026-01-01 / 2026-01-03" in text


def test_each_machine_has_its_own_table(tmp_path):
    for hardware in ("CPU one", "CPU two"):
        rows = xca_rows(CASE, "2026-01-01T00:00:00Z", hardware=hardware)
        results.append(tmp_path / "xca.csv", rows, cases.XCA.columns)
    assert tables.xca_table(tmp_path).count("| width / heads |") == 2


def test_cases_that_are_not_the_suites_stay_out(tmp_path):
    odd = cases.XCACase(32, 4, 1, 7, "inference")
    results.append(tmp_path / "xca.csv", xca_rows(odd, "2026-01-01T00:00:00Z"), cases.XCA.columns)
    assert tables.xca_table(tmp_path).startswith("Not measured yet")


def test_the_grid_of_forms(tmp_path):
    rows = []
    for case, ratio in zip(cases.XCA_FORMS.cases[:2], ("0.514", "1.299"), strict=True):
        (row,) = (r for r in xca_rows(case, "2026-01-01T00:00:00Z") if r["competitor"] == "covariance")
        row["ratio_vs_tokens"] = ratio
        del row["ratio_vs_timm"]
        rows.append(row)
    results.append(tmp_path / "xca_forms.csv", rows, cases.XCA_FORMS.columns)
    text = tables.forms_table(tmp_path)
    assert "| width / heads, pass | 1 × 196 | 8 × 196 |" in text
    assert "| 128 / 4, inference | 0.51× | 1.30× |" in text


def test_without_measurements_the_text_says_so(tmp_path):
    for name, verb in (("xca", "xca"), ("backbone", "backbone"), ("memory", "memory"), ("forms", "calibrate")):
        assert f"`python -m xcit.bench {verb}`" in tables.TABLES[name](tmp_path)


def test_the_models_table_holds_the_published_figures(tmp_path):
    lines = tables.models_table(tmp_path).splitlines()
    assert len(lines) == 2 + 14
    # the released repository's README, and multiply-adds as the ports count them
    assert "| `xcit_small_12_p16` | 26.3 M | 4.8 / 14.1 | 82.0 | 83.3 | 84.7 |" in lines
    assert "| `xcit_large_24_p8` | 188.9 M | 141.2 / 415.0 | 84.4 | 85.4 | 86.0 |" in lines


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ("<!-- bench:nonsense -->\n<!-- /bench -->\n", UnknownNameError, "nonsense"),
        ("<!-- bench:xca -->\ntext\n", DataError, "no <!-- /bench -->"),
        ("<!-- bench:xca -->\n<!-- bench:memory -->\n<!-- /bench -->\n", DataError, "no <!-- /bench -->"),
    ],
)
def test_a_broken_document_is_refused(tmp_path, document, error, message):
    with pytest.raises(error, match=message):
        tables.render(document, tmp_path, source="README.md")


def test_rewrite_changes_what_is_stale_and_only_that(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(DOCUMENT)
    (tmp_path / "docs" / "plain.md").write_text("no table\n")
    assert [str(p) for p in tables.rewrite(tmp_path, write=False)] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == DOCUMENT
    assert [str(p) for p in tables.rewrite(tmp_path)] == ["README.md"]
    assert "Not measured yet" in (tmp_path / "README.md").read_text()
    assert tables.rewrite(tmp_path) == []


def test_rewrite_needs_the_repositorys_root(tmp_path):
    with pytest.raises(ConfigError, match="root of the xcit repository"):
        tables.rewrite(tmp_path)
