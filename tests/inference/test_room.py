"""Whether there is room: on the device that the model is on, and on the CPU that prepares and draws."""

import pytest
import torch

from xcit.inference.room import AMPLE, MARGIN, PREPARING, Room

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def doubled(images):
    return images * 2


@pytest.fixture
def room(monkeypatch):
    """A function that takes 24 bytes a pixel: its images, and twice as much of them; and what there is, to be set."""

    def room(cpu, cuda=None):
        free = {CPU: cpu, CUDA: cuda}
        monkeypatch.setattr("xcit.inference.devices.available_bytes", free.__getitem__)
        made = Room(torch.nn.Linear(2, 2))
        if cuda is not None:
            made.device = CUDA
            monkeypatch.setattr(
                "xcit.inference.costs.peak_bytes", lambda function, shape, **_: 100 * shape[2] * shape[3]
            )
        return made

    return room


def test_on_the_cpu(room):
    needed = MARGIN * 24 * 1000 * 1000
    assert room(int(needed) + 1).lack(doubled, 1, 3, (1000, 1000)) is None
    lack = room(int(needed) - 2).lack(doubled, 1, 3, (1000, 1000))
    assert (lack.needed, lack.available, lack.device) == (pytest.approx(needed), int(needed) - 2, CPU)
    assert str(lack) == "about 25 MiB of memory on cpu, where 25 MiB are free"
    assert room(int(needed)).lack(doubled, 2, 3, (1000, 1000)).needed == pytest.approx(2 * needed)
    assert room(int(needed)).lack(doubled, 1, 3, (1000, 1000), on_host=10 * needed).needed == pytest.approx(
        MARGIN * 10 * needed
    )


def test_what_is_ample_is_not_counted(room, monkeypatch):
    monkeypatch.setattr("xcit.inference.costs.peak_bytes", lambda *_, **__: pytest.fail("counted"))
    assert room(AMPLE * 100).lack(doubled, 1, 3, (10, 10)) is None
    assert room(None).lack(doubled, 1, 3, (10, 10)) is None
    with pytest.raises(pytest.fail.Exception):
        room(AMPLE * 100 - 1).lack(doubled, 1, 3, (10, 10))
    with pytest.raises(pytest.fail.Exception):
        room(AMPLE * 100).lack(doubled, 1, 3, (10, 10), enlarged=1.1)


def test_on_a_card_both_places_count(room):
    pixels = 10**6
    assert room(10**9, 10**9).lack(doubled, 1, 3, (1000, 1000)) is None
    lack = room(10**9, 10**8).lack(doubled, 1, 3, (1000, 1000))
    assert (lack.device, lack.needed) == (CUDA, pytest.approx(MARGIN * 100 * pixels))
    lack = room(10**7, 10**9).lack(doubled, 1, 3, (1000, 1000))
    assert (lack.device, lack.needed) == (CPU, pytest.approx(MARGIN * PREPARING * pixels))
    assert room(10**7, 10**7).lack(doubled, 1, 3, (1000, 1000)).device == CUDA  # where more is missing
