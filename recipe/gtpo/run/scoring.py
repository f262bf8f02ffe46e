"""Asking a reward function without holding up the rollouts of a worker.

The trajectories of an agent-loop worker share one event loop. A reward function that is no coroutine would stop them
all while it works, and one that guards itself with SIGALRM fails off the main thread. So it runs in processes of its
own, each in its main thread; one that takes too long is killed, and its trajectory is lost with a named cause.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
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
    section = OmegaConf.select(config, "reward.custom_reward_function")
    if section is None or not section.get("path"):
        return functools.partial(_ask_task, task) if task.scores else None
    seconds = float(OmegaConf.select(config, "reward_timeout_seconds", default=60.0))
    return _custom(json.dumps(OmegaConf.to_container(section, resolve=True), sort_keys=True), seconds)


async def _ask_task(task: Task, **row: Any) -> Any:
    """A task of this package scores within microseconds, or is a coroutine that leaves the work to a process."""
    try:
        scored = task.score(**row)
        return await scored if inspect.isawaitable(scored) else scored
    except Exception as e:
        raise ScoreError(f"the score of task={task.name} raised {type(e).__name__}: {e}") from e


@functools.lru_cache(maxsize=8)  # an agent loop is made for every trajectory; its processes serve them all
def _custom(section: str, seconds: float) -> Score:
    function, kwargs = load_function(json.loads(section))
    what = f"the reward function {getattr(function, '__name__', function)}"
    if inspect.iscoroutinefunction(function):

        async def ask(**row: Any) -> Any:
            try:
                return await function(**row, **kwargs)
            except Exception as e:
                raise ScoreError(f"{what} raised {type(e).__name__}: {e}") from e

        return ask

    processes = Processes()

    async def ask_process(**row: Any) -> Any:
        try:
            return await processes.call(_call, section, row, seconds=seconds)
        except TimeoutError as e:
            raise ScoreError(f"{what} took longer than reward_timeout_seconds={seconds:g} and was ended") from e
        except Exception as e:  # what it raised, an answer that cannot be sent, or the death of its process
            raise ScoreError(f"{what} raised {type(e).__name__}: {e}") from e

    return ask_process


def _call(section: str, row: Mapping[str, Any]) -> Any:
    """In a process of the pool."""
    function, kwargs = _loaded(section)
    return function(**row, **kwargs)


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
