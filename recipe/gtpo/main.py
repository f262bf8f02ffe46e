"""Train with GTPO or a baseline: `python -m recipe.gtpo.main [hydra overrides]` (examples/run_gtpo_qwen.sh calls this).

The command checks everything that can be checked, prepares the task, starts the tool server, hands over to verl's own
`run_ppo`, shows progress, and leaves no process behind, whichever way the run ends. The last line says why it ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

import hydra  # noqa: E402
import ray  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig, open_dict  # noqa: E402

from recipe.gtpo.run.checks import ConfigError, check, prepare, register  # noqa: E402
from recipe.gtpo.run.progress import Progress, summarize  # noqa: E402
from recipe.gtpo.run.record import RunRecord, last_line  # noqa: E402
from recipe.gtpo.run.watchdog import CAUSE_FILE, read_cause, write_cause  # noqa: E402
from verl_ext.tool_server.launch import ServerHandle, ServerStartError, start_server  # noqa: E402


def say(text: str) -> None:
    print(f"gtpo: {text}", flush=True)


@contextmanager
def tool_server(config: DictConfig) -> Iterator[ServerHandle | None]:
    """The run's tool server: started here and stopped at the end, or the one at `tool_server.url`.

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


def _check_health(url: str, token: str | None) -> None:
    import asyncio

    from verl_ext.tool_server import ToolClient

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


@contextmanager
def watch_tool_server(handle: ServerHandle | None, config: DictConfig) -> Iterator[None]:
    """While the block runs, a tool server that dies interrupts it (every trajectory would be void without it)."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(config.watchdog.poll_seconds):
            if handle is not None and not handle.alive:
                last = last_line(handle.log())
                write_cause(config.run_dir, f"the tool server died: pid {handle.pid}, its last line: {last}")
                os.kill(os.getpid(), signal.SIGINT)  # out of the main thread's ray.get
                return

    thread = threading.Thread(target=watch, name="tool-server-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=config.watchdog.poll_seconds + 5)


def validate(config: DictConfig) -> None:
    """verl's own checks, before anything starts."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from recipe.gtpo.plugin import assert_registered

    assert_registered()
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError) as e:
        raise ConfigError(str(e)) from e


def finished(config: DictConfig) -> bool:
    """Whether the run folder holds a run that has done all its steps."""
    tracker = Path(config.trainer.default_local_dir) / "latest_checkpointed_iteration.txt"
    if config.trainer.resume_mode != "auto" or not tracker.exists():
        return False
    return int(tracker.read_text()) >= (config.trainer.total_training_steps or float("inf"))


def train(config: DictConfig) -> None:
    """One run, from the tool server to the summary. Raises what ended it early."""
    from verl.trainer.main_ppo import run_ppo

    from recipe.gtpo.task_runner import GTPOTaskRunner

    record = RunRecord(config.run_dir)
    record.write_start(config.seed)
    (record.dir / CAUSE_FILE).unlink(missing_ok=True)
    with tool_server(config) as server:
        with open_dict(config):
            variables = config.ray_kwargs.ray_init.runtime_env.setdefault("env_vars", {})
            variables["GTPO_TOOL_SERVER_URL"] = config.tool_server.url
            if config.tool_server.token is not None:
                variables["GTPO_TOOL_SERVER_TOKEN"] = config.tool_server.token
        say("starting Ray, the policy and the rollout servers")
        try:
            with watch_tool_server(server, config), Progress(record, config.trainer.total_training_steps):
                run_ppo(config, task_runner_class=GTPOTaskRunner)
        finally:
            _keep_logs(record)
            ray.shutdown()


def _keep_logs(record: RunRecord) -> None:
    """Copy the workers' output out of Ray's temporary session folder."""
    # Ray has no public name for the folder of the session it is in; tests/gtpo/test_plugin.py breaks when it moves.
    node = ray._private.worker._global_node
    if node is not None:
        shutil.copytree(node.get_logs_dir_path(), record.logs, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def run(config: DictConfig) -> int:
    """Everything from the composed config to the last line. Returns the exit status: 0 after a complete run."""
    began = time.monotonic()
    # Started with `&` by a script, the process inherits an ignored SIGINT, and nothing could interrupt the run: neither
    # the watch on the tool server, nor whoever stops it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check(config, dict(HydraConfig.get().runtime.choices))
        prepare(config)
        validate(config)
        record = RunRecord(config.run_dir)
        if finished(config):
            summarize(record, config)
            say("this run is complete, nothing was trained; to train again, set seed= or trainer.experiment_name=")
            return 0
        train(config)
        summarize(record, config, seconds=time.monotonic() - began)
        return 0
    except (ConfigError, ServerStartError) as e:
        return _end(str(e))
    except KeyboardInterrupt:
        cause = read_cause(config.run_dir)
        return _end(cause) if cause else _end("interrupted", status=130)
    except Exception as e:
        logs = RunRecord(config.run_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "driver.txt").write_text("".join(traceback.format_exception(e)))
        cause = read_cause(config.run_dir) or f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"
        return _end(f"{cause} (whole report: {logs})")


def _end(cause: str, status: int = 1) -> int:
    print(f"gtpo: error: {cause}", file=sys.stderr, flush=True)
    return status


@hydra.main(config_path="config", config_name="gtpo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    status = run(config)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    register()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
