"""The cold start of a run: its transcripts, and the model that was trained on them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.data.overlap import Known
from recipe.gtpo.data.sources import read_file
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.tool_server import tool_server
from recipe.gtpo.run.tools import tool_schemas
from recipe.gtpo.sft.sources import TEACHER, Say, collect, open_source
from recipe.gtpo.sft.train import train
from recipe.gtpo.sft.transcripts import question
from recipe.gtpo.tasks.prepared import PreparedTask
from recipe.gtpo.tasks.task import Task, load_task
from verl_ext.tool_server import ToolClient


def cold_start(config: DictConfig, say: Say) -> Path:
    """The folder of the run's model after its cold start; made now or found.

    Args:
        config: of a run whose task and model are prepared.

    Raises ConfigError or ValueError with what is missing.
    """
    check_source(config)
    options = config.sft
    task = load_task(config)
    with _python(config, say) if options.source == TEACHER else _no_python() as run_code:
        transcripts = collect(
            open_source(options.source, task, run_code),
            count=options.count,
            system=getattr(task, "system", None),
            held_out=_held_out(config, task),
            say=say,
        )
    return train(config, transcripts, tool_schemas(config), say)


def check_source(config: DictConfig) -> None:
    """Raise ConfigError where nothing says what the transcripts are."""
    if not is_wanted(config):
        raise ConfigError(
            f"sft.source is not set: {TEACHER} (a task that has one), a run's folder, a file, or a data set of the hub"
        )


def _held_out(config: DictConfig, task: Task) -> Known:
    """What the run validates on. A published problem is also known in part: transcripts may frame it in instructions.

    Elsewhere a prompt may be instructions for the greater part, the same for all: there only an equal one counts.
    """
    known = Known(partial=isinstance(task, PreparedTask) and not task.templated)
    files = config.data.val_files
    for path in [files] if isinstance(files, str) else list(files or ()):
        for row in read_file(Path(path)):
            known.add(question(row[config.data.prompt_key]), str(path))
    return known


@contextmanager
def _python(config: DictConfig, say: Say) -> Iterator[Callable[[str], str]]:
    """What the tool python says to a program, from the run's own kind of tool server."""
    config = copy.deepcopy(config)  # the run starts another one

    async def ask(code: str) -> str:
        async with ToolClient.from_url(config.tool_server.url, token=config.tool_server.token) as client:
            return (await client.run(code)).output

    with tool_server(config, say):
        yield lambda code: asyncio.run(ask(code))


@contextmanager
def _no_python() -> Iterator[Callable[[str], str]]:
    def refuse(code: str) -> str:
        raise AssertionError("only a teacher runs programs")

    yield refuse


def is_wanted(config: DictConfig) -> bool:
    """Whether a run begins with a cold start."""
    return OmegaConf.select(config, "sft.source") is not None
