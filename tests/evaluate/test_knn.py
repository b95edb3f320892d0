"""Weighted k-NN against a naive float64 one; ties, pieces, memory, and the probe that training calls."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, DataError
from xcit.evaluate.embedding import embed_set
from xcit.evaluate.knn import knn_accuracy, knn_probe, neighbours
from xcit.inference.features import FeatureExtractor
from xcit.models.xcit import XCiT


def data(num_queries, num_bank, num_classes, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, dim))
    parts = []
    for count in (num_queries, num_bank):
        labels = rng.integers(0, num_classes, count)
        parts += [centres[labels] + 1.3 * rng.normal(size=(count, dim)) * rng.uniform(0.5, 2, (count, 1)), labels]
    return [part.astype(np.float32) if part.ndim == 2 else part for part in parts]


def naive(queries, query_labels, bank, bank_labels, num_classes, k, temperature, leave_one_out=False):
    """One query at a time, one neighbour at a time. Return how often the class is first, and among the first five."""
    unit = [row.astype(np.float64) / math.sqrt(sum(float(v) ** 2 for v in row)) for row in bank]
    top1 = top5 = 0
    for i, row in enumerate(queries):
        query = row.astype(np.float64) / math.sqrt(sum(float(v) ** 2 for v in row))
        similar = [(-float(query @ other), j) for j, other in enumerate(unit) if not (leave_one_out and i == j)]
        votes = {}
        for minus, j in sorted(similar)[:k]:
            votes[int(bank_labels[j])] = votes.get(int(bank_labels[j]), 0.0) + math.exp(-minus / temperature)
        order = sorted(votes, key=lambda c: (-votes[c], c))
        top1 += order[0] == query_labels[i]
        top5 += query_labels[i] in order[:5]
    return top1, top5


@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.005])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_figures_are_those_of_the_definition(seed, temperature):
    queries, truth, bank, labels = data(60, 150, 8, seed=seed)
    result = knn_accuracy(queries, truth, bank, labels, num_classes=8, ks=(1, 5, 20, 150), temperature=temperature)
    for k, accuracy in result.accuracies.items():
        assert (accuracy.num_correct, accuracy.num_top5_correct) == naive(
            queries, truth, bank, labels, 8, k, temperature
        )
        assert accuracy.num_images == 60
    if temperature > 0.01:  # else the nearest decide alone
        assert len({accuracy.num_correct for accuracy in result.accuracies.values()}) > 1


def test_leave_one_out():
    queries, truth, *_ = data(80, 1, 7)
    result = knn_accuracy(queries, truth, queries, truth, num_classes=7, ks=(1, 10, 79), leave_one_out=True)
    for k, accuracy in result.accuracies.items():
        want = naive(queries, truth, queries, truth, 7, k, 0.07, leave_one_out=True)
        assert (accuracy.num_correct, accuracy.num_top5_correct) == want
    with_itself = knn_accuracy(queries, truth, queries, truth, num_classes=7, ks=(1,))
    assert with_itself.accuracies[1].top1 == 1
    assert result.accuracies[1].top1 < 1
    with pytest.raises(ConfigError, match="k is 80, more than the 79 images"):
        knn_accuracy(queries, truth, queries, truth, num_classes=7, ks=(80,), leave_one_out=True)


@pytest.mark.parametrize(("queries_at_once", "bank_at_once"), [(1, 1), (7, 13), (60, 4), (1000, 1000)])
def test_pieces_of_any_size_give_the_same_neighbours(queries_at_once, bank_at_once):
    queries, _, bank, _ = data(23, 90, 5)
    pieces = list(neighbours(queries, bank, 9, queries_at_once=queries_at_once, bank_at_once=bank_at_once))
    similarities, indices = (torch.cat(each).numpy() for each in zip(*pieces, strict=True))
    unit = [array.astype(np.float64) / np.linalg.norm(array, axis=1, keepdims=True) for array in (queries, bank)]
    cosines = unit[0] @ unit[1].T
    want = np.argsort(-cosines, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines, want, axis=1), atol=1e-6)


def test_equal_similarities_go_by_position_and_equal_votes_by_class():
    # Of integers whose lengths are powers of two, so that every cosine is exact.
    bank = np.array([[1, 0], [0, 1], [2, 0], [0, -1], [-4, 0], [0, 8], [1, 0]], dtype=np.float32)
    query = np.array([[1, 0]], dtype=np.float32)
    for pieces in (1, 2, 3, 100):
        ((similarities, indices),) = neighbours(query, bank, 7, bank_at_once=pieces)
        assert indices.tolist() == [[0, 2, 6, 1, 3, 5, 4]]
        assert similarities.tolist() == [[1, 1, 1, 0, 0, 0, -1]]
    labels = np.array([5, 0, 3, 0, 0, 0, 1])
    for truth, right in ((1, 1), (3, 0), (5, 0)):  # a vote each
        result = knn_accuracy(query, np.array([truth]), bank, labels, num_classes=6, ks=(3,))
        assert (result.accuracies[3].num_correct, result.accuracies[3].num_top5_correct) == (right, 1)
    # Classes 0, 2 and 4 have no vote: they are not among the first five, though only three have one.
    result = knn_accuracy(query, np.array([0]), bank, labels, num_classes=6, ks=(3,))
    assert result.accuracies[3].num_top5_correct == 0


def test_few_classes_have_no_top5_and_zero_vectors_are_taken():
    queries, truth, bank, labels = data(10, 20, 5)
    bank[3] = 0
    accuracy = knn_accuracy(queries, truth, bank, labels, num_classes=5, ks=(20,)).accuracies[20]
    assert accuracy.top5 is None
    assert accuracy.top1 == accuracy.num_correct / 10
    assert accuracy.interval[0] < accuracy.top1 < accuracy.interval[1]


def test_other_types_and_memory_mapped_files(tmp_path):
    queries, truth, bank, labels = data(30, 100, 6)
    want = knn_accuracy(queries, truth, bank, labels, num_classes=6, ks=(5,))
    np.save(tmp_path / "bank.npy", bank.astype(np.float64))
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    assert knn_accuracy(queries.astype(np.float64), truth, mapped, labels, num_classes=6, ks=(5,)) == want


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ks": (0,)}, ConfigError, "k is 0; it must be 1 or more"),
        ({"ks": ()}, ConfigError, "k is missing"),
        ({"ks": (5, 51)}, ConfigError, "k is 51, more than the 50 images"),
        ({"temperature": 0}, ConfigError, "temperature is 0"),
        ({"bank": np.zeros((50, 3), np.float32)}, DataError, r"queries are \(9, 12\) and the bank is \(50, 3\)"),
        ({"bank_labels": np.zeros(49, int)}, DataError, "the bank have 50 rows and 49 labels"),
        ({"bank_labels": np.full(50, 7)}, DataError, "labels go from 7 to 7; there are 4 classes"),
        ({"leave_one_out": True}, DataError, "leave_one_out is for a bank of the queries"),
        ({"queries": np.zeros((0, 12), np.float32), "query_labels": np.zeros(0, int)}, DataError, "queries are empty"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(zip(("queries", "query_labels", "bank", "bank_labels"), data(9, 50, 4), strict=True))
    with pytest.raises(error, match=message):
        knn_accuracy(**{"ks": (5,), **arguments, **change}, num_classes=4)


def test_features_that_are_not_finite_are_named():
    queries, truth, bank, labels = data(9, 50, 4)
    bank[37, 2] = np.nan
    with pytest.raises(DataError, match="features of image 37 of the bank are not finite"):
        knn_accuracy(queries, truth, bank, labels, num_classes=4, ks=(5,))


# --- sets of images ---------------------------------------------------------------------------------------------------

CFG = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3}


class Pictures:
    """Pictures of a hue a class; number 4 is broken."""

    def __call__(self, number):
        if number == 4:
            raise DataError("picture 4: is broken.")
        rng = np.random.default_rng(number)
        pixels = np.full((16, 16, 3), 40) + np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200)])[number % 3]
        return Image.fromarray((pixels + rng.integers(-40, 16, pixels.shape)).clip(0, 255).astype(np.uint8))


def pictures(start, count):
    numbers = np.arange(start, start + count)
    return ImageSet(("r", "g", "b"), [f"picture {n}" for n in numbers], numbers % 3, Pictures(), numbers)


@pytest.fixture
def model(randomize):
    model = randomize(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=0, patch_size=8))
    model.pretrained_cfg = dict(CFG)
    return model


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_as_an_array(model, num_workers):
    images = pictures(0, 20)
    seen = []
    embedded = embed_set(model.train(), images, batch_size=6, num_workers=num_workers, on_progress=seen.append)
    assert seen == [6, 12, 18, 20]
    assert model.training
    assert embedded.features.shape == (20, 32)
    assert embedded.decoded.tolist() == [n != 4 for n in range(20)]
    assert not embedded.features[4].any()
    assert embedded.labels.tolist() == [n % 3 for n in range(20)]
    assert [tuple(s) for s in embedded.skipped] == [("picture 4", "picture 4: is broken.")]
    features, labels = embedded.usable()
    want = FeatureExtractor(model)([images.open(n) for n in range(20) if n != 4])
    np.testing.assert_allclose(features, want, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [n % 3 for n in range(20) if n != 4]
    assert embedded.subset(np.array([3, 4])).decoded.tolist() == [True, False]


def test_bfloat16_is_near_float32(model):
    exact, near = (embed_set(model, pictures(5, 6), precision=p).features for p in ("32", "bf16"))
    assert 0 < np.abs(exact - near).max() < 0.1


def test_sets_that_cannot_be_embedded(model):
    with pytest.raises(DataError, match="1 of 3 images cannot be decoded"):
        embed_set(model, pictures(3, 3))
    with pytest.raises(DataError, match="None of the 1 images"):
        embed_set(model, pictures(4, 1), max_bad_fraction=1)
    with pytest.raises(ConfigError, match="no images"):
        embed_set(model, pictures(0, 0))
    several = ImageSet(("a", "b"), ["x"], np.ones((1, 2), bool), Pictures(), np.array([0]))
    with pytest.raises(ConfigError, match="one class each"):
        embed_set(model, several)
    with torch.no_grad():
        model.norm.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(first: norm\.bias\)"):
        embed_set(model, pictures(5, 3))


def test_out_of_memory_says_what_to_do(model, monkeypatch):
    def too_large(x):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes.")

    monkeypatch.setattr(model, "forward_features", too_large)
    with pytest.raises(
        ConfigError, match="Out of memory on cpu with 6 images of 16 x 16 px at once; take --batch-size"
    ):
        embed_set(model, pictures(5, 6))


def test_the_probe_for_training(model):
    prepared = Preprocessing.from_cfg(CFG)
    model.pretrained_cfg = {}
    model.train()
    result = knn_probe(model, pictures(0, 60), pictures(60, 31), prepared, ks=(5, 200), max_bank=40, max_queries=30)
    assert model.training
    assert list(result.accuracies) == [5, 39]  # the bank's size: 40, less the broken one
    assert result.num_bank == 39
    assert all(accuracy.num_images == 30 for accuracy in result.accuracies.values())
    bank, queries = (
        pictures(start, total).subset(np.arange(most) * total // most)
        for start, total, most in (
            (0, 60, 40),
            (60, 31, 30),
        )
    )
    extract = FeatureExtractor(model, preprocessing=prepared)
    known = [n for n in range(40) if bank.numbers[n] != 4]
    want = naive(
        extract([queries.open(n) for n in range(30)]),
        queries.labels,
        extract([bank.open(n) for n in known]),
        bank.labels[known],
        3,
        5,
        0.07,
    )
    assert result.accuracies[5].num_correct == want[0] > 15
    again = knn_probe(model, pictures(0, 60), pictures(60, 31), prepared, ks=(5, 200), max_bank=40, max_queries=30)
    assert again == result
    with pytest.raises(DataError, match="1 of 5 images cannot be decoded"):
        knn_probe(model, pictures(0, 5), pictures(60, 5), prepared, ks=(3,))
    assert knn_probe(model, pictures(0, 5), pictures(60, 5), prepared, ks=(3,), max_bad_fraction=0.2).num_bank == 4


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on a process's memory")
def test_a_million_features_fit_into_bounded_memory(tmp_path):
    """The bank is a file of 1.5 GB; besides mapping it, the process may allocate 400 MB."""
    code = """
        import resource, sys, numpy as np, torch
        from xcit.evaluate.knn import knn_accuracy

        torch.set_num_threads(1)
        rng = np.random.default_rng(0)
        bank = np.lib.format.open_memmap(sys.argv[1], mode="w+", dtype=np.float32, shape=(1_000_000, 384))
        centres = rng.standard_normal((1000, 384), dtype=np.float32)
        labels = np.arange(1_000_000) % 1000
        noise = rng.standard_normal((60_000, 384), dtype=np.float32)
        for start in range(0, 1_000_000, 50_000):
            first = rng.integers(0, 10_000)
            bank[start : start + 50_000] = centres[labels[start : start + 50_000]] + 2 * noise[first : first + 50_000]
        bank.flush()
        del bank, noise
        bank = np.load(sys.argv[1], mmap_mode="r")
        truth = np.arange(1500) % 1000
        queries = centres[truth] + 2 * rng.standard_normal((1500, 384), dtype=np.float32)
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 400 * 2**20, resource.RLIM_INFINITY))
        print(knn_accuracy(queries, truth, bank, labels, num_classes=1000, ks=(20, 200)).accuracies[20].top1)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "bank.npy"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    (tmp_path / "bank.npy").unlink()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.9
