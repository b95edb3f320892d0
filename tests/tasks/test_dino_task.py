"""DINO's training against a plain loop that spells out every step, and what it notes, saves and refuses."""

import copy
import io
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import StochasticDepth

from xcit.data.batches import Crops
from xcit.data.sampling import derive_seed, seed_everything
from xcit.errors import ConfigError
from xcit.models.dino_head import DINOHead, DINOModel, teacher_of
from xcit.models.xcit import XCiT
from xcit.tasks.dino import FLAT, SHARP, DinoSchedule, DinoTask
from xcit.tasks.task import DivergedError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*smaller than the logging interval",
    "ignore:.*in eval mode at the start",
)

STEPS, EPOCHS, BATCH, OUT = 5, 4, 4, 12
SCHEDULE = DinoSchedule(
    lr=5e-3,
    min_lr=1e-4,
    warmup_lr=0.0,
    warmup_steps=6,
    total_steps=STEPS * EPOCHS,
    weight_decay=0.1,
    weight_decay_end=0.6,
    momentum=0.9,
    teacher_temp=0.07,
    warmup_teacher_temp=0.03,
    warmup_teacher_temp_steps=3 * STEPS,
    steps_per_epoch=STEPS,
)


class Draws(Dataset):
    """Views of noise: 2 of 16 px and 3 of 8 px an image."""

    def __init__(self, n=STEPS * BATCH, dtype=torch.float64):
        g = torch.Generator().manual_seed(3)
        self.views = [torch.randn(n, v, 1, s, s, generator=g, dtype=dtype) for v, s in ((2, 16), (3, 8))]

    def __len__(self):
        return len(self.views[0])

    def __getitem__(self, i):
        return Crops(tuple(view[i] for view in self.views), torch.tensor(i), torch.tensor(True))


