"""The learning rate of the paper's schedule at every boundary, and what holds between them."""

import itertools
import math

import pytest
import torch

from mmtrain.config import LrSegment
from mmtrain.config.schema import Count
from mmtrain.config.stage import LR_KINDS
from mmtrain.errors import ConfigError
from mmtrain.train.lr_schedule import lr_at

STEP = 16 * 2**20
WARM_UP = 500 * STEP
PAPER = [
    LrSegment("linear", Count(WARM_UP), 2e-4, 0.0),
    LrSegment("constant", Count(7_200_000_000_000 - WARM_UP), 2e-4),
    LrSegment("constant", Count(3_200_000_000_000), 1.3e-4),
    LrSegment("exponential", Count(1_000_000_000_000), 3e-5, 1.3e-4),
]


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (STEP, 2e-4 / 500),
        (250 * STEP, 1e-4),
        (WARM_UP, 2e-4),
        (WARM_UP + 1, 2e-4),
        (7_200_000_000_000, 2e-4),
        (7_200_000_000_001, 1.3e-4),
        (10_400_000_000_000, 1.3e-4),
        (10_900_000_000_000, math.sqrt(1.3e-4 * 3e-5)),
        (11_400_000_000_000, 3e-5),
        (99_000_000_000_000, 3e-5),
    ],
)
def test_lr_of_the_paper_at_every_boundary(tokens, lr):
    assert lr_at(PAPER, tokens) == pytest.approx(lr, rel=1e-12)


def test_ends_are_exact():
    assert lr_at(PAPER, WARM_UP) == 2e-4
    assert lr_at(PAPER, 11_400_000_000_000) == 3e-5


def test_exponential_falls_by_equal_factors():
    decay = [LrSegment("exponential", Count(100), 1e-5, 1e-3)]
    rates = [lr_at(decay, tokens) for tokens in range(10, 101, 10)]
    factors = [later / earlier for earlier, later in itertools.pairwise(rates)]
    assert factors == pytest.approx([0.01**0.1] * 9)


def test_cosine_is_torch_s_annealing():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=2e-5)
    segments = [LrSegment("cosine", Count(2000), 2e-5, 3e-4)]
    for step in range(1, 21):
        optimizer.step()
        oracle.step()
        assert lr_at(segments, 100 * step) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12)
    assert lr_at(segments, 5000) == 2e-5


def test_empty_segment_is_passed_over():
    segments = [LrSegment("linear", Count(0), 1.0, 0.5), LrSegment("constant", Count(10), 0.25)]
    assert lr_at(segments, 1) == 0.25


def test_an_unknown_kind_of_segment_is_not_taken_for_another():
    with pytest.raises(KeyError, match="cosin"):
        lr_at([LrSegment("cosin", Count(10), 1e-5, 1e-3)], 5)


def test_a_kind_is_defined_in_one_table(monkeypatch):
    """Entered there, it passes the check of options and is what the schedule runs."""
    segment = LrSegment("square", Count(10), 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"lr\.kind=square"):
        segment.validate("lr")
    monkeypatch.setitem(LR_KINDS, "square", lambda start, end, fraction: end + (start - end) * (1 - fraction) ** 2)
    segment.validate("lr")
    assert lr_at([segment], 5) == 0.25
