"""A job of the GPU lane (tests/gpu), whole, on the CPU: what is measured of it stands beside what was added up."""

from __future__ import annotations

import os

import pytest
from gpus import nvidia_smi
from jobs import job_overrides, main_job

from recipe.gtpo.run.machine import gpus

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def one_card(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, 1, used=700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.cache_clear()
    yield
    gpus.cache_clear()


def test_a_job_with_the_transformers_rollout_is_measured(tmp_path):
    found = main_job([*job_overrides("transformers", "gtpo", "sdpa", tmp_path), "hardware=cpu"], seconds=500)
    assert found["training/rollout_probs_diff_mean"] < 1e-5
    assert found["timing_s/gen"] > 0 and found["timing_s/update_actor"] > 0 and found["timing_s/update_weights"] > 0
    assert found["actor/perf/max_memory_allocated_gb"] > 0
    assert found["card/peak_gb"] == found["card/before_gb"] == 700 * 2**20 / 1e9
    assert found["planned/update_gb"] > 3 and found["planned/generation_gb"] > 4  # what is taken for contexts, at least
