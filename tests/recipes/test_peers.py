"""Models of timm in files of ours: what is written is read back, and what is no such file is refused."""

import pytest
import timm
import torch

from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT
from xcit.recipes.peers import create_peer, is_peer, load_peer, save_peer

NAMES = ("Bär", "b", "c")
GREY = Preprocessing((32, 32), mean=(0.3,), std=(0.2,), in_chans=1, crop_pct=0.9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:resnet10t", {}),
        ("resnet10t", {"drop_rate": 0.1}),
        (
            "timm:vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False,
             "global_pool": "avg"},
        ),
        ("timm:swin_tiny_patch4_window7_224",
         {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": "1,1", "num_heads": "1,2"}),
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(tmp_path, randomize, name, options):
    model = randomize(create_peer(name, num_classes=3, in_chans=1, options=options)).eval()
    file = tmp_path / "model.safetensors"
    save_peer(model, file, name=name, options=options, class_names=NAMES, preprocessing=GREY)
    assert is_peer(file)
    found = load_peer(file)
    assert found.class_names == NAMES
    assert found.preprocessing == GREY
    assert not found.model.training
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model(images), model(images))


def test_it_is_timms_model():
    torch.manual_seed(3)
    ours = create_peer("timm:resnet10t", num_classes=5, in_chans=3)
    torch.manual_seed(3)
    theirs = timm.create_model("resnet10t", num_classes=5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_cannot_be_built():
    with pytest.raises(UnknownNameError, match=r"Unknown model of timm 'resnet188'. Did you mean"):
        create_peer("timm:resnet188", num_classes=3)
    with pytest.raises(ConfigError, match=r"timm cannot build resnet10t with these options: .*wings"):
        create_peer("timm:resnet10t", num_classes=3, options={"wings": 2})


def test_other_files_are_refused(tmp_path):
    ours = tmp_path / "ours.safetensors"
    model = XCiT(patch_size=8, in_chans=1, num_classes=3, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1)
    save_checkpoint(model, ours, class_names=NAMES, preprocessing=GREY)
    text = tmp_path / "text"
    text.write_text("no weights")
    for file in (ours, text, tmp_path / "nowhere"):
        assert not is_peer(file)
        with pytest.raises(CheckpointError, match=r"cannot be read as a model of timm"):
            load_peer(file)


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    model = create_peer("resnet10t", num_classes=3, in_chans=1)
    save_peer(model, file, name="resnet10t", options={}, class_names=NAMES, preprocessing=GREY)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as a model of timm"):
        load_peer(file)
