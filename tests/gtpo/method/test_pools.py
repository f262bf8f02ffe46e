"""When the returns of a pool count as equal, and how many such pools a batch has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipe.gtpo.method.advantage import normalize_returns
from recipe.gtpo.method.pools import group_index, zero_spread_share

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


def objects(*labels):
    array = np.empty(len(labels), dtype=object)
    array[:] = labels
    return array


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        (["a", "b", "a"], [0, 1, 0]),
        ([1, "1", 1], [0, 1, 0]),
        ([(1, 2), (1, 3), (1, 2)], [0, 1, 0]),
        (objects((1, 2), (1, 3), (1, 2)), [0, 1, 0]),
        (objects(1, "1", ("1",)), [0, 1, 2]),
        (np.array([7, 3, 7]), [0, 1, 0]),
        (np.array(["x", "y", "x"]), [0, 1, 0]),
        (torch.tensor([3, 7, 3]), [0, 1, 0]),
        ([], []),
    ],
    ids=str,
)
def test_group_ids_are_labels_of_any_kind_and_none_is_merged_with_another(labels, same):
    assert group_index(labels).tolist() == same


@pytest.mark.parametrize("label", [None, float("nan"), [1], {"uid": 1}], ids=str)
@pytest.mark.parametrize("wrap", [list, lambda labels: objects(*labels)], ids=["list", "array"])
def test_a_group_id_that_is_none_or_cannot_be_compared_names_its_row(label, wrap):
    with pytest.raises(ValueError, match="row 1: a group id must be a number, a text or a tuple of them, not"):
        group_index(wrap(["a", label, "a"]))
