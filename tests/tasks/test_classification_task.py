"""The training task: loss, schedule, weight decay, averages and seeds, against formulas written out here."""

import math

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from xcit.data.batches import LabelledImages
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError
from xcit.models.xcit import XCiT
from xcit.tasks.classification import ClassificationTask, Distillation
from xcit.tasks.task import DivergedError, Schedule
from xcit.tasks.teacher import Teacher

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*smaller than the logging interval",
    "ignore:.*in eval mode at the start",
)

SCHEDULE = Schedule(lr=1e-2, min_lr=1e-4, warmup_lr=1e-3, warmup_steps=4, total_steps=20)
PREPARED = Preprocessing((16, 16), mean=(0.5,), std=(0.5,), in_chans=1)


def model(**changes):
    settings = {"embed_dim": 16, "depth": 1, "num_heads": 2, "cls_attn_layers": 1} | changes
    torch.manual_seed(0)
    return XCiT(**{"patch_size": 8, "in_chans": 1, "num_classes": 3} | settings)


def task(network=None, **changes):
    settings = {"schedule": SCHEDULE, "weight_decay": 0.1, "label_smoothing": 0.1, "seed": 5} | changes
    return ClassificationTask(network or model(), **settings)


def labelled(pixels, label, index=0, decoded=True):
    return LabelledImages(pixels, torch.as_tensor(label), torch.tensor(index), torch.tensor(decoded))


def batch_of(pixels, labels, decoded=None):
    labels = torch.as_tensor(labels)
    known = torch.ones(len(pixels), dtype=torch.bool) if decoded is None else torch.tensor(decoded)
    return LabelledImages(pixels, labels, torch.arange(len(pixels)), known)


def images(n=40):
    g = torch.Generator().manual_seed(0)
    return [labelled(torch.randn(1, 16, 16, generator=g), i % 3, i) for i in range(n)]


def fit(module, *callbacks, epochs=2, data=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = data or images()
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data[:11], batch_size=6))
    return trainer


def loss_of(module, batch):
    """The loss of one step outside of a trainer; batch norm from its statistics."""
    module.watch = lambda *_: None
    module.eval()
    return module.training_step(batch, 0)


class Notes(lightning.Callback):
    """Notes the learning rate that each step was taken with, and torch's generator at the first batch of an epoch."""

    def __init__(self):
        self.rates, self.draws = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append({group["lr"] for group in optimizer.param_groups})

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = torch.get_rng_state().sum().item()

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.draws.append(torch.initial_seed())


# --- steps -----------------------------------------------------------------------------------------------------------


def test_warm_up_then_cosine_by_the_step():
    notes = Notes()
    fit(task(), notes)
    expected = [1e-3 + 9e-3 * t / 4 for t in range(4)]
    expected += [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(4, 20)]
    assert all(len(rates) == 1 for rates in notes.rates)
    assert [rate for (rate,) in notes.rates] == pytest.approx(expected)


def test_accumulated_gradients_make_one_step_of_the_schedule():
    notes = Notes()
    fit(task(), notes, accumulate_grad_batches=2)
    assert [rate for (rate,) in notes.rates][:3] == pytest.approx([1e-3, 1e-3 + 9e-3 / 4, 1e-3 + 9e-3 / 2])
    assert len(notes.rates) == 10


def test_every_step_draws_by_seed_epoch_and_batch():
    first, again, other = Notes(), Notes(), Notes()
    fit(task(), first)
    torch.manual_seed(123)
    fit(task(), again)
    fit(task(seed=6), other)
    assert first.draws == again.draws
    assert len({*first.draws, *other.draws}) == 40


