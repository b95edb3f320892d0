"""A run of supervised classification: built from its settings, judged and reported at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from xcit.data.datasets import EvalImages
from xcit.data.image_set import ImageSet
from xcit.data.loading import eval_loader
from xcit.errors import DataError
from xcit.evaluate.classification import ClassificationMetrics, classification_metrics
from xcit.evaluate.multi_label import MultiLabelMetrics, multi_label_metrics
from xcit.files import write_atomic
from xcit.models.factory import create_model
from xcit.recipes.build import Parts, build, eval_batch_size, no_grad_logits, save_model
from xcit.recipes.checkpointing import RunKeeper, skipped_images, write_skipped
from xcit.recipes.config import TrainConfig
from xcit.recipes.dry_run import plan
from xcit.recipes.job import Fact, Job, Share
from xcit.recipes.peers import PREFIX, load_peer
from xcit.recipes.provenance import environment
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.run_report import RunRecord, write_report


class ClassificationJob(Job):
    """Train a classifier, and evaluate its best epoch's weights once on the test part.

    Args:
        config: all settings.
        share: which process this is; None for the only one.
        pin_memory: lay batches where CUDA can fetch them.

    Attributes:
        parts: what the settings stand for.

    Raises:
        XCiTError: as ``build``.
    """

    def __init__(self, config: TrainConfig, share: Share | None = None, *, pin_memory: bool = False) -> None:
        self.config = config
        self.parts = parts = build(config, share, pin_memory=pin_memory)
        self.task, self.train_loader, self.val_loader = parts.task, parts.train_loader, parts.val_loader
        self.accumulate, self.clip_grad = config.optim.accumulate, config.optim.clip_grad
        train, val, test, _ = parts.splits
        self.images = {"train": train, "val": val} | ({"test": test} if test is not None else {})

    def save(self, model: nn.Module, path: Path) -> None:
        """Write a model's weights with its classes and preprocessing."""
        save_model(model, path, config=self.config, parts=self.parts)

    def introduction(self) -> Iterator[Fact]:
        """Yield what to say before the first step."""
        train, val, test, notes = self.parts.splits
        parameters = sum(p.numel() for p in self.task.model.parameters()) / 1e6
        held_out = f", {len(test):,} held out" if test is not None else ""
        size = self.config.data.image_size
        classes = len(train.class_names)
        yield "data", f"{classes} classes: {len(train):,} images to train on, {len(val):,} to choose by{held_out}"
        yield "model", f"{self.config.model.name}, {parameters:.2f} M parameters, images of {size} x {size} px"
        yield from (("note", note) for note in notes)

    def plan(self) -> list[Fact]:
        """Return what the run would do."""
        return plan(self.config, self.parts)

    def conclude(
        self, run: RunFolder, keeper: RunKeeper, device: torch.device
    ) -> ClassificationMetrics | MultiLabelMetrics:
        """Evaluate the weights that were kept, as a user reads them, and write report and figures."""
        keeper.write_model(self.task, run.last_model)
        config, parts = self.config, self.parts
        model = read_model(config, run).to(device).eval()
        part: Literal["test", "validation"] = "test" if parts.splits.test is not None else "validation"
        images = parts.splits.test or parts.splits.val
        metrics, logits, judged = evaluate_part(config, model, images, parts, device)
        skipped = dict(keeper.skipped)
        known = set(judged.names)
        if part == "test" and len(judged) < len(images):
            skipped["test"] = {index for index, name in enumerate(images.names) if name not in known}
            write_skipped(skipped, self.images, run.skipped)
        record = RunRecord(
            config=config,
            history=keeper.history,
            best=dict(keeper.best),
            metrics=metrics,
            part=part,
            environment=environment(device),
            splits=parts.splits,
            preprocessing=parts.preprocessing,
            skipped=skipped_images(skipped, self.images),
        )
        write_report(record, run, model, judged, logits)
        # Last: this file says that the run is complete.
        content = {
            part: metrics.to_dict(),
            "val": record.best,
            "epochs": keeper.history,
            "skipped": {name: len(found) for name, found in skipped.items()},
            "environment": record.environment,
        }
        write_atomic(run.metrics, (json.dumps(content, indent=2) + "\n").encode())
        return metrics


def read_model(config: TrainConfig, run: RunFolder) -> nn.Module:
    """Return the model whose weights the run keeps."""
    if config.model.name.startswith(PREFIX):
        return load_peer(run.model).model
    return create_model(str(run.model))


def evaluate_part(
    config: TrainConfig, model: nn.Module, images: ImageSet, parts: Parts, device: torch.device
) -> tuple[ClassificationMetrics | MultiLabelMetrics, torch.Tensor, ImageSet]:
    """Return the figures on a part of the data, the logits, and the images that they are of.

    Raises:
        DataError: none of the images can be decoded.
    """
    loader = eval_loader(
        EvalImages(images, parts.preprocessing),
        eval_batch_size(config.data.image_size),
        num_workers=parts.train_loader.num_workers,
    )
    logits, decoded = no_grad_logits(model, loader, device)
    if not decoded.any():
        raise DataError("None of the images to evaluate on can be decoded; look at them with xcit data check.")
    judged = images.subset(decoded.nonzero().flatten().numpy())
    labels = torch.from_numpy(judged.labels)
    measure = multi_label_metrics if images.multi_label else classification_metrics
    return measure(logits[decoded], labels, images.class_names), logits[decoded], judged
