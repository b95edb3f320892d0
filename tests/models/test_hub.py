"""Models by the Hugging Face hub, which is replaced at its public functions by a folder."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import errors as hub_errors

from xcit.errors import CheckpointError, ConfigError
from xcit.models.factory import create_model
from xcit.models.hub import push_to_hub
from xcit.models.zoo import CHECKPOINTS


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    status_code = 403
    headers: dict = {}  # noqa: RUF012
    request = None


class Hub:
    """A folder that behaves like the hub: a repository is a sub-folder."""

    def __init__(self, root):
        self.root = root
        self.calls = []

    def hf_hub_download(self, repo_id, filename, *, revision=None, local_files_only=False, library_name=None):
        self.calls.append(("download", repo_id, filename, revision, local_files_only))
        if not (self.root / repo_id).is_dir():
            raise hub_errors.RepositoryNotFoundError("404", response=Response())
        path = self.root / repo_id / filename
        if not path.exists():
            raise hub_errors.RemoteEntryNotFoundError("404", response=Response())
        return str(path)

    def create_repo(self, repo_id, *, private=None, token=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, token, exist_ok))
        (self.root / repo_id).mkdir(parents=True)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, token=None):
        self.calls.append(("upload", repo_id, commit_message, token))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("XCIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub = Hub(tmp_path / "hub")
    for name in ("hf_hub_download", "create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


def test_there_and_back(hub, small, images):
    original = small()
    cfg = {"input_size": [3, 40, 24], "mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    url = push_to_hub(original, "me/model", class_names="abcde", preprocessing=cfg, private=True, token="t")
    assert url == "https://huggingface.co/me/model"
    assert hub.calls == [("create", "me/model", True, "t", True), ("upload", "me/model", "Upload an XCiT model", "t")]
    assert sorted(p.name for p in (hub.root / "me/model").iterdir()) == ["README.md", "model.safetensors"]

    model = create_model("hf-hub:me/model")
    assert torch.equal(model.eval()(images), original(images))
    assert model.pretrained_cfg["class_names"] == list("abcde")
    assert hub.calls[-1] == ("download", "me/model", "model.safetensors", None, False)
    create_model("hf-hub:me/model@v1.2", num_classes=2)
    assert hub.calls[-1][3] == "v1.2"


def test_the_card_says_how_to_use_the_model(hub, small):
    push_to_hub(small(), "me/model", class_names="abcde")
    card = (hub.root / "me/model/README.md").read_text(encoding="utf-8")
    header, _, body = card.removeprefix("---\n").partition("---\n")
    assert "library_name: xcit\n" in header
    assert "pipeline_tag: image-classification\n" in header
    assert "| Classes | a, b, c, d, e |" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["model"].num_classes == 5
    push_to_hub(small(num_classes=0), "me/features")
    assert "image-feature-extraction" in (hub.root / "me/features/README.md").read_text(encoding="utf-8")


def timm_repository(hub, repo_id, name, randomize, *, model_config=None, **options):
    """Let timm write a repository's files, and return its model."""
    import timm
    from timm.models import save_for_hf

    model = randomize(timm.create_model(name, **options)).eval()
    save_for_hf(model, hub.root / repo_id, model_config=model_config, safe_serialization=True)
    return model


@torch.no_grad()
def test_a_repository_of_timm(hub, randomize, images):
    original = timm_repository(hub, "timm/xcit_nano_12_p16_384.fb_dist_in1k", "xcit_nano_12_p16_384", randomize)
    model = create_model("hf-hub:timm/xcit_nano_12_p16_384.fb_dist_in1k").eval()
    expected = original(images)
    assert (model(images) - expected).norm() <= 1e-5 * expected.norm()
    assert model.config == create_model("xcit_nano_12_p16").config
    assert model.pretrained_cfg == CHECKPOINTS["xcit_nano_12_p16_384_dist"].pretrained_cfg


