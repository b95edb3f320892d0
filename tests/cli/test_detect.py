"""`xcit detect` on real files: what is printed and written, whose ids results bear, how it ends."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli import main as command
from xcit.data.coco_masks import decode_mask
from xcit.errors import ConfigError
from xcit.inference import detector as inference
from xcit.inference.detector import Detector
from xcit.models.detectors import create_detector, save_detector
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild"]
TINY = {"num_classes": 3, "out_channels": 16, "box_width": 32, "mask_channels": 16, "mask_convs": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a detector and photos: 0.png to 4.png, of which 2.png is no image."""
    folder = tmp_path_factory.mktemp("detect")
    torch.manual_seed(0)
    model = create_detector("xcit_nano_12_p16", **TINY, min_size=64, max_size=128, score_thresh=0.0)
    torch.nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.05)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    torch.nn.init.normal_(model.roi_heads.mask_predictor.logits.weight, std=3.0)
    save_detector(model, folder / "d.safetensors", class_names=NAMES)
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        noise.resize((100 + 20 * i, 80)).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "2.png").write_bytes(b"nothing of the kind")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(command, "VERBS", tuple({*command.VERBS, "detect"}))


def run(capsys, *arguments):
    status = command.main(["detect", "--model", "d.safetensors", "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def expected(place):
    """What the Python API says, by path, with the verb's own defaults apart from five instances an image."""
    found = Detector(place / "d.safetensors", device="cpu", max_detections=5)([place / "photos"])
    return {f"photos/{each.path.name}": each for each in found}


# --- what is printed --------------------------------------------------------------------------------------------------


def test_table(capsys, expected):
    status, out, err = run(capsys, "photos", "--top", 5)
    assert status == 1
    head, *lines = out.splitlines()
    assert head.split() == ["file", "score", "left", "top", "right", "bottom", "class"]
    want = [(path, found, i) for path, found in expected.items() for i in range(len(found))]
    assert len(lines) == len(want) == 4 * 5
    for line, (path, found, i) in zip(lines, want, strict=True):
        cells = line.split()
        if i == 0:
            assert cells.pop(0) == path
        assert cells[0] == f"{found.scores[i]:.2f}"
        assert cells[1:5] == [f"{side:.0f}" for side in found.boxes[i]]
        assert line.endswith(f"  {found.names[i]}")
    assert err.splitlines() == [f"xcit: {expected_error(expected)}", "xcit: 1 of 5 images could not be looked at."]


def expected_error(expected):
    (error,) = [found.error for found in expected.values() if found.error]
    return "photos/2.png" + error.rpartition("photos/2.png")[2]


def test_table_of_an_image_with_nothing(capsys):
    status, out, _ = run(capsys, "photos/0.png", "--score", 1)
    assert status == 0
    assert out.splitlines()[1].split() == ["photos/0.png", "-", "nothing", "found"]


def test_json_on_stdout_is_json_alone(capsys, expected):
    status, out, _ = run(capsys, "photos", "--top", 5, "--format", "json")
    objects = json.loads(out)
    assert status == 1
    assert [each["file"] for each in objects] == list(expected)
    for each in objects:
        found = expected[each["file"]]
        assert (each["error"] is None) == (found.error is None)
        assert (each["height"], each["width"]) == (found.size if found.error is None else (None, None))
        assert [one["label"] for one in each["detections"]] == found.labels.tolist()
        assert [one["name"] for one in each["detections"]] == found.names
        np.testing.assert_allclose([one["score"] for one in each["detections"]], found.scores, rtol=1e-4)
        boxes = np.array([one["box"] for one in each["detections"]]).reshape(-1, 4)
        np.testing.assert_allclose(boxes, found.boxes, atol=0.02)


# --- files ------------------------------------------------------------------------------------------------------------


def test_csv(capsys, tmp_path, expected):
    assert run(capsys, "photos", "--top", 5, "--csv", tmp_path / "new" / "o.csv")[0] == 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "o.csv").read_text())))
    assert list(rows[0]) == ["file", "label", "name", "score", "x0", "y0", "x1", "y1", "error"]
    for path, found in expected.items():
        mine = [row for row in rows if row["file"] == path]
        if found.error:
            assert [(row["label"], row["error"]) for row in mine] == [("", expected_error(expected))]
            continue
        assert [(int(row["label"]), row["name"]) for row in mine] == list(zip(found.labels, found.names, strict=True))
        boxes = [[float(row[key]) for key in ("x0", "y0", "x1", "y1")] for row in mine]
        np.testing.assert_allclose(boxes, found.boxes, atol=0.02)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["o.csv"]


