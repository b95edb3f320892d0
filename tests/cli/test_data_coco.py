"""`xcit data check-coco`: what people and programs read, the mended copy, and the exit status."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tyro
from PIL import Image

from xcit.cli.data_coco import check_coco
from xcit.data.coco import open_coco
from xcit.errors import ConfigError, DataError, ExportError


def run(*arguments):
    return tyro.cli(check_coco, prog="xcit data check-coco", args=list(map(str, arguments)))


def write(root, annotations, num_images=2):
    (root / "images").mkdir(exist_ok=True)
    for i in range(1, num_images + 1):
        pixels = np.full((20, 30, 3), i, dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    file = root / "set.json"
    file.write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in (1, 2)],
                "categories": [{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}],
                "annotations": annotations,
            }
        )
    )
    return file


def annotation(number, category=1, box=(2, 3, 10, 10), **others):
    return {"id": number, "image_id": 1, "category_id": category, "bbox": list(box), "area": box[2] * box[3], **others}


@pytest.fixture
def clean(tmp_path):
    return write(tmp_path, [annotation(1), annotation(2, 4)])


@pytest.fixture
def broken(tmp_path):
    return write(tmp_path, [annotation(1), annotation(1, 4, (25, 3, 10, 10)), annotation(3, 9)], num_images=1)


def test_a_clean_set(clean, capsys):
    assert run(clean) == 0
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    assert out[0] == str(clean)
    assert out[1].split() == ["images", "annotations", "categories", "images", "in"]
    assert out[2].split() == ["2", "2", "2", str(clean.parent / "images")]
    assert "dog               1" in out
    assert "Good to know (1)\n  1 image without annotations: '2.png'.\n" in captured.out
    assert out[-1] == "Nothing is wrong."
    assert captured.err == ""


def test_faults_are_named(broken, capsys):
    before = broken.read_bytes()
    assert run(broken) == 1
    out = capsys.readouterr().out
    assert f"Images that are not there, fixable (1)\n  {broken.parent}/images/2.png: there is no such file.\n" in out
    assert "Annotations without an id of their own, fixable (1)\n  Annotation 2 has the id 1 of another.\n" in out
    assert "Annotations of categories that are not listed, fixable (1)\n  Annotation 3 is of category 9," in out
    assert "Boxes that reach out of their image, fixable (1)\n" in out
    assert out.endswith("Found: 5 faults, 5 fixable (--fix OUT.json).\n")  # a clipped box has another area
    assert broken.read_bytes() == before


def test_the_mended_copy(broken, capsys):
    before = broken.read_bytes()
    out = broken.parent / "a" / "b" / "fixed.json"
    assert run(broken, "--fix", out) == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("Found: 5 faults, 5 fixable.\n")
    assert captured.err == f"xcit: {out} is written.\n"
    assert broken.read_bytes() == before
    with pytest.raises(DataError, match="name the folder"):
        run(out)
    capsys.readouterr()
    assert run(out, "--images", broken.parent / "images") == 0
    assert capsys.readouterr().out.endswith("Nothing is wrong.\n")
    coco = open_coco(out, broken.parent / "images")
    assert coco.instances(0).boxes.tolist() == [[2, 3, 12, 13], [25, 3, 30, 13]]
    assert coco.instances(0).areas.tolist() == [100, 50]
    again = out.read_bytes()
    assert run(broken, "--fix", out) == 1  # the same once more
    assert out.read_bytes() == again


def test_what_nothing_mends(tmp_path, capsys):
    file = write(tmp_path, [annotation(1), annotation(2, area=7)])
    assert run(file, "--fix", tmp_path / "fixed.json") == 1
    out = capsys.readouterr().out
    assert "Categories without instances (1)\n  The category 'dog' (id 4) has no instance.\n" in out
    assert out.endswith("Found: 2 faults, 1 fixable.\n")
    assert run(tmp_path / "fixed.json") == 1
    assert capsys.readouterr().out.endswith("Found: 1 fault, 0 fixable.\n")


def test_json(broken, clean, capsys):
    clean.rename(clean.parent / "clean.json")
    broken = write(clean.parent, [annotation(i, 9) for i in range(1, 31)])
    assert run(broken, "--format", "json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["clean"] is False
    assert len(report["findings"]) == 32
    assert report["num_fixable"] == 30
    assert report["findings"][0] == {
        "kind": "category-empty", "fixable": False, "text": "The category 'cat' (id 1) has no instance.",
    }  # fmt: skip
    assert run(clean.parent / "clean.json", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["clean"] is True
    assert run(broken) == 1
    out = capsys.readouterr().out
    assert "that are not listed, fixable (30)\n" in out
    assert "  and 10 more; --format json lists them all\n" in out


def test_without_decoding(clean, capsys):
    (clean.parent / "images" / "1.png").write_bytes(b"?")
    assert run(clean) == 1
    assert "Images that cannot be read, fixable (1)" in capsys.readouterr().out
    assert run(clean, "--no-decode") == 0


def test_names_that_no_terminal_can_show(tmp_path, capsys):
    file = write(tmp_path, [annotation(1), annotation(2, 4)])
    file.write_text(file.read_text().replace('"dog"', r'"d\udcffg"'))
    assert run(file) == 0
    assert r"d\udcffg" in capsys.readouterr().out


def test_what_cannot_be_done(clean, tmp_path, capsys):
    before = clean.read_bytes()
    for same in (clean, clean.parent / "images" / ".." / "set.json"):
        with pytest.raises(ConfigError, match="which is the file that is checked; name another"):
            run(clean, "--fix", same)
    with pytest.raises(ConfigError, match=r"its name must end in \.json"):
        run(clean, "--fix", tmp_path / "out.txt")
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ConfigError, match="which is a folder; name a file in it"):
        run(clean, "--fix", tmp_path / "x.json")
    with pytest.raises(ConfigError, match="is not a folder"):
        run(clean, "--fix", clean / "out.json")
    with pytest.raises(DataError, match=r"there is no such file; did you mean 'set\.json'"):
        run(tmp_path / "sets.json", "--fix", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    assert clean.read_bytes() == before
    with pytest.raises(SystemExit):
        run()
    capsys.readouterr()


def test_a_full_disk_leaves_nothing(clean, tmp_path, monkeypatch):
    import os

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="make room"):
        run(clean, "--fix", tmp_path / "out.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "set.json"]


def test_interrupted(clean, tmp_path, monkeypatch):
    from xcit.data import coco_check

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(coco_check, "open_image", interrupt)
    with pytest.raises(KeyboardInterrupt):  # which the command line turns into 130
        run(clean, "--fix", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("FILE", "--images", "--fix", "--no-decode", "--format"))
    assert "--no-no-" not in shown


def test_the_verbs_file_imports_nothing_heavy():
    code = "import sys, xcit.cli.data_coco; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_check_needs_no_torch(clean):
    code = (
        "import sys, xcit.data.coco_check as c; c.check_coco(sys.argv[1]);"
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, clean], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
