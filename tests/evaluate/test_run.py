"""A whole test set through a model: exact figures, broken images, precision, speed."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import BackendError, CheckpointError, ConfigError, DataError
from xcit.evaluate.classification import ClassificationMetrics, classification_metrics
from xcit.evaluate.multi_label import MultiLabelMetrics
from xcit.evaluate.record import evaluation_record
from xcit.evaluate.run import LARGEST_BATCH, evaluate_classifier

CPU = torch.device("cpu")
SIZE = 8
PREPROCESSING = Preprocessing((SIZE, SIZE), mean=(0.5,) * 3, std=(0.25,) * 3)


class Pictures:
    """Pictures that a number alone makes; some are broken. Worker processes can be given it."""

    def __init__(self, broken=()):
        self.broken = frozenset(broken)

    def __call__(self, number):
        if number in self.broken:
            raise DataError(f"picture {number}: is damaged.")
        pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def image_set(n=23, classes=7, broken=(), multi_label=False):
    rng = np.random.default_rng(5)
    labels = rng.random((n, classes)) < 0.4 if multi_label else rng.integers(0, classes, n)
    return ImageSet(
        class_names=tuple(f"class {i}" for i in range(classes)),
        names=[f"picture {i}" for i in range(n)],
        labels=labels,
        read=Pictures(broken),
        numbers=np.arange(n),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIZE * SIZE, 7))


def evaluate(model, images, **options):
    return evaluate_classifier(model, images, PREPROCESSING, device=CPU, **({"num_workers": 0} | options))


def by_hand(model, images, chosen):
    pixels = torch.stack([PREPROCESSING(images.open(i)) for i in chosen])
    with torch.no_grad():
        return model.eval()(pixels)


def test_figures_are_those_of_all_images_at_once(model):
    images = image_set()
    evaluation = evaluate(model, images, batch_size=5)
    logits = by_hand(model, images, range(23))
    expected = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    metrics = evaluation.metrics
    assert (metrics.confusion, metrics.num_top5_correct) == (expected.confusion, expected.num_top5_correct)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    assert metrics.calibration_error == pytest.approx(expected.calibration_error, abs=1e-5)
    assert evaluation.indices == tuple(range(23))
    assert evaluation.predicted == tuple(logits.argmax(1).tolist())
    assert evaluation.skipped == ()
    assert (evaluation.batch_size, evaluation.num_workers, evaluation.peak_memory_bytes) == (5, 0, None)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 100}, {"batch_size": 4, "num_workers": 2}])
def test_neither_batches_nor_workers_change_figures(model, options):
    images = image_set(broken={2, 9})
    one, other = evaluate(model, images, batch_size=6), evaluate(model, images, **options)
    assert one.metrics.confusion == other.metrics.confusion
    assert (one.indices, one.predicted, one.skipped) == (other.indices, other.predicted, other.skipped)
    assert one.metrics.loss == pytest.approx(other.metrics.loss, rel=1e-6)


def test_broken_images_are_listed_and_count_for_nothing(model):
    images = image_set(broken={0, 22})
    evaluation = evaluate(model, images, batch_size=22)  # the last batch has nothing but a broken image
    assert [tuple(s) for s in evaluation.skipped] == [
        ("picture 0", "picture 0: is damaged."), ("picture 22", "picture 22: is damaged."),
    ]  # fmt: skip
    assert evaluation.indices == tuple(range(1, 22))
    logits = by_hand(model, images, range(1, 22))
    expected = classification_metrics(logits, torch.from_numpy(images.labels[1:22]), images.class_names)
    assert evaluation.metrics.confusion == expected.confusion


def test_too_many_broken_images_are_refused_at_once(model):
    images = image_set(n=30, broken=range(4))
    seen = []
    with pytest.raises(DataError, match=r"4 of 30 .*share of 0.1 .*The first: picture 0: is damaged\. Mend"):
        evaluate(model, images, batch_size=2, on_progress=seen.append)
    assert seen == [2]  # the fourth broken one stands in the second batch
    assert len(evaluate(model, images, max_bad_fraction=0.2).skipped) == 4


def test_none_that_can_be_decoded(model):
    with pytest.raises(DataError, match=r"None of the 3 images could be decoded\. The first: picture 0"):
        evaluate(model, image_set(n=3, broken=range(3)), max_bad_fraction=1)


def test_several_labels_an_image(model):
    images = image_set(multi_label=True, broken={1})
    evaluation = evaluate(model, images, batch_size=4)
    assert isinstance(evaluation.metrics, MultiLabelMetrics)
    assert evaluation.metrics.num_images == 22
    logits = by_hand(model, images, [0, *range(2, 23)])
    targets = torch.from_numpy(images.labels)[[0, *range(2, 23)]].float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, targets).item()
    assert evaluation.metrics.loss == pytest.approx(expected, rel=1e-5)
    record = evaluation_record(evaluation)
    assert record["mean_average_precision"] == evaluation.metrics.mean_average_precision
    assert [row["num_images"] for row in record["classes"]] == images.labels[[0, *range(2, 23)]].sum(0).tolist()


def test_the_model_goes_back_to_the_mode_it_was_in(model):
    model.train()
    model[2].eval()
    evaluate(model, image_set())
    assert [module.training for module in model] == [True, True, False]
    with pytest.raises(DataError):
        evaluate(model, image_set(broken=range(23)))
    assert [module.training for module in model] == [True, True, False]


def test_progress_and_speed(model):
    seen = []
    evaluation = evaluate(model, image_set(n=10, broken={3}), batch_size=4, on_progress=seen.append)
    assert seen == [4, 8, 10]
    assert evaluation.speed.images_per_second > 0
    assert 0 <= evaluation.speed.data_wait <= 1
    assert evaluation.seconds > 6 / evaluation.speed.images_per_second  # the warm-up is in the one, not in the other


def test_the_first_batch_is_no_measurement(model):
    assert evaluate(model, image_set(n=10), batch_size=10).speed is None
    assert evaluation_record(evaluate(model, image_set(n=10), batch_size=10))["speed"]["images_per_second"] is None


def test_waiting_for_images_is_counted(model):
    class Slow(Pictures):
        def __call__(self, number):
            threading.Event().wait(0.02)
            return super().__call__(number)

    images = image_set(n=12)
    object.__setattr__(images, "read", Slow())
    assert evaluate(model, images, batch_size=3).speed.data_wait > 0.8


def test_the_batch_that_nobody_chose_is_bounded(model):
    assert evaluate(model, image_set(n=3)).batch_size == LARGEST_BATCH
    large = Preprocessing((1500, 1500))
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(8), model)
    assert evaluate_classifier(flat, image_set(n=2), large, device=CPU, num_workers=0).batch_size == 1


def test_bf16_runs_in_bf16(model):
    seen = []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    evaluation = evaluate(model, image_set(), precision="bf16")
    assert set(seen) == {torch.bfloat16}
    exact = evaluate(model, image_set())
    assert evaluation.metrics.loss == pytest.approx(exact.metrics.loss, rel=0.02)
    assert evaluation.metrics.loss != exact.metrics.loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_bad_fraction": 1.5}, "from 0 to 1"),
        ({"precision": "8"}, "32, bf16 or 16"),
        ({"precision": "16"}, "for GPUs; take bf16 or 32 on the CPU"),
        ({"batch_size": -3, "max_bad_fraction": -1}, "batch_size is -3.*; max_bad_fraction is -1"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, image_set(), **options)


class Deadly(Pictures):
    """The process that reads the sixth picture is killed, as for want of memory."""

    def __call__(self, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(number)


def test_a_worker_process_that_dies_is_a_sentence(model):
    images = image_set()
    object.__setattr__(images, "read", Deadly())
    with pytest.raises(BackendError, match=r"ended unexpectedly.* --num-workers"):
        evaluate(model, images, batch_size=4, num_workers=2)


def test_an_empty_set_is_refused(model):
    with pytest.raises(ConfigError, match="There are no images"):
        evaluate(model, image_set().subset([]))


def test_weights_that_are_not_finite(model):
    with torch.no_grad():
        model[2].bias[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(first: 2.bias\)"):
        evaluate(model, image_set())


def test_logits_that_overflow(model):
    with torch.no_grad():
        model[2].bias[3] = 3e38
        model[2].weight[3] = 3e38
    with pytest.raises(ConfigError, match="overflows in float32; use weights of a wider type"):
        evaluate(model, image_set())
    with pytest.raises(ConfigError, match="overflows in bfloat16; take --precision 32"):
        evaluate(model, image_set(), precision="bf16")


@pytest.mark.parametrize(("batch_size", "advice"), [(8, "take --batch-size 4"), (1, "take smaller images")])
def test_out_of_memory_is_a_sentence(model, batch_size, advice):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(
        ConfigError, match=f"Out of memory on cpu with {batch_size} images of 8 x 8 px at once; {advice}"
    ):
        evaluate(model, image_set(), batch_size=batch_size)


def test_other_errors_of_the_model_pass_through(model):
    def fail(*args):
        raise RuntimeError("a bug")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate(model, image_set())


def test_the_record_holds_the_whole_confusion_matrix(model):
    evaluation = evaluate(model, image_set(n=60))
    assert isinstance(evaluation.metrics, ClassificationMetrics)
    record = evaluation_record(evaluation)
    matrix = np.zeros((7, 7), dtype=int)
    for row in record["classes"]:
        matrix[row["index"], row["index"]] = row["num_correct"]
    for row in record["mistakes"]:
        matrix[row["true"], row["predicted"]] = row["num_images"]
        assert (row["true_name"], row["predicted_name"]) == (f"class {row['true']}", f"class {row['predicted']}")
    assert np.array_equal(matrix, evaluation.metrics.confusion)
    assert record["num_images"] == matrix.sum()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_cuda_gives_the_figures_of_the_cpu(model, precision):
    images = image_set(n=200)
    there = torch.device("cuda")
    ours = evaluate(model, images, batch_size=32)
    theirs = evaluate_classifier(
        model, images, PREPROCESSING, device=there, batch_size=32, num_workers=2, precision=precision
    )
    assert theirs.metrics.loss == pytest.approx(ours.metrics.loss, rel=1e-4 if precision == "32" else 0.02)
    if precision == "32":
        agree = sum(a == b for a, b in zip(ours.predicted, theirs.predicted, strict=True))
        assert agree >= 198
    assert theirs.peak_memory_bytes > 4 * sum(p.numel() for p in model.parameters())