def test_vectors_and_what_the_model_names_are_not_decayed():
    module = task()
    names = {id(p): name for name, p in module.model.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == dict(module.model.named_parameters()).keys()
    for name, p in module.model.named_parameters():
        assert decay[name] == (0.0 if p.ndim <= 1 or name == "cls_token" else 0.1), name
    assert decay["blocks.0.attn.temperature"] == 0.1  # as in the released training


def test_the_optimizer_is_the_one_that_is_asked_for():
    assert isinstance(task(opt="sgd").configure_optimizers()["optimizer"], torch.optim.SGD)
    assert isinstance(task().configure_optimizers()["optimizer"], torch.optim.AdamW)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_loss_is_smoothed_cross_entropy():
    module = task()
    batch = batch_of(torch.randn(4, 1, 16, 16), [0, 1, 2, 0])
    log_p = module.eval().model(batch.images).log_softmax(1)
    plain = -log_p.gather(1, batch.labels[:, None]).mean()
    torch.testing.assert_close(loss_of(module, batch), 0.9 * plain - 0.1 * log_p.mean())


def test_class_weights_weigh_the_images_of_a_class():
    weights = torch.tensor([0.5, 1.0, 4.0])
    module = task(class_weights=weights, label_smoothing=0.0)
    batch = batch_of(torch.randn(4, 1, 16, 16), [0, 1, 2, 0])
    log_p = module.eval().model(batch.images).log_softmax(1)
    each = weights[batch.labels]
    expected = -(each * log_p.gather(1, batch.labels[:, None])[:, 0]).sum() / each.sum()
    torch.testing.assert_close(loss_of(module, batch), expected)
    assert not any("class_weights" in name for name in module.state_dict())  # they follow from the data


def test_a_mixer_gives_images_and_targets_and_does_the_smoothing():
    def mixer(pixels, labels):
        return pixels.flip(0), 0.7 * F.one_hot(labels, 3) + 0.1

    module = task(mixer=mixer)
    batch = batch_of(torch.randn(4, 1, 16, 16), [0, 1, 2, 0])
    log_p = module.eval().model(batch.images.flip(0)).log_softmax(1)
    expected = -((0.7 * F.one_hot(batch.labels, 3) + 0.1) * log_p).sum(1).mean()
    torch.testing.assert_close(loss_of(module, batch), expected)


def test_several_labels_have_a_binary_cross_entropy_each():
    module = task(multi_label=True)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    batch = batch_of(torch.randn(2, 1, 16, 16), labels)
    p = module.eval().model(batch.images).sigmoid()
    wanted = 0.9 * labels + 0.05
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    torch.testing.assert_close(loss_of(module, batch), expected)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher_is_listened_to_and_not_trained(kind):
    teacher = Teacher(model(embed_dim=32), name="teacher", student=PREPARED, own=PREPARED)
    module = task(distillation=Distillation(teacher, kind, alpha=0.3, tau=2.0), label_smoothing=0.0)
    batch = batch_of(torch.randn(4, 1, 16, 16), [0, 1, 2, 0])
    logits, taught = module.eval().model(batch.images), teacher.model(batch.images)
    plain = F.cross_entropy(logits, batch.labels)
    if kind == "hard":
        part = F.cross_entropy(logits, taught.argmax(1))
    else:
        p, q = (taught / 2).softmax(1), (logits / 2).softmax(1)
        part = 4 * (p * (p / q).log()).sum() / 12
    torch.testing.assert_close(loss_of(module, batch), 0.7 * plain + 0.3 * part)

    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    module = task(distillation=module.distillation)
    fit(module, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert not any("teacher" in name for name in (*module.state_dict(), *dict(module.named_parameters())))


# --- parts that stay -------------------------------------------------------------------------------------------------


def test_what_is_frozen_stays_statistics_included():
    module = task(freeze=("patch_embed",))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit(module, epochs=1)
    after = module.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith("patch_embed")]
    assert {"head.weight", "blocks.0.attn.temperature", "blocks.0.local_mp.bn.running_mean"} <= moved
    assert any(name.startswith("patch_embed") and name.endswith("running_mean") for name in before)


def test_averages_follow_the_raw_weights_and_stay_in_evaluation_mode():
    module = task(ema_decay=0.8)
    name, seen = "head.weight", [module.model.head.weight.detach().clone()]

    class Recording(lightning.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            assert task.model.training
            assert not any(part.training for part in task.ema.modules())
            seen.append(task.model.state_dict()[name].clone())

    fit(module, Recording(), epochs=1)
    average = seen[0]
    for raw in seen[1:]:
        average = 0.8 * average + 0.2 * raw
    torch.testing.assert_close(module.ema.module.state_dict()[name], average)
    assert not any(p.requires_grad for p in module.ema.parameters())
    assert {"ema_val_loss", "ema_val_accuracy"} <= module.figures.keys()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_it_learns_and_its_figures_are_counted_by_the_image():
    data = [labelled(torch.full((1, 16, 16), float(i % 3)) + 0.1 * torch.randn(1, 16, 16), i % 3, i) for i in range(47)]
    module = task(weight_decay=0.0, schedule=SCHEDULE._replace(total_steps=144))
    losses = []
    watch = module.watch
    module.watch = lambda loss, n: (losses.append((loss.item(), n)), watch(loss, n))[1]
    fit(module, epochs=12, data=data)
    assert module.figures["val_accuracy"] > 0.9
    assert module.figures.keys() == {"train_loss", "val_loss", "val_accuracy"}
    last = losses[-12:]  # of the last epoch: eleven batches of four and one of three
    assert sum(n for _, n in last) == 47
    assert module.figures["train_loss"] == pytest.approx(sum(loss * n for loss, n in last) / 47)

    held = batch_of(torch.stack([item.images for item in data[:11]]), torch.stack([item.labels for item in data[:11]]))
    logits = module.model.eval()(held.images)
    assert module.figures["val_loss"] == pytest.approx(F.cross_entropy(logits, held.labels).item(), rel=1e-5)
    assert module.figures["val_accuracy"] == (logits.argmax(1) == held.labels).double().mean().item()


def test_images_that_could_not_be_decoded_count_for_nothing():
    data = images(12)
    broken = [item._replace(images=torch.full((1, 16, 16), 1e3), decoded=torch.tensor(False)) for item in data[:6]]
    sound, mixed = task(), task()
    fit(sound, epochs=1, data=data)
    module_figures = []
    for module, held in ((sound, data[6:]), (mixed, [*broken, *data[6:]])):
        mixed.load_state_dict(sound.state_dict())
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.validate(module, DataLoader(held, batch_size=4), verbose=False)
        module_figures.append({k: v for k, v in module.figures.items() if k != "train_loss"})
    assert module_figures[0] == pytest.approx(module_figures[1])


def test_several_labels_give_mean_average_precision():
    data = [item._replace(labels=F.one_hot(item.labels, 3).float()) for item in images(12)]
    module = task(multi_label=True)
    fit(module, epochs=1, data=data)
    assert module.figures.keys() == {"train_loss", "val_loss", "val_map"}
    assert 0 < module.figures["val_map"] <= 1


@pytest.mark.parametrize("bad", [3, None])
def test_a_loss_that_is_no_number_stops_with_a_sentence(bad):
    """In the fourth training step, or (the weights having been broken by the last step) in validation."""
    data = images()
    module = task()
    if bad is None:
        module.on_validation_start = lambda: module.model.head.weight.data.fill_(float("nan"))
        expected = r"The validation loss became nan at step 11 \(epoch 1\)"
    else:
        data[4 * bad] = data[0]._replace(images=torch.full((1, 16, 16), float("inf")))
        expected = rf"The loss became nan at step {bad + 1} \(epoch 1\), with a learning rate of .*try a lower --lr"
    with pytest.raises(DivergedError, match=expected):
        fit(module, epochs=1, data=data)


def test_a_compiled_model_has_the_same_weights_and_names(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda network: wrapped.append(network) or network.forward)
    plain, compiled = task(), task(compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert wrapped == [compiled.model]
    assert compiled._forward[0] == compiled.model.forward


def test_a_model_that_was_evaluated_before_is_trained():
    module = task(model().eval(), freeze=("patch_embed",))
    assert module.model.blocks.training
    assert not any(part.training for part in module.model.patch_embed.modules())


def test_channels_last_reaches_the_model():
    module = task(channels_last=True, network=model(in_chans=3))
    seen = []
    module.model.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    loss_of(module, batch_of(torch.randn(2, 3, 16, 16), [0, 1]))
    assert seen == [True]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_model_without_classes_is_refused():
    with pytest.raises(ConfigError, match="num_classes is 0"):
        task(model(num_classes=0))


def test_what_excludes_each_other_is_refused():
    weights = torch.ones(3)
    with pytest.raises(ConfigError, match="Class weights need hard targets"):
        task(class_weights=weights, mixer=lambda x, y: (x, y))
    with pytest.raises(ConfigError, match="are for images of one class each"):
        task(class_weights=weights, multi_label=True)
