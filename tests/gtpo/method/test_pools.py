"""When the returns of a pool count as equal, and how many such pools a batch has."""

from __future__ import annotations

import pytest
import torch

from recipe.gtpo.method.advantage import normalize_returns
from recipe.gtpo.method.pools import zero_spread_share

pytestmark = pytest.mark.unit


def test_returns_within_a_millionth_count_as_equal():
    exists = torch.ones(2, 1, dtype=torch.bool)
    for base in (0.1, 1.0, 1000.0):
        for relative, silent in ((5e-7, True), (1e-5, False)):
            returns = torch.tensor([[base], [base * (1 + relative)]])
            assert (not normalize_returns(returns, exists, ["p", "p"]).any()) is silent


def test_zero_spread_share_weighs_each_pool_once():
    returns = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [3.0, 3.0]])
    exists = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    assert zero_spread_share(returns, exists, ["p", "p", "q", "r"]) == pytest.approx(2 / 3)
    assert zero_spread_share(returns, exists, ["p", "p", "q", "r"], "batch") == 0.0
    assert zero_spread_share(returns, exists, ["p", "p", "q", "q"], "turn") == pytest.approx(3 / 4)
    assert zero_spread_share(returns, torch.zeros_like(exists), ["p"] * 4) == 0.0
