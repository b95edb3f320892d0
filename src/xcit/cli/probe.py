"""`xcit probe`: what a frozen model's features are worth to a simple classifier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from xcit.errors import BackendError, ConfigError, UnknownNameError

if TYPE_CHECKING:
    from xcit.inference.features import FeatureExtractor

BASELINES = ("untrained", "pixels", "pca")


def probe(
    *,
    model: Annotated[str, arg(metavar="MODEL")],
    data: Annotated[str, arg(metavar="DIR", help_behavior_hint="(required, but for --layout digits)")] = "",
    layout: Annotated[str, arg(metavar="auto|folder|csv|shards|NAME|digits")] = "auto",
    method: Annotated[Literal["knn", "linear", "logistic", "all"], arg(metavar="knn|linear|logistic|all")] = "knn",
    pool: Annotated[Literal["token", "avg", "both", "gem"], arg(metavar="token|avg|both|gem")] = "token",
    k: Annotated[str | None, arg(metavar="N,N,...", help_behavior_hint="(default: 10,20,100,200)")] = None,
    temperature: Annotated[float, arg(metavar="T")] = 0.07,
    epochs: Annotated[int, arg(metavar="N")] = 100,
    lr: Annotated[str, arg(metavar="RATE,RATE,...")] = "1e-3",
    sgd_batch: Annotated[int, arg(metavar="N")] = 1024,
    hflip: Annotated[float, arg(metavar="SHARE")] = 0.5,
    cache: Annotated[bool, FlagCreatePairsOff] = False,
    seed: Annotated[int, arg(metavar="N")] = 0,
    save: Annotated[str | None, arg(metavar="FILE.safetensors", help_behavior_hint="")] = None,
    random: Annotated[bool, FlagCreatePairsOff] = False,
    baselines: Annotated[str | None, arg(metavar="untrained,pixels,pca", help_behavior_hint="")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model expects)")] = None,
    crop_pct: Annotated[
        float | None, arg(metavar="SHARE", help_behavior_hint="(default: what the model expects)")
    ] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, fewer of larger images)")
    ] = None,
    num_workers: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: as many as there are cores to spare)")
    ] = None,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
    output: Annotated[str | None, arg(metavar="FILE.json", help_behavior_hint="")] = None,
) -> int:
    """Measure what a frozen model's features tell about classes: k-NN, a linear classifier, logistic regression.

    Examples: `xcit probe --model dino_xcit_small_12_p16 --data imagenet`, or
    `xcit probe --model runs/dino/model.safetensors --layout digits --method all --cache --baselines untrained,pixels`.

    MODEL is a released model's name (those of DINO were published with such figures; an architecture means its
    distilled weights at 224 px), a checkpoint that xcit wrote, or hf-hub:owner/name; a classifier's head is left aside.
    Data is whatever `xcit train` takes (docs/data.md).

    The training part is learnt from, or is the bank of neighbours; the test part is judged, or the validation part
    where there is none, and the output says which. Nothing is chosen by the images that are judged.

    knn and linear are the published probes. logistic is the quick one, on standardised features. linear shows each
    image once an epoch, as another random part, and so takes long; --cache computes features once instead. With --save
    Ctrl-C keeps the finished epochs, and the same command goes on there.

    Exit status: 0 when the figures are there, 2 for a mistake in the command or too many broken images, 130 after
    Ctrl-C.

    Args:
        model: Whose features; see above.
        data: Images and their classes; see above.
        layout: What lies there. auto finds out a folder, a CSV or shards; NAME is cifar10, cifar100, flowers102,
            stanford_cars, inat18 or inat19, of which DIR is the local copy. digits are embedded and need no DIR.
        method: Which probe; all are the three.
        pool: The features are the class token, the mean of the patch tokens, both in a row, or the generalised mean.
        k: Numbers of neighbours.
        temperature: Of k-NN: the smaller, the more the nearest neighbours count.
        epochs: Of linear: passes over the training images.
        lr: Of linear: peak learning rate for a batch of 256; of several, the one that the validation part likes best.
        sgd_batch: Of linear: images a step.
        hflip: Of linear: share of the training images that are mirrored; 0 for digits, text and the like.
        cache: Of linear: compute features once, without random parts.
        seed: Of linear and of random weights.
        save: Write model and linear head to this file, which `xcit predict` and `xcit eval` take.
        random: Give MODEL's architecture random weights instead; nothing is downloaded.
        baselines: Put beside it the same architecture untrained, the pixels (at 32 px at most), their principal
            components (as many as the model's features).
        image_size: Side of the square in pixels to which images are resized and cropped.
        crop_pct: Side of the crop as a share of the resized image's; with 0.875, 224 px are cropped out of 256.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        batch_size: Images that go through the model at once.
        num_workers: Processes that decode images; 0 decodes in the main one.
        format: What is printed: a table for people, JSON for programs.
        output: Write JSON to this file as well.
    """
    from xcit.cli.result_files import writable

    methods = ("knn", "linear", "logistic") if method == "all" else (method,)
    asked_ks = None if k is None else _numbers(k, int, "--k")
    rates = _numbers(lr, float, "--lr")
    beside = _baselines(baselines, random)
    _check(methods, asked_ks, temperature, save, pool, image_size, crop_pct, batch_size, num_workers)
    json_file = writable(output, (".json",), "--output")
    weights_file = writable(save, (".safetensors",), "--save")

    from xcit.evaluate.linear_probe import LinearSettings

    _refuse_idle(methods, temperature != 0.07, epochs != 100, lr != "1e-3", sgd_batch != 1024, hflip != 0.5, cache)
    settings = LinearSettings(epochs, rates, sgd_batch, augment=not cache, hflip=hflip, seed=seed)
    extract = _extractor(model, random, seed, pool, device, batch_size, image_size, crop_pct)

    from xcit.cli.probe_run import Plan, run_probes
    from xcit.data.sources import open_data
    from xcit.evaluate.probes import probe_sets

    if not data and layout != "digits":
        raise ConfigError("--data is missing; name a folder of images, a CSV file or a pattern of tar shards.")
    splits = open_data(data, layout, in_chans=extract.preprocessing.in_chans)
    for note in splits.notes:
        print(f"xcit: {note}", file=sys.stderr)
    sets = probe_sets(splits)
    if asked_ks is not None and max(asked_ks) > len(sets.bank):
        raise ConfigError(f"--k is {max(asked_ks)}, more than the {len(sets.bank):,} images of the training part.")
    plan = Plan(methods, asked_ks, temperature, settings, num_workers, weights_file)
    return run_probes(
        plan, extract, sets, f"{model}, untrained" if random else model, beside, data or layout, format, json_file
    )


# --- what was asked for -----------------------------------------------------------------------------------------------


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; it must be numbers with commas between them.") from None
    return tuple(dict.fromkeys(values))


def _baselines(text: str | None, random: bool) -> tuple[str, ...]:
    names = () if text is None else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in BASELINES:
            raise UnknownNameError("baseline", name, BASELINES, f"There are {', '.join(BASELINES)}.")
    if random and "untrained" in names:
        raise ConfigError("With --random the model itself is untrained; leave that baseline out.")
    return names


def _check(
    methods: Sequence[str],
    ks: Sequence[int] | None,
    temperature: float,
    save: str | None,
    pool: str,
    image_size: int | None,
    crop_pct: float | None,
    batch_size: int | None,
    num_workers: int | None,
) -> None:
    """Refuse, all at once, what cannot be honoured, before anything slow."""
    problems = []
    if ks is not None and min(ks) < 1:
        problems.append(f"--k is {min(ks)}; it must be 1 or more")
    if ks is not None and "knn" not in methods:
        problems.append("--k is for --method knn")
    if not 0 < temperature < float("inf"):
        problems.append(f"--temperature is {temperature}; it must be more than 0")
    if save is not None and "linear" not in methods:
        problems.append("--save keeps a linear head; take --method linear (or all) with it")
    if save is not None and pool in ("both", "gem"):
        problems.append(f"--save needs --pool token or avg: no classifier pools by {pool}")
    if image_size is not None and image_size < 1:
        problems.append(f"--image-size is {image_size}; it must be 1 or more, and at least one patch of the model")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        problems.append(f"--crop-pct is {crop_pct}; it must be more than 0 and at most 1")
    if batch_size is not None and batch_size < 1:
        problems.append(f"--batch-size is {batch_size}; it must be 1 or more")
    if num_workers is not None and not 0 <= num_workers <= 256:
        problems.append(f"--num-workers is {num_workers}; it must be from 0 to 256")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    if "logistic" in methods and find_spec("sklearn") is None:
        raise BackendError('--method logistic needs scikit-learn, which is not installed: pip install "xcit[train]".')


def _refuse_idle(
    methods: Sequence[str], temperature: bool, epochs: bool, lr: bool, sgd_batch: bool, hflip: bool, cache: bool
) -> None:
    """Refuse options that would do nothing with these methods; each argument says whether it was given."""
    linear = {"--epochs": epochs, "--lr": lr, "--sgd-batch": sgd_batch, "--hflip": hflip, "--cache": cache}
    idle = [option for option, given in linear.items() if given and "linear" not in methods]
    problems = [f"{', '.join(idle)} only matter{'s' * (len(idle) == 1)} to --method linear"] if idle else []
    if temperature and "knn" not in methods:
        problems.append("--temperature only matters to --method knn")
    if hflip and cache:
        problems.append("--hflip mirrors random parts, of which --cache has none")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _extractor(
    model: str,
    random: bool,
    seed: int,
    pool: str,
    device: str,
    batch_size: int | None,
    image_size: int | None,
    crop_pct: float | None,
) -> FeatureExtractor:
    from xcit.inference.features import FeatureExtractor

    chosen: Any = _random_model(model, seed, device) if random else model
    extract = FeatureExtractor(chosen, pool=pool, device=device, batch_size=batch_size, image_size=image_size)
    if crop_pct is not None:
        own = replace(extract.preprocessing, crop_pct=crop_pct)
        extract = FeatureExtractor(extract.model, pool=pool, batch_size=batch_size, preprocessing=own)
    return extract


def _random_model(name: str, seed: int, device: str) -> Any:
    """Build a named architecture without its weights, or a file's with others."""
    from xcit.evaluate.probes import untrained
    from xcit.inference.devices import choose_device
    from xcit.models.factory import create_model
    from xcit.models.zoo import default_checkpoint, find

    try:
        architecture, released = find(name)
    except UnknownNameError:
        model = create_model(name, pretrained=True)  # a file, or a name that is refused
    else:
        model = create_model(name)
        model.pretrained_cfg = (released or default_checkpoint(architecture)).pretrained_cfg
    return untrained(model, seed).to(choose_device(device))
