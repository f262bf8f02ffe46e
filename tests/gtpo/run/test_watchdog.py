"""The actor watch on small real Ray actors: death is found, slow is not dead, an old answer is no proof of life, and a
server whose engine died or hangs is no living server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import pytest
import ray

from recipe.gtpo.run.ending import end_of
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.watchdog import _ASKED, ActorWatch

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
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors' processes do not know this module
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_dead_actor_is_found_and_named(tmp_path):
    part = Part.remote()
    pid = ray.get(part.pid.remote())
    watch = ActorWatch([("rollout server", part)], RunRecord(tmp_path), poll_seconds=1, engine_seconds=60)
    ray.get(part.pid.remote())  # by now the watch holds an answer from before the death
    os.kill(pid, signal.SIGKILL)
    dead = watch.find_dead(timeout=30)
    assert dead is not None and dead.startswith("the rollout server died: ") and f"pid {pid}" in dead


OUT_OF_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node was 10.66GB used / 23.54GB limit"
)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ray.exceptions.OutOfMemoryError(f"{OUT_OF_MEMORY}\nOOM kill reason: ..."), f"died: {OUT_OF_MEMORY}"),
        (ray.exceptions.RayTaskError("f", "...", KeyError("engine")), "does not say how it is: KeyError: 'engine'"),
    ],
)
def test_an_actor_whose_end_has_another_type_is_found_and_named(tmp_path, monkeypatch, error, found):
    """Ray reports an actor that its memory monitor killed by an error that is no RayActorError."""
    part = Part.remote()
    watch = ActorWatch([("rollout server", part)], RunRecord(tmp_path), poll_seconds=1, engine_seconds=60)

    def fail(question):
        raise error

    monkeypatch.setattr("recipe.gtpo.run.watchdog.ray.get", fail)
    assert watch.find_dead(timeout=30) == f"the rollout server {found}"


def test_the_last_line_names_a_trainer_that_was_killed_for_its_memory():
    error = ray.exceptions.OutOfMemoryError(f"{OUT_OF_MEMORY}\nOOM kill reason: ...")
    assert end_of(error) == f"the trainer's process died: {OUT_OF_MEMORY}"


def test_the_last_line_names_a_trainer_that_was_killed():
    """It wrote nothing down; Ray's own report has twenty lines, of which the first says little."""
    trainer = BusyPart.remote()
    pid = ray.get(trainer.pid.remote())
    working = trainer.work.remote(60)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(working, timeout=60)
    assert end_of(caught.value).startswith("the trainer's process died: ") and f"pid {pid}" in end_of(caught.value)


def test_an_actor_that_was_closed_is_no_cause(tmp_path):
    closed, part = Part.remote(), Part.remote()
    pids = ray.get([closed.pid.remote(), part.pid.remote()])
    actors = [("storage of TransferQueue", closed), ("rollout server", part)]
    watch = ActorWatch(actors, RunRecord(tmp_path), poll_seconds=1, engine_seconds=60)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert watch.find_dead(timeout=30, closed="TransferQueue").startswith("the rollout server died: ")


def test_a_busy_actor_is_not_dead(tmp_path):
    part = BusyPart.remote()
    working = part.work.remote(3)
    watch = ActorWatch([("training worker", part)], RunRecord(tmp_path), poll_seconds=1, engine_seconds=60)
    assert watch.find_dead(timeout=1.5) is None
    ray.get(working)
    assert watch.find_dead(timeout=1.0) is None


class Engine:
    """What verl's vLLM server holds: vLLM's AsyncLLM, as far as the watch knows it, with a process of its own.

    The process is `cat`, which answers a line with the line: so it can be killed and stopped as an EngineCore can.
    """

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self.output_handler: asyncio.Task | None = None
        self.dead_error = RuntimeError("EngineCore encountered an issue.\nSee stack trace")

    async def start(self) -> int:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
        self.output_handler = asyncio.create_task(self._process.wait())
        return self._process.pid

    @property
    def errored(self) -> bool:
        return self.output_handler is not None and self.output_handler.done()

    async def is_sleeping(self) -> bool:
        self._process.stdin.write(b"sleeping?\n")
        return await self._process.stdout.readline() != b""


@ray.remote(num_cpus=0)
class Server:
    def __init__(self) -> None:
        self.engine = Engine()

    async def start(self) -> int:
        return await self.engine.start()

    async def answered(self) -> None:
        """Ends when the engine has answered what it was asked last."""
        await asyncio.wrap_future(vars(self)[_ASKED][0])


def watch_of(server, folder, engine_seconds):
    return ActorWatch([("rollout server", server)], RunRecord(folder), 1, engine_seconds=engine_seconds)


def test_a_server_whose_engine_died_is_found(tmp_path):
    """The actor itself lives, and would for ever."""
    server = Server.remote()
    pid = ray.get(server.start.remote())
    watch = watch_of(server, tmp_path, engine_seconds=60)
    os.kill(pid, signal.SIGKILL)
    found = watch.find_dead(timeout=30)
    assert found == "the rollout server lost its engine: RuntimeError: EngineCore encountered an issue."


def test_a_server_whose_engine_hangs_is_found_and_one_that_goes_on_is_not(tmp_path):
    server = Server.remote()
    pid = ray.get(server.start.remote())
    patient, hasty = (watch_of(server, tmp_path, seconds) for seconds in (600, 1))
    os.kill(pid, signal.SIGSTOP)
    try:
        found = hasty.find_dead(timeout=30)
        assert found is not None and found.startswith("the rollout server lost its engine: no answer for ")
        assert found.endswith(" s (watchdog.engine_seconds=1)")
        assert patient.find_dead(timeout=0.5) is None
    finally:
        os.kill(pid, signal.SIGCONT)
    ray.get(server.answered.remote())
    assert hasty.find_dead(timeout=0.5) is None


def test_a_server_that_was_asked_for_nothing_yet_is_well(tmp_path):
    assert watch_of(Server.remote(), tmp_path, engine_seconds=0).find_dead(timeout=0.5) is None
