"""The comparison of learned features with random weights and pixels: what it measures, what its table says."""

import sys
from pathlib import Path

import pytest

from xcit.bench import results, self_supervision
from xcit.bench.ablations import settings_digest
from xcit.errors import ConfigError
from xcit.recipes.dino import dino_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import dino_runs
import runs


def test_each_kind_of_features_is_probed(tmp_path):
    with runs.one_thread():
        rows = list(self_supervision.measure(dino_runs.TINY_DINO, tmp_path / "run"))
        again = list(self_supervision.measure(dino_runs.TINY_DINO, tmp_path / "run"))
    assert [(row["features"], row["probe"]) for row in rows] == [
        (features, probe) for features in self_supervision.FEATURES for probe in self_supervision.PROBES
    ]
    assert rows == again  # nothing is trained a second time, and there is no chance in the probes
    assert {row["images"] for row in rows} == {"60"}
    correct = {(row["features"], row["probe"]): int(row["correct"]) for row in rows}
    assert correct["pixels", "k-NN"] > 45  # of 60 held-out digits, 190 known ones
    assert correct["random weights", "k-NN"] != correct["random weights, batch norm measured", "k-NN"]


def row(features, probe, seed, correct, settings):
    environment = dict.fromkeys(results.ENVIRONMENT, "1")
    return environment | {
        "date": "2026-01-02T03:04:05Z", "recipe": "dino_digits", "settings": settings, "seed": str(seed),
        "epochs": "40",
        "features": features, "probe": probe, "correct": str(correct), "images": "200", "minutes": f"{seed + 4}",
    }  # fmt: skip


def test_the_table_has_every_seed(tmp_path):
    assert "Not measured yet" in self_supervision.table(tmp_path)
    now = settings_digest(dino_digits())
    rows = [
        row(features, probe, seed, 100 + 10 * place + seed, now)
        for place, features in enumerate(self_supervision.FEATURES)
        for probe in self_supervision.PROBES
        for seed in range(2)
    ]
    rows.append(row("DINO", "k-NN", 0, 1, "other settings"))
    results.append(self_supervision.path(tmp_path), rows, self_supervision.COLUMNS)
    lines = self_supervision.table(tmp_path).splitlines()
    assert lines[2] == "| DINO | 50.2 ± 0.2 | 100, 101 | 50.2 ± 0.2 | 100, 101 |"
    assert len(lines) == 2 + len(self_supervision.FEATURES) + 2
    assert "40 epochs, seeds 0, 1; 4.0 to 5.0 minutes each" in lines[-1]


def test_no_seed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="seeds is 0"):
        self_supervision.run(seeds=0, results_dir=tmp_path, runs_dir=tmp_path)
