"""int8 accepted: a classifier trained on the digits, exported both ways, judged by the 360 of the test part."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xcit.cli.main import main
from xcit.data.preprocess import Preprocessing
from xcit.deploy.calibration import validation_images
from xcit.inference.predictor import Predictor
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = [str(digit) for digit in range(10)]
PREPARED = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the digits as files, and a small classifier trained on them by a plain loop."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("digits")
    assert main(["data", "digits", "--out", str(folder / "data")]) == 0
    train = validation_images(folder / "data" / "train", PREPARED, NAMES)
    images, labels = torch.from_numpy(np.stack(train.images[:])), torch.from_numpy(train.labels)
    model = XCiT(
        patch_size=8, embed_dim=64, depth=2, num_heads=4, cls_attn_layers=1, num_classes=10, tokens_norm=True, eta=1.0
    )
    epochs = 12
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(labels) // 64))
    for _ in range(epochs):
        for picked in torch.randperm(len(labels)).split(64):
            loss = F.cross_entropy(model(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save_checkpoint(model.eval(), folder / "m.safetensors", class_names=NAMES, preprocessing=PREPARED.to_cfg())
    yield folder
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_no_more_than_two_of_the_360_test_digits_change_to_wrong(trained, capsys, ending):
    path = trained / f"m{ending}"
    status = main(
        ["export", str(trained / "m.safetensors"), "--out", str(path), "--dtype", "int8",
         "--calibration", str(trained / "data" / "train"), "--calibration-images", "200",
         "--validation", str(trained / "data" / "test")]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "━" not in out + err  # no progress bar of NNCF's
    assert "200 images of train" in out
    said = json.loads((trained / f"{path.name}.proof.json").read_text(encoding="utf-8"))["int8"]
    assert said["compared"] == 360
    assert said["top1_before"] > 90
    assert said["changed_to_wrong"] <= 2
    assert said["loss"] <= 0.5
    # the file as `xcit predict` runs it, against the classes that the folders say
    test = trained / "data" / "test"
    predictions = Predictor(path)(test, top_k=1)
    right = sum(found.labels[0].name == found.path.parent.name for found in predictions)
    assert 100 * right / 360 == pytest.approx(said["top1_after"])
