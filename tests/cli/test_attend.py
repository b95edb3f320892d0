"""`xcit attend` on real files: what is written, what it is called, how it ends."""

import json
import re
import signal
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.data.preprocess import Preprocessing
from xcit.data.video import VideoReader, write_video
from xcit.inference.attention_maps import class_attention, mass_mask
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

CFG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}


def save_model(path, **options):
    torch.manual_seed(0)
    model = XCiT(**{"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 4, "patch_size": 8} | options)
    save_checkpoint(model, path, class_names=list("abcd")[: model.num_classes], preprocessing=CFG)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, photos (b.png is no image) and a clip."""
    folder = tmp_path_factory.mktemp("attend")
    save_model(folder / "m.safetensors")
    rng = np.random.default_rng(0)
    for name in ("photos/a.png", "photos/b.png", "photos/sub/a.png", "one/x.png", "two/x.png", "two/x.bmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (43, 70, 3), dtype=np.uint8)).save(folder / name)
    (folder / "photos/b.png").write_bytes(b"nothing of the kind")
    with write_video(folder / "clip.mp4", Fraction(1, 600)) as writer:
        for i, pts in enumerate((0, 20, 50, 60, 130)):
            writer.write(np.roll(rng.integers(0, 256, (34, 46, 3), dtype=np.uint8), i, axis=1), pts)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments, model="m.safetensors"):
    status = main(["attend", *map(str, arguments), "--model", model, "--device", "cpu"])
    return status, capsys.readouterr().err.splitlines()


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_all_kinds_of_one_image(capsys, tmp_path):
    kinds = "overlay,mask,heads,raw,xca,pca"
    assert run(capsys, "one/x.png", "--out", tmp_path / "new", "--kind", kinds) == (0, [])
    assert names(tmp_path / "new") == sorted(
        f"x_{end}"
        for end in (
            "overlay.png",
            "mask.png",
            "heads.png",
            "attention.npy",
            "attention.json",
            "xca.png",
            "xca.npy",
            "pca.png",
        )
    )
    # the whole image at its own size, rounded to patches: 43 x 70 is seen at 40 x 72
    attention = np.load(tmp_path / "new/x_attention.npy")
    assert attention.shape == (4, 5, 9)
    np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, rtol=1e-6)
    model = create_model("m.safetensors", pretrained=True).eval()
    with Image.open("one/x.png") as image:
        seen = Preprocessing((40, 72), mean=(0.5,) * 3, std=(0.5,) * 3)(
            image.resize((72, 40), Image.Resampling.BICUBIC)
        )
    expected = class_attention(model, seen[None])
    np.testing.assert_allclose(attention, expected.patches[0], rtol=1e-5)
    facts = json.loads((tmp_path / "new/x_attention.json").read_text())
    assert (facts["image"], facts["layer"], facts["seen"]) == ("one/x.png", 2, [40, 72])
    assert facts["class_token_keeps"] == pytest.approx(expected.own[0].tolist())
    with torch.no_grad():
        matrices = model.channel_attention(seen[None])
    np.testing.assert_allclose(np.load(tmp_path / "new/x_xca.npy"), torch.stack(matrices)[:, 0], rtol=1e-5)
    for kind in ("overlay", "mask", "pca"):
        with Image.open(tmp_path / f"new/x_{kind}.png") as picture:
            assert picture.size == (70, 43)
    with Image.open(tmp_path / "new/x_mask.png") as picture:
        mask = np.asarray(picture)
    grid = mass_mask(expected.mean[0], 0.6)
    assert (np.asarray(Image.fromarray(grid.astype(np.uint8) * 255).resize((70, 43), 0)) == mask).all()


def test_inputs_of_one_name_keep_apart(capsys, tmp_path):
    status, err = run(capsys, "one", "two", "--out", tmp_path)
    assert (status, err) == (0, [])
    assert names(tmp_path) == ["one/x_overlay.png", "two/x.bmp_overlay.png", "two/x.png_overlay.png"]


def test_a_broken_image_costs_a_line(capsys, tmp_path):
    status, err = run(capsys, "photos", "--out", tmp_path)
    assert status == 1
    assert len(err) == 2
    assert err[0].startswith("xcit: photos/b.png: is not an image")
    assert err[1] == "xcit: 1 of 3 could not be looked at."
    assert names(tmp_path) == ["a_overlay.png", "sub/a_overlay.png"]


def test_if_all_are_broken_the_status_is_two(capsys, tmp_path):
    assert run(capsys, "photos/b.png", "none.png", "--out", tmp_path)[0] == 2
    assert names(tmp_path) == []


def test_results_that_are_there_are_replaced_only_if_asked(capsys, tmp_path):
    (tmp_path / "x_overlay.png").write_bytes(b"mine")
    status, err = run(capsys, "one/x.png", "--out", tmp_path)
    assert status == 2
    assert "is there already" in err[0]
    assert (tmp_path / "x_overlay.png").read_bytes() == b"mine"
    assert run(capsys, "one/x.png", "--out", tmp_path, "--overwrite")[0] == 0
    assert (tmp_path / "x_overlay.png").read_bytes() != b"mine"


@pytest.mark.parametrize("head", ["mean", "1", "all"])
def test_results_that_are_there_are_found_before_the_model_is_loaded(capsys, tmp_path, monkeypatch, head):
    monkeypatch.setattr("xcit.inference.attention_viewer.create_model", lambda *_, **__: pytest.fail("loaded"))
    end = {"mean": "", "1": "_head1", "all": "_head0"}[head]
    (tmp_path / f"x_overlay{end}.png").write_bytes(b"mine")
    status, err = run(capsys, "one/x.png", "--out", tmp_path, "--head", head)
    assert status == 2
    assert f"x_overlay{end}.png is there already" in err[0]


def test_of_all_heads_the_last_is_looked_for_too(capsys, tmp_path):
    (tmp_path / "x_mask_head3.png").write_bytes(b"mine")
    status, err = run(capsys, "one/x.png", "--out", tmp_path, "--head", "all", "--kind", "mask")
    assert status == 2
    assert "x_mask_head3.png is there already" in err[0]


@pytest.mark.parametrize(
    ("inputs", "out", "folder"),
    [
        (["photos"], "photos", "photos"),
        (["one", "photos"], "photos/sub/looks", "photos"),
        (["./photos/../photos"], "photos/looks", "photos/../photos"),
        (["phot*"], "photos/looks", "photos"),
        (["."], "looks", "."),
    ],
)
def test_results_do_not_go_where_they_would_be_inputs(capsys, place, inputs, out, folder):
    before = names(place)
    status, err = run(capsys, *inputs, "--out", out)
    assert status == 2
    assert len(err) == 1
    assert err[0].startswith(f"xcit: --out is {out}, where the results would be inputs the next time")
    assert f"all of {folder} is looked at" in err[0]
    assert names(place) == before


def test_results_may_go_beside_a_named_file_and_beside_a_folder(capsys, tmp_path):
    for name in ("in/x.png", "in2/x.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    assert run(capsys, tmp_path / "in/x.png", "--out", tmp_path / "in") == (0, [])
    assert run(capsys, tmp_path / "in", "--out", tmp_path / "in2") == (0, [])


def test_a_folder_without_anything_to_look_at(capsys, tmp_path):
    (tmp_path / "notes.txt").touch()
    status, err = run(capsys, tmp_path, "--out", tmp_path.parent / "nowhere")
    assert status == 2
    assert len(err) == 1
    assert "neither image nor video" in err[0]
    assert ".png" in err[0]
    assert ".mp4" in err[0]


@pytest.mark.parametrize("basis", ["each", "common"])
def test_a_basis_is_for_images(capsys, tmp_path, basis):
    status, err = run(capsys, "clip.mp4", "--out", tmp_path, "--kind", "pca", "--basis", basis)
    assert status == 2
    assert "--basis is for images" in err[0]
    assert run(capsys, "clip.mp4", "one/x.png", "--out", tmp_path, "--kind", "pca", "--basis", basis) == (0, [])


def test_an_input_is_never_replaced(capsys, tmp_path):
    for name in ("x.png", "x_mask.png"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    before = (tmp_path / "x_mask.png").read_bytes()
    inputs = [tmp_path / "x.png", tmp_path / "x_mask.png"]
    status, err = run(capsys, *inputs, "--out", tmp_path, "--kind", "mask", "--overwrite")
    assert status == 2
    assert "is an input" in err[0]
    assert (tmp_path / "x_mask.png").read_bytes() == before


def test_heads_and_layers_and_sizes(capsys, tmp_path):
    options = ["--head", "all", "--layer", "1", "--size", "64x48", "--kind", "overlay,raw"]
    assert run(capsys, "one/x.png", "--out", tmp_path, *options) == (0, [])
    assert names(tmp_path) == ["x_attention.json", "x_attention.npy", *(f"x_overlay_head{i}.png" for i in range(4))]
    assert np.load(tmp_path / "x_attention.npy").shape == (4, 8, 6)
    assert json.loads((tmp_path / "x_attention.json").read_text())["layer"] == 1
    assert run(capsys, "one/x.png", "--out", tmp_path, "--head", "2", "--kind", "mask", "--size", "24") == (0, [])
    assert "x_mask_head2.png" in names(tmp_path)


def test_side_by_side_is_twice_as_wide(capsys, tmp_path):
    assert run(capsys, "one/x.png", "--out", tmp_path, "--side-by-side")[0] == 0
    with Image.open(tmp_path / "x_overlay.png") as picture, Image.open("one/x.png") as image:
        assert picture.size == (140, 43)
        assert (np.asarray(picture)[:, :70] == np.asarray(image)).all()


def test_a_common_basis_gives_one_picture_the_same_colours_twice(capsys, tmp_path):
    def colours(folder, *options):
        assert run(capsys, *options, "--out", folder, "--kind", "pca")[0] == 0
        with Image.open(next(folder.rglob("x.png_pca.png"), folder / "x_pca.png")) as picture:
            return np.asarray(picture)

    alone = colours(tmp_path / "1", "two/x.png")
    each = colours(tmp_path / "2", "two", "one", "--basis", "each")
    common = colours(tmp_path / "3", "two", "one")
    assert (alone == each).all()
    assert (alone != common).any()


def test_a_video_in_is_a_video_out(capsys, tmp_path):
    kinds = "overlay,mask,pca,raw,heads,xca"
    assert run(capsys, "clip.mp4", "--out", tmp_path, "--kind", kinds) == (0, [])
    assert names(tmp_path) == sorted(
        [f"clip_{kind}.mp4" for kind in ("overlay", "mask", "pca", "heads")]
        + ["clip_attention.npy", "clip_attention.json", "clip_xca.png", "clip_xca.npy"]
    )
    for kind in ("overlay", "mask", "pca", "heads"):
        with VideoReader(tmp_path / f"clip_{kind}.mp4") as video:
            frames = list(video)
            assert [frame.pts * video.time_base for frame in frames] == [Fraction(t, 600) for t in (0, 20, 50, 60, 130)]
            assert video.problem is None
            if kind != "heads":
                assert frames[0].image.shape == (34, 46, 3)
    attention = np.load(tmp_path / "clip_attention.npy")
    assert attention.shape == (5, 4, 4, 6)
    np.testing.assert_allclose(attention.sum(axis=(2, 3)), 1, rtol=1e-6)
    facts = json.loads((tmp_path / "clip_attention.json").read_text())
    assert facts["seconds"] == pytest.approx([0, 20 / 600, 50 / 600, 0.1, 130 / 600])
    assert len(facts["class_token_keeps"]) == 5


def test_a_truncated_video_gives_what_it_holds(capsys, tmp_path):
    import av

    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "cut.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(30):
            image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    data = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    status, err = run(capsys, tmp_path / "cut.mp4", "--out", tmp_path / "o")
    assert status == 1
    assert len(err) == 1
    assert "is cut off or damaged" in err[0]
    with VideoReader(tmp_path / "o/cut_overlay.mp4") as video:
        assert 3 < len(list(video)) < 30


def test_of_a_truncated_video_whose_index_is_at_its_end_comes_nothing(capsys, tmp_path, place):
    data = (place / "clip.mp4").read_bytes()
    assert data.index(b"mdat") < data.index(b"moov")
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 8])
    status, err = run(capsys, tmp_path / "cut.mp4", "--out", tmp_path / "o")
    assert status == 2
    assert "cut.mp4" in err[0]
    assert not (tmp_path / "o").exists()


def test_what_is_no_video_is_refused(capsys, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/empty.mp4").write_bytes(b"")
    (tmp_path / "in/text.mp4").write_text("no video")
    status, err = run(capsys, tmp_path / "in", "--out", tmp_path / "o")
    assert status == 2
    assert "empty.mp4: is empty" in err[0]
    assert "text.mp4: is not a video" in err[1]
    assert not (tmp_path / "o").exists() or names(tmp_path / "o") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "overlays"], "Did you mean 'overlay'"),
        (["--kind", ","], "--kind is empty"),
        (["--layer", "3"], "--layer is 3; the model's class-attention layers are 1 to 2"),
        (["--layer", "0"], "counted from 1"),
        (["--head", "4"], "--head is 4; the model's heads are 0 to 3"),
        (["--head", "first"], "mean, all or a head's number"),
        (["--keep", "0", "--kind", "mask"], "--keep is 0"),
        (["--keep", "0.5"], "--keep is for mask only"),
        (["--opacity", "2"], "--opacity is 2"),
        (["--opacity", "0.5", "--kind", "raw"], "--opacity is for"),
        (["--size", "big"], "--size is 'big'"),
        (["--size", "4"], "--size is 4; it must be at least one patch"),
        (["--size", "32x4"], "--size is 32x4; it must be at least one patch"),
        (["--foreground"], "--foreground is for pca only"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, options, message):
    status, err = run(capsys, "one/x.png", "--out", tmp_path, *options)
    assert status == 2
    assert len(err) == 1
    assert message in err[0]
    assert names(tmp_path) == []


def test_a_model_without_class_attention(capsys, tmp_path):
    save_model(tmp_path / "avg.safetensors", variant="avg_pool")
    out = tmp_path / "o"
    status, err = run(capsys, "one/x.png", "--out", out, model=str(tmp_path / "avg.safetensors"))
    assert status == 2
    assert "no class attention" in err[0]
    options = ["--kind", "pca,xca"]
    assert run(capsys, "one/x.png", "--out", out, *options, model=str(tmp_path / "avg.safetensors")) == (0, [])


@pytest.fixture
def _heard():
    """Ctrl-C reaches the test in background jobs too, which begin deaf to it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("_heard")
def test_ctrl_c_keeps_the_frames_that_are_done(capsys, tmp_path, monkeypatch):
    @contextmanager
    def interrupting(total, name):
        yield lambda done: signal.raise_signal(signal.SIGINT) if done == 3 else None

    monkeypatch.setattr("xcit.cli.attend._progress", interrupting)
    status, err = run(capsys, "clip.mp4", "--out", tmp_path, "--kind", "overlay,raw")
    assert status == 130
    assert err == [
        "xcit: clip.mp4: the results hold its first 3 of 5 frames.",
        "xcit: interrupted; 0 of 1 were done and are kept.",
    ]
    assert names(tmp_path) == ["clip_attention.json", "clip_attention.npy", "clip_overlay.mp4"]
    assert np.load(tmp_path / "clip_attention.npy").shape == (3, 4, 4, 6)
    with VideoReader(tmp_path / "clip_overlay.mp4") as video:
        assert len(list(video)) == 3
        assert video.problem is None


@pytest.mark.usefixtures("_heard")
def test_ctrl_c_keeps_the_images_that_are_done(capsys, tmp_path, monkeypatch):
    @contextmanager
    def interrupting(total, name):
        yield lambda done: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("xcit.cli.attend._progress", interrupting)
    assert run(capsys, "one/x.png", "two", "--out", tmp_path) == (
        130,
        ["xcit: interrupted; 1 of 3 were done and are kept."],
    )
    assert names(tmp_path) == ["one/x_overlay.png"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _little(monkeypatch):
    """There are 8 MiB of memory."""
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: 8 * 2**20)


@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize("kind", ["overlay", "raw", "pca", "xca", "overlay,mask,heads,raw,xca,pca"])
@pytest.mark.parametrize("size", ["20000", "20000x9000"])
def test_what_does_not_fit_is_refused_with_the_size_that_does(capsys, tmp_path, kind, size):
    status, err = run(capsys, "one/x.png", "--out", tmp_path, "--kind", kind, "--size", size)
    assert status == 2
    assert names(tmp_path) == []
    said = re.fullmatch(
        r"xcit: one/x\.png: would take about [\d.,]+ GiB of memory on cpu, where 8 MiB are free, to be looked at with "
        r"20000 x (\d+) px; the largest size that fits is about --size (\d+)(x\d+)?\.",
        err[0],
    )
    assert said, err
    assert bool(said[3]) == ("x" in size)
    fits = f"{said[2]}{said[3] or ''}"
    assert run(capsys, "one/x.png", "--out", tmp_path, "--kind", kind, "--size", fits) == (0, [])
    more = "x".join(str(int(1.1 * int(side)) + 16) for side in fits.split("x"))
    status, err = run(capsys, "one/x.png", "--out", tmp_path / "2", "--kind", kind, "--size", more)
    assert status == 2
    assert "the largest size that fits is about --size" in err[0]


@pytest.mark.parametrize(("kind", "available"), [("raw", 40), ("overlay", 400)])
def test_a_large_image_does_not_fit_at_its_own_size(capsys, tmp_path, monkeypatch, kind, available):
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: available * 2**20)
    Image.new("RGB", (3000, 2000)).save(tmp_path / "large.png")
    options = ["--kind", kind, "--size", "original"]
    status, err = run(capsys, tmp_path / "large.png", "one/x.png", "--out", tmp_path / "o", *options)
    assert status == 1  # the small one is done
    assert "large.png: would take about" in err[0]
    said = re.search(r"looked at with 2000 x 3000 px; the largest size that fits is about --size (\d+)\.", err[0])
    assert said, err[0]
    assert 100 < int(said[1]) < 2000
    assert len(names(tmp_path / "o")) == (2 if kind == "raw" else 1)


def test_nothing_fits(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: 100)
    status, err = run(capsys, "one/x.png", "--out", tmp_path, "--size", "500")
    assert status == 2
    assert "not even the smallest size fits" in err[0]
