"""Asking a reward function without holding up the rollouts of a worker.

The trajectories of an agent-loop worker share one event loop. A reward function that is no coroutine would stop them
all while it works, and one that guards itself with SIGALRM fails off the main thread. So it runs in processes of its
own, each in its main thread; one that takes too long is killed, and its trajectory is lost with a named cause.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import json
import multiprocessing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.run.processes import Processes
from recipe.gtpo.tasks.task import Task

Score = Callable[..., Awaitable[Any]]


class ScoreError(RuntimeError):
    """The reward function failed: what it raised, or how it ended."""


def load_score(config: DictConfig, task: Task) -> Score | None:
    """What scores a final assistant turn: `reward.custom_reward_function`, else the task; None where neither does.

    It takes verl's keyword arguments (data_source, solution_str, ground_truth, extra_info) and raises ScoreError.
    """
    custom = custom_score(config)
    return custom or (functools.partial(_ask_task, task) if task.scores else None)


def custom_score(config: DictConfig) -> CustomScore | None:
    """The config's own reward function, if there is one."""
    section = OmegaConf.select(config, "reward.custom_reward_function")
    if section is None or not section.get("path"):
        return None
    seconds = float(OmegaConf.select(config, "reward_timeout_seconds", default=60.0))
    return _custom(json.dumps(OmegaConf.to_container(section, resolve=True), sort_keys=True), seconds)


async def _ask_task(task: Task, **row: Any) -> Any:
    """A task of this package scores within microseconds, or is a coroutine that leaves the work to a process."""
    try:
        scored = task.score(**row)
        return await scored if inspect.isawaitable(scored) else scored
    except Exception as e:
        raise ScoreError(f"the score of task={task.name} raised {type(e).__name__}: {e}") from e


class CustomScore:
    """`reward.custom_reward_function`: a coroutine is awaited, anything else called in processes of its own.

    Args:
        section: the config's, as JSON. seconds: after which a call is ended; a coroutine ends where it awaits.
    """

    def __init__(self, section: str, seconds: float) -> None:
        self._function, self._kwargs = load_function(json.loads(section))
        self._section, self._seconds = section, seconds
        self._what = f"the reward function {getattr(self._function, '__name__', self._function)}"
        self._processes = None if inspect.iscoroutinefunction(self._function) else Processes(_fork)

    async def __call__(self, **row: Any) -> Any:
        asked: asyncio.Future | None = None
        try:
            if self._processes is None:
                asked = asyncio.ensure_future(self._function(**row, **self._kwargs))
                return await asyncio.wait_for(asked, self._seconds)
            return await self._processes.call(_call, self._section, row, seconds=self._seconds)
        except Exception as e:  # what it raised, an answer that cannot be sent, or the death of its process
            over = isinstance(e, (TimeoutError, asyncio.TimeoutError))  # one from Python 3.11 on
            if over and (asked is None or asked.cancelled()):  # else a coroutine's own: a client's, for example
                limit = f"reward_timeout_seconds={self._seconds:g}"
                raise ScoreError(f"{self._what} took longer than {limit} and was ended") from e
            raise ScoreError(f"{self._what} raised {type(e).__name__}: {e}") from e

    def end(self) -> None:
        """End the processes. A later call starts new ones."""
        if self._processes is not None:
            self._processes.end()


@functools.lru_cache(maxsize=8)  # an agent loop is made for every trajectory; its processes serve them all
def _custom(section: str, seconds: float) -> CustomScore:
    return CustomScore(section, seconds)


#: What a reward function is asked about before a run starts: it must bear any text.
SPECIMEN = r"I am not sure. My answer is \boxed{0}."


def try_score(score: CustomScore, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What it says of SPECIMEN as the answer to each of these rows of the data; a ScoreError where it fails."""

    async def ask() -> list[Any]:
        asked = [score(**reward_arguments(SPECIMEN, row)) for row in rows]
        return await asyncio.gather(*asked, return_exceptions=True)

    try:
        return asyncio.run(ask())
    finally:
        score.end()


def reward_arguments(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """verl's keyword arguments for the final assistant turn of a row's trajectory. What the row has not got is None."""
    return {
        "data_source": row.get("data_source"),
        "solution_str": text,
        "ground_truth": (row.get("reward_model") or {}).get("ground_truth"),
        "extra_info": row.get("extra_info"),
    }


def _fork() -> None:
    """First in a process of the pool. One that was spawned would spawn its own children, too, and they could not import
    what a reward function starts in them: its file is no module that is found by name. Under verl they are forked. It
    is sound here: nothing but reward functions runs in these processes, and no thread is in them that none has started.
    """
    multiprocessing.set_start_method("fork", force=True)


def _call(section: str, row: Mapping[str, Any]) -> Any:
    """In a process of the pool."""
    function, kwargs = _loaded(section)
    try:
        return function(**row, **kwargs)
    except TimeoutError as e:  # a client's, for example; outside it would be the one that ends a call
        raise RuntimeError(f"{type(e).__name__}: {e}") from e


@functools.lru_cache(maxsize=1)
def _loaded(section: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    return load_function(json.loads(section))


def load_function(section: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that `reward.custom_reward_function` names, and its `reward_kwargs`, read as verl reads them.

    verl's own loader is not used because it is verl: every process of the pool would import all of it. Raises OSError,
    ImportError, AttributeError, or what the file raises.
    """
    path, name = str(section["path"]), str(section["name"])
    if path.startswith("pkg://"):
        module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    else:
        file = Path(path.removeprefix("file://")).expanduser()
        spec = importlib.util.spec_from_file_location(f"custom_reward_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name), dict(section.get("reward_kwargs") or {})
