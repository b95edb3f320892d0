"""What the committed measurements must show.

`python -m xcit.bench` takes them on a quiet machine; the tests only read them, so that none depends on how busy the
machine is.
"""

import math
from pathlib import Path

import pytest
import torch

from xcit.bench import cases, results
from xcit.ops.xca_form import choose_form

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def last_rows(suite, dtype="float32"):
    """The CPU's rows by case and competitor, each case from its last run."""
    path = suite.path(RESULTS)
    assert path.exists(), f"{path.name} is not there; measure it on a quiet machine with `python -m xcit.bench`"
    rows = {}
    for row in results.read(path, suite.columns):
        if row["device"] == "cpu" and row["dtype"] == dtype:
            case = tuple(row[column] for column in suite.case_columns)
            if row["date"] >= max((r["date"] for r in rows.get(case, {}).values()), default=""):
                rows.setdefault(case, {})[row["competitor"]] = row
    return rows


def key(case, suite):
    return tuple(str(getattr(case, column)) for column in suite.case_columns)


@pytest.mark.parametrize(("mode", "least"), [("inference", 2.0), ("training", 1.5)])
def test_one_layer_against_timms(mode, least):
    rows = last_rows(cases.XCA)
    wanted = [c for c in cases.XCA.cases if c.mode == mode]
    ratios = [float(rows[key(c, cases.XCA)]["auto"]["ratio_vs_timm"]) for c in wanted]
    assert len(ratios) == 3
    assert math.prod(ratios) ** (1 / 3) >= least


def test_a_whole_network_at_high_resolution_against_timms():
    case = cases.BackboneCase("xcit_small_12_p8", 512, 1, "inference")
    assert float(last_rows(cases.BACKBONE)[key(case, cases.BACKBONE)]["auto"]["ratio_vs_timm"]) >= 1.2


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_pyramid_at_a_detectors_size_against_timms(mode):
    case = cases.PyramidCase("xcit_small_12_p16", 800, 1333, 1, mode)
    row = last_rows(cases.PYRAMID)[key(case, cases.PYRAMID)]
    assert float(row["auto"]["ratio_vs_timm"]) > 1
    assert float(row["auto"]["peak_mib"]) < float(row["timm"]["peak_mib"])


def test_the_memory_that_one_layer_saves_for_every_width():
    rows = last_rows(cases.XCA_MEMORY)
    assert set(rows) >= {key(c, cases.XCA_MEMORY) for c in cases.XCA_MEMORY.cases}
    small = rows["384", "8", "4", "2304", "training"]
    assert float(small["auto"]["saved_mib"]) <= 0.4 * float(small["timm"]["saved_mib"])


def test_the_automatic_form_is_never_much_slower_than_the_other():
    rows = last_rows(cases.XCA_FORMS)
    slow = {}
    for case in cases.XCA_FORMS.cases:
        faster = float(rows[key(case, cases.XCA_FORMS)]["covariance"]["ratio_vs_tokens"])
        chosen = choose_form(
            num_tokens=case.num_tokens,
            embed_dim=case.embed_dim,
            num_heads=case.num_heads,
            batch_size=case.batch_size,
            dtype=torch.float32,
            device_type="cpu",
            needs_grad=case.mode == "training",
        )
        of_the_better = faster if chosen == "covariance" else 1 / faster
        if of_the_better < 0.95:
            slow[str(case)] = (chosen, round(of_the_better, 2))
    assert slow == {}
