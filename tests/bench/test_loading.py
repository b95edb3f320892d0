"""The loading bench gives both loaders the same work, and times nothing that differs."""

import csv

import pytest
import torch
from torch.utils.data import DataLoader

from xcit.bench import cases, loading, results, tables, timer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # timm leaves it to the collector to close the files
]

CASE = cases.LoadingCase(6, 48, 2, 0)
PLAN = timer.Plan(warmup=0, min_rounds=2, max_rounds=2, min_sample_ms=0)


@pytest.fixture(scope="module")
def root():
    with loading._folder(6) as path:
        yield path


def test_a_case_from_start_to_row_and_table(tmp_path, root):
    lines = []
    rows = loading.run([CASE], results_dir=tmp_path, plan=PLAN, report=lines.append)
    with (tmp_path / "loading.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert [row["competitor"] for row in rows] == ["timm", "xcit"]
    assert float(rows[0]["ratio_vs_timm"]) == 1
    for row in rows:
        rate = 6 / float(row["median_ms"]) * 1e3
        assert float(row["images_per_second"]) == pytest.approx(rate, rel=0.01)
        assert row["rounds"] == "2"
    assert len(lines) == 1
    table = tables.loading_table(tmp_path)
    assert f"| 0 | {float(rows[0]['images_per_second']):.0f} |" in table
    assert "6 JPEG files of 500 × 375 px to 48 px, batch 2" in table


def test_the_table_shows_the_last_run(tmp_path):
    for date, rate in (("2026-01-03T00:00:00Z", "30"), ("2026-01-01T00:00:00Z", "10")):
        rows = [
            dict.fromkeys(cases.LOADING_COLUMNS, "1")
            | {"date": date, "competitor": name, "images_per_second": rate, "num_workers": "2"}
            for name in ("timm", "xcit")
        ]
        results.append(tmp_path / "loading.csv", rows, cases.LOADING_COLUMNS)
    assert "| 2 | 30 | 30 | 1.00× |" in tables.loading_table(tmp_path)
    assert "| 2 | 10" not in tables.loading_table(tmp_path)
    assert "python -m xcit.bench loading" in tables.loading_table(tmp_path / "none")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_loaders_give_the_same_batches_of_all_images(root, num_workers):
    case = cases.LoadingCase(6, 48, 2, num_workers)
    ours, theirs = loading.our_loader(case, root), loading.timm_loader(case, root)
    assert isinstance(theirs, DataLoader)
    assert ours.num_workers == theirs.num_workers == num_workers
    assert ours.persistent_workers == theirs.persistent_workers == (num_workers > 0)
    for loader in (ours, theirs):
        batches = list(loader)
        assert [tuple(batch[0].shape) for batch in batches] == [(2, 3, 48, 48)] * 3
        assert all(batch[0].dtype == torch.float32 for batch in batches)
        assert sorted(torch.cat([batch[1] for batch in batches]).tolist()) == [0, 0, 0, 1, 1, 1]
    assert loading._epoch(ours)() == loading._epoch(theirs)() == 6


def test_transforms_that_differ_are_not_timed(root):
    ours, theirs = loading.our_loader(CASE, root), loading.timm_loader(CASE, root)
    loading.compare(theirs, ours)
    ours.dataset.transform.mean = ours.dataset.transform.mean + 0.01
    with pytest.raises(loading.OutputsDifferError, match="Nothing was timed"):
        loading.compare(theirs, ours)


def test_the_files_are_jpegs_of_the_stated_size(root):
    from PIL import Image

    paths = sorted(root.rglob("*.jpg"))
    assert len(paths) == 6
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", loading.SIZE)
    assert 40_000 < sum(path.stat().st_size for path in paths) / 6 < 150_000


def test_the_promised_cases_are_there():
    assert [case.num_workers for case in cases.LOADING_CASES] == [0, 1, 2]
