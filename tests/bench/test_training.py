"""The training bench takes the step that a run takes, with both models in the same task."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from xcit.bench import cases, contenders, runner, timer
from xcit.bench.training import NUM_CLASSES, make_batch, make_task, training_step
from xcit.data.batches import LabelledImages
from xcit.models.factory import create_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*smaller than the"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

CPU = torch.device("cpu")
CASE = cases.TrainingCase("xcit_nano_12_p16", 32, 2)


def test_a_case_from_start_to_row(tmp_path):
    plan = timer.Plan(warmup=0, min_rounds=2, max_rounds=2, min_sample_ms=0)
    rows = runner.run(
        cases.TRAINING, [CASE], results_dir=tmp_path, device=CPU, dtype=torch.float32, plan=plan, report=lambda _: None
    )
    assert [row["competitor"] for row in rows] == ["timm", "auto"]
    assert rows[1]["form"] in ("tokens", "covariance")
    for row in rows:
        assert float(row["max_rel_diff"]) < 1e-4
        assert float(row["median_ms"]) > 0
        assert float(row["peak_mib"]) >= float(row["saved_mib"]) > 0
    assert (tmp_path / "training.csv").exists()


def test_the_step_is_lightnings():
    """A step by hand leaves bitwise the weights that one of one batch leaves under Lightning's loop."""
    torch.manual_seed(0)
    by_hand = create_model("xcit_nano_12_p16", num_classes=NUM_CLASSES)
    by_lightning = create_model("xcit_nano_12_p16", num_classes=NUM_CLASSES)
    by_lightning.load_state_dict(by_hand.state_dict())
    batch = make_batch(CASE, CPU, 0)

    task = make_task(by_hand, 5).train()
    step = training_step(task, batch)
    loss = step()

    task = make_task(by_lightning, 5)
    seen = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(outputs["loss"])

    images = [LabelledImages(*(field[i] for field in batch)) for i in range(CASE.batch_size)]
    lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(task, DataLoader(images, batch_size=CASE.batch_size))
    assert torch.equal(loss, seen[0])
    for (name, mine), theirs in zip(by_hand.state_dict().items(), by_lightning.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_every_call_does_the_same():
    (contender,) = contenders.build(CASE, ("auto",), device=CPU, dtype=torch.float32)
    first, again = contender.evidence(), contender.evidence()
    # the weights moved by a hair; another mixture of the two images would tell by far more
    assert torch.allclose(first["output"], again["output"], atol=5e-3)
    assert first.keys() == again.keys()
    assert len(first) > 100


def test_the_promised_case_is_among_them():
    assert cases.TrainingCase("xcit_small_12_p8", 384, 2) in cases.TRAINING.cases