def check_results(results, expected, image_ids, category_ids):
    """Compare COCO's results with detections."""
    want = [(path, found, i) for path, found in expected.items() for i in range(len(found))]
    want = [(path, found, i) for path, found, i in want if category_ids[found.labels[i]] is not None]
    assert len(results) == len(want)
    for result, (path, found, i) in zip(results, want, strict=True):
        assert result["image_id"] == image_ids[path]
        assert result["category_id"] == category_ids[found.labels[i]]
        assert result["score"] == pytest.approx(found.scores[i], rel=1e-4)
        x0, y0, x1, y1 = found.boxes[i]
        assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)
        assert (decode_mask(result["segmentation"], *found.size) != found.mask(i)).mean() < 0.01


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with NumPy 2
@pytest.mark.parametrize("library", ["faster_coco_eval", "pycocotools.coco"])
def test_results_without_ids_are_numbered_in_order(capsys, tmp_path, expected, library):
    status, _, _ = run(capsys, "photos", "--top", 5, "--json", tmp_path / "r.json")
    assert status == 1
    results = json.loads((tmp_path / "r.json").read_text())
    check_results(results, expected, {path: i for i, path in enumerate(expected, 1)}, [1, 2, 3])
    listed = json.loads((tmp_path / "r.images.json").read_text())
    assert [(image["id"], image["file_name"]) for image in listed["images"]] == [
        (i, path) for i, path in enumerate(expected, 1) if i != 3
    ]
    assert [(image["height"], image["width"]) for image in listed["images"]] == [
        (80, 100 + 20 * i) for i in (0, 1, 3, 4)
    ]
    assert listed["categories"] == [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    assert [(each["id"], each["error"]) for each in listed["failed"]] == [(3, expected_error(expected))]
    loaded = pytest.importorskip(library).COCO(str(tmp_path / "r.images.json")).loadRes(str(tmp_path / "r.json"))
    assert len(loaded.getAnnIds()) == len(results)
    for annotation, result in zip(loaded.loadAnns(sorted(loaded.getAnnIds())), results, strict=True):
        assert (
            loaded.annToMask(annotation).sum()
            == decode_mask(result["segmentation"], *result["segmentation"]["size"]).sum()
        )


def listing(folder, **changes):
    """Write a list of the images, ids of their own, and return its path."""
    content = {
        "images": [
            {"id": 100 + i, "file_name": f"{i}.png", "height": 80, "width": 100 + 20 * i} for i in (4, 3, 2, 1, 0)
        ],
        "categories": [{"id": 70, "name": "ant"}, {"id": 9, "name": "cat, wild"}, {"id": 5, "name": "fly"}],
        **changes,
    }
    (folder / "l.json").write_text(json.dumps(content))
    return folder / "l.json"


def test_results_bear_the_ids_of_a_listing(capsys, tmp_path, expected):
    coco = listing(tmp_path)
    status, _, err = run(capsys, "photos", "--top", 5, "--json", tmp_path / "r.json", "--coco", coco)
    assert status == 1
    assert f"1 of the model's classes are no category of {coco} and are left out" in err
    assert "json: bee." in err
    results = json.loads((tmp_path / "r.json").read_text())
    check_results(results, expected, {path: 100 + i for i, path in enumerate(expected)}, [70, None, 9])
    assert 0 < len(results) < 20
    assert not (tmp_path / "r.images.json").exists()


def test_results_that_can_be_judged(capsys, tmp_path, expected):
    from xcit.evaluate.coco_ap import coco_figures

    good = {path: found for path, found in expected.items() if found.error is None}
    annotations = [
        {"id": n, "image_id": result["image_id"], "category_id": result["category_id"], "bbox": result["bbox"],
         "segmentation": result["segmentation"], "iscrowd": 0}
        for n, (result) in enumerate(
            (r for i, found in enumerate(good.values()) for r in found.to_coco(100 + i + (i > 1), [5, 9, 70])[:1]), 1
        )
    ]  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in zip((5, 9, 70), NAMES, strict=True)]
    coco = listing(tmp_path, annotations=annotations, categories=categories)
    assert run(capsys, "photos", "--top", 1, "--json", tmp_path / "r.json", "--coco", coco)[0] == 1
    truth, results = (json.loads((tmp_path / name).read_text()) for name in ("l.json", "r.json"))
    assert coco_figures(truth, results, "bbox").ap > 0.99
    assert coco_figures(truth, results, "segm").ap > 0.9


