"""`xcit eval` with segmenters on real files: what is printed and written, what is refused, how it ends."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli import eval_segmentation
from xcit.cli.eval_segmentation import is_segmenter, open_part
from xcit.cli.main import main
from xcit.errors import DataError
from xcit.evaluate import segmenter_run
from xcit.evaluate.segmenter_run import evaluate_segmenter
from xcit.inference.room import Lack, Room
from xcit.inference.segmenter import Segmenter
from xcit.models.mmseg_files import to_mmseg
from xcit.models.segmenters import create_segmenter, save_segmenter
from xcit.models.storage import write_safetensors
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild"]


def write_part(root, part, count):
    rng = np.random.default_rng(count)
    for folder in ("images", "masks"):
        (root / part / folder).mkdir(parents=True)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        noise.resize((60, 40)).save(root / part / "images" / f"{i}.png")
        mask = rng.choice([0, 1, 255], (40, 60)).astype(np.uint8)  # no pixel of the third class
        Image.fromarray(mask).save(root / part / "masks" / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a segmenter, as several files, and data of 1, 3 and 2 images to train on, validate and test."""
    folder = tmp_path_factory.mktemp("eval_segmentation")
    torch.manual_seed(0)
    options = {"depth": 4, "channels": 16, "image_size": 64, "max_size": 128}
    model = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=3, **options)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    save_segmenter(model, folder / "s.safetensors", class_names=NAMES)
    model.pretrained_cfg |= {"class_names": NAMES}
    torch.save(to_mmseg(model.state_dict(), model.pretrained_cfg), folder / "s.pth")
    write_safetensors(folder / "bare.safetensors", model.state_dict(), {})
    save_checkpoint(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3), folder / "c.safetensors")
    torch.save(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3).state_dict(), folder / "c.pth")
    (folder / "data").mkdir()
    (folder / "data" / "classes.txt").write_text("\n".join(NAMES))
    for part, count in (("train", 1), ("val", 3), ("test", 2)):
        write_part(folder / "data", part, count)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def xcit_eval(capsys, *arguments, model="s.safetensors", data="data"):
    status = main(["eval", "--model", model, "--data", str(data), "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected(part, data="data", **options):
    """What the Python API says."""
    return evaluate_segmenter(Segmenter("s.safetensors", device="cpu", **options), open_part(str(data), part)[0])


# --- figures ----------------------------------------------------------------------------------------------------------


def test_json(capsys, tmp_path):
    status, out, err = xcit_eval(capsys, "--format", "json", "--output", tmp_path / "o.json")
    assert status == 0
    record = json.loads(out)
    assert json.loads((tmp_path / "o.json").read_text()) == record
    want = expected("test")
    for key, value in want.figures.to_dict(NAMES).items():
        assert record[key] == value
    assert record["num_pixels"] == sum(int((open_part("data", "test")[0].open_mask(i) >= 0).sum()) for i in range(2))
    assert record["classes"][2]["acc"] is None
    assert (record["num_images"], record["num_skipped"], record["skipped"]) == (2, 0, [])
    assert (record["model"], record["data"], record["split"], record["part"]) == ("s.safetensors", "data", None, "test")
    assert record["protocol"] == {"mode": "whole", "image_size": 64, "max_size": 128, "scales": [1.0], "flip": False}
    assert "test is taken" in err


def test_table(capsys):
    status, out, _ = xcit_eval(capsys, "--split", "val", "--per-class", "2")
    assert status == 0
    want = expected("val").figures
    facts = dict(line.strip().split("  ", 1) for line in out.splitlines() if line.startswith("  "))
    facts = {name: text.strip() for name, text in facts.items()}
    assert facts["images"] == "3 of val"
    assert facts["mIoU"] == f"{100 * want.miou:.2f} %"
    assert facts["mAcc"] == f"{100 * want.macc:.2f} %"
    assert facts["aAcc"] == f"{100 * want.aacc:.2f} %"
    assert facts["protocol"] == "shorter side 64 px, longer at most 128 px, looked at whole"
    rows = out[out.index("The worst classes") :].splitlines()[2:4]
    order = sorted(range(3), key=lambda k: (want.iou[k], k))[:2]
    assert [float(row.split()[0]) for row in rows] == pytest.approx([100 * float(want.iou[k]) for k in order], abs=0.01)
    assert all(row.endswith(f" {k}  {NAMES[k]}") for row, k in zip(rows, order, strict=True))
    assert "1 of 3 classes has no pixel in this set." in out


@pytest.mark.parametrize("arguments", [("--image-size", 32), ("--batch-size", 2, "--split", "validation")])
def test_options(capsys, arguments):
    status, out, _ = xcit_eval(capsys, "--format", "json", *arguments)
    assert status == 0
    side = 32 if arguments[0] == "--image-size" else None
    want = expected("test" if side else "val", image_size=side).figures
    assert json.loads(out)["miou"] == pytest.approx(want.miou)


@pytest.mark.parametrize("model", ["s.pth", "bare.safetensors"])
def test_files_that_do_not_describe_themselves(capsys, model):
    status, out, _ = xcit_eval(capsys, "--format", "json", "--image-size", "64", model=model)
    assert status == 0
    assert json.loads(out)["num_pixels"] == expected("test").figures.num_pixels


# --- who is one -------------------------------------------------------------------------------------------------------


def test_who_is_a_segmenter():
    for model in ("s.safetensors", "s.pth", "bare.safetensors", "upernet_xcit_small_12_p16", "sem_fpn_xcit_tiny_12_p8"):
        assert is_segmenter(model), model
    assert is_segmenter("https://example.org/ade/upernet_xcit_small_12_p16.pth")
    for model in ("c.safetensors", "c.pth", "xcit_small_12_p16", "maskrcnn_xcit_small_12_p16", "data", "nothing.pth"):
        assert not is_segmenter(model), model
    assert not is_segmenter("data/classes.txt")
    assert not is_segmenter("https://example.org/xcit_small_12_p16_224.pth")


def test_a_released_name_goes_to_the_segmenter(capsys, monkeypatch):
    def no_download(name, **_):
        raise DataError(f"{name} would be downloaded.")

    monkeypatch.setattr("xcit.inference.segmenter._load", no_download)
    status, _, err = xcit_eval(capsys, model="upernet_xcit_small_12_p16")
    assert status == 2
    assert "upernet_xcit_small_12_p16 would be downloaded." in err


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts(tmp_path):
    assert [len(open_part("data", word)[0]) for word in ("train", "valid", "testing", None)] == [1, 3, 2, 2]
    shutil.copytree("data", tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "test")
    assert open_part(str(tmp_path / "d"), None)[1] == "val"
    with pytest.raises(DataError, match="has train and val; it has no test part"):
        open_part(str(tmp_path / "d"), "test")
    shutil.rmtree(tmp_path / "d" / "val")
    with pytest.raises(DataError, match="neither test nor val; say which part: --split train"):
        open_part(str(tmp_path / "d"), None)
    for folder in ("images", "masks"):
        (tmp_path / "d" / "train" / folder).rename(tmp_path / "d" / folder)
    (tmp_path / "d" / "train").rmdir()
    images, part = open_part(str(tmp_path / "d"), None)
    assert (len(images), part) == (1, "all")
    with pytest.raises(DataError, match="is not divided; it has no val part"):
        open_part(str(tmp_path / "d"), "val")


def test_an_image_without_a_mask_is_said(capsys, tmp_path):
    for i in range(10):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(f"data/test/{folder}/0.png", tmp_path / folder / f"{i}.png")
    shutil.copy("data/classes.txt", tmp_path)
    (tmp_path / "masks" / "7.png").unlink()
    status, out, err = xcit_eval(capsys, "--format", "json", data=tmp_path)
    assert (status, json.loads(out)["num_images"], json.loads(out)["part"]) == (0, 9, "all")
    assert "1 of 10 images have no mask of that name" in err


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_broken_files(capsys, tmp_path):
    shutil.copytree("data", tmp_path / "d")
    (tmp_path / "d" / "val" / "images" / "1.png").write_bytes(b"nothing")
    status, out, err = xcit_eval(capsys, "--split", "val", data=tmp_path / "d")
    assert (status, out) == (2, "")
    assert "1 of 3 images cannot be used so far" in err
    status, out, err = xcit_eval(
        capsys, "--split", "val", "--max-bad-fraction", "0.5", "--format", "json", data=tmp_path / "d"
    )
    assert status == 0
    record = json.loads(out)
    assert (record["num_images"], record["num_skipped"]) == (2, 1)
    assert record["skipped"][0]["name"] == "val/images/1.png"
    assert record["miou"] == expected("val", tmp_path / "d").figures.miou
    assert f"xcit: {record['skipped'][0]['reason']}" in err
    assert "1 of 3 images are broken and were skipped." in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--layout", "folder"), ("--real", "real.json"), ("--sizes", "64,96"), ("--crop-pct", "0.9"),
        ("--precision", "bf16"), ("--num-workers", "0"),
    ],
)  # fmt: skip
def test_flags_for_classifiers(capsys, arguments):
    status, out, err = xcit_eval(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err == f"xcit: {arguments[0]} is for classifiers, and s.safetensors is a segmenter; leave it out.\n"


def test_several_flags_for_classifiers(capsys):
    status, _, err = xcit_eval(capsys, "--sizes", "64,96", "--plot", "p.png", "--crop-pct", "0.9")
    assert status == 2
    assert err.startswith("xcit: --sizes, --crop-pct, --plot are for classifiers")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--image-size", "16"), "image_size is 16; it must be 32 or more"),
        (("--split", "tset"), "Unknown part 'tset'"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_mistakes(capsys, arguments, sentence):
    status, out, err = xcit_eval(capsys, *arguments)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") <= 2


def test_no_data(capsys, tmp_path):
    assert xcit_eval(capsys, data="")[::2] == (
        2, "xcit: --data is missing; name a folder of images and masks, as xcit data check-masks takes it.\n"
    )  # fmt: skip
    assert xcit_eval(capsys, data=tmp_path / "nowhere")[0] == 2


def test_too_little_memory_names_a_way_out_that_there_is(capsys, monkeypatch):
    monkeypatch.setattr(Room, "lack", lambda *_: Lack(2**30, 2**20, torch.device("cpu")))
    status, out, err = xcit_eval(capsys)
    assert (status, out) == (2, "")
    assert "use mode='slide' with evaluate_segmenter in Python" in err
    assert "--mode" not in err


def test_interrupted(capsys, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(segmenter_run, "confusion", interrupt)
    status, out, err = xcit_eval(capsys, "--output", tmp_path / "o.json")
    assert (status, out) == (130, "")
    assert "interrupted after 0 of 2 images; there is no result." in err
    assert not (tmp_path / "o.json").exists()


def test_classifiers_go_their_own_way(capsys, monkeypatch):
    monkeypatch.setattr(eval_segmentation, "eval_segmenter", lambda *_, **__: pytest.fail("not a segmenter"))
    assert xcit_eval(capsys, model="c.safetensors")[0] == 2  # its classes are not those of the folders
