"""A teacher by name or file, matched to the classes of the data."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from huggingface_hub import errors as hub_errors
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from xcit.data.labels import imagenet_names
from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models.factory import create_model
from xcit.models.storage import read_file
from xcit.models.weights import read_weights
from xcit.models.xcit import XCiT
from xcit.recipes.peers import PREFIX, is_peer, load_peer
from xcit.tasks.teacher import Teacher

IMAGENET = "imagenet-1k"
WRAPPINGS = ("model", "state_dict")
"""Keys under which training programs store the weights; DeiT's RegNetY-16GF has the first."""

_log = logging.getLogger("xcit")


class _Classifier(NamedTuple):
    """A model that can teach, and what is known of it."""

    model: nn.Module
    num_classes: int
    own: Preprocessing
    names: list[Sequence[str]]
    """What its classes are called, in the order of its logits; several where they go by several names, none where
    nobody knows."""


def build_teacher(teacher: str, *, class_names: Sequence[str], student: Preprocessing) -> Teacher:
    """Return a frozen teacher, on the CPU, whose logits are in the order of the data's classes.

    A teacher that names its classes must have exactly the data's; another order is put right by name. ImageNet's may be
    called by their WordNet ids (n01440764, as its folders are) or by their English names. Of a teacher without names
    only the number can be compared, and the order is taken to be the data's.

    timm's models are fed at their training resolution, which their configuration calls ``input_size``: 224 px for the
    RegNetY-16GF that the paper distils from.

    Args:
        teacher: ``timm:NAME`` (timm's own weights, downloaded once), ``timm:NAME=FILE`` (weights for that model from a
            file), a released XCiT checkpoint's name, or a file: of ``save_checkpoint``, of a run, or a released one.
        class_names: of the data, in the order of the student's logits.
        student: how the images are prepared that the teacher will get.

    Raises:
        UnknownNameError: no such model.
        ConfigError: other classes than the data's, or a model without a classifier.
        CheckpointError: weights that cannot be had, or do not fit.
    """
    if teacher.startswith(PREFIX):
        name, _, file = teacher.removeprefix(PREFIX).partition("=")
        found = _timm_from_file(name, Path(file).expanduser()) if "=" in teacher else _timm_released(name)
    else:
        found = _ours(teacher)
    if found.num_classes < 1:
        raise ConfigError(
            f"The teacher {teacher} has no classifier; choose one that was trained on the data's classes."
        )
    columns = match_classes(teacher, found.num_classes, found.names, class_names)
    return Teacher(found.model, name=teacher, student=student, own=found.own, columns=columns)


def match_classes(
    teacher: str, num_classes: int, names: Sequence[Sequence[str]], wanted: Sequence[str]
) -> list[int] | None:
    """Return which of a teacher's outputs stands for each class of the data; None where they agree one by one.

    Args:
        teacher: what it is called in messages.
        num_classes: outputs of the teacher.
        names: what its classes are called, in the order of its outputs; several lists where they go by several names,
            none where nobody knows.
        wanted: the data's classes.

    Raises:
        ConfigError: they are not the same classes.
    """
    if not names and num_classes == len(wanted):
        _log.info(
            "The teacher %s does not name its %d classes; they are taken in the data's order.", teacher, num_classes
        )
        return None
    if any(list(known) == list(wanted) for known in names):
        return None
    for known in names:
        place = {name: column for column, name in enumerate(known)}
        if len(place) == len(known) == len(wanted) and place.keys() == set(wanted):
            _log.info(
                "The teacher %s has the data's classes in another order; its outputs are put in the data's.", teacher
            )
            return [place[name] for name in wanted]
    raise ConfigError(
        f"The teacher {teacher} cannot teach this data: it knows {_sample(num_classes, names[0] if names else ())}, "
        f"the data has {_sample(len(wanted), wanted)}. Choose a teacher with the data's classes, such as one trained "
        f"on it: distill.teacher=RUN/model.safetensors."
    )