@torch.no_grad()
def test_a_model_that_someone_tuned_with_timm(hub, randomize, images):
    names = {"label_names": ["cat", "dog"]}
    options = {"num_classes": 2, "global_pool": "avg", "in_chans": 1}
    original = timm_repository(hub, "me/pets", "xcit_tiny_12_p8_224", randomize, model_config=names, **options)
    model = create_model("hf-hub:me/pets").eval()
    expected = original(images[:, :1])
    assert (model(images[:, :1]) - expected).norm() <= 1e-5 * expected.norm()
    assert model.config["global_pool"] == "avg"
    assert model.pretrained_cfg["class_names"] == ["cat", "dog"]
    assert (model.pretrained_cfg["label_set"], model.pretrained_cfg["checkpoint"]) == (None, None)


def test_repositories_that_are_something_else(hub, small, tmp_path):
    def repository(name, config):
        folder = hub.root / "other" / name
        folder.mkdir(parents=True)
        safetensors.torch.save_file(dict(small().state_dict()), folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(config)
        return f"hf-hub:other/{name}"

    def refusal(name):
        with pytest.raises(CheckpointError) as caught:
            create_model(name)
        return str(caught.value)

    resnet = repository("resnet", json.dumps({"architecture": "resnet50"}))
    assert f"{resnet} is a 'resnet50', not an XCiT" in refusal(resnet)
    assert "neither an xcit model nor one of timm's: it has no config.json" in refusal(repository("none", None))
    assert "config.json that is not timm's (KeyError: 'architecture')" in refusal(
        repository("hf", '{"model_type": "vit"}')
    )
    assert "config.json that is not timm's" in refusal(repository("list", "[]"))
    assert "config.json that is not timm's" in refusal(repository("text", "no json"))
    options = {"architecture": "xcit_nano_12_p16_224", "model_args": {"act_layer": "relu"}}
    assert "built with act_layer, which XCiT has no option for" in refusal(repository("relu", json.dumps(options)))
    (hub.root / "other/empty").mkdir()
    assert "it has no model.safetensors" in refusal("hf-hub:other/empty")
    assert "hf-hub:other/nothing does not exist, or is private" in refusal("hf-hub:other/nothing")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (hub_errors.GatedRepoError("403", response=Response()), CheckpointError, "asks for consent"),
        (hub_errors.RevisionNotFoundError("404", response=Response()), CheckpointError, "has no revision 'v9'"),
        (hub_errors.HFValidationError("bad"), ConfigError, "is not a repository's name"),
        (hub_errors.LocalEntryNotFoundError("none"), CheckpointError, "the hub could not be reached"),
        (hub_errors.HfHubHTTPError("403", response=Response()), CheckpointError, "The hub answered 403"),
        (ConnectionError(111, "Connection refused"), CheckpointError, r"could not be reached .*\(Connection refused\)"),
        (hub_errors.HTTPError("no route"), CheckpointError, r"could not be reached .*\(HTTPError\)"),
    ],
)
def test_the_hubs_errors_become_sentences(hub, monkeypatch, error, kind, sentence):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(kind, match=sentence):
        create_model("hf-hub:me/model@v9")


def test_uploading_without_a_token(hub, small, monkeypatch):
    def fail(*args, **kwargs):
        raise hub_errors.LocalTokenNotFoundError("none")

    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    with pytest.raises(CheckpointError, match="needs a token"):
        push_to_hub(small(), "me/model")


def test_offline(small, monkeypatch):
    """With the hub's own functions: offline they do not try the network."""
    monkeypatch.setenv("XCIT_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="is not in the hub's cache, and XCIT_OFFLINE is set"):
        create_model("hf-hub:xcit-tests/no-such-model")
    with pytest.raises(ConfigError, match="is not a repository's name"):
        create_model("hf-hub:no such/model!")
    with pytest.raises(CheckpointError, match="cannot be uploaded: XCIT_OFFLINE is set"):
        push_to_hub(small(), "me/model")


def test_nothing_is_uploaded_of_a_diverged_model(hub, small):
    model = small()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        push_to_hub(model, "me/model")
    assert hub.calls == []
    assert not Path(hub.root).exists()
