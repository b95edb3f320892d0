"""Duplicates: clusters are those that a plain search through the graph of pairs gives."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

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


def test_of_equal_files_the_plain_name_is_kept(tmp_path):
    names = ["cat (1).jpg", "a/cat.jpg", "b/cat.jpg", "copy of cat.jpg"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"same")
    cluster = [duplicates.Member(i, True, 1.0) for i in range(4)]
    assert names[kept_member(cluster, paths)] == "a/cat.jpg"
    paths[3].write_bytes(b"larger")
    assert names[kept_member(cluster, paths)] == "copy of cat.jpg"


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


def saved_copies(paths, folder, quality=60, prefix="copy"):
    """Write each picture once more, compressed: other bytes, nearly the same picture."""
    copies = []
    for i, path in enumerate(paths):
        copies.append(folder / f"{prefix}{i}.jpg")
        with Image.open(path) as image:
            image.convert("RGB").save(copies[-1], quality=quality)
    return copies


def cosines_of(features):
    x = features.astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def test_a_threshold_finds_the_copies_that_it_was_chosen_by(tmp_path, extractor):
    paths = blobs(tmp_path, 25)
    features = extractor(paths)
    paths[24].write_bytes(b"")  # broken meanwhile
    chosen = choose_threshold(paths, features, extractor)
    assert chosen.num_images == 24
    nearest = (cosines_of(features) - 3 * np.eye(25)).max(axis=1)[:24]
    assert chosen.images_joined == pytest.approx((nearest >= chosen.value).mean(), abs=1e-3)
    assert chosen.images_joined <= 0.2
    assert chosen.copies_found >= duplicates.FOUND
    # a copy of another kind than those of the measurement
    paths.pop()
    with Image.open(paths[5]) as image:
        image.save(tmp_path / "copy.jpg", quality=60)
    shutil.copy(paths[7], tmp_path / "again.png")
    everything = [*paths, tmp_path / "copy.jpg", tmp_path / "again.png"]
    clusters = find_clusters(extractor(everything), chosen.value, exact=content_groups(everything))
    assert {(5, 24), (7, 25)} <= {tuple(m.position for m in c) for c in clusters}


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("num", [3, 6, 40])
def test_a_folder_full_of_exact_copies_is_no_fault_of_the_model(tmp_path, extractor, num, times):
    paths = blobs(tmp_path, num)
    alone = choose_threshold(paths, extractor(paths), extractor)
    for k in range(1, times):
        for i in range(num):
            paths.append(tmp_path / f"{i} ({k}).png")
            shutil.copy(paths[i], paths[-1])
    chosen = choose_threshold(paths, extractor(paths), extractor, exact=content_groups(paths))
    assert chosen.num_images == num
    assert chosen.value == pytest.approx(alone.value, abs=2e-6)
    assert chosen.copies_found >= duplicates.FOUND
    assert (chosen.images_joined, chosen.likely_copies) == (alone.images_joined, 0)


@pytest.mark.parametrize(("num", "copied", "times"), [(5, 1, 1), (6, 6, 1), (12, 2, 1), (50, 50, 1), (50, 30, 3)])
def test_a_folder_full_of_near_copies_is_no_fault_of_the_model(tmp_path, extractor, num, copied, times):
    """Copies of one's own images are no strangers, so they do not raise the threshold above themselves."""
    paths = blobs(tmp_path, num)
    pairs = set()
    for k in range(times):
        pairs |= {(i, len(paths) + i) for i in range(copied)}
        paths += saved_copies(paths[:copied], tmp_path, 90 - 10 * k, f"copy{k}-")
    features = extractor(paths)
    chosen = choose_threshold(paths, features, extractor)
    assert chosen.copies_found >= duplicates.FOUND
    share = copied * (times + 1) / len(paths)
    assert chosen.likely_copies == pytest.approx(share, abs=0.1)
    assert chosen.images_joined == pytest.approx(share, abs=0.1)
    parents = {m.position: number for number, c in enumerate(find_clusters(features, chosen.value)) for m in c}
    assert all(parents.get(i, -1) == parents.get(j, -2) for i, j in pairs)