def network(seed=0, norm_last_layer=True, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    config = {"patch_size": 8, "in_chans": 1, "num_classes": 0, "embed_dim": 16, "depth": 1, "num_heads": 2}
    head = DINOHead(16, OUT, hidden_dim=16, bottleneck_dim=8, norm_last_layer=norm_last_layer)
    return DINOModel(XCiT(**config | {"cls_attn_layers": 1} | options), head).to(dtype)


def task(student=None, teacher=None, dtype=torch.float64, **changes):
    student = student or network(dtype=dtype, drop_path_rate=0.3)
    settings = {"schedule": SCHEDULE, "clip_grad": 0.05, "freeze_last_layer_steps": 7, "seed": 5} | changes
    return DinoTask(student, teacher or teacher_of(student), **settings).to(dtype)


def fit(module, *callbacks, epochs=EPOCHS, data=None, batch=BATCH, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": epochs,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | options
    )
    loader = data if isinstance(data, DataLoader) else DataLoader(data or Draws(), batch_size=batch)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


class EpochFigures(lightning.Callback):
    """Asks for the figures at the end of each epoch, as a run does."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_end(self, trainer, module):
        self.rows.append(dict(module.epoch_figures()))


# --- the plain loop --------------------------------------------------------------------------------------------------


def soft(row, temp):
    e = (row / temp - (row / temp).max()).exp()
    return e / e.sum()


def half_cosine(start, end, i, n):
    return end + (start - end) * (1 + math.cos(math.pi * i / n)) / 2


def plain_loop(student, s=SCHEDULE, clip=0.05, frozen=7, seed=5, epochs=EPOCHS, data=None):
    """Train as main_dino.py does, every operation by hand; return teacher, centre, and a row of figures an epoch."""
    data = data or Draws()
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    center, rows, moments = torch.zeros(OUT, dtype=torch.float64), [], {}
    step = 0
    for epoch in range(epochs):
        warmup = s.warmup_teacher_temp_steps // s.steps_per_epoch
        temp = s.teacher_temp
        if epoch < warmup:
            temp = s.warmup_teacher_temp + (s.teacher_temp - s.warmup_teacher_temp) * epoch / max(1, warmup - 1)
        sums, count = Counter(), 0
        for index in range(STEPS):
            seed_everything(derive_seed(seed, epoch, index, 0))
            if step < s.warmup_steps:
                lr = s.warmup_lr + (s.lr - s.warmup_lr) * step / (s.warmup_steps - 1)
            else:
                lr = half_cosine(s.lr, s.min_lr, step - s.warmup_steps, s.total_steps - s.warmup_steps)
            decay = half_cosine(s.weight_decay, s.weight_decay_end, step, s.total_steps)
            momentum = half_cosine(s.momentum, 1.0, step, s.total_steps)

            large, small = (view[index * BATCH : (index + 1) * BATCH] for view in data.views)
            large, small = (torch.cat(list(views.unbind(1))) for views in (large, small))
            with torch.no_grad():
                taught = teacher.head(teacher.backbone(large))
            said = torch.stack(student.head(torch.cat([student.backbone(large), student.backbone(small)])).split(BATCH))
            p = torch.stack([soft(row - center, temp) for row in taught]).reshape(2, BATCH, OUT)
            loss = 0
            for t in range(2):
                for v in range(5):
                    if v != t:
                        for b in range(BATCH):
                            loss = loss - (p[t, b] * (said[v, b] / 0.1).log_softmax(0)).sum() / (BATCH * 8)
            q = [soft(said[v, b].detach(), 0.1) for v in range(5) for b in range(BATCH)]
            flat = p.reshape(-1, OUT)
            sums["train_loss"] += loss.item()
            sums["teacher_entropy"] += sum(-(r * r.log()).sum().item() for r in flat) / len(flat)
            sums["student_entropy"] += sum(-(r * r.log()).sum().item() for r in q) / len(q)
            mean = flat.mean(0)
            sums["teacher_spread"] += -(mean * mean.log()).sum().item()
            count += 1

            for parameter in student.parameters():
                parameter.grad = None
            loss.backward()
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    if parameter.grad is None:
                        continue
                    norm = parameter.grad.square().sum().sqrt()
                    grad = parameter.grad * min(1.0, clip / (norm.item() + 1e-6)) if clip else parameter.grad
                    if "last_layer" in name and step < frozen:
                        continue
                    m, v, n = moments.get(name, (0, 0, 0))
                    m, v, n = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, n + 1
                    moments[name] = m, v, n
                    if parameter.ndim > 1:
                        parameter.mul_(1 - lr * decay)
                    parameter -= lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
                for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                    ours.copy_(momentum * ours + (1 - momentum) * theirs)
                center = 0.9 * center + 0.1 * taught.mean(0)
            step += 1
        rows.append({name: total / count for name, total in sums.items()})
        rows[-1]["kl"] = rows[-1]["train_loss"] - rows[-1]["teacher_entropy"]
    return teacher, center, rows


@pytest.mark.parametrize(
    ("norm_last_layer", "clip", "frozen"), [(True, 0.05, 7), (False, 0.05, 3), (False, 0.0, 0), (True, 3.0, 0)]
)
def test_twenty_steps_are_those_of_a_plain_loop(norm_last_layer, clip, frozen):
    student = network(norm_last_layer=norm_last_layer, drop_path_rate=0.3)
    alone = copy.deepcopy(student)
    begun = {name: value.clone() for name, value in student.state_dict().items()}
    module, notes = task(student, clip_grad=clip, freeze_last_layer_steps=frozen), EpochFigures()
    fit(module, notes)
    teacher, center, rows = plain_loop(alone, clip=clip, frozen=frozen)
    for ours, theirs in ((module.student, alone), (module.teacher, teacher)):
        for name, value in theirs.state_dict().items():  # batch-norm statistics included
            torch.testing.assert_close(
                ours.state_dict()[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.testing.assert_close(module.center, center, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(notes.rows, rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, begun[name])}
    assert {"backbone.cls_token", "head.last_layer.weight_v"} <= moved
    assert ("head.last_layer.weight_g" in moved) is not norm_last_layer


def test_the_last_layer_stays_while_it_is_frozen():
    class Watch(lightning.Callback):
        changed = ()

        def on_train_batch_end(self, trainer, module, *_):
            v = module.student.head.last_layer.weight_v
            self.changed += (not torch.equal(v, begun),)

    module, watch = task(freeze_last_layer_steps=7), Watch()
    begun = module.student.head.last_layer.weight_v.clone()
    trainer = fit(module, watch, epochs=2)
    assert watch.changed == (False,) * 7 + (True,) * 3
    state = trainer.optimizers[0].state[module.student.head.last_layer.weight_v]
    assert state["step"] == 3


def test_what_is_decayed_is_what_the_released_code_decays():
    module = task(network(norm_last_layer=False))
    names = {id(p): name for name, p in module.student.named_parameters()}
    optimizer = module.configure_optimizers()
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, p in module.student.named_parameters():
        assert decay[name] == (0.0 if p.ndim == 1 or name.endswith(".bias") else 0.1), name
    assert decay["backbone.blocks.0.attn.temperature"] == decay["backbone.cls_token"] == 0.1
    assert decay["head.last_layer.weight_g"] == 0.1
    fixed = task().configure_optimizers()
    assert len(decay) - 1 == sum(len(group["params"]) for group in fixed.param_groups)


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_is_what_a_run_leaves_and_is_named_once():
    module = task()
    assert module.model is module.teacher.backbone
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "teacher", "center"}
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert module.teacher.training
    assert module.merit({"epoch": 3, "train_loss": 1.0}) > module.merit({"epoch": 2, "train_loss": 0.1})


def test_the_teachers_batch_norm_follows_its_own_global_views():
    module = task()
    norms = [m for m in module.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    fit(module, epochs=1)
    assert {int(norm.num_batches_tracked) for norm in norms} == {STEPS}
    students = [m for m in module.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in students} == {2 * STEPS}
    assert not torch.allclose(norms[0].running_mean, students[0].running_mean)


def test_a_teacher_of_other_shapes_is_refused():
    with pytest.raises(ConfigError, match="teacher_of"):
        task(network(), teacher_of(network(embed_dim=16, depth=2)))


# --- precision, layout, memory ---------------------------------------------------------------------------------------


def one_epoch(**changes):
    module = task(network(), **changes)
    notes = EpochFigures()
    fit(module, notes, epochs=1)
    return notes.rows[0], module


def test_the_loss_is_taken_in_float32_under_bfloat16():
    seen = []

    class Watch(DinoTask):
        def watch(self, loss, num_images):
            seen.append(loss.dtype)
            super().watch(loss, num_images)

    student = network(dtype=torch.float32)
    module = Watch(student, teacher_of(student), schedule=SCHEDULE)
    notes = EpochFigures()
    fit(module, notes, epochs=1, data=Draws(dtype=torch.float32), precision="bf16-mixed")
    exact = task(network(), clip_grad=3.0, freeze_last_layer_steps=0)
    expected = EpochFigures()
    fit(exact, expected, epochs=1)
    assert set(seen) == {torch.float32}
    assert module.center.dtype == torch.float32
    assert notes.rows[0] == pytest.approx(expected.rows[0], rel=0.05, abs=0.05)


def test_channels_last_and_gradient_checkpointing_compute_the_same():
    plain, module = one_epoch()
    other, laid_out = one_epoch(channels_last=True)
    assert other == pytest.approx(plain, rel=1e-9)
    student = network()
    student.backbone.set_grad_checkpointing()
    checkpointed, notes = task(student), EpochFigures()
    fit(checkpointed, notes, epochs=1)
    assert notes.rows[0] == pytest.approx(plain, rel=1e-9)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)
        torch.testing.assert_close(laid_out.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_compiling_changes_no_names_and_wraps_both(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda net: wrapped.append(net) or net.forward)
    plain, compiled = one_epoch(), one_epoch(compile=True)
    assert wrapped == [compiled[1].student, compiled[1].teacher]
    assert compiled[0] == plain[0]
    assert compiled[1].state_dict().keys() == plain[1].state_dict().keys()


def without_statistics(module):
    """Batch norm from fixed statistics, so that parts of a batch are worth as much as the whole."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return module


def test_accumulated_gradients_make_one_step_of_everything():
    whole, parts = (without_statistics(task(network())) for _ in range(2))
    notes = EpochFigures(), EpochFigures()
    fit(whole, notes[0], epochs=2)
    fit(parts, notes[1], epochs=2, batch=BATCH // 2, accumulate_grad_batches=2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)
    for ours, theirs in zip(notes[1].rows, notes[0].rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_take_in_what_a_look_adds_and_begin_anew():
    seen = []

    def look(figures):
        seen.append(dict(figures))
        return {"knn": 0.5} if len(seen) == 1 else {}

    module, notes = task(), EpochFigures()
    module.look = look
    fit(module, notes, epochs=2)
    names = {"train_loss", "teacher_entropy", "student_entropy", "teacher_spread", "kl"}
    assert [row.keys() for row in seen] == [names, names]  # once an epoch
    assert notes.rows == [seen[0] | {"knn": 0.5}, seen[1]]
    assert notes.rows[0]["train_loss"] != notes.rows[1]["train_loss"]
    assert module.figures == notes.rows[1]


def test_each_collapse_is_named():
    module = task()
    k = math.log(OUT)
    for spread, entropy, expected in (
        (k, k, FLAT),
        (k - 0.01, k - 0.03, FLAT),
        (k - 0.12, k - 0.14, FLAT),  # nearly uniform
        (0.55 * k, 0.55 * k - 0.05, FLAT),
        (0.45 * k, 0.45 * k - 0.05, SHARP),
        (0.0, 0.0, SHARP),
        (1.0, 0.98, SHARP),
        (1.0, 0.5, None),
        (k, k - 0.1, None),
    ):
        assert module.collapse({"teacher_spread": spread, "teacher_entropy": entropy}) == expected


@pytest.mark.parametrize(
    ("changes", "schedule", "expected"),
    [
        ({"center_momentum": 1.0}, {"teacher_temp": 0.005}, SHARP),
        ({}, {"teacher_temp": 3.0}, FLAT),
    ],
)
def test_a_collapse_that_is_brought_about_is_seen(changes, schedule, expected):
    """Without centring one output wins everywhere; without sharpening all outputs come to be equal."""
    s = SCHEDULE._replace(
        **{"lr": 0.02, "momentum": 0.5, "warmup_teacher_temp_steps": 0, "weight_decay": 0.0, "weight_decay_end": 0.0}
        | {"total_steps": 12 * STEPS}
        | schedule
    )
    module, notes = task(network(), schedule=s, clip_grad=0, freeze_last_layer_steps=0, **changes), EpochFigures()
    fit(module, notes, epochs=12)
    assert module.collapse(notes.rows[-1]) == expected, notes.rows[-1]


def test_a_loss_that_is_no_number_is_refused():
    data = Draws()
    data.views[0][9, 0, 0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"loss became nan at step 3 \(epoch 1\).*clip_grad"):
        fit(task(), data=data)


# --- going on --------------------------------------------------------------------------------------------------------


class StatefulLoader(DataLoader):
    """Goes on at the batch where it was left, as a run's loader does."""

    skip = done = 0

    def __iter__(self):
        self.done = self.skip
        batches = list(super().__iter__())[self.skip :]
        self.skip = 0
        for batch in batches:
            self.done += 1
            yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.skip = state["done"]


class SaveAt(lightning.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def loader():
    return StatefulLoader(Draws(), batch_size=BATCH)


def test_a_run_that_is_gone_on_with_is_the_same_to_the_last_bit(tmp_path):
    path, whole = tmp_path / "state.ckpt", EpochFigures()
    first = task()
    fit(first, SaveAt(8, path), whole, data=loader())
    again, rest = task(network(seed=9, drop_path_rate=0.3)), EpochFigures()
    trainer = fit(again, rest, data=loader(), ckpt_path=path)
    assert trainer.global_step == STEPS * EPOCHS
    assert rest.rows == whole.rows[1:]  # the epoch in the middle of which it was saved has all of its figures
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    saved = torch.load(path, weights_only=True)["epoch_so_far"]
    assert saved["num_images"] == saved["loss_count"] == 3 * BATCH


# --- several processes -----------------------------------------------------------------------------------------------

RECORD = """
import sys, os
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_dino_task as t
module, notes = t.two_process_task(), t.EpochFigures()
rank = int(os.environ["RANK"])
class Half(t.Draws):
    def __init__(self):
        super().__init__()
        self.views = [view[rank::2] for view in self.views]
t.fit(module, notes, data=t.DataLoader(Half(), batch_size=t.BATCH // 2), devices=2, strategy="ddp",
      use_distributed_sampler=False)
torch.save({"state": module.state_dict(), "rows": notes.rows}, f"{sys.argv[2]}/{rank}.pt")
"""


def two_process_task():
    """Neither stochastic depth, whose draws differ between processes, nor statistics of a half batch each."""
    return without_statistics(task(network()))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    with_port = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RECORD, str(Path(__file__).parent), str(tmp_path)],
            env=with_port | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    records = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone, notes = two_process_task(), EpochFigures()
    fit(alone, notes)
    assert torch.equal(records[0]["state"]["center"], records[1]["state"]["center"])
    for name, value in alone.state_dict().items():
        for record in records:
            torch.testing.assert_close(record["state"][name], value, rtol=1e-9, atol=1e-9, msg=name)
    for record in records:
        for ours, theirs in zip(record["rows"], notes.rows, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_state_is_plain_data():
    module = task()
    trainer = fit(module, epochs=1)
    buffer = io.BytesIO()
    torch.save(trainer.optimizers[0].state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
