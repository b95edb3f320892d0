"""Models on the Hugging Face hub: fetch one by name, publish one.

A repository holds ``model.safetensors``, which ``save_checkpoint`` wrote and which describes itself; or it is one of
timm's, with timm's names in ``model.safetensors`` and the architecture in ``config.json``.
"""

import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import errors as hub_errors
from torch import nn

from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models.download import offline_variable
from xcit.models.timm_models import cfg_from_timm
from xcit.models.weights import HasCfg, WeightFile, bare, read_weights, save_checkpoint
from xcit.models.xcit import XCiT
from xcit.models.zoo import CHECKPOINTS, find

PREFIX = "hf-hub:"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

_TIMM_OPTIONS = {"use_pos_embed": "use_pos"}  # timm's names of options that are named differently here
_DERIVED = ("num_classes", "in_chans", "img_size")  # the weights tell, or any will do

_Result = TypeVar("_Result")


def fetch(name: str) -> WeightFile:
    """Download a model's weights and description, or take them from the hub's cache.

    Args:
        name: ``hf-hub:owner/name``, with ``@revision`` (branch, tag or commit) if need be.

    Returns:
        The weights, with the model's arguments in ``config``.

    Raises:
        CheckpointError: no such repository or file, no permission, no network; or a repository that is neither this
            package's nor a timm XCiT.
    """
    repo_id, _, revision = name.removeprefix(PREFIX).partition("@")
    file = replace(read_weights(_get(repo_id, WEIGHTS_FILE, revision)), name=name)
    if file.config is not None:
        return file
    try:
        description = json.loads(_get(repo_id, CONFIG_FILE, revision).read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise TypeError("not a dictionary")
        return _described_by_timm(file, repo_id, description)
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{name} has a {CONFIG_FILE} that is not timm's ({type(err).__name__}: {err}).") from err


def _described_by_timm(file: WeightFile, repo_id: str, description: Mapping[str, Any]) -> WeightFile:
    try:
        architecture, _ = find(description["architecture"])
    except UnknownNameError as err:
        raise CheckpointError(f"{file.name} is a {description['architecture']!r}, not an XCiT.") from err
    options = {_TIMM_OPTIONS.get(k, k): v for k, v in description.get("model_args", {}).items() if k not in _DERIVED}
    if "global_pool" in description:
        options.setdefault("global_pool", description["global_pool"])
    unknown = options.keys() - inspect.signature(XCiT).parameters.keys()
    if unknown:
        raise CheckpointError(f"{file.name} was built with {', '.join(sorted(unknown))}, which XCiT has no option for.")

    num_classes = file.layout.num_classes if file.layout else 0
    names = {key: description[key] for key in ("architecture", "label_names") if key in description}
    cfg = cfg_from_timm(description.get("pretrained_cfg", {}) | names, num_classes)
    # timm's own repositories hold the released files, each under its own name
    cfg["checkpoint"] = next((c.stem for c in CHECKPOINTS.values() if f"timm/{c.timm_id}" == repo_id), None)
    return replace(file, config=architecture.config | options, cfg=cfg)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: HasCfg | Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload an XCiT model",
) -> str:
    """Publish a model, so that ``create_model("hf-hub:owner/name")`` rebuilds it anywhere.

    Args:
        model: an ``XCiT``.
        repo_id: ``owner/name``; made if it does not exist.
        class_names: see ``save_checkpoint``.
        preprocessing: see ``save_checkpoint``.
        private: whether a repository that is made now is hidden from others.
        token: a write token; None takes the one that ``hf auth login`` stored.
        commit_message: what the repository's history says.

    Returns:
        The repository's address.

    Raises:
        ConfigError: see ``save_checkpoint``; or a repository's name that the hub does not allow.
        CheckpointError: no network, no permission, offline mode.
    """
    if variable := offline_variable():
        raise CheckpointError(f"{repo_id} cannot be uploaded: {variable} is set, which forbids the network. Unset it.")
    with tempfile.TemporaryDirectory(prefix="xcit-") as folder:
        path = save_checkpoint(model, Path(folder) / WEIGHTS_FILE, class_names=class_names, preprocessing=preprocessing)
        card = model_card(bare(model), repo_id, read_weights(path).cfg or {})
        path.with_name("README.md").write_text(card, encoding="utf-8")
        url = _call(
            f"{PREFIX}{repo_id}", huggingface_hub.create_repo, repo_id, private=private, token=token, exist_ok=True
        )
        _call(
            f"{PREFIX}{repo_id}",
            huggingface_hub.upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
        )
    return str(url)


def model_card(model: XCiT, repo_id: str, cfg: Mapping[str, Any]) -> str:
    """Return the README of a model's repository, in the hub's form."""
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    size = cfg.get("input_size")
    rows = {
        "Architecture": cfg.get("architecture") or "custom",
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "Patch size": f"{model.config['patch_size']} px",
        "Input": f"{size[1]} × {size[2]} px, {size[0]} channels" if size else "not recorded",
        "Classes": ", ".join(cfg.get("class_names") or ()) or cfg.get("label_set") or str(model.num_classes),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: xcit
pipeline_tag: {task}
tags:
- xcit
---
# {repo_id.rpartition("/")[2]}

An [XCiT](https://arxiv.org/abs/2106.09681) (cross-covariance image transformer).

| | |
|---|---|
{table}

```python
import xcit

model = xcit.create_model("{PREFIX}{repo_id}")
```
"""


def _get(repo_id: str, filename: str, revision: str) -> Path:
    return Path(
        _call(
            f"{PREFIX}{repo_id}",
            huggingface_hub.hf_hub_download,
            repo_id,
            filename,
            revision=revision or None,
            local_files_only=offline_variable() is not None,
            library_name="xcit",
        )
    )


def _call(where: str, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Call the hub and turn its errors into sentences about ``where``."""
    try:
        return function(*args, **kwargs)
    except hub_errors.HFValidationError as err:
        raise ConfigError(f"{where} is not a repository's name: the hub's are owner/name.") from err
    except hub_errors.GatedRepoError as err:
        raise CheckpointError(f"{where} asks for consent: accept its terms on its page, then `hf auth login`.") from err
    except hub_errors.RepositoryNotFoundError as err:
        raise CheckpointError(
            f"{where} does not exist, or is private and you are not logged in (`hf auth login`)."
        ) from err
    except hub_errors.RevisionNotFoundError as err:
        raise CheckpointError(f"{where} has no revision {kwargs.get('revision')!r}.") from err
    except hub_errors.LocalEntryNotFoundError as err:  # before its base class EntryNotFoundError
        variable = offline_variable()
        why = f"{variable} is set, which forbids the network" if variable else "the hub could not be reached"
        raise CheckpointError(
            f"{where} is not in the hub's cache, and {why}. Fetch it elsewhere and pass the file's path instead."
        ) from err
    except hub_errors.EntryNotFoundError as err:
        raise CheckpointError(f"{where} is neither an xcit model nor one of timm's: it has no {args[1]}.") from err
    except hub_errors.LocalTokenNotFoundError as err:
        raise CheckpointError(f"Uploading to {where} needs a token: `hf auth login`, or pass token=.") from err
    except hub_errors.HfHubHTTPError as err:
        status = err.response.status_code if err.response is not None else "an error"
        raise CheckpointError(f"The hub answered {status} for {where}. Try again, or check your permission.") from err
    except (OSError, hub_errors.HTTPError) as err:  # the latter: of the hub's HTTP library, no network
        reason = getattr(err, "strerror", None) or type(err).__name__
        raise CheckpointError(f"The hub could not be reached for {where} ({reason}).") from err
