"""Tiny work gets one thread, other work keeps what is set, and what was set comes back."""

import pytest
import torch

from fedsim import threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("flops", "expected"), [(0.0, 1), (1.9 * threads.SHARE, 1), (2 * threads.SHARE, 2), (float("inf"), 2)]
)
def test_tiny_work_gets_one_thread(two_threads, flops, expected):
    with threads.enough_for(flops):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2


def test_an_error_gives_the_threads_back(two_threads):
    with pytest.raises(RuntimeError), threads.enough_for(0.0):
        raise RuntimeError
    assert torch.get_num_threads() == 2
