"""One model over rows of an image in several processes: outputs, gradients and statistics are those of one process.

Run as a program (FOLDER SIZE ...), this file is groups of processes: it imports torch once and forks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from xcit.errors import ConfigError, ShapeError, XCiTError
from xcit.models.row_collectives import RowGroup
from xcit.models.row_parallel import RowParallel, split_rows
from xcit.models.variants import VARIANTS
from xcit.models.xcit import XCiT

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
DEADLINE = timedelta(seconds=120)
"""Of one message."""
LIMITS = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-5, 1e-4)}
"""Relative errors allowed of outputs, and of gradients and what follows from them, against one process in float64."""

CASES: dict[str, dict[str, Any]] = {
    "p8": {"config": TINY | {"patch_size": 8}, "size": (97, 45), "steps": 2},
    "p16": {"config": TINY | {"tokens_norm": False, "in_chans": 2}, "size": (145, 45), "frozen": True},
    "average": {
        "config": TINY | {"patch_size": 8, "global_pool": "avg", "drop_path_rate": 0.4, "qkv_bias": False},
        "size": (90, 33),
        "momentum": None,
        "steps": 2,
        "processes": (3,),
    },
    "features": {
        "config": TINY | {"num_classes": 0, "use_pos": False, "drop_path_rate": 0.2},
        "size": (128, 100),
        "processes": (2,),
    },
    "float32": {"config": TINY | {"patch_size": 8}, "size": (97, 45), "dtype": torch.float32, "processes": (4,)},
} | {
    variant: {"config": TINY | {"patch_size": 8, "depth": 1, "variant": variant}, "size": (83, 24), "processes": (2,)}
    for variant in VARIANTS
}
NANO = {"embed_dim": 128, "depth": 12, "num_heads": 4, "num_classes": 10, "tokens_norm": False}
LARGER: dict[str, dict[str, Any]] = {
    f"nano_p{p} {dtype}": {
        "config": NANO | {"patch_size": p},
        "size": (213, 101),
        "dtype": dtype,
        "steps": 2 if dtype == torch.float64 else 0,
    }
    for p in (8, 16)
    for dtype in (torch.float64, torch.float32)
}


# --- both sides: what is measured of a case --------------------------------------------------------------------------


def measure(
    case: dict[str, Any], model: XCiT, run: Callable[[Tensor], Tensor], images: Tensor, sync: Callable[[], None]
) -> dict[str, Tensor]:
    """Logits, every gradient, and the weights and statistics after some steps."""
    found = {}
    images = images.clone().requires_grad_()

    def backward() -> Tensor:
        model.zero_grad()
        torch.manual_seed(5)
        logits = run(images)
        ((logits * case["targets"]).sum() + 0.1 * logits.square().sum()).backward()
        sync()
        return logits

    for norm in norms(model):
        norm.momentum = case.get("momentum", norm.momentum)
    for mode in ("eval", "train"):
        model.train(mode == "train")
        if case.get("frozen"):
            model.patch_embed.eval()
            model.patch_embed.proj[0][0].weight.requires_grad = False
        images.grad = None
        found[f"{mode} logits"] = backward().detach()
        assert images.grad is not None
        found[f"{mode} images"] = images.grad
        found |= {f"{mode} {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found["unrecorded logits"] = run(images)
    found |= {f"statistics {name}": b.clone() for name, b in model.named_buffers()}
    if case.get("steps"):
        # The bias of class attention's keys has no gradient but rounding errors, which AdamW divides by eps.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, eps=1e-6)
        for _ in range(case["steps"]):
            backward()
            optimizer.step()
        found |= {f"steps {name}": t.clone() for name, t in model.state_dict().items()}
    return found


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def built(case: dict[str, Any], dtype: torch.dtype | None = None) -> XCiT:
    model = XCiT(**case["config"]).to(dtype or case["images"].dtype)
    model.load_state_dict(case["state"])
    return model


# --- the processes ---------------------------------------------------------------------------------------------------


def main(folder: Path, sizes: list[int]) -> None:
    for size in sizes:
        children = {forked(folder, rank, size) for rank in range(size)}
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:  # the others would wait for it
                for other in children:
                    os.kill(other, signal.SIGKILL)
                raise SystemExit(1)


def forked(folder: Path, rank: int, size: int) -> int:
    child = os.fork()
    if not child:
        try:
            work(folder, rank, size)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def work(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=DEADLINE)
    cases = torch.load(folder / "cases.pt", weights_only=True)
    found = {name: measured(case, None) for name, case in cases.items() if size in case.get("processes", (size,))}
    if size > 1 and "p8" in cases:
        found["neighbours"] = neighbours(rank, size)
        found["errors"] = errors(built(cases["p8"]), cases["p8"]["images"])
    if size == 3 and "p8" in cases:
        group = dist.new_group([1, 2])
        if rank:
            found["subgroup"] = measured(cases["p8"], group)
        else:
            found["errors"]["outside"] = said(lambda: split_rows(built(cases["p8"]), group))
    torch.save(found, folder / f"{size}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measured(case: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    model, images = built(case), case["images"]
    parallel = split_rows(model, group)
    height = images.shape[2]
    first, end = parallel.share(height)
    found = measure(case, model, lambda rows: parallel(rows, height), images[:, :, first:end], parallel.sync_gradients)
    return found | {"share": (first, end)}


def neighbours(rank: int, size: int) -> list[Tensor]:
    """Rows with two above and one below, in types of which not every backend knows all."""
    rows = slice(3 * rank, 3 * rank + 3)
    return [
        RowGroup().with_neighbours(column(3 * size, dtype)[:, :, rows], above=2, below=1)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ]


def column(height: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(1, 1 + 4 * height, dtype=dtype).view(1, 2, height, 2)


def errors(model: XCiT, images: Tensor) -> dict[str, str]:
    """What is said where the processes' arguments are wrong, in one of them or in all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parallel, height = split_rows(model.eval()), images.shape[2]
    first, end = parallel.share(height)
    rows = images[:, :, first:end]
    found = {
        "too few rows": said(lambda: parallel.share(8 * (2 * size - 1))),
        "too few rows given": said(lambda: parallel(rows, 8 * (2 * size - 1))),
        "other rows": said(lambda: parallel(rows[:, :, 1:] if rank == 0 else rows, height)),
        "other axes": said(lambda: parallel(rows[0] if rank == 1 else rows, height)),
        "other channels": said(lambda: parallel(rows[:, :2], height)),
        "other widths": said(lambda: parallel(rows[..., rank:], height)),
        "other heights": said(lambda: parallel(rows, height + rank)),
        "other modes": said(lambda: parallel.train(rank == 0)(rows, height)),
        "other gradients": said(lambda: parallel.eval()(rows.clone().requires_grad_(rank == 0), height)),
        "narrow": said(lambda: parallel(rows[..., :7], height)),
    }
    with torch.no_grad():
        model.blocks[1].attn.temperature += 1e-6 * (rank == 1)
    found["other weights"] = said(lambda: split_rows(model))
    return found


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except XCiTError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# --- the tests -------------------------------------------------------------------------------------------------------


