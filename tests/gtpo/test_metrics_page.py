"""docs/metrics.md names every metric that the code logs, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from trajectories import trajectory, turn

from recipe.gtpo import status, trainer
from recipe.gtpo.method.advantage import turn_advantages
from recipe.gtpo.method.credit import REASONS, assign_credit
from recipe.gtpo.method.metrics import credit_metrics, log_prob_gap_by_turn
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.turns import validation_info

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_the_page_names_every_metric_and_no_other():
    page = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"^\| `(gtpo/[^`]+)`", page, flags=re.MULTILINE))
    assert named == logged()


def test_the_page_explains_what_status_draws_and_what_a_validation_says():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [metric for metric in status.CURVES.values() if f"| `{metric}`" not in page] == []
    numbers = {name for name, value in validation_info(trajectory(turn(0, 2))).items() if not isinstance(value, str)}
    section = page.split("## Validation")[1].split("## ")[0]
    named = {name for row in re.findall(r"^\| (`[^|]+) \|", section, flags=re.MULTILINE) for name in row.split(", ")}
    assert named == {f"`{name}`" for name in numbers - {"acc"}}


def logged() -> set[str]:
    """From a batch that has every case (a group all solved, one unsolved, calls that ran), and the trainer's source."""
    members = [trajectory(turn(0, 2, "a = 1"), turn(3, 4), acc=1.0)] * 2
    members += [trajectory(turn(0, 2, "b = 1"), turn(3, 4, broken=REASONS[0]))] * 2
    groups, options = ["p", "p", "q", "q"], GTPOOptions()
    credit = assign_credit(members, groups, options)
    numbers = turn_advantages(credit.rewards.combined, credit.turn_mask, groups, options, credit.solved)
    ids = torch.tensor([[0, 0, -1, 1]])
    found = {
        *credit_metrics(credit, members, *numbers),
        *log_prob_gap_by_turn(torch.zeros(1, 4), torch.zeros(1, 4), ids),
    }
    found |= set(re.findall(r'"(gtpo/[a-z_/]+)"', Path(trainer.__file__).read_text()))
    reasons = "|".join(reason.value for reason in REASONS)
    found = {re.sub(r"/t\d+$", "/t<k>", name) for name in found}
    found = {re.sub(rf"(by_turn/format)/({reasons})/", r"\1/<reason>/", name) for name in found}
    return {re.sub(r"(outcome_total)/\w+$", r"\1/<outcome>", name) for name in found}
