"""The log-probs that every run on a GPU takes (verl_ext/fused_head.py), in a whole run under verl on the CPU."""

from __future__ import annotations

import pytest
from runs import start

pytestmark = pytest.mark.slow


def test_a_run_with_the_fused_head_and_without_padding_agrees_with_its_rollouts(tmp_path):
    fused = ("actor_rollout_ref.model.use_fused_kernels=true", "actor_rollout_ref.model.use_remove_padding=true")
    with start(tmp_path, "trainer.total_training_steps=2", *fused) as run:
        assert run.wait(600) == 0, run.text()[-3000:]
    steps = [line["metrics"] for line in run.record.read_metrics() if line["step"] > 0]
    assert len(steps) == 2 and all(step["gtpo/log_prob_gap/mean"] < 1e-5 for step in steps)
