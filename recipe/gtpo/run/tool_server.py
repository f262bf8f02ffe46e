"""The tool server of a run: started for it and stopped with it, or the one that the config names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig, open_dict

from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.inputs import Say
from verl_ext.tool_server import ToolClient
from verl_ext.tool_server.client import is_ray
from verl_ext.tool_server.launch import ServerHandle, start_server


def _say(text: str) -> None:
    print(f"gtpo: {text}", flush=True)


@contextmanager
def tool_server(config: DictConfig, say: Say = _say) -> Iterator[ServerHandle | None]:
    """The run's tool server: started here and stopped at the end, the one at `tool_server.url`, or one on every node.

    Raises ServerStartError / ConfigError when there is none: no worker has been started by then.
    """
    options = config.tool_server
    limits = {name: value for name, value in options.limits.items() if value is not None}
    if options.url is not None:
        if limits or options.packages is not None:
            raise ConfigError(
                f"tool_server.limits and tool_server.packages are for a server that the run starts; the one at "
                f"tool_server.url={options.url} has its own: give them on its command line"
            )
        if is_ray(options.url):
            with open_dict(config):
                options.url = ray_executors(config)
            say("the tool server is an executor on every node of the Ray cluster, which starts with the workers")
        else:
            _check_health(options.url, options.token)
        yield None
        return
    say("starting the tool server")
    handle = start_server(
        isolation=options.isolation,
        unsafe_no_isolation=options.unsafe_no_isolation,
        workers=options.workers,
        limits=limits,
        packages=options.packages,
        progress=lambda line: say(f"tool server: {line.split(' tool_server ')[-1].removeprefix('INFO ')}"),
    )
    try:
        say(f"tool server at {handle.url}, isolation: {handle.isolation}")
        with open_dict(config):
            options.url = handle.url
        yield handle
    finally:
        handle.stop()


def ray_executors(config: DictConfig) -> str:
    """`tool_server.url=ray` with the isolation that the config asks for, in the form that the tool's client reads."""
    options = config.tool_server
    if options.unsafe_no_isolation or options.workers is not None:
        raise ConfigError(
            f"tool_server.unsafe_no_isolation and tool_server.workers are for a server that the run starts; with "
            f"tool_server.url={options.url} every node isolates programs, and runs one for each of its CPUs"
        )
    if "://" in options.url or options.isolation == "auto":
        return options.url
    return f"{options.url}://{options.isolation}"


def _check_health(url: str, token: str | None) -> None:
    async def ask() -> None:
        async with ToolClient.from_url(url, token=token) as client:
            await client.health()

    try:
        asyncio.run(asyncio.wait_for(ask(), timeout=15))
    except Exception as e:
        raise ConfigError(
            f"tool_server.url={url} does not answer ({type(e).__name__}: {e}); start one with "
            "`python -m verl_ext.tool_server`, or leave the url out and the run starts its own"
        ) from e