def test_images_lie_as_annotated(capsys, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open("photos/0.png") as image:
        image.save(tmp_path / "t.png", exif=exif)
    for height, width in ((80, 100), (100, 80), (77, 80)):
        coco = listing(tmp_path, images=[{"id": 8, "file_name": "t.png", "height": height, "width": width}])
        out = tmp_path / f"{height}"
        status, _, err = run(capsys, tmp_path / "t.png", "--json", tmp_path / "r.json", "--coco", coco, "--out", out)
        results = json.loads((tmp_path / "r.json").read_text())
        if height == 77:
            assert (status, results) == (2, [])
            assert "t.png: is 80 x 100 px, but its annotations are for 80 x 77 px" in err
            continue
        assert status == 0
        assert {tuple(result["segmentation"]["size"]) for result in results} == {(height, width)}
        with Image.open(out / "t_detections.png") as drawn:
            assert (drawn.height > drawn.width) == (height > width)


def test_pictures(capsys, tmp_path):
    status, _, _ = run(capsys, "photos", "--out", tmp_path / "drawn")
    assert status == 1
    names = sorted(p.name for p in (tmp_path / "drawn").iterdir())
    assert names == [f"{i}_detections.png" for i in (0, 1, 3, 4)]
    with Image.open(tmp_path / "drawn" / "0_detections.png") as drawn:
        assert drawn.size == (640, 512)
    status, out, err = run(capsys, "photos", "--out", tmp_path / "drawn")
    assert (status, out) == (2, "")
    assert "0_detections.png is there already; name another --out, or replace it with --overwrite." in err
    assert run(capsys, "photos", "--out", tmp_path / "drawn", "--overwrite")[0] == 1


def test_pictures_of_several_folders_keep_them(capsys, tmp_path, place):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes((place / "photos" / "0.png").read_bytes())
    assert run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o", "--batch-size", 2)[0] == 0
    assert (tmp_path / "o" / "a" / "x_detections.png").exists()
    assert (tmp_path / "o" / "b" / "x_detections.png").exists()


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_reach_the_detector(capsys, monkeypatch):
    given = {}

    class Told(Detector):
        def __init__(self, model, **options):
            given.update(options)
            super().__init__(model, **options)

    monkeypatch.setattr(inference, "Detector", Told)
    scores = "bee=0.25, cat, wild=0.75"
    run(
        capsys,
        "photos/0.png",
        "--score",
        0.4,
        "--class-score",
        scores,
        "--top",
        3,
        "--batch-size",
        2,
        "--max-size",
        256,
    )
    assert given == {
        "device": "cpu",
        "batch_size": 2,
        "score_threshold": {"*": 0.4, "bee": 0.25, "cat, wild": 0.75},
        "max_detections": 3,
        "min_size": None,
        "max_size": 256,
    }


def test_scores_by_class(capsys):
    _, out, _ = run(capsys, "photos/0.png", "--score", 1, "--class-score", "cat, wild=0.1", "--format", "json")
    (each,) = json.loads(out)
    assert {one["name"] for one in each["detections"]} == {"cat, wild"}
    assert min(one["score"] for one in each["detections"]) < 0.9


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_status_2_when_no_image_could_be_looked_at(capsys, tmp_path):
    status, out, err = run(capsys, "photos/2.png", "missing.png", "--json", tmp_path / "r.json")
    assert (status, out) == (2, "")
    assert "missing.png: there is no such file" in err
    assert json.loads((tmp_path / "r.json").read_text()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0", "--top", "0"], "--top is 0; it must be 1 or more; --batch-size is 0"),
        (["--min-size", "8"], "--min-size is 8; it must be 32 or more."),
        (["--min-size", "80", "--max-size", "64"], "--max-size is 64, less than --min-size, 80."),
        (["--score", "2"], "--score is 2.0; it must be between 0 and 1."),
        (
            ["--class-score", "bee=2,ant=x"],
            "gives 'bee' the score 2; it must be between 0 and 1; --class-score gives 'ant'",
        ),
        (["--class-score", "bee"], "--class-score ends in 'bee'; it must be CLASS=SCORE"),
        (["--class-score", "bees=0.5"], "Unknown class 'bees'. Did you mean 'bee'?"),
        (["--device", "gpu"], "The device is 'gpu'"),
        (["--json", "r.txt"], "--json is r.txt; its name must end in .json."),
        (["--csv", "."], "--csv is .; its name must end in .csv"),
        (["--coco", "l.json"], "--coco is for --json only"),
        (["--coco", "l.json", "--json", "l.json"], "--json is l.json, which is the file of --coco"),
        (["--coco", "l.json", "--json", "r.json"], "l.json: there is no such file"),
        (["--overwrite"], "--overwrite is for --out only"),
        (["--out", "photos/0.png"], "--out is photos/0.png, which is a file; name a folder."),
        (["--model", "c.safetensors"], "c.safetensors is a classifier or a backbone, not a detector"),
        (["--model", "missing.safetensors"], "missing.safetensors"),
        (["--model", "maskrcnn_xcit_smal_12_p16"], "Unknown model 'maskrcnn_xcit_smal_12_p16'. Did you mean"),
        (["*.nothing"], "The pattern '*.nothing' matches nothing"),
        (["empty"], "The folder 'empty' holds no image"),
    ],
)
def test_mistakes_cost_one_line_and_status_2(capsys, place, arguments, message):
    (place / "empty").mkdir(exist_ok=True)
    if not (place / "c.safetensors").exists():
        save_checkpoint(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3), place / "c.safetensors")
    status, out, err = run(capsys, "photos/0.png", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(place.glob(".*partial*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1, "file_name": "7.png", "height": 8, "width": 8}]}, "4 of 4 images are not listed in"),
        ({"categories": [{"id": 1, "name": "gnu"}]}, "None of the model's classes (ant, bee, cat, wild) is a category"),
        ({"categories": [{"id": 1, "name": ""}]}, "category 1 of 1 has the name ''"),
        ({"images": []}, "its list of images is empty"),
        ({"images": "none", "annotations": []}, "has no images"),
    ],
)
def test_listings_that_do_not_fit(capsys, tmp_path, changes, message):
    coco = listing(tmp_path, **{"annotations": [], **changes})
    images = [f"photos/{i}.png" for i in (0, 1, 3, 4)]
    status, out, err = run(capsys, *images, "--json", tmp_path / "r.json", "--coco", coco)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "r.json").exists()


