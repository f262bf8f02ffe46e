"""End a run that lost a part of itself, and say which part.

A dead rollout server or agent-loop worker makes verl's trainer wait for ever: nothing is left that would finish the
batch. `ActorWatch` notices in the trainer's process and ends it; the command that started the run then ends too
(recipe/gtpo/main.py). The first cause goes to the run's record, so that it can be the last line the user reads.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import ray

from recipe.gtpo.run.errors import how_it_died
from recipe.gtpo.run.record import RunRecord


class ActorWatch:
    """Keeps one unanswered question at every actor; Ray answers it with an error when the actor dies.

    An actor that is busy simply answers later, so the watch needs no time limit and never takes slow for dead.

    Args:
        actors: (what it is, handle) pairs.
        record: where the cause goes.
        poll_seconds: time between two looks.
    """

    def __init__(self, actors: Iterable[tuple[str, Any]], record: RunRecord, poll_seconds: float) -> None:
        self._actors = list(actors)
        self._record = record
        self._poll_seconds = poll_seconds
        self._questions = {_ask(handle): (name, handle) for name, handle in self._actors}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="actor-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._poll_seconds + 5)

    def find_dead(self, timeout: float = 0.0) -> str | None:
        """A sentence on the first actor found dead, or None after `timeout` seconds of asking.

        An answer at hand may be older than the death: only a question asked after it tells. So it takes several rounds.
        """
        deadline = time.monotonic() + timeout
        while (dead := self._ask_round()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return dead

    def _ask_round(self) -> str | None:
        with self._lock:
            answered, _ = ray.wait(list(self._questions), num_returns=len(self._questions), timeout=0)
            for question in answered:
                name, handle = self._questions.pop(question)
                try:
                    ray.get(question)
                except ray.exceptions.RayActorError as e:
                    return f"the {name} died: {how_it_died(str(e))}"
                self._questions[_ask(handle)] = (name, handle)
            return None

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            dead = self.find_dead()
            if dead is not None and not self._stop.is_set():
                self._record.write_cause(dead)
                print(f"gtpo: {dead}; ending the run", file=sys.stderr, flush=True)
                # The main thread may be in a call that never returns; the driver sees this process go and cleans up.
                os._exit(1)


def _ask(handle: Any) -> Any:
    # __ray_call__ runs a function in any actor, whatever its methods (verl uses it too)
    return handle.__ray_call__.remote(_nothing)


def _nothing(_actor: Any) -> None:
    return None