def test_strangers_are_looked_for_among_all_images(tmp_path, extractor):
    """The more images there are, the nearer the nearest stranger: what is told of 64 must hold for all of them."""
    data = load_digits()
    paths = []
    for i, image in enumerate(data.images[:900]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray((255 - image * 15).astype(np.uint8)).resize((32, 32)).save(paths[-1])
    features = extractor(paths)
    cosines = cosines_of(features)
    np.fill_diagonal(cosines, -1)
    chosen = choose_threshold(paths, features, extractor)
    sample = np.unique(np.linspace(0, 899, duplicates.SAMPLE).round().astype(int))
    among_all = (cosines[sample] >= chosen.value - 1e-6).any(axis=1).mean()
    assert chosen.images_joined == pytest.approx(among_all, abs=1e-3)
    # the same measurement among the sample alone, as a false all-clear
    at_reached = (cosines >= chosen.reached - 1e-6).any(axis=1).mean()
    among_few = (cosines[np.ix_(sample, sample)] >= chosen.reached - 1e-6).any(axis=1).mean()
    assert at_reached > 0.25 > 4 * among_few
    joined = sum(map(len, find_clusters(features, chosen.value))) / 900
    assert joined == pytest.approx(chosen.images_joined, abs=0.1)
    assert joined < 0.2
    assert chosen.value > chosen.reached
    assert chosen.copies_found < duplicates.FOUND  # which is told: the model is weak


def test_only_images_of_the_other_side_are_strangers(tmp_path, extractor):
    paths = blobs(tmp_path, 40)
    near = saved_copies(paths[:20], tmp_path)
    everything = [*paths, *near]
    side = np.array([i >= 20 and i < 40 for i in range(60)])  # copies lie beside their originals
    features = extractor(everything)
    chosen = choose_threshold(everything, features, extractor, side=side)
    assert (chosen.images_joined, chosen.likely_copies) == (0, 0)
    both = choose_threshold(everything, features, extractor)
    assert both.images_joined == pytest.approx(40 / 60, abs=0.05)
    across = choose_threshold(everything, features, extractor, side=np.arange(60) >= 40)
    assert across.images_joined == pytest.approx(40 / 60, abs=0.05)


def test_exact_copies_on_both_sides_stand_for_both(tmp_path, extractor):
    paths = blobs(tmp_path, 10)
    near = saved_copies(paths[:1], tmp_path)[0]
    again = tmp_path / "again.png"
    shutil.copy(paths[0], again)
    everything = [*paths, near, again]  # the near copy's only counterpart across is the exact one
    side = np.arange(12) == 11
    chosen = choose_threshold(everything, extractor(everything), extractor, exact=content_groups(everything), side=side)
    assert chosen.num_images == 12
    assert chosen.images_joined == pytest.approx(2 / 12)


def test_a_model_that_cannot_tell_is_found_out(tmp_path, extractor):
    """Of pictures that are nearly the same, copies cannot be told: the threshold keeps strangers apart and says so."""
    paths = []
    for i in range(20):
        pixels = np.full((40, 40, 3), 120, np.uint8)
        pixels[20, 20] = i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    features = extractor(paths)
    chosen = choose_threshold(paths, features, extractor)
    assert chosen.copies_found < duplicates.FOUND
    joined = sum(map(len, find_clusters(features, chosen.value)))
    assert joined <= chosen.images_joined * len(paths) + 1  # what is told is what is then done


@pytest.mark.parametrize("dim", [2, 3, 8, 24])
def test_strangers_are_seldom_taken_for_copies(dim):
    """Points at random have no copies, whatever their dimension; points that are there twice all have one."""
    rng = np.random.default_rng(dim)
    points = duplicates.unit_rows(rng.normal(size=(4000, dim + 1)))
    sample, everything, sides = np.arange(0, 4000, 8), np.arange(4000), np.zeros(4000, bool)
    nearest, stranger = duplicates._neighbours(points, sample, everything, everything, sides, False)
    truth = -np.sort(-(points[sample].astype(float) @ points.T.astype(float)), axis=1)[:, 1]
    np.testing.assert_allclose(nearest, truth, atol=1e-6)
    assert (stranger < nearest).mean() < (0.05 if dim > 2 else 0.2)  # TENTH, which few images need, costs there
    points[2000:] = duplicates.unit_rows(points[:2000] + 1e-3 * rng.normal(size=(2000, dim + 1)) * (dim > 2))
    nearest, stranger = duplicates._neighbours(points, sample, everything, everything, sides, False)
    assert (stranger < nearest).mean() > 0.95


def test_one_image_gives_no_threshold(tmp_path, extractor):
    paths = blobs(tmp_path, 2)
    features = extractor(paths)
    with pytest.raises(DataError, match="cannot be chosen from one image; give one"):
        choose_threshold(paths[:1], features[:1], extractor)
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="from 2 images, none of which can be read"):
        choose_threshold(paths, features, extractor)
