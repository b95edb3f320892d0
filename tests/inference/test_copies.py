"""Duplicates: clusters are those that a plain search through the graph of pairs gives."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.inference import duplicates
from xcit.inference.duplicates import choose_threshold, content_groups, find_clusters, kept_member
from xcit.inference.features import FeatureExtractor
from xcit.models.xcit import XCiT


def naive_clusters(features, threshold, side=None, exact=()):
    x = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    n = len(x)
    same = {(i, j) for group in exact for i in group for j in group}
    edges = {
        i: [
            j for j in range(n)
            if i != j and (x[i] @ x[j] >= threshold or (i, j) in same) and (side is None or side[i] != side[j])
        ]
        for i in range(n)
    }  # fmt: skip
    clusters, seen = set(), set()
    for start in range(n):
        if start in seen or not edges[start]:
            continue
        members, ahead = set(), [start]
        while ahead:
            i = ahead.pop()
            if i not in members:
                members.add(i)
                ahead += edges[i]
        seen |= members
        clusters.add(frozenset(members))
    return clusters, edges, x


def bunches(n=120, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(25, 6))[rng.integers(0, 25, n)] + 0.15 * rng.normal(size=(n, 6))).astype(np.float32)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("sided", [False, True])
@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.995])
def test_clusters(monkeypatch, chunk, sided, threshold):
    monkeypatch.setattr(duplicates, "CHUNK", chunk)
    x = bunches()
    side = np.arange(120) % 3 == 0 if sided else None
    exact = [[0, 50, 100], [3, 4]]
    found = find_clusters(x, threshold, side=side, exact=exact)
    want, edges, unit = naive_clusters(x, threshold, side, exact)
    assert {frozenset(m.position for m in cluster) for cluster in found} == want
    assert [len(c) for c in found] == sorted(map(len, found), reverse=True)
    for member in (m for cluster in found for m in cluster):
        joined = [1.0 if {member.position, j} <= {0, 50, 100} or {member.position, j} == {3, 4} else
                  unit[member.position] @ unit[j] for j in edges[member.position]]  # fmt: skip
        assert member.similarity == pytest.approx(max(joined), abs=1e-6)


def test_equal_vectors_are_found_at_threshold_one():
    x = np.repeat(bunches(20), 2, axis=0)
    found = find_clusters(x, 1.0)
    assert sorted(tuple(m.position for m in c) for c in found) == [(2 * i, 2 * i + 1) for i in range(20)]


@pytest.mark.parametrize("threshold", [-1, 1.01, float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ConfigError, match="more than -1 and at most 1"):
        find_clusters(bunches(4), threshold)


def test_contents(tmp_path):
    names = []
    for i, content in enumerate([b"a", b"bb", b"a", b"cc", b"bb", b"", b"", b"a"]):
        (tmp_path / str(i)).write_bytes(content)
        names.append(tmp_path / str(i))
    names.append(tmp_path / "gone")
    assert content_groups(names) == [[0, 2, 7], [1, 4]]


def test_the_largest_file_is_kept(tmp_path):
    paths = [tmp_path / str(i) for i in range(3)]
    for path, size in zip(paths, (5, 9, 9), strict=True):
        path.write_bytes(b"x" * size)
    cluster = [duplicates.Member(i, False, 1.0) for i in range(3)]
    assert kept_member(cluster, paths) == 1
    paths[1].unlink()
    assert kept_member(cluster, paths) == 2


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, patch_size=8, num_classes=0).eval()
    return FeatureExtractor(model, pool="avg", preprocessing=Preprocessing((32, 32)))


def blobs(folder, n):
    """Pictures that look nothing alike: a few large patches of colour."""
    paths = []
    for i in range(n):
        small = np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return paths


def test_a_threshold_finds_the_copies_that_it_was_chosen_by(tmp_path, extractor):
    paths = blobs(tmp_path, 24)
    (tmp_path / "bad.png").write_bytes(b"")
    chosen = choose_threshold([*paths, tmp_path / "bad.png"], extractor)
    assert chosen.num_images == 24
    x = extractor(paths).astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    nearest = (x @ x.T - 3 * np.eye(24)).max(axis=1)
    assert chosen.images_joined == pytest.approx((nearest >= chosen.value).mean(), abs=1e-3)
    assert chosen.images_joined <= 0.2
    # a copy of another kind than those of the measurement
    with Image.open(paths[5]) as image:
        image.save(tmp_path / "copy.jpg", quality=60)
    shutil.copy(paths[7], tmp_path / "again.png")
    everything = [*paths, tmp_path / "copy.jpg", tmp_path / "again.png"]
    clusters = find_clusters(extractor(everything), chosen.value, exact=content_groups(everything))
    assert {(5, 24), (7, 25)} <= {tuple(m.position for m in c) for c in clusters}


def test_a_model_that_cannot_tell_is_found_out(tmp_path, extractor):
    """Of pictures that are nearly the same, copies cannot be told: the threshold keeps strangers apart and says so."""
    paths = []
    for i in range(20):
        pixels = np.full((40, 40, 3), 120, np.uint8)
        pixels[20, 20] = i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    chosen = choose_threshold(paths, extractor)
    assert chosen.copies_found < duplicates.FOUND
    joined = sum(map(len, find_clusters(extractor(paths), chosen.value)))
    assert joined <= chosen.images_joined * len(paths) + 1  # what is told is what is then done


def test_one_image_gives_no_threshold(tmp_path, extractor):
    with pytest.raises(DataError, match="from 1 readable images"):
        choose_threshold(blobs(tmp_path, 1), extractor)
