"""The ablations' command and table, with training replaced by what it would have written."""

import csv
import json
from dataclasses import replace

import pytest

from xcit.bench import ablations, results
from xcit.errors import ConfigError, DataError, ExportError, UnknownNameError
from xcit.recipes.config import AugmentConfig
from xcit.recipes.registry import find_recipe
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import write_config
from xcit.tasks.task import DivergedError


class Training:
    """Stands in for ``xcit.recipes.train.train``: notes each call, and writes what a run leaves."""

    def __init__(self):
        self.calls, self.correct, self.fails = [], {}, {}

    def __call__(self, config, run):
        self.calls.append((config.recipe, config.seed, config.compute.device, run.resume))
        write_config(config, run.config)
        epochs = [{"epoch": i + 1, "train_loss": 2.0 - i / 4, "val_accuracy": 0.9, "seconds": 30.0} for i in range(4)]
        with run.history.open("w", newline="") as file:
            writer = csv.DictWriter(file, epochs[0])
            writer.writeheader()
            writer.writerows(epochs)
        if failure := self.fails.get((config.recipe, config.seed)):
            raise failure
        correct = self.correct.get((config.recipe, config.seed), 350)
        content = {"test": {"num_correct": correct, "num_images": 360}, "val": epochs[2], "epochs": epochs}
        run.metrics.write_text(json.dumps(content))


@pytest.fixture
def training(monkeypatch):
    stand_in = Training()
    monkeypatch.setattr("xcit.recipes.train.train", stand_in)
    monkeypatch.setattr(ablations, "_sizes", lambda config: (1_306_874, 17_270_528))
    return stand_in


@pytest.fixture
def compare(tmp_path, training):
    """Runs the comparison in a folder of its own; returns the new rows and the lines that it printed."""

    def compare(*recipes, seeds=1, **options):
        lines = []
        rows = ablations.run(
            recipes or ablations.RECIPES,
            seeds=seeds,
            results_dir=tmp_path / "results",
            runs_dir=tmp_path / "runs",
            report=lines.append,
            **options,
        )
        return rows, lines

    return compare


def test_every_recipe_is_run_with_every_seed_and_gets_its_row(compare, training, tmp_path):
    rows, lines = compare(seeds=2)
    assert [call[:2] for call in training.calls] == [(name, seed) for seed in (0, 1) for name in ablations.RECIPES]
    assert {call[2:] for call in training.calls} == {("cpu", False)}
    assert ablations.RECIPES[0] == ablations.BASELINE == "digits_xcit"
    assert len(ablations.RECIPES) == 10
    stored = results.read(ablations.path(tmp_path / "results"), ablations.COLUMNS)
    assert stored == rows
    assert len(stored) == 20
    row = stored[0]
    assert row["recipe"] == "digits_xcit"
    assert (row["test_correct"], row["test_images"], row["val_accuracy"]) == ("350", "360", "0.900000")
    assert (row["train_loss"], row["minutes"], row["diverged"]) == ("1.250000", "2.000", "no")
    assert row["epochs"] == str(find_recipe("digits_xcit").make().epochs)
    assert row["hardware"]
    assert lines[0] == "digits_xcit, seed 0: 97.22 % of 360 test images, 2.0 min"


def test_rows_that_are_there_are_not_run_again(compare, training):
    compare("digits_xcit", "digits_no_lpi")
    assert compare("digits_xcit", "digits_no_lpi")[0] == []
    rows, _ = compare("digits_no_lpi", seeds=2)
    assert [(row["recipe"], row["seed"]) for row in rows] == [("digits_no_lpi", "1")]
    assert len(training.calls) == 3


def test_a_run_without_its_row_is_read_and_an_unfinished_one_gone_on_with(compare, training, tmp_path):
    compare("digits_xcit", "digits_no_lpi", "digits_vit")
    ablations.path(tmp_path / "results").unlink()
    for name in ("digits_no_lpi", "digits_vit"):
        run = RunFolder(tmp_path / "runs" / f"{name}_0")
        run.metrics.unlink()  # killed before its end
        if name == "digits_no_lpi":
            run.last.write_bytes(b"state")
    training.calls.clear()
    rows, _ = compare("digits_xcit", "digits_no_lpi", "digits_vit")
    assert [row["recipe"] for row in rows] == ["digits_xcit", "digits_no_lpi", "digits_vit"]
    assert training.calls == [("digits_no_lpi", 0, "cpu", True), ("digits_vit", 0, "cpu", False)]


def test_a_run_of_other_settings_is_replaced(compare, training, tmp_path):
    compare("digits_xcit")
    ablations.path(tmp_path / "results").unlink()
    run = RunFolder(tmp_path / "runs" / "digits_xcit_0")
    write_config(replace(find_recipe("digits_xcit").make(), epochs=7), run.config)
    compare("digits_xcit")
    assert len(training.calls) == 2


