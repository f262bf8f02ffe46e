"""Protects the configuration as a whole: every method on every task on every stack that makes sense."""

from __future__ import annotations

import pytest
from composition import EVERYTHING, assert_can_start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("method", "task", "hardware", "rollout"), EVERYTHING)
def test_every_composition_passes_our_checks_and_verls(method, task, hardware, rollout):
    assert_can_start(method, task, hardware, rollout)
