"""Teachers by name and file: which weights, which preparation, which classes; and a student that learns from one."""

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import ImageNetInfo

from xcit.data.labels import imagenet_names
from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT
from xcit.recipes import teacher as teachers
from xcit.recipes.config import DistillConfig
from xcit.recipes.peers import create_peer, save_peer
from xcit.recipes.teacher import build_teacher, match_classes
from xcit.tasks.teacher import distillation_loss

STUDENT = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NAMES = ("ant", "bee", "cow")
WNIDS = ImageNetInfo("imagenet-1k").label_names()
CONVNET = "test_resnet"
"""timm's smallest: 0.5 M parameters, 160 px."""


def convnet(num_classes=3, seed=0):
    torch.manual_seed(seed)
    return timm.create_model(CONVNET, pretrained=False, num_classes=num_classes).eval()


def xcit(**options):
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "cls_attn_layers": 1, "num_classes": 3}
    return XCiT(**sizes | options).eval()


@pytest.fixture
def no_network(monkeypatch):
    """timm's weights are a random model's, as if they had been downloaded."""
    create = timm.create_model

    def created(name, pretrained=False, **options):
        assert pretrained
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(teachers.timm, "create_model", created)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_a_model_of_timm_with_weights_from_a_file(tmp_path, randomize, wrap):
    model = randomize(convnet())
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    student = Preprocessing((160, 160), (0.5,) * 3, (0.5,) * 3)  # as timm's configuration of the model says
    found = build_teacher(f"timm:{CONVNET}={tmp_path / 'weights.pth'}", class_names=NAMES, student=student)
    images = torch.randn(2, 3, 160, 160)
    assert found.own.image_size == (160, 160)
    torch.testing.assert_close(found(images), model(images))
    small = build_teacher(f"timm:{CONVNET}={tmp_path / 'weights.pth'}", class_names=NAMES, student=STUDENT)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_weights_of_a_parallel_run(tmp_path):
    model = convnet()
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    found = build_teacher(f"timm:{CONVNET}={tmp_path / 'w.pth'}", class_names=NAMES, student=STUDENT)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), model.parameters(), strict=True))


def test_weights_under_the_authors_names_are_translated_by_timm(tmp_path, randomize):
    ours = randomize(create_model("xcit_nano_12_p16", num_classes=3)).eval()
    torch.save({"model": ours.state_dict()}, tmp_path / "w.pth")
    student = Preprocessing((224, 224))
    found = build_teacher(f"timm:xcit_nano_12_p16_224={tmp_path / 'w.pth'}", class_names=NAMES, student=student)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(found(images), ours(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("change", "match"), [("missing", "Missing key"), ("shape", "size mismatch")])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, match):
    state = convnet().state_dict()
    key = next(iter(state))
    if change == "missing":
        del state[key]
    else:
        state[key] = state[key][:1]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"w\.pth does not hold the weights of timm's {CONVNET}: .*{match}"):
        build_teacher(f"timm:{CONVNET}={tmp_path / 'w.pth'}", class_names=NAMES, student=STUDENT)