def test_what_diverges_is_a_result_and_what_fails_is_not(compare, training, tmp_path):
    training.fails = {
        ("digits_no_qk_norm", 0): DivergedError("the loss is nan"),
        ("digits_vit", 0): ExportError("the disk is full"),
    }
    with pytest.raises(ExportError, match="disk is full"):
        compare("digits_no_qk_norm", "digits_vit")
    (row,) = results.read(ablations.path(tmp_path / "results"), ablations.COLUMNS)
    assert row["diverged"] == "yes"
    assert (row["test_correct"], row["train_loss"], row["val_accuracy"]) == ("", "nan", "0.900000")
    training.fails = {}
    rows, _ = compare("digits_no_qk_norm", "digits_vit")  # it goes on, and the divergence stands
    assert [row["recipe"] for row in rows] == ["digits_vit"]


def test_mistakes(compare, tmp_path):
    with pytest.raises(UnknownNameError, match=r"'digits_no_lip'\. Did you mean 'digits_no_lpi'"):
        compare("digits_no_lip")
    with pytest.raises(ConfigError, match="seeds is 0"):
        compare(seeds=0)
    file = ablations.path(tmp_path / "results")
    file.parent.mkdir(exist_ok=True)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has the columns a, b"):
        compare("digits_xcit")


def test_the_digest_is_of_what_decides():
    config = find_recipe("digits_xcit").make()
    digest = ablations.settings_digest(config)
    assert ablations.settings_digest(replace(config, seed=5)) == digest
    assert ablations.settings_digest(replace(config, compute=replace(config.compute, device="cuda"))) == digest
    for other in (
        replace(config, epochs=41),
        replace(config, model=replace(config.model, variant="no_lpi")),
        replace(config, augment=replace(config.augment, mixup=0.0)),
        replace(config, augment=AugmentConfig()),
    ):
        assert ablations.settings_digest(other) != digest
    # of all settings that are off, none counts, nor would a new one
    assert ablations._switched_on({"a": 0.0, "b": "none", "c": "", "d": 1}) == {"d": 1}


# --- the table ------------------------------------------------------------------------------------------------------


def cells(table, name):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}`"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_mean_and_spread(compare, training, tmp_path):
    names = ("digits_xcit", "digits_no_lpi", "digits_no_qk_norm", "digits_vit")
    training.correct = {("digits_xcit", 0): 356, ("digits_xcit", 1): 358, ("digits_xcit", 2): 357}
    training.correct |= {("digits_no_lpi", 1): 352, ("digits_vit", 0): 359, ("digits_vit", 1): 359}
    training.correct |= {("digits_vit", 2): 359}
    training.fails = {("digits_no_qk_norm", seed): DivergedError("nan") for seed in range(3)}
    training.fails["digits_no_lpi", 2] = DivergedError("nan")
    compare(*names, seeds=3)
    table = ablations.table(tmp_path / "results")
    assert len(table.splitlines()) == 2 + 4 + 2
    base = cells(table, "digits_xcit")
    assert base[0].startswith("`digits_xcit`: the baseline")
    assert base[1:7] == ["1.31 M", "17.3 M", "3", "99.17 ± 0.28", "356, 358, 357 of 360", "–"]
    assert base[7:] == ["90.00 ± 0.00", "1.250 ± 0.000", "2.0"]
    assert cells(table, "digits_no_lpi")[3:7] == ["3, 1 diverged", "97.50 ± 0.28", "350, 352 of 360", "−6.0"]
    assert cells(table, "digits_no_qk_norm")[3:9] == ["3, 3 diverged", "–", "–", "–", "–", "–"]
    assert cells(table, "digits_vit")[4:7] == ["99.72 ± 0.00", "359, 359, 359 of 360", "+2.0"]
    assert "10 epochs" in table.splitlines()[-1]


def test_rows_of_former_settings_are_not_shown(compare, tmp_path):
    compare("digits_xcit")
    file = ablations.path(tmp_path / "results")
    (row,) = results.read(file, ablations.COLUMNS)
    file.unlink()
    results.append(file, [row | {"settings": "0" * 12}], ablations.COLUMNS)
    assert ablations.table(tmp_path / "results").startswith("Not measured yet: `python -m xcit.bench ablations`")
    results.append(file, [row, row | {"test_correct": "300"}], ablations.COLUMNS)
    assert cells(ablations.table(tmp_path / "results"), "digits_xcit")[5] == "300 of 360"  # the last of the seed


@pytest.mark.parametrize("name", ["digits_avg_pool", "digits_resnet"])
def test_sizes_are_those_of_the_model(name):
    parameters, multiply_adds = ablations._sizes(find_recipe(name).make())
    assert 0.8e6 < parameters < 1.4e6
    assert multiply_adds / 1e9 == pytest.approx(ablations.CONTESTANTS[name].gmacs, rel=0.02)