def test_an_image_of_a_listing_twice(capsys, tmp_path, place):
    (tmp_path / "0.png").write_bytes((place / "photos" / "0.png").read_bytes())
    coco = listing(tmp_path)
    status, _, err = run(capsys, "photos/0.png", tmp_path / "0.png", "--json", tmp_path / "r.json", "--coco", coco)
    assert status == 2
    assert "its image 100 is given more than once: photos/0.png, " in err


def stopping(monkeypatch, error, after=2):
    """Let an image bring an error."""
    stream = Detector.stream

    def stopped(self, images, **options):
        for number, found in enumerate(stream(self, images, **options)):
            if number == after:
                raise error
            yield found

    monkeypatch.setattr(Detector, "stream", stopped)


@pytest.mark.parametrize(("error", "ends"), [(KeyboardInterrupt(), 130), (ConfigError("Out of memory."), 2)])
def test_what_was_done_is_kept(capsys, tmp_path, monkeypatch, error, ends):
    stopping(monkeypatch, error)
    files = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--out", tmp_path / "o", "--format", "json")
    status, out, err = run(capsys, "photos", *files)
    assert status == ends
    assert "2 of 5 images were done and are kept." in err
    assert ("interrupted" in err) == (ends == 130)
    assert [each["file"] for each in json.loads(out)] == ["photos/0.png", "photos/1.png"]
    assert {result["image_id"] for result in json.loads((tmp_path / "r.json").read_text())} == {1, 2}
    assert len(json.loads((tmp_path / "r.images.json").read_text())["images"]) == 2
    assert len({row["file"] for row in csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text()))}) == 2
    assert len(list((tmp_path / "o").iterdir())) == 2


def test_nothing_done_leaves_former_files(capsys, tmp_path, monkeypatch):
    stopping(monkeypatch, KeyboardInterrupt(), after=0)
    (tmp_path / "r.json").write_text("former")
    assert run(capsys, "photos", "--json", tmp_path / "r.json")[0] == 130
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.json", "former")]


def test_a_large_photo_brings_no_warning(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")  # more than the limit, less than twice as much
    assert run(capsys, tmp_path)[0] == 0


def test_masks_want_their_package(capsys, monkeypatch):
    monkeypatch.setattr("xcit.cli.detect.find_spec", lambda name: None)
    status, _, err = run(capsys, "photos/0.png", "--json", "r.json")
    assert status == 2
    assert 'pip install "xcit[detection]"' in err


def test_importing_the_verb_is_light():
    code = "import sys, xcit.cli.detect; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
