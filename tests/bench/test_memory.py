import pytest
import torch
from torch import nn

from xcit.bench.memory import MIB, peak_mib, saved_mib


def mib(count):
    return torch.empty(int(count * MIB), dtype=torch.uint8)


def test_the_peak_counts_what_is_alive_together():
    def step():
        a = mib(3)
        b = mib(4)
        del a
        c = mib(2)
        return b, c

    assert peak_mib(step) == pytest.approx(7, abs=0.01)


def test_the_peak_is_above_what_was_there_before():
    before = mib(50)

    def step():
        return before[:10], mib(1)

    assert peak_mib(step) == pytest.approx(1, abs=0.01)


def test_saved_counts_each_storage_once_and_no_parameter():
    layer = nn.Linear(256, 512, bias=False)
    x = torch.randn(1024, 256, requires_grad=True)

    def step():
        # the product saves x and the weight; exp saves its result, whose view `square` saves again
        y = layer(x).exp()
        return y.view(-1).square()

    assert saved_mib(step, layer.parameters()) == pytest.approx(1 + 2)
    assert saved_mib(step, []) == pytest.approx(1 + 2 + 0.5)


def test_addresses_that_are_reused_are_counted_again():
    w = torch.ones((), requires_grad=True)

    def step():
        for _ in range(4):
            # each product saves its factor, which dies with the graph of this round: the next may get its address
            (w * torch.ones(MIB // 4)).sum().backward()

    assert saved_mib(step, [w]) == pytest.approx(4)


def test_without_gradients_nothing_is_saved():
    layer = nn.Linear(8, 8)

    def step():
        with torch.no_grad():
            return layer(torch.ones(4, 8))

    assert saved_mib(step, layer.parameters()) == 0


@pytest.mark.gpu
def test_the_peak_on_cuda():
    def step():
        return torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")

    step()
    assert peak_mib(step, "cuda") == pytest.approx(3, abs=0.01)
