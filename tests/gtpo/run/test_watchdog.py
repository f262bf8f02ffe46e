"""The actor watch on small real Ray actors: death is found, slow is not dead, an old answer is no proof of life."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
import ray

from recipe.gtpo.main import end_of
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.watchdog import ActorWatch

pytestmark = pytest.mark.e2e


@ray.remote(num_cpus=0)
class Part:
    """Async, as rollout servers and agent-loop workers are."""

    async def pid(self) -> int:
        return os.getpid()

    async def work(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@ray.remote(num_cpus=0)
class BusyPart:
    """Sync, as training workers are: answers nothing while it works."""

    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_dead_actor_is_found_and_named(tmp_path):
    part = Part.remote()
    pid = ray.get(part.pid.remote())
    watch = ActorWatch([("rollout server", part)], RunRecord(tmp_path), poll_seconds=1)
    ray.get(part.pid.remote())  # by now the watch holds an answer from before the death
    os.kill(pid, signal.SIGKILL)
    dead = watch.find_dead(timeout=30)
    assert dead is not None and dead.startswith("the rollout server died: ") and f"pid {pid}" in dead


def test_the_last_line_names_a_trainer_that_was_killed():
    """It wrote nothing down; Ray's own report has twenty lines, of which the first says little."""
    trainer = BusyPart.remote()
    pid = ray.get(trainer.pid.remote())
    working = trainer.work.remote(60)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(working, timeout=60)
    assert end_of(caught.value).startswith("the trainer's process died: ") and f"pid {pid}" in end_of(caught.value)


def test_a_busy_actor_is_not_dead(tmp_path):
    part = BusyPart.remote()
    working = part.work.remote(3)
    watch = ActorWatch([("training worker", part)], RunRecord(tmp_path), poll_seconds=1)
    assert watch.find_dead(timeout=1.5) is None
    ray.get(working)
    assert watch.find_dead(timeout=1.0) is None
