"""How `xcit probe` goes about it: features first, then one probe after the other, and what Ctrl-C leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xcit.cli.probe_tables import tell, tell_skipped
from xcit.data.image_set import ImageSet
from xcit.evaluate.embedding import SetFeatures, embed_set
from xcit.evaluate.knn import KS
from xcit.evaluate.linear_head import with_linear_head
from xcit.evaluate.linear_probe import EpochFigures, LinearSettings, train_linear
from xcit.evaluate.pixels import PrincipalComponents, pixel_preprocessing, pixel_set
from xcit.evaluate.probes import (
    ProbeFeatures,
    ProbeRow,
    ProbeSets,
    embed_parts,
    knn_rows,
    learning_set,
    logistic_rows,
    untrained,
)
from xcit.inference.features import FeatureExtractor
from xcit.models.weights import bare, save_checkpoint

INTERRUPTED = 130


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    methods: Sequence[str]
    ks: Sequence[int] | None
    """None for the usual ones, as far as there are images for them."""
    temperature: float
    settings: LinearSettings
    num_workers: int | None
    weights_file: Path | None

    @property
    def chooses_rate(self) -> bool:
        """Whether the linear probe has a learning rate to choose.

        A single one leaves nothing to choose, so that all of the training part is learnt from, as published.
        """
        return len(self.settings.lrs) > 1

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen by images of its own."""
        return "logistic" in self.methods or ("linear" in self.methods and self.chooses_rate)


def run_probes(
    plan: Plan,
    extract: FeatureExtractor,
    sets: ProbeSets,
    name: str,
    baselines: Sequence[str],
    data: str,
    format: str,
    json_file: Path | None,
) -> int:
    """Embed, probe, and print what came out.

    Args:
        plan: what to do.
        extract: the model.
        sets: the images.
        name: of the model.
        baselines: what else to probe.
        data: what the images are called.
        format: of what is printed.
        json_file: to be written as well, unless interrupted.

    Returns:
        The exit status.
    """
    rows: list[ProbeRow] = []
    features: ProbeFeatures | None = None
    interrupted = False
    about: dict[str, Any] = {
        "model": name,
        "data": data,
        "temperature": plan.temperature if "knn" in plan.methods else None,
        "linear": asdict(plan.settings) if "linear" in plan.methods else None,
    }
    try:
        with _progress() as stage:
            features = _embedded(extract, sets, plan, stage)
            tell_skipped(features.skipped)
            if "knn" in plan.methods and plan.ks is None:
                plan = replace(plan, ks=_usual_ks(int(features.bank.decoded.sum())))
            for row in _rows(name, plan, extract, features, sets, baselines, stage):
                rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
        state = _state_file(plan.weights_file)
        kept = f"what linear learnt is kept in {state}; the same command goes on there" if _is_there(state) else ""
        there = "the figures that were done follow" if rows else "" if kept else "there is no result"
        print(f"xcit: interrupted; {'; '.join(filter(None, (kept, there)))}.", file=sys.stderr)
    if features is not None and rows:
        tell(rows, extract, sets, features, about, format, None if interrupted else json_file, complete=not interrupted)
    return INTERRUPTED if interrupted else 0


def _usual_ks(num_bank: int) -> tuple[int, ...]:
    """Return the usual numbers of neighbours that there are images for; of fewer than ten images, all."""
    fitting = tuple(k for k in KS if k <= num_bank)
    if len(fitting) < len(KS):
        print(
            f"xcit: The training part has {num_bank:,} images, fewer than some of the usual numbers of neighbours "
            f"({', '.join(map(str, KS))}); these are left out.",
            file=sys.stderr,
        )
    return fitting or (num_bank,)


def _embedded(
    extract: FeatureExtractor, sets: ProbeSets, plan: Plan, stage: Stage, words: str = "features"
) -> ProbeFeatures:
    def embed(images: ImageSet) -> SetFeatures:
        return embed_set(extract, images, num_workers=plan.num_workers, on_progress=stage(words, len(images)))

    return embed_parts(embed, sets, choosing=plan.chooses)


def _rows(
    name: str,
    plan: Plan,
    extract: FeatureExtractor,
    features: ProbeFeatures,
    sets: ProbeSets,
    baselines: Sequence[str],
    stage: Stage,
) -> Iterator[ProbeRow]:
    yield from _probe(name, plan, extract, features, sets, stage, keep=True)
    if "untrained" in baselines:
        same = FeatureExtractor(
            untrained(bare(extract.model), plan.settings.seed),
            pool=extract.pool,
            batch_size=extract.batch_size,
            preprocessing=extract.preprocessing,
        )
        beside = _embedded(same, sets, plan, stage, "untrained features")
        yield from _probe("the same, untrained", plan, same, beside, sets, stage, keep=False)
    if "pixels" in baselines or "pca" in baselines:
        yield from _pixel_rows(plan, extract, sets, baselines, stage)


