"""The gang itself: an answer from every rank, and no failure that hides or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.gang import gang

pytestmark = pytest.mark.dist


def _sum_of_ranks(factor: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(total)
    return dist.get_rank(), total


def _fails_on(rank: int) -> None:
    assert dist.get_rank() != rank, "this one is odd"
    dist.barrier()


def _dies_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def _sleeps() -> None:
    time.sleep(60)


def test_every_rank_answers_in_order() -> None:
    assert gang(3, _sum_of_ranks, 10) == [(rank, torch.tensor(30)) for rank in range(3)]


def test_a_failure_shows_its_traceback_and_ends_the_others() -> None:
    with pytest.raises(
        AssertionError, match=r"rank 1 failed:(.|\n)*_fails_on(.|\n)*this one is odd"
    ):
        gang(2, _fails_on, 1)


def test_a_dead_rank_is_noticed() -> None:
    with pytest.raises(AssertionError, match="rank 1 died without a word"):
        gang(2, _dies_on, 1)


def test_a_gang_never_hangs() -> None:
    with pytest.raises(AssertionError, match=r"time-out: no answer from ranks \[0, 1\] of 2"):
        gang(2, _sleeps, timeout=2)
