"""Learning the digits without their labels: what the features are worth, against random weights."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import xcit
from xcit.data.sources import open_data
from xcit.evaluate.embedding import embed_set
from xcit.evaluate.probes import embed_parts, knn_rows, logistic_rows, probe_sets
from xcit.recipes.dino import dino_digits
from xcit.recipes.dino_job import DinoJob
from xcit.recipes.run_folder import new_run
from xcit.recipes.train import train

sys.path.insert(0, str(Path(__file__).parent))
import runs

pytestmark = pytest.mark.slow


def probed(model, preprocessing):
    """Held-out digits: right by the 20 nearest neighbours, and by logistic regression, of 360."""
    sets = probe_sets(open_data("", "digits", val_fraction=0.2, in_chans=1))
    features = embed_parts(lambda images: embed_set(model, images, preprocessing), sets)
    (near,) = knn_rows("", features, 10, [20], 0.07)
    (logistic,) = logistic_rows("", features, 10)
    assert near.accuracy.num_images == 360
    return near.accuracy.top1, logistic.accuracy.top1


@pytest.mark.timeout(1200)
def test_features_learned_without_labels_beat_random_ones(tmp_path):
    """Half of the recipe's epochs; docs/self-supervision.md has all of them, for three seeds."""
    config = replace(dino_digits(), epochs=20)
    with runs.one_thread():
        before = DinoJob(config)
        random = probed(before.task.model.eval(), before.preprocessing)
        run = new_run(tmp_path / "run")
        result = train(config, run)
        learned = probed(xcit.create_model(str(run.model)), None)
    assert result.collapse is None
    assert learned[0] > random[0] + 0.05
    assert learned[1] > random[1]
