"""End a run that lost a part of itself, and say which part.

A dead rollout server or agent-loop worker makes verl's trainer wait for ever: nothing is left that would finish the
batch. `ActorWatch` notices in the trainer's process and ends it; the command that started the run then ends too
(recipe/gtpo/main.py). The first cause goes to the run's record, so that it can be the last line the user reads.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import ray

from recipe.gtpo.run.errors import how_it_died, one_line
from recipe.gtpo.run.record import RunRecord


class ActorWatch:
    """Keeps one unanswered question at every actor; Ray answers it with an error when the actor dies.

    An actor that is busy simply answers later, so the watch needs no time limit and never takes slow for dead.

    vLLM's server is an actor that outlives its engine, which is a process of its own: the question that the server
    answers is how its engine is. (SGLang ends its server when a process of the engine dies.)

    Args:
        actors: (what it is, handle) pairs.
        record: where the cause goes.
        poll_seconds: time between two looks.
        engine_seconds: an engine that leaves a question unanswered for longer is stuck. It answers none while weights
            are loaded into it.
    """

    def __init__(
        self, actors: Iterable[tuple[str, Any]], record: RunRecord, poll_seconds: float, engine_seconds: float
    ) -> None:
        self._actors = list(actors)
        self._record = record
        self._poll_seconds = poll_seconds
        self._engine_seconds = engine_seconds
        self._questions = {self._ask(handle): (name, handle) for name, handle in self._actors}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="actor-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._poll_seconds + 5)

    def _ask(self, handle: Any) -> Any:
        # __ray_call__ runs a function in any actor, whatever its methods (verl uses it too)
        return handle.__ray_call__.remote(lost_engine, self._engine_seconds)

    def find_dead(self, timeout: float = 0.0, closed: str | None = None) -> str | None:
        """A sentence on the first actor found dead or without its engine, or None after `timeout` seconds of asking.

        An answer at hand may be older than the death: only a question asked after it tells. So it takes several rounds.

        Args:
            closed: actors with this in what they are were ended on purpose, and are asked no longer.
        """
        if closed is not None:
            with self._lock:
                self._questions = {q: (name, h) for q, (name, h) in self._questions.items() if closed not in name}
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
                    if (lost := ray.get(question)) is not None:
                        return f"the {name} lost its engine: {lost}"
                except ray.exceptions.RayTaskError as e:  # what asks raised
                    return f"the {name} does not say how it is: {one_line(e)}"
                except ray.exceptions.RayError as e:  # killed for its memory, it has no RayActorError
                    return f"the {name} died: {how_it_died(str(e))}"
                self._questions[self._ask(handle)] = (name, handle)
            return None

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            dead = self.find_dead()
            if dead is not None and not self._stop.is_set():
                self._record.write_cause(dead)
                print(f"gtpo: {dead}; ending the run", file=sys.stderr, flush=True)
                # The main thread may be in a call that never returns; the driver sees this process go and cleans up.
                os._exit(1)


_ASKED = "_gtpo_asked_engine"  # where a server keeps what its engine was asked: (the answer to come, when)


def lost_engine(actor: Any, engine_seconds: float) -> str | None:
    """How the engine of a rollout server is lost; None where it is well, or where the actor has none of vLLM's kind.

    Runs in the actor, in a thread beside its event loop. The engine is asked something that its own process answers.
    """
    engine: Any = getattr(actor, "engine", None)
    if getattr(engine, "errored", False):
        return f"{type(engine.dead_error).__name__}: {str(engine.dead_error).strip().splitlines()[0]}"
    handler = getattr(engine, "output_handler", None)  # a task in the server's event loop, from the first request on
    if handler is None:
        return None
    answer, since = vars(actor).get(_ASKED, (None, 0.0))
    if answer is None or answer.done():
        vars(actor)[_ASKED] = (
            asyncio.run_coroutine_threadsafe(engine.is_sleeping(), handler.get_loop()),
            time.monotonic(),
        )
        return None
    silent = time.monotonic() - since
    if silent <= engine_seconds:
        return None
    return f"no answer for {silent:.0f} s (watchdog.engine_seconds={engine_seconds:g})"