def _probe(
    name: str,
    plan: Plan,
    extract: FeatureExtractor,
    features: ProbeFeatures,
    sets: ProbeSets,
    stage: Stage,
    *,
    keep: bool,
) -> Iterator[ProbeRow]:
    """Yield the rows of one model by all methods; ``keep`` its linear head if that was asked for."""
    classes = len(sets.bank.class_names)
    if "knn" in plan.methods:
        stage("neighbours", None)
        yield from knn_rows(name, features, classes, plan.ks or (), plan.temperature)
    if "logistic" in plan.methods:
        yield from logistic_rows(name, features, classes, stage("logistic regression", None))
    if "linear" in plan.methods:
        yield _linear_row(name, plan, extract, features, sets, stage, keep)


def _linear_row(
    name: str,
    plan: Plan,
    extract: FeatureExtractor,
    features: ProbeFeatures,
    sets: ProbeSets,
    stage: Stage,
    keep: bool,
) -> ProbeRow:
    chooses = plan.chooses_rate
    learn = learning_set(sets) if chooses else sets.bank
    advance = stage("linear", plan.settings.epochs * len(learn))
    state = _state_file(plan.weights_file) if keep else None

    def note(figures: EpochFigures) -> None:
        stage.note(f"linear, epoch {figures.epoch}: loss {figures.loss:.3f}")

    result = train_linear(
        extract,
        learn,
        features.choose if chooses else features.judge,
        plan.settings,
        cached=None if plan.settings.augment else (features.learn if chooses else features.bank),
        num_workers=plan.num_workers,
        state_file=state,
        on_progress=lambda epoch, done: advance(epoch * len(learn) + done),
        on_epoch=note,
    )
    if keep and plan.weights_file is not None:
        classifier = with_linear_head(
            extract.model, result.weight, result.bias, pool=extract.pool, class_names=sets.bank.class_names
        )
        save_checkpoint(classifier, plan.weights_file, preprocessing=extract.preprocessing)
        print(f"xcit: {plan.weights_file} is written.", file=sys.stderr)
    kind = "random parts" if plan.settings.augment else "cached"
    setting = f"{result.settings.epochs} epochs, lr {result.lr:g}, {kind}"
    return ProbeRow(name, "linear", setting, result.judge(features.judge))


def _pixel_rows(
    plan: Plan, extract: FeatureExtractor, sets: ProbeSets, baselines: Sequence[str], stage: Stage
) -> Iterator[ProbeRow]:

    prepared = pixel_preprocessing(extract.preprocessing)

    def embed(images: ImageSet) -> SetFeatures:
        return pixel_set(images, prepared, num_workers=plan.num_workers, on_progress=stage("pixels", len(images)))

    pixels = embed_parts(embed, sets, choosing="logistic" in plan.methods)
    H, W = prepared.image_size
    kinds = [(f"pixels, {H} x {W}", pixels)] if "pixels" in baselines else []
    if "pca" in baselines:
        stage("principal components", None)
        project = PrincipalComponents(pixels.learn, extract.dim)
        kinds.append((f"pixels, {project.directions.shape[1]} components", ProbeFeatures(*map(project, pixels))))
    classes = len(sets.bank.class_names)
    for name, features in kinds:
        if "knn" in plan.methods:
            stage("neighbours", None)
            yield from knn_rows(name, features, classes, plan.ks or (), plan.temperature)
        if "logistic" in plan.methods:
            yield from logistic_rows(name, features, classes, stage("logistic regression", None))


def _state_file(weights_file: Path | None) -> Path | None:
    return None if weights_file is None else weights_file.with_name(f"{weights_file.name}.state")


def _is_there(path: Path | None) -> bool:
    return path is not None and path.exists()


class Stage:
    """The progress bar, if there is one: called with what is being done and how much that is, it begins anew."""

    def __init__(self, bar: Any = None) -> None:
        self.bar = bar
        self.task = None if bar is None else bar.add_task("", total=None)

    def __call__(self, words: str, total: int | None) -> Callable[[int], None]:
        """Begin a stage; return what sets it to a number done."""
        if self.bar is None:
            return lambda done: None
        self.bar.reset(self.task, total=total, description=words)
        return lambda done: self.bar.update(self.task, completed=done)

    def note(self, words: str) -> None:
        """Change what the bar says of the stage."""
        if self.bar is not None:
            self.bar.update(self.task, description=words)


@contextmanager
def _progress() -> Iterator[Stage]:
    """Show a progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield Stage()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        yield Stage(bar)