def test_a_file_of_other_things_is_refused(tmp_path):
    torch.save({"lr": 1}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights alone"):
        build_teacher(f"timm:{CONVNET}={tmp_path / 'w.pth'}", class_names=NAMES, student=STUDENT)
    with pytest.raises(CheckpointError, match="There is no file"):
        build_teacher(f"timm:{CONVNET}={tmp_path / 'none.pth'}", class_names=NAMES, student=STUDENT)


def test_without_network_one_sentence_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(teachers.timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"could not be downloaded .*timm:regnety_160\.deit_in1k=FILE"):
        build_teacher(DistillConfig().teacher, class_names=WNIDS, student=STUDENT)


def test_the_default_teacher_is_the_papers_at_the_size_it_was_trained_with(monkeypatch):
    create = timm.create_model

    def created(name, pretrained=False, **options):
        assert (name, pretrained) == ("regnety_160.deit_in1k", True)
        with torch.device("meta"):
            return create(name, **options)

    monkeypatch.setattr(teachers.timm, "create_model", created)
    found = build_teacher(DistillConfig().teacher, class_names=WNIDS, student=STUDENT)
    assert found.own == Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert sum(p.numel() for p in found.model.parameters()) == pytest.approx(83.6e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm:regnety_161", "Unknown model of timm 'regnety_161'. Did you mean .*regnety_160"),
        ("timm:resnet18.a1_in2k", "Of resnet18 timm has .*resnet18.a1_in1k"),
        ("xcit_small_12_p17", "Did you mean 'xcit_small_12_p16'"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(name, match):
    with pytest.raises(UnknownNameError, match=match):
        build_teacher(name, class_names=NAMES, student=STUDENT)


def test_a_model_of_timm_without_its_prefix_or_weights(no_network):
    with pytest.raises(ConfigError, match="write timm:regnety_160"):
        build_teacher("regnety_160", class_names=NAMES, student=STUDENT)
    with pytest.raises(ConfigError, match=r"timm has no weights of .*=FILE"):
        build_teacher("timm:vit_small_patch16_18x2_224", class_names=NAMES, student=STUDENT)


# --- ours ------------------------------------------------------------------------------------------------------------


def test_a_file_that_xcit_wrote(tmp_path, randomize):
    model = randomize(xcit(in_chans=1))
    own = Preprocessing((24, 24), (0.3,), (0.4,), in_chans=1)
    path = save_checkpoint(model, tmp_path / "model.safetensors", class_names=NAMES, preprocessing=own)
    found = build_teacher(str(path), class_names=NAMES, student=own)
    assert found.own == own
    images = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(found(images), model(images))


def test_classes_in_another_order_are_put_right_by_name(tmp_path, randomize):
    model = randomize(xcit())
    own = Preprocessing((32, 32))
    path = save_checkpoint(model, tmp_path / "model.safetensors", class_names=NAMES, preprocessing=own)
    found = build_teacher(str(path), class_names=("cow", "ant", "bee"), student=own)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found(images), model(images)[:, [2, 0, 1]])


def test_a_convolutional_run_as_a_teacher(tmp_path, randomize):
    options = {"channels": "16,16,24,24"}
    model = randomize(create_peer(f"timm:{CONVNET}", num_classes=3, options=options).eval())
    own = Preprocessing((32, 32), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    path = tmp_path / "model.safetensors"
    save_peer(model, path, name=CONVNET, options=options, class_names=NAMES, preprocessing=own)
    found = build_teacher(str(path), class_names=NAMES, student=own)
    images = torch.randn(2, 3, 32, 32)
    assert found.own == own
    torch.testing.assert_close(found(images), model(images))


def test_a_released_file_by_its_name(tmp_path):
    torch.save({"model": create_model("xcit_nano_12_p16").state_dict()}, tmp_path / "xcit_nano_12_p16_224.pth")
    found = build_teacher(str(tmp_path / "xcit_nano_12_p16_224.pth"), class_names=WNIDS, student=STUDENT)
    assert found.own.image_size == (224, 224)
    with pytest.raises(ConfigError, match="cannot teach this data"):
        build_teacher(str(tmp_path / "xcit_nano_12_p16_224.pth"), class_names=NAMES, student=STUDENT)


def test_a_backbone_without_a_classifier_is_refused(tmp_path):
    path = save_checkpoint(xcit(num_classes=0), tmp_path / "model.safetensors", preprocessing=STUDENT)
    with pytest.raises(ConfigError, match="has no classifier"):
        build_teacher(str(path), class_names=NAMES, student=STUDENT)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_imagenet_goes_by_its_ids_and_by_its_names(no_network):
    for names in (WNIDS, imagenet_names()):
        assert build_teacher(f"timm:{CONVNET}.r160_in1k", class_names=names, student=STUDENT)._columns is None
    turned = build_teacher(f"timm:{CONVNET}.r160_in1k", class_names=WNIDS[::-1], student=STUDENT)
    assert turned._columns.tolist() == list(range(1000))[::-1]


def test_a_thousand_other_classes_are_not_imagenet(no_network):
    others = [f"n{index:08}" for index in range(1000)]
    with pytest.raises(ConfigError, match=r"knows 1000 classes \(n01440764, .*the data has 1000 classes \(n00000000"):
        build_teacher(f"timm:{CONVNET}.r160_in1k", class_names=others, student=STUDENT)


@pytest.mark.parametrize(
    ("count", "names", "wanted", "columns"),
    [
        (3, [], ("x", "y", "z"), None),
        (3, [NAMES], NAMES, None),
        (3, [list(NAMES)], NAMES, None),
        (3, [NAMES], ("bee", "ant", "cow"), [1, 0, 2]),
        (3, [("1", "2", "3"), NAMES], ("bee", "ant", "cow"), [1, 0, 2]),
        (3, [("a", "a", "b")], ("a", "a", "b"), None),
    ],
)
def test_classes_that_agree(count, names, wanted, columns):
    assert match_classes("t", count, names, wanted) == columns


@pytest.mark.parametrize(
    ("count", "names", "wanted"),
    [
        (4, [], NAMES),
        (3, [NAMES], ("ant", "bee", "cat")),
        (3, [NAMES], ("ant", "bee")),
        (4, [(*NAMES, "dog")], NAMES),
        (3, [("a", "a", "b")], ("a", "b", "a")),  # two classes of one name cannot be told apart
    ],
)
def test_classes_that_differ_are_refused(count, names, wanted):
    with pytest.raises(ConfigError, match="The teacher t cannot teach this data"):
        match_classes("t", count, names, wanted)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_student_comes_to_agree_with_a_convolutional_teacher(tmp_path, randomize, kind):
    """It never sees a label, only what a network with random weights says of random images."""
    model = randomize(create_peer(CONVNET, num_classes=3)).eval()
    own = Preprocessing((32, 32), (0.2, 0.2, 0.2), (0.3, 0.3, 0.3))
    images = torch.randn(48, 3, 32, 32) + 2 * torch.randn(48, 3, 1, 1)
    with torch.no_grad():  # so that each class is the answer for some
        model.get_classifier().bias -= model(images).mean(0)
    path = tmp_path / "model.safetensors"
    save_peer(model, path, name=CONVNET, options={}, class_names=NAMES, preprocessing=own)
    found = build_teacher(str(path), class_names=("cow", "ant", "bee"), student=STUDENT)
    taught = found(images)
    taught_classes = taught.argmax(1)
    assert taught_classes.bincount().max() < 40, "a teacher that says one thing only is agreed with by accident"
    student = xcit().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        logits = student(images)
        loss = distillation_loss(logits.sum() * 0, logits, taught, kind=kind, alpha=1.0, tau=1.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    agreement = (student.eval()(images).argmax(1) == taught_classes).float().mean()
    assert losses[-1] < 0.3 * losses[0]
    assert agreement > 0.85
