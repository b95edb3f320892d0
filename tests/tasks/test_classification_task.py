"""The training task: loss, schedule, weight decay and seeds, against formulas written out here."""

import math

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from xcit.data.batches import LabelledImages
from xcit.errors import ConfigError, XCiTError
from xcit.models.xcit import XCiT
from xcit.tasks.classification import ClassificationTask

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*smaller than the logging interval"
)

SETTINGS = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "warmup_fraction": 0.2,
    "min_lr": 1e-4,
    "label_smoothing": 0.1,
    "mixup": 0.0,
    "seed": 5,
}


def task(**changes):
    model = XCiT(patch_size=8, in_chans=1, num_classes=3, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1)
    return ClassificationTask(model, **(SETTINGS | changes))


def images(n=40):
    g = torch.Generator().manual_seed(0)
    return [LabelledImages(torch.randn(1, 16, 16, generator=g), torch.tensor(i % 3)) for i in range(n)]


def fit(module, *callbacks, epochs=2, data=None):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = data or images()
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data[:12], batch_size=6))
    return trainer


class Rates(lightning.Callback):
    """Notes the learning rate that each step was taken with."""

    def __init__(self):
        self.rates, self.draws = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.draws.append(torch.get_rng_state().sum().item())


def test_warm_up_then_cosine_by_the_step():
    rates = Rates()
    fit(task(), rates)
    steps, warmup, low, peak = 20, 4, 1e-4, 1e-2
    expected = [peak / 100 + (peak - peak / 100) * t / warmup for t in range(warmup)]
    expected += [low + (peak - low) * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(warmup, steps)]
    assert rates.rates == pytest.approx(expected)


def test_every_epoch_draws_by_seed_and_epoch():
    first, again, other = Rates(), Rates(), Rates()
    fit(task(), first)
    torch.manual_seed(123)
    fit(task(), again)
    fit(task(seed=6), other)
    assert first.draws == again.draws
    assert len({*first.draws, *other.draws}) == 4


def test_vectors_and_what_the_model_names_are_not_decayed():
    module = task()
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    module.trainer = trainer
    trainer.fit_loop.max_batches = 1
    type(trainer).estimated_stepping_batches  # noqa: B018 (a property; its value below is the loop's)
    trainer.fit_loop.setup_data = lambda: None
    names = {id(p): name for name, p in module.model.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == dict(module.model.named_parameters()).keys()
    spared = {"cls_token", "pos_embeder.token_projection.weight"}
    for name, p in module.model.named_parameters():
        assert decay[name] == (0.0 if p.ndim <= 1 or name in spared else 0.1), name


def test_loss_is_smoothed_cross_entropy():
    module = task()
    batch = LabelledImages(torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]))
    module.log = lambda *args, **kwargs: None
    module.eval()  # batch norm from its statistics
    logits = module.model(batch.images)
    log_p = logits.log_softmax(1)
    plain = -log_p.gather(1, batch.labels[:, None]).mean()
    expected = 0.9 * plain - 0.1 * log_p.mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_mixup_mixes_images_and_targets():
    seen = {}
    module = task(mixup=1.0)
    module.log = lambda *args, **kwargs: None
    module.model.forward = lambda x: seen.setdefault("x", x).flatten(1)[:, :3]
    batch = LabelledImages(torch.eye(3)[:, None, None, :] * torch.ones(3, 1, 16, 1), torch.tensor([0, 1, 2]))
    loss = module.training_step(batch, 0)
    # Each image is one-hot in its own class, so a mixed image's first row is its mixed target.
    target = 0.9 * seen["x"][:, 0, 0] + 0.1 / 3
    assert 0.01 < (seen["x"][:, 0, 0].max(dim=1).values).min() < 0.9999
    torch.testing.assert_close(loss, F.cross_entropy(seen["x"].flatten(1)[:, :3], target))


def test_it_learns_and_logs():
    data = [
        LabelledImages(torch.full((1, 16, 16), float(i % 3)) + 0.1 * torch.randn(1, 16, 16), torch.tensor(i % 3))
        for i in range(48)
    ]
    trainer = fit(task(weight_decay=0.0), epochs=12, data=data)
    assert {"train_loss", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val_accuracy"] > 0.9


@pytest.mark.parametrize("bad", [3, None])
def test_a_loss_that_is_no_number_stops_with_a_sentence(bad):
    """In the fourth training step, or (the weights having been broken by the last step) in validation."""
    data = images()
    module = task()
    if bad is None:
        module.on_train_epoch_end = lambda: None
        module.on_validation_start = lambda: module.model.head.weight.data.fill_(float("nan"))
        expected = r"The validation loss became nan at step 10 \(epoch 1\)"
    else:
        data[4 * bad] = LabelledImages(torch.full((1, 16, 16), float("inf")), torch.tensor(0))
        expected = rf"The loss became nan at step {bad} \(epoch 1\).*try a lower lr \(a third of 0.01\)"
    trainer_kwargs = {"epochs": 1, "data": data}
    with pytest.raises(XCiTError, match=expected):
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(trainer_kwargs["data"], batch_size=4), DataLoader(data[:12], batch_size=6))


def test_a_model_without_classes_is_refused():
    model = XCiT(patch_size=8, in_chans=1, num_classes=0, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ConfigError, match="num_classes is 0"):
        ClassificationTask(model, **SETTINGS)