def prepare(randomize: Callable[..., Any], cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cases with weights, images and targets."""
    prepared = {}
    for seed, (name, case) in enumerate(cases.items()):
        dtype = case.get("dtype", torch.float64)
        model = randomize(XCiT(**case["config"]), seed).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(2, model.config["in_chans"], *case["size"], generator=generator, dtype=torch.float64)
        targets = torch.randn(2, model.num_classes or model.embed_dim, generator=generator, dtype=torch.float64)
        prepared[name] = {k: v for k, v in case.items() if k != "dtype"} | {
            "state": model.state_dict(),
            "images": images.to(dtype),
            "targets": targets.to(dtype),
        }
    return prepared


def run_processes(folder: Path, cases: dict[str, dict[str, Any]], *sizes: int) -> dict[int, list[dict[str, Any]]]:
    """What every process found, by the number of processes."""
    torch.save(cases, folder / "cases.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [sys.executable, __file__, str(folder), *map(str, sizes)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate()
        finally:  # a test that is out of time leaves nothing running
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return {
        size: [torch.load(folder / f"{size}.{rank}.pt", weights_only=True) for rank in range(size)] for size in sizes
    }


def expect(case: dict[str, Any]) -> dict[str, Tensor]:
    """What one process finds with the whole image, in float64."""
    model = built(case, torch.float64)
    return measure(case, model, model, case["images"].double(), lambda: None)


def compare(expected: dict[str, Tensor], found: list[dict[str, Any]]) -> dict[str, float]:
    """Relative errors of what the processes found, and that it is the same in all, to the bit."""
    differences = {}
    for rank, each in enumerate(found):
        share = each["share"]
        assert share[0] == (0 if rank == 0 else found[rank - 1]["share"][1])
        assert each.keys() == expected.keys() | {"share"}
        for name, value in expected.items():
            if name.endswith(" images"):
                value = value[:, :, slice(*share)]
            else:
                assert torch.equal(each[name], found[0][name]), f"{name} differs between processes"
            assert each[name].shape == value.shape
            scale = value.abs().max().double().clamp_min(1e-300)
            difference = float((each[name] - value).abs().max().double() / scale)
            differences[name] = max(difference, differences.get(name, 0.0))
    assert found[-1]["share"][1] == expected["train images"].shape[2]
    return differences


def check(expected: dict[str, Tensor], found: list[dict[str, Any]]) -> None:
    output, gradient = LIMITS[found[0]["train logits"].dtype]
    differences = compare(expected, found)
    wrong = {n: d for n, d in differences.items() if not d <= (output if n.endswith("logits") else gradient)}
    assert not wrong, len(found)


def test_processes_are_one(randomize, tmp_path) -> None:
    cases = prepare(randomize, CASES)
    expected = {name: expect(case) for name, case in cases.items()}
    runs = run_processes(tmp_path, cases, 1, 2, 3, 4)
    for size, found in runs.items():
        for name, case in cases.items():
            if size in case.get("processes", (size,)):
                check(expected[name], [each[name] for each in found])
    # a group of two of three processes, whose ranks are others in it
    check(expected["p8"], [each["subgroup"] for each in runs[3][1:]])
    assert runs[3][0]["errors"].pop("outside").startswith("ConfigError: This process is not in the group")
    for size in (2, 3, 4):
        for rank, each in enumerate(runs[size]):
            for joined in each["neighbours"]:
                whole = nn.functional.pad(column(3 * size, joined.dtype), (0, 0, 2, 1))
                assert torch.equal(joined, whole[:, :, 3 * rank : 3 * rank + 6])
        check_errors([each["errors"] for each in runs[size]], size)


def check_errors(found: list[dict[str, str]], size: int) -> None:
    assert all(each == found[0] for each in found), "all processes say the same, and none waits"
    too_few = (
        f"ConfigError: The image has {2 * size - 1} rows of tokens, too few for {size} processes, of which each takes "
        f"2 at least; use {size - 1} or fewer."
    )
    rows = 8 * (13 // size)
    assert found[0] == {
        "too few rows": too_few,
        "too few rows given": too_few,
        "other rows": f"ShapeError: Process 0 of {size} gave {rows - 1} rows of an image 97 px high; its share is the "
        f"{rows} rows from 0 on.",
        "other axes": "ShapeError: The model takes rows of images, (batch, 3, rows, W); process 1 gave a tensor with "
        "3 axes.",
        "other channels": "ShapeError: The model takes rows of images, (batch, 3, rows, W); process 0 gave "
        f"(2, 2, {rows}, 45).",
        "other widths": "ShapeError: The processes gave rows of different images: (batch, H, W) are "
        + ", ".join(str((2, 97, 45 - rank)) for rank in range(size))
        + ".",
        "other heights": "ShapeError: The processes gave rows of different images: (batch, H, W) are "
        + ", ".join(str((2, 97 + rank, 45)) for rank in range(size))
        + ".",
        "other modes": "ConfigError: Training mode, gradient mode, and what needs gradients must be the same in all "
        "processes, and are not.",
        "other gradients": "ConfigError: Training mode, gradient mode, and what needs gradients must be the same in "
        "all processes, and are not.",
        "narrow": "ShapeError: The image is 97 x 7 px, less than one patch of 8 x 8; enlarge it first.",
        "other weights": "ConfigError: The processes begin with different weights (blocks.1.attn.temperature is the "
        "first that differs); load one checkpoint in all of them, or seed them alike.",
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_are_one_at_full_depth(randomize, tmp_path) -> None:
    cases = prepare(randomize, LARGER)
    expected = {name: expect(case) for name, case in cases.items()}
    for found in run_processes(tmp_path, cases, 2, 3, 4).values():
        for name in cases:
            check(expected[name], [each[name] for each in found])


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def parallel(alone, randomize) -> RowParallel:
    return split_rows(randomize(XCiT(**TINY)))


def test_without_a_group(randomize) -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node N"):
        split_rows(randomize(XCiT(**TINY)))
    with pytest.raises(ConfigError, match="init_process_group"):
        RowGroup()


def test_what_is_no_plain_model_is_refused(alone, randomize) -> None:
    model = randomize(XCiT(**TINY))
    with pytest.raises(ConfigError, match="takes an XCiT, not compiled nor wrapped; got a Sequential"):
        split_rows(nn.Sequential(model))  # type: ignore[arg-type]
    model.blocks[1] = nn.Identity()
    with pytest.raises(ConfigError, match=r"blocks\.1 is a Identity, whose rows cannot be split"):
        split_rows(model)


@pytest.mark.parametrize("option", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"])
def test_dropout_is_refused_in_training(option: str, alone, randomize) -> None:
    model = randomize(XCiT(**TINY, **{option: 0.25})).train()
    parallel, images = split_rows(model), torch.randn(2, 3, 40, 40)
    with pytest.raises(ConfigError, match=r"drops values with p = 0\.25, .* set every drop rate but drop_path_rate"):
        parallel(images, 40)
    torch.testing.assert_close(parallel.eval()(images, 40), model(images))


def test_settings_that_cannot_be_honoured_are_refused(parallel) -> None:
    images = torch.randn(2, 3, 40, 40)
    parallel.model.set_grad_checkpointing()
    with pytest.raises(ConfigError, match=r"set_grad_checkpointing\(False\)"):
        parallel(images, 40)
    with torch.no_grad():
        parallel(images, 40)  # as in the model, it matters to gradients only
    parallel.model.set_grad_checkpointing(False)
    parallel.model.set_attn_form("covariance")
    with pytest.raises(ConfigError, match=r"set_attn_form\('auto'\)"):
        parallel(images, 40)


def test_small_images(parallel) -> None:
    assert parallel.share(16) == (0, 16)
    with pytest.raises(ShapeError, match="15 px high, less than one patch of 16 x 16"):
        parallel.share(15)
    parallel.train()
    assert parallel(torch.randn(2, 3, 16, 16), 16).shape == (2, 5)
    with pytest.raises(ShapeError, match="no statistics of a single value"):
        parallel(torch.randn(1, 3, 16, 16), 16)


def test_gradients_are_synchronised_after_the_backward_pass(parallel) -> None:
    with pytest.raises(ConfigError, match=r"call loss\.backward\(\) before"):
        parallel.sync_gradients()


def test_the_models_parameters_are_shared(parallel) -> None:
    assert {id(p) for p in parallel.parameters()} == {id(p) for p in parallel.model.parameters()}
    assert not parallel.eval().model.training


def test_rows_beyond_the_border_are_zeros_without_gradient(alone) -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    joined = RowGroup().with_neighbours(x, above=1, below=2)
    assert torch.equal(joined, nn.functional.pad(x, (0, 0, 1, 2)))
    (grad,) = torch.autograd.grad((joined * torch.arange(7.0)[:, None]).sum(), x)
    assert torch.equal(grad, torch.arange(1.0, 5.0)[:, None].expand_as(x))


def test_autocast(alone, randomize) -> None:
    model = randomize(XCiT(**TINY)).eval()
    images = torch.randn(2, 3, 80, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = split_rows(model)(images, 80)
    torch.testing.assert_close(found.float(), model(images), rtol=0.05, atol=0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
