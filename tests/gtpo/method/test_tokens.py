"""Which tokens a turn has, what lies on them, and the way back."""

from __future__ import annotations

import itertools

import pytest
import torch
from batches import make_batch, ragged_batches
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.estimator import compute_gtpo_advantage
from recipe.gtpo.method import tokens

pytestmark = pytest.mark.unit

EXISTS = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_a_turns_value_lies_on_its_last_token():
    spans = torch.tensor([[[0, 2], [3, 4], [6, 7]], [[1, 3], [0, 0], [0, 0]], [[0, 0]] * 3])
    rows = tokens.scatter_to_tokens(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), EXISTS, spans, [7, 5, 2])
    assert [row.tolist() for row in rows] == [[0, 1, 0, 2, 0, 0, 3], [0, 0, 4, 0, 0], [0, 0]]
    assert all(row.dtype == torch.float32 for row in rows)


def test_a_turn_that_does_not_fit_names_its_row():
    spans = torch.tensor([[[0, 2], [3, 4], [6, 7]], [[1, 3], [0, 0], [0, 0]], [[0, 0]] * 3])
    with pytest.raises(ValueError, match="row 1: turn 0 ends at token 3 of a response of 2 tokens"):
        tokens.scatter_to_tokens(torch.ones(3, 3), EXISTS, spans, [7, 2, 2])
    with pytest.raises(ValueError, match="2 response lengths for 3 rows"):
        tokens.scatter_to_tokens(torch.ones(3, 3), EXISTS, spans, [7, 5])


def test_values_at_turn_ends_are_those_scattered_there():
    spans = torch.tensor([[[0, 2], [3, 4], [6, 7]], [[1, 3], [0, 0], [0, 0]], [[0, 0]] * 3])
    values = torch.tensor([[1.0, 2, 3], [4, 0, 0], [0, 0, 0]])
    rows = tokens.scatter_to_tokens(values, EXISTS, spans, [7, 5, 2])
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    assert torch.equal(tokens.at_turn_ends(nested, EXISTS, spans), values)
    assert torch.equal(tokens.at_turn_ends(nested.to_padded_tensor(9.0), EXISTS, spans), values)


def test_a_value_is_that_of_the_last_token_that_is_trained_on():
    """rollout_correction may reject a turn's last token, or all of them."""
    spans, exists = torch.tensor([[[0, 3], [4, 6], [6, 8]]]), torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.7, 0.7, 0.0, 0.0]])
    kept = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]])
    assert torch.allclose(tokens.at_turn_ends(values, exists, spans, kept), torch.tensor([[0.5, 0.7, 0.0]]))
    assert torch.equal(tokens.at_turn_ends(values, exists, spans)[0, 0], torch.tensor(0.0))
    nested = [torch.nested.as_nested_tensor([row[0], row[0, :3]], layout=torch.jagged) for row in (values, kept)]
    two = tokens.at_turn_ends(nested[0], exists.expand(2, 3) & torch.tensor([[True] * 3, [True, False, False]]),
                              torch.stack([spans[0], torch.tensor([[0, 3], [0, 0], [0, 0]])]), nested[1])  # fmt: skip
    assert torch.allclose(two, torch.tensor([[0.5, 0.7, 0.0], [0.5, 0.0, 0.0]]))


def test_every_token_of_a_turn_gets_the_turns_value():
    ids = torch.tensor([[-1, 0, 0, -1, 1], [0, 1, 1, -1, -1], [-1, -1, -1, -1, -1]])
    runs = tokens.find_runs(ids >= 0, ids)
    out = tokens.spread_to_tokens(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), runs)
    assert out.tolist() == [[0, 1, 1, 0, 2], [3, 4, 4, 0, 0], [0, 0, 0, 0, 0]] and out.dtype == torch.float32


@given(ragged_batches(), st.booleans())
def test_runs_and_their_rewards_are_what_a_loop_finds(batch, recorded):
    """Every run ends where the mask or the turn id changes; a reward counts for the turn that began last before it."""
    rewards = batch.rewards + torch.linspace(0, 1, batch.rewards.numel()).view_as(batch.rewards)
    ids = batch.turn_ids.to(torch.int16) if recorded else None
    runs = tokens.find_runs(batch.mask, ids)
    sums = tokens.sum_rewards_by_turn(rewards, *tokens.turn_starts(runs))
    found = list(zip(*(field.tolist() for field in runs[:5]), strict=True))
    for i, (mask, turns) in enumerate(zip(batch.mask.tolist(), batch.turn_ids.tolist(), strict=True)):
        expected, earned, at = [], {}, 0
        for (masked, k), run in itertools.groupby(zip(mask, turns, strict=True)):
            size = len(list(run))
            expected.append((i, at, size, k, bool(masked)))
            owner = max(0, k, *earned)
            earned[owner] = earned.get(owner, 0.0) + float(rewards[i, at : at + size].double().sum())
            at += size
        assert [run for run in found if run[0] == i] == expected
        if any(mask):
            assert sums[i, : max(earned) + 1].tolist() == pytest.approx([earned[k] for k in sorted(earned)], abs=1e-12)
            assert not sums[i, max(earned) + 1 :].any()


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    batch = make_batch([(f"u{i % 3}", [(1, 2, i / 7), (1, 1, i % 2)] if i % 4 else []) for i in range(11)], extra=2)
    whole = compute_gtpo_advantage(*batch.args, turn_ids=batch.turn_ids)
    monkeypatch.setattr(tokens, "_BLOCK", 1)  # one row a block
    for a, b in zip(whole, compute_gtpo_advantage(*batch.args, turn_ids=batch.turn_ids), strict=True):
        assert torch.equal(a, b)