def _sample(count: int, names: Sequence[str]) -> str:
    listed = ", ".join(names[:3])
    return f"{count} classes" + (f" ({listed}{', ...' if count > 3 else ''})" if listed else "")


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(teacher: str) -> _Classifier:
    path = Path(teacher).expanduser()
    if is_peer(path):
        peer = load_peer(path)
        return _Classifier(peer.model, len(peer.class_names), peer.preprocessing, [peer.class_names])
    model = _xcit(teacher, path)
    cfg, names = model.pretrained_cfg, []
    if cfg.get("class_names"):
        names = [cfg["class_names"]]
    elif cfg.get("label_set") == IMAGENET:
        names = _imagenet()
    return _Classifier(model, model.num_classes, Preprocessing.from_cfg(cfg), names)


def _xcit(teacher: str, path: Path) -> XCiT:
    if path.is_file():
        file = read_weights(path)
        if file.config is None and file.layout and file.layout.architecture:  # a released file, or one like it
            return create_model(file.layout.architecture.id, pretrained=path)
    try:
        return create_model(teacher, pretrained=True)
    except UnknownNameError as err:
        if timm.is_model(teacher):
            raise ConfigError(f"The teacher {teacher} is a model of timm; write {PREFIX}{teacher}.") from err
        raise


# --- timm's ----------------------------------------------------------------------------------------------------------


def _timm_released(name: str) -> _Classifier:
    cfg = _timm_cfg(name)
    if not cfg.has_weights:
        raise ConfigError(f"timm has no weights of {name}; name a file with them: {PREFIX}{name}=FILE.")
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, hub_errors.HTTPError, hub_errors.EntryNotFoundError) as err:
        raise CheckpointError(
            f"The weights of timm's {name} are not on this machine, and could not be downloaded "
            f"({type(err).__name__}). Fetch them where there is a network, and name the file: {PREFIX}{name}=FILE."
        ) from err
    names: list[Sequence[str]] = []
    if cfg.label_names:
        names = [cfg.label_names]
    elif cfg.num_classes == 1000:  # timm's weights of a thousand classes are all of this set
        names = _imagenet()
    return _Classifier(model, cfg.num_classes, _timm_preprocessing(model), names)


def _timm_from_file(name: str, path: Path) -> _Classifier:
    cfg = _timm_cfg(name)
    state = _state(path)
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else (cfg.classifier or [""])[0]
    head = state.get(f"{classifier}.weight")
    num_classes = cfg.num_classes if head is None else len(head)
    model = timm.create_model(name, pretrained=False, num_classes=num_classes)
    if state.keys() != model.state_dict().keys():
        # of the authors' own names; timm's models bring along what translates them
        module = vars(sys.modules[type(model).__module__])
        translate = module.get("checkpoint_filter_fn") or module.get("_filter_fn")
        state = _translated(translate, state, model) if translate else state
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as err:
        reason = " ".join(str(err).split())
        raise CheckpointError(
            f"{path} does not hold the weights of timm's {name}: {reason[:300]}{'...' if len(reason) > 300 else ''}"
        ) from err
    return _Classifier(model, num_classes, _timm_preprocessing(model), [])


def _timm_cfg(name: str) -> Any:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UnknownNameError("model of timm", name, timm.list_models())
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if tag and name not in tagged:
        raise UnknownNameError(
            "model of timm", name, tagged, f"Of {base} timm has {', '.join(tagged) or 'no weights'}."
        )
    return get_pretrained_cfg(name)


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    in_chans, *size = cfg["input_size"]
    height, width = size
    return Preprocessing((height, width), tuple(cfg["mean"]), tuple(cfg["std"]), in_chans=in_chans)


def _state(path: Path) -> dict[str, Tensor]:
    content = read_file(path).content
    for key in WRAPPINGS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds no weights alone: a dictionary of tensors is expected, by itself or under "
            f"{' or '.join(map(repr, WRAPPINGS))}."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _translated(translate: Any, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    try:
        try:
            return translate(dict(state), model)
        except TypeError:  # some take the weights alone
            return translate(dict(state))
    except Exception:  # of foreign weights they fail in any way; loading will say what does not fit
        return state


def _imagenet() -> list[Sequence[str]]:
    return [ImageNetInfo(IMAGENET).label_names(), imagenet_names()]
