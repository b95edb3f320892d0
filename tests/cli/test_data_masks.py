"""`xcit data check-masks`: what people and programs read, and the exit status."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tyro
from PIL import Image

from xcit.cli.data import data
from xcit.errors import DataError


def run(*arguments):
    return tyro.cli(data, prog="xcit data", args=["check-masks", *map(str, arguments)])


@pytest.fixture
def clean(tmp_path):
    root = tmp_path / "street"
    for part, num in (("train", 3), ("val", 2)):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        for i in range(num):
            Image.new("RGB", (4, 2)).save(root / part / "images" / f"{i}.jpg")
            mask = np.array([[0, 0, 0, 1], [0, 0, 255, 1]], dtype=np.uint8)
            Image.fromarray(mask).save(root / part / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("road\ncar\n")
    return root


def test_a_clean_set(clean, capsys):
    assert run(clean) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == [str(clean)]
    assert lines[1:4] == [
        ["part", "images", "usable", "classes", "ignored"],
        ["train", "3", "3", "2", "of", "2", "12.50%"],
        ["val", "2", "2", "2", "of", "2", "12.50%"],
    ]
    assert ["class", "train", "images", "val", "images"] in lines
    assert ["road", "71.43%", "3", "71.43%", "2"] in lines
    assert ["car", "28.57%", "3", "28.57%", "2"] in lines
    assert lines[-1] == ["Nothing", "is", "wrong."]
    assert captured.err == ""


def test_faults(clean, capsys):
    (clean / "train" / "masks" / "0.png").unlink()
    (clean / "train" / "masks" / "2.png").write_bytes(b"")
    for i in range(30):
        Image.new("L", (4, 2)).save(clean / "val" / "masks" / f"x{i}.png")
    assert run(clean) == 1
    out = capsys.readouterr().out
    assert "Images without a mask (1)\n  train/images/0.jpg: there is no mask of that name.\n" in out
    assert f"Masks that cannot be read (1)\n  The mask {clean}/train/masks/2.png: is empty (0 bytes).\n" in out
    assert "Masks without an image (30)\n" in out
    assert "  and 10 more; --format json lists them all\n" in out
    assert out.endswith("Found: 32 faults.\n")
    assert run(clean, "--format", "json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["clean"] is False
    assert report["counts"] == {"mask-missing": 1, "image-missing": 30, "mask-unreadable": 1}
    assert len(report["findings"]) == 32
    assert report["findings"][0] == {
        "kind": "mask-missing", "part": "train", "text": "train/images/0.jpg: there is no mask of that name.",
    }  # fmt: skip
    assert report["parts"][0]["num_usable"] == 1


def test_many_classes(clean, capsys):
    (clean / "classes.txt").write_text("".join(f"class {i}\n" for i in range(200)))
    assert run(clean) == 1
    out = capsys.readouterr().out
    assert "of each class (the first 60 of 200)\n" in out
    assert "Classes without a pixel (198)\n" in out


def test_what_cannot_be_opened(clean, capsys):
    with pytest.raises(DataError, match="there is no such folder"):
        run(clean / "x")
    (clean / "classes.txt").unlink()
    command = [sys.executable, "-m", "xcit.cli.main", "data", "check-masks", str(clean)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no classes.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupted(clean, monkeypatch):
    from xcit.data import mask_set

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(mask_set, "open_image", interrupt)
    with pytest.raises(KeyboardInterrupt):  # which the command line turns into 130
        run(clean)


def test_it_needs_no_torch(clean):
    code = (
        "import sys, xcit.cli.data_masks; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules]);"
        "import xcit.data.mask_check as c; c.check_masks(sys.argv[1]);"
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, clean], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("DIR", "--format", "classes.txt"))
