"""Indexes: the nearest neighbours are those that NumPy finds, approximate ones agree as stated, damage is noticed."""

import json
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch

from xcit.errors import ConfigError, DataError, UnknownNameError
from xcit.inference import index as indexing
from xcit.inference.feature_file import FeatureTable, Origin
from xcit.inference.index import build_index, num_lists_of, read_index, save_index

ORIGIN = Origin("ab" * 32, {"model": "m.safetensors", "pool": "token", "scales": [1.0]}, "photos")


def table(n=1500, dim=24, seed=0):
    """Vectors of very different lengths in 30 loose bunches."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, dim))
    vectors = centres[rng.integers(0, 30, n)] + 0.8 * rng.normal(size=(n, dim))
    vectors *= rng.uniform(0.01, 100, size=(n, 1))
    none = np.zeros(n, np.int64)
    return FeatureTable(ORIGIN, [f"{i}.png" for i in range(n)], vectors.astype(np.float32), none, none)


def naive(features, queries):
    """Cosines in float64, one pair at a time."""
    return np.array(
        [[q @ x / np.sqrt((q @ q) * (x @ x)) for x in features.astype(float)] for q in queries.astype(float)]
    )


def test_exact_finds_what_numpy_finds():
    data, queries = table(200), table(7, seed=1).features
    hits = build_index(data).search(queries, 12)
    cosines = naive(data.features, queries)
    np.testing.assert_allclose(hits.similarities, -np.sort(-cosines, axis=1)[:, :12], atol=1e-6)
    np.testing.assert_array_equal(hits.positions, np.argsort(-cosines, axis=1)[:, :12])


def test_length_is_of_no_matter():
    data = table(50)
    hits = build_index(data).search(1000 * data.features, 1)
    np.testing.assert_array_equal(hits.positions[:, 0], np.arange(50))
    assert (hits.similarities <= 1).all()


def reference_order(cosines, k):
    """The rule, one query at a time: a tie is what lies within 1e-6 of its highest; ties by position."""
    rows = []
    for row in cosines:
        left, order = sorted(range(len(row)), key=lambda i: -row[i]), []
        while left:
            tie = [i for i in left if row[i] >= row[left[0]] - 1e-6]
            order += sorted(tie)
            left = left[len(tie) :]
        rows.append(order[:k])
    return np.array(rows)


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_equally_near_images_come_in_their_order_however_many_are_asked_for(kind):
    """Copies many and few, equal to the bit or up to rounding."""
    data = table(700, seed=3)
    rng = np.random.default_rng(0)
    source = rng.integers(0, 60, 700) ** 2 // 60  # of some there are very many
    data.features[:] = data.features[source] * rng.choice([1, 1, 1, 0.37], 700).astype(np.float32)[:, None]
    queries = table(25, seed=4).features
    index = build_index(data, kind)
    index = replace(index, breadth=index.num_lists or index.breadth)  # ivf: so that none is missed
    want = reference_order(naive(data.features, queries), 700)
    assert (np.bincount(source) > 70).any()
    for k in (1, 2, 3, 10, 60, 200):
        for few in (queries, queries[:1]):
            hits = index.search(few, k)
            np.testing.assert_array_equal(hits.positions, want[: len(few), :k])
            assert (np.diff(hits.similarities, axis=1) <= 0).all()


def test_all_images_alike():
    data = table(3000)
    data.features[:] = data.features[0]
    hits = build_index(data).search(table(3, seed=5).features, 2)
    np.testing.assert_array_equal(hits.positions, [[0, 1]] * 3)


def test_more_results_than_images():
    hits = build_index(table(4)).search(table(2).features, 10)
    assert hits.positions.shape == (2, 4)
    assert sorted(hits.positions[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_indexes_agree_with_exact_as_stated(kind):
    data = table()
    built = build_index(data, kind)
    stated = built.recall
    assert stated.value >= indexing.TARGET_RECALL
    chosen = np.unique(np.linspace(0, len(data) - 1, stated.num_queries).round().astype(int))
    assert len(chosen) == stated.num_queries
    cosines = naive(data.features, data.features[chosen])
    cosines[np.arange(len(chosen)), chosen] = -2  # the image itself
    found = built.search(data.features[chosen], 11).positions
    right = sum(
        len({p for p in row if p != query} & set(np.argsort(-own)[:10]))
        for row, query, own in zip(found, chosen, cosines, strict=True)
    )
    assert right / (10 * len(chosen)) == pytest.approx(stated.value, abs=0.002)


def test_a_narrow_index_says_that_it_is_bad(monkeypatch):
    monkeypatch.setattr(indexing, "TARGET_RECALL", 0.0)
    data = table()
    data = replace(data, features=np.random.default_rng(0).normal(size=data.features.shape).astype(np.float32))
    built = build_index(data, "ivf")
    assert built.breadth == 4
    assert built.recall.value < 0.9


def test_copies_among_the_images_do_not_count_as_missed():
    data = table(700)
    data.features[:] = data.features[np.arange(700) // 70 * 70]  # ten images, 70 times each
    assert build_index(data, "ivf").recall.value == 1


def test_a_graph_holds_copies_once_and_finds_them_all(tmp_path):
    """Linked to each other, seventy equal points would be all that a walk ever sees."""
    data = table(700)
    data.features[:] = data.features[np.arange(700) // 70 * 70]
    built = build_index(data, "hnsw")
    assert built.recall.value == 1
    assert built.searcher.ntotal == 10
    save_index(tmp_path / "a.index", built)
    for index in (built, read_index(tmp_path / "a.index")):
        hits = index.search(data.features[[3, 699]], 100)
        assert hits.positions.shape == (2, 100)
        assert set(hits.positions[0, :70]) == set(range(70))
        assert set(hits.positions[1, :70]) == set(range(630, 700))
        cosines = naive(data.features, data.features[[3, 699]])
        np.testing.assert_allclose(hits.similarities, -np.sort(-cosines, axis=1)[:, :100], atol=1e-6)
        assert [len(set(row)) for row in hits.positions] == [100, 100]
        assert index.search(data.features[:1], 800).positions.shape == (1, 700)


@pytest.mark.parametrize(("n", "lists"), [(624, 16), (1000, 25), (1_000_000, 4000)])
def test_number_of_cells(n, lists):
    assert num_lists_of(n) == lists


def test_too_few_images_for_cells():
    with pytest.raises(ConfigError, match=r"needs at least 624 images .* there are 623. Take exact"):
        build_index(table(623), "ivf")


def test_refusals():
    with pytest.raises(UnknownNameError, match=r"'hsnw'. Did you mean 'hnsw'"):
        build_index(table(5), "hsnw")
    with pytest.raises(ConfigError, match="no features"):
        build_index(table(0))
    built = build_index(table(5))
    with pytest.raises(ConfigError, match="top_k is 0"):
        built.search(table(1).features, 0)
    with pytest.raises(ConfigError, match=r"\(1, 3\); the index takes \(queries, 24\)"):
        built.search(np.ones((1, 3), np.float32))


def test_queries_of_another_model_are_refused():
    built = build_index(table(5))
    built.check_origin(ORIGIN, "a.index")
    other = Origin("cd" * 32, {"model": "n.safetensors", "pool": "gem", "scales": [1.0, 0.5]}, "photos")
    with pytest.raises(
        ConfigError,
        match=r"a.index was made with m.safetensors \(pool token, fingerprint abab.*\), not with n.safetensors \(pool "
        r"gem, fingerprint cdcd.*\); they differ in pool, scales\.",
    ):
        built.check_origin(other, "a.index")


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
def test_what_is_saved_is_read(tmp_path, kind):
    built = build_index(table(), kind)
    save_index(tmp_path / "a.index", built)
    found = read_index(tmp_path / "a.index")
    fields = ("kind", "paths", "origin", "breadth", "num_lists", "recall", "dim")
    assert [getattr(found, name) for name in fields] == [getattr(built, name) for name in fields]
    assert [getattr(read_index(str(tmp_path / "a.index")), name) for name in fields] == [
        getattr(built, name) for name in fields
    ]  # a name is a path too
    for got, want in zip(found.search(table(9).features), built.search(table(9).features), strict=True):
        np.testing.assert_array_equal(got, want)


def test_every_damage_is_noticed(tmp_path):
    path = tmp_path / "a.index"
    save_index(path, build_index(table(20)))
    whole = path.read_bytes()
    for at in (8, 15, 16, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="checksum"):
            read_index(path)
    for end in (8, 12, 16, 47, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match="truncated or damaged"):
            read_index(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="checksum"):
        read_index(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.index"
    for content, message in (
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "not an index of xcit; it begins with b'.x89PNG"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_index(path)
    with pytest.raises(DataError, match="there is no such index"):
        read_index(tmp_path / "b.index")
    with pytest.raises(DataError, match="is a folder"):
        read_index(tmp_path)


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "FORMAT", 2)
    save_index(tmp_path / "a.index", build_index(table(5)))
    monkeypatch.undo()
    with pytest.raises(DataError, match="format 2; this xcit reads 1"):
        read_index(tmp_path / "a.index")


def test_nothing_of_the_former_index_is_lost_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.index"
    save_index(path, build_index(table(5)))
    before = path.read_bytes()

    def killed(data):
        raise MemoryError

    monkeypatch.setattr(faiss, "serialize_index", killed)
    with pytest.raises(MemoryError):
        save_index(path, build_index(table(6)))
    assert path.read_bytes() == before
    assert json.loads(before[16 : 16 + int.from_bytes(before[8:16], "little")])["paths"][0] == "0.png"


def test_faiss_takes_torchs_number_of_threads():
    before = torch.get_num_threads()
    try:
        for number in (2, 1):
            torch.set_num_threads(number)
            build_index(table(5)).search(table(2).features)
            assert faiss.omp_get_max_threads() == number
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
