"""Published retrieval protocols on tiny data in the published layout, against plain loops."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.evaluate.retrieval import (
    DEPTH,
    average_precision,
    copy_scores,
    evaluate_copies,
    evaluate_revisited,
    revisited_scores,
    whitening_of,
)
from xcit.evaluate.retrieval_sets import (
    BLOCKS,
    RevisitedQuery,
    RevisitedSet,
    open_copydays,
    open_revisited,
    read_plain_pickle,
)
from xcit.inference.features import FeatureExtractor
from xcit.models.xcit import XCiT

# --- figures, naively -------------------------------------------------------------------------------------------------


def naive_ap(relevant, total):
    """Walk down a list of True and False and add up the trapezoids between recalls."""
    area = found = 0
    for position, right in enumerate(relevant):
        if right:
            before = 1.0 if position == 0 else found / position
            found += 1
            area += (before + found / (position + 1)) / 2 / total
    return area


def naive_level(similarities, queries, positive, ignored):
    aps, at = [], []
    for row, query in zip(similarities, queries, strict=True):
        wanted = {int(i) for name in positive for i in query.labels[name]}
        junk = {int(i) for name in ignored for i in query.labels[name]}
        if not wanted:
            continue
        ranking = [i for i in sorted(range(len(row)), key=lambda i: -row[i]) if i not in junk]
        relevant = [i in wanted for i in ranking]
        aps.append(naive_ap(relevant, len(wanted)))
        last = max(i for i, right in enumerate(relevant, 1) if right)
        at.append([sum(relevant[: min(k, last)]) / min(k, last) for k in (1, 5, 10)])
    return np.mean(aps), np.mean(at, axis=0), len(aps)


def random_set(rng, num_images, num_queries):
    queries = []
    for i in range(num_queries):
        order, cuts = rng.permutation(num_images), np.sort(rng.integers(0, num_images // 2, 3))
        easy, hard, junk, _ = np.split(order, cuts)
        queries.append(RevisitedQuery(f"q{i}", (0, 0, 1, 1), {"easy": easy, "hard": hard, "junk": junk}))
    return RevisitedSet([str(i) for i in range(num_images)], queries)


@pytest.mark.parametrize("seed", range(5))
def test_revisited_scores(seed):
    rng = np.random.default_rng(seed)
    data = random_set(rng, 60, 12)
    similarities = rng.normal(size=(12, 60))
    scores = revisited_scores(similarities, data)
    for level, positive, ignored in (
        ("easy", ["easy"], ["junk", "hard"]),
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["junk", "easy"]),
    ):
        mean, at, count = naive_level(similarities, data.queries, positive, ignored)
        assert scores[level].mean_average_precision == pytest.approx(mean, abs=1e-12)
        assert list(scores[level].precision_at.values()) == pytest.approx(list(at), abs=1e-12)
        assert list(scores[level].precision_at) == [1, 5, 10]
        assert scores[level].num_queries == count


def test_average_precision_by_hand():
    assert average_precision([0, 1, 2], 3) == 1
    assert average_precision([], 2) == 0
    # found first, and third of three: (1 + 1) / 4 + (1 / 2 + 2 / 3) / 4
    assert average_precision([0, 2], 2) == pytest.approx(0.5 + 7 / 24)
    # half of the positives are never found
    assert average_precision([0], 2) == 0.5


def test_a_perfect_ranking_scores_one_on_every_level():
    data = random_set(np.random.default_rng(1), 40, 6)
    similarities = np.zeros((6, 40))
    for row, query in zip(similarities, data.queries, strict=True):
        row[query.labels["easy"]], row[query.labels["hard"]], row[query.labels["junk"]] = 3, 2, 9
    for scores in revisited_scores(similarities, data).values():
        assert scores.mean_average_precision == 1
        assert set(scores.precision_at.values()) == {1}


def test_a_level_without_queries():
    query = RevisitedQuery("q", (0, 0, 1, 1), {"easy": np.array([1]), "hard": np.array([], int), "junk": np.array([0])})
    scores = revisited_scores(np.eye(1, 3), RevisitedSet(["a", "b", "c"], [query]))
    assert scores["easy"].num_queries == 1
    assert scores["hard"].num_queries == 0
    assert np.isnan(scores["hard"].mean_average_precision)


def test_copies_are_looked_for_among_the_first_20():
    rng = np.random.default_rng(0)
    similarities = rng.normal(size=(50, 60))
    positives = [sorted(rng.choice(60, size=rng.integers(1, 4), replace=False)) for _ in range(50)]
    want = np.mean([
        naive_ap([i in wanted for i in sorted(range(60), key=lambda i: -row[i])[:20]], len(wanted))
        for row, wanted in zip(similarities, positives, strict=True)
    ])  # fmt: skip
    scores = copy_scores(similarities, positives)
    assert DEPTH == 20
    assert scores.mean_average_precision == pytest.approx(want, abs=1e-12)
    assert scores.num_queries == 50


def test_whitening():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 0.5
    white = whitening_of(x)(x)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    want = (x - x.mean(axis=0)) @ vectors / np.sqrt(values)
    np.testing.assert_allclose(white @ white.T, want @ want.T, atol=1e-3)  # whatever the signs of the directions
    flat = np.concatenate([x, np.zeros((400, 2))], axis=1)  # directions in which nothing varies
    assert np.isfinite(whitening_of(flat)(flat)).all()


# --- data as published ------------------------------------------------------------------------------------------------


def picture(seed, size=(48, 40)):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def truth(as_arrays=False):
    kind = (lambda x: np.array(x, np.int64)) if as_arrays else list
    gnd = [
        {"bbx": [4.0, 4.0, 40.5, 36.0], "easy": kind([0]), "hard": kind([1]), "junk": kind([2])},
        {"bbx": [0.0, 0.0, 48.0, 40.0], "easy": kind([3, 4]), "hard": kind([]), "junk": kind([])},
    ]
    return {"imlist": [f"im_{i}" for i in range(6)], "qimlist": ["query_a", "query_b"], "gnd": gnd}


@pytest.fixture
def oxford(tmp_path):
    (tmp_path / "jpg").mkdir()
    for i in range(6):
        picture(i).save(tmp_path / "jpg" / f"im_{i}.jpg", quality=95)
    picture(0).save(tmp_path / "jpg" / "query_a.jpg", quality=60)
    picture(3).save(tmp_path / "jpg" / "query_b.jpg", quality=60)
    write(tmp_path, truth())
    return tmp_path


def write(folder, content, **options):
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, **options))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("as_arrays", [False, True])
def test_ground_truth_in_every_pickle_protocol(oxford, protocol, as_arrays):
    write(oxford, truth(as_arrays), protocol=protocol)
    for root in (oxford, str(oxford)):
        data = open_revisited(root, "roxford5k")
    assert [path.name for path in data.images] == [f"im_{i}.jpg" for i in range(6)]
    assert [query.path.name for query in data.queries] == ["query_a.jpg", "query_b.jpg"]
    assert data.queries[0].box == (4.0, 4.0, 40.5, 36.0)
    assert {k: v.tolist() for k, v in data.queries[0].labels.items()} == {"easy": [0], "hard": [1], "junk": [2]}
    assert data.queries[1].labels["hard"].dtype == np.int64


def test_the_folder_above_is_found_too(oxford):
    folder = oxford.parent / "roxford5k"
    oxford.rename(folder)
    assert len(open_revisited(folder.parent, "roxford5k").images) == 6
    folder.rename(oxford)


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch ran",)),
        (eval, ("open('ran', 'w')",)),
        (getattr, ("", "join")),
        (np.load, ("x.npy",)),
        (np.random.default_rng, ()),
    ],
)
def test_a_pickle_that_runs_code_is_refused(oxford, monkeypatch, function, arguments):
    monkeypatch.chdir(oxford)
    write(oxford, truth() | {"gnd": Runs(function, *arguments)})
    with pytest.raises(DataError, match=r"is refused: reading it would import .*(system|eval|getattr|load|rng)"):
        open_revisited(oxford, "roxford5k")
    assert not (oxford / "ran").exists()


def test_text_is_decoded_as_latin1_only(tmp_path):
    import codecs

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": b"\xff\x00"}, protocol=2))  # spelt with _codecs.encode
    assert read_plain_pickle(tmp_path / "a.pkl") == {"x": b"\xff\x00"}
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Runs(codecs.encode, "abc", "rot13"), protocol=2))
    with pytest.raises(DataError, match=r"damaged|refused"):
        read_plain_pickle(tmp_path / "b.pkl")


def test_damaged_pickles(oxford):
    whole = pickle.dumps(truth())
    for content in (b"", b"no pickle", whole[:40], whole[:-1]):
        (oxford / "gnd_roxford5k.pkl").write_bytes(content)
        with pytest.raises(DataError, match=r"gnd_roxford5k.pkl: is truncated or damaged"):
            open_revisited(oxford, "roxford5k")


def changed(**changes):
    content = truth()
    content["gnd"][0].update(changes)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "not the ground truth"),
        ({"imlist": []}, "KeyError"),
        (changed(easy=[6]), "not all among the 6"),
        (changed(junk=[-1]), "not all among the 6"),
        (changed(hard=["im_1"]), "not numbers"),
        (changed(bbx=[5, 5, 5, 9]), "box of query_a.jpg is empty"),
        (changed(bbx=[1, 2, 3]), "not enough values"),
        (truth() | {"gnd": []}, "not the ground truth"),
        (truth() | {"imlist": ["../../etc/passwd"] * 6}, "no name of an image"),
        (truth() | {"imlist": [], "qimlist": [], "gnd": []}, "lists 0 images and 0 queries"),
        (truth() | {"imlist": ["im_0", "im_1", "im_2", "im_3", "im_4", "gone"]}, r"1 of 8 images .* such as gone.jpg"),
    ],
)
def test_ground_truth_that_cannot_be(oxford, content, message):
    write(oxford, content)
    with pytest.raises(DataError, match=message):
        open_revisited(oxford, "roxford5k")


def test_no_ground_truth(tmp_path):
    with pytest.raises(DataError, match=r"has no gnd_rparis6k.pkl, nor a folder rparis6k"):
        open_revisited(tmp_path, "rparis6k")


@pytest.fixture
def copydays(tmp_path):
    for block in ("original", "strong", "jpegqual/10", "crops/50"):
        (tmp_path / block).mkdir(parents=True)
    for i in range(5):
        own = picture(i)
        own.save(tmp_path / "original" / f"{2000 + i}00.jpg", quality=95)
        own.save(tmp_path / "jpegqual" / "10" / f"{2000 + i}00.jpg", quality=10)
        own.crop((6, 5, 42, 35)).save(tmp_path / "crops" / "50" / f"{2000 + i}00.jpg")
    picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "strong" / "200101.jpg")
    picture(1).rotate(90).save(tmp_path / "strong" / "200102.jpg")
    picture(4).save(tmp_path / "strong" / "200401.jpg")
    return tmp_path


def test_copydays_layout(copydays):
    data = open_copydays(copydays)
    assert len(data.originals) == 5
    assert list(data.blocks) == ["strong", "jpegqual/10", "crops/50"]
    assert [positives for _, positives in data.blocks["strong"]] == [[1], [1], [4]]
    assert [positives for _, positives in data.blocks["crops/50"]] == [[i] for i in range(5)]
    assert len(data.absent) == len(BLOCKS) - 3


def test_copydays_that_cannot_be(copydays):
    picture(9).save(copydays / "strong" / "300001.jpg")
    with pytest.raises(DataError, match=r"300001.jpg: there is no original whose name begins with '3000'"):
        open_copydays(copydays)
    (copydays / "strong" / "300001.jpg").unlink()
    (copydays / "crops" / "50" / "200000.jpg").unlink()
    with pytest.raises(DataError, match=r"holds 4 images, and original/ 5"):
        open_copydays(copydays)
    with pytest.raises(DataError, match=r"no images in original/"):
        open_copydays(copydays / "crops")


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return XCiT(embed_dim=32, depth=1, num_heads=4, patch_size=8, num_classes=0).eval()


def extractor(model, pool="token", **options):
    return FeatureExtractor(model, pool=pool, preprocessing=Preprocessing((32, 32)), batch_size=3, **options)


def by_hand(model, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return model.forward_features(((pixels - mean) / std).float())[0].numpy()


@pytest.mark.parametrize("crop", [True, False])
def test_revisited_from_files_to_scores(oxford, model, crop):
    data = open_revisited(oxford, "roxford5k")
    seen = []
    scores = evaluate_revisited(
        [extractor(model)], data, image_size=32, crop_queries=crop, on_progress=lambda: seen.append(1)
    )
    assert len(seen) == 8

    def token(path, box=None):
        with Image.open(path) as image:
            image = image.convert("RGB")
        image = image.crop(box) if box else image
        scale = min(1, 32 / max(image.size))
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS, reducing_gap=2.0)
        vector = by_hand(model, image)[0].astype(float)
        return vector / np.linalg.norm(vector)

    database = np.stack([token(path) for path in data.images])
    boxes = [(4, 4, 40, 36), (0, 0, 48, 40)] if crop else [None, None]
    queries = np.stack([token(query.path, box) for query, box in zip(data.queries, boxes, strict=True)])
    assert scores == revisited_scores(queries @ database.T, data)


def test_copydays_from_files_to_scores(copydays, model):
    data = open_copydays(copydays)
    scores = evaluate_copies([extractor(model, "token"), extractor(model, "gem")], data, image_size=40)
    assert list(scores) == list(data.blocks)

    def vector(path):
        with Image.open(path) as image:
            tokens = by_hand(model, image.convert("RGB").resize((40, 40), Image.Resampling.BICUBIC)).astype(float)
        gem = (np.maximum(tokens[1:], 1e-6) ** 4).mean(axis=0) ** 0.25
        both = np.concatenate([tokens[0], gem])
        return both / np.linalg.norm(both)

    database = np.stack([vector(path) for path in data.originals])
    for block, queries in data.blocks.items():
        similarities = np.stack([vector(path) for path, _ in queries]) @ database.T
        assert scores[block] == copy_scores(similarities, [positives for _, positives in queries])


def test_distractors_can_only_hurt_and_whitening_runs(copydays, model, tmp_path):
    data = open_copydays(copydays)
    others = tmp_path / "others"
    others.mkdir()
    for i in range(12):
        picture(100 + i).save(others / f"{i}.png")
    paths = sorted(others.iterdir())
    plain = evaluate_copies([extractor(model, "gem")], data, image_size=40)
    crowded = evaluate_copies([extractor(model, "gem")], data, image_size=40, distractors=paths)
    assert all(crowded[b].mean_average_precision <= plain[b].mean_average_precision for b in plain)
    white = evaluate_copies([extractor(model, "gem")], data, image_size=40, whitening=paths)
    assert all(0 <= each.mean_average_precision <= 1 for each in white.values())
    assert white != plain


def test_a_broken_image_is_named(oxford, model):
    (oxford / "jpg" / "im_4.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"im_4.jpg: is not an image"):
        evaluate_revisited([extractor(model)], open_revisited(oxford, "roxford5k"), image_size=32)


def test_an_image_size_below_a_patch(oxford, model):
    with pytest.raises(ConfigError, match=r"image_size is 12; with patches of 8 px and the smallest scale 0.5 .* 16"):
        evaluate_revisited([extractor(model, scales=(1, 0.5))], open_revisited(oxford, "roxford5k"), image_size=12)
