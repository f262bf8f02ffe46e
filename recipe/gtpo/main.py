"""Train with GTPO or a baseline: `python -m recipe.gtpo.main [hydra overrides]` (examples/run_gtpo_qwen.sh calls this).

The command checks everything that can be checked, prepares the task, starts the tool server, hands over to verl's own
`run_ppo`, shows progress, and leaves no process behind, whichever way the run ends. The last line says why it ended.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

import hydra  # noqa: E402
import ray  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig, open_dict  # noqa: E402

from recipe.gtpo.run.checks import first_checks, prepare, register  # noqa: E402
from recipe.gtpo.run.ending import end, end_on_sigterm, end_over, sigterm_came  # noqa: E402
from recipe.gtpo.run.errors import TERMINATED, TERMINATED_STATUS, ConfigError, call_hydra, one_line  # noqa: E402
from recipe.gtpo.run.identity import claim  # noqa: E402
from recipe.gtpo.run.progress import Progress, summarize, validation_accuracy  # noqa: E402
from recipe.gtpo.run.record import RecordError, RunRecord, last_line, latest_checkpoint  # noqa: E402
from recipe.gtpo.run.tool_server import tool_server  # noqa: E402
from recipe.gtpo.run.tools import check_tools  # noqa: E402
from verl_ext.cpu.memory import empty_cache  # noqa: E402
from verl_ext.tool_server.launch import ServerHandle, ServerStartError  # noqa: E402

_PATIENCE_SECONDS = 20.0  # for an orderly end after a loss


def say(text: str) -> None:
    print(f"gtpo: {text}", flush=True)


@contextmanager
def watch_machine(handle: ServerHandle | None, record: RunRecord, poll_seconds: float) -> Iterator[threading.Event]:
    """While the block runs, the death of what this command started itself interrupts it: the tool server, without which
    every trajectory is void, and Ray's own servers, without which the run waits for ever.

    Yields an event, to be set before these are ended on purpose. After a loss the block has `_PATIENCE_SECONDS` to end.
    """
    ending, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ending.wait(poll_seconds):
            cause = lost_part(handle)
            if cause is not None:
                record.write_cause(cause)
                os.kill(os.getpid(), signal.SIGINT)  # out of the main thread's ray.get
                if not ended.wait(_PATIENCE_SECONDS):
                    end("gtpo", cause)
                    os._exit(1)  # Ray cannot end itself; its workers go when this process does
                return

    thread = threading.Thread(target=watch, name="machine-watch", daemon=True)
    thread.start()
    try:
        yield ending
    finally:
        ending.set()
        ended.set()
        thread.join(timeout=poll_seconds + 5)


@contextmanager
def naming_lost_part(handle: ServerHandle | None, record: RunRecord) -> Iterator[None]:
    """What the block raises while a part is lost is a consequence of that: the cause is the part."""
    try:
        yield
    except Exception:
        lost = lost_part(handle)
        if lost is not None:
            record.write_cause(lost)
        raise


def lost_part(handle: ServerHandle | None) -> str | None:
    """A sentence on what is dead, or None."""
    if handle is not None and not handle.alive:
        return f"the tool server died: pid {handle.pid}, its last line: {last_line(handle.log())}"
    # Ray has no public name for the processes that it started; tests/gtpo/test_plugin.py breaks when it moves.
    node = ray._private.worker._global_node
    dead = {} if node is None else {name: process.pid for name, process in node.dead_processes()}
    named = {"gcs_server": "Ray's control store (gcs_server)", "raylet": "Ray's raylet"}
    return next((f"{named[name]} died: pid {dead[name]}" for name in named if name in dead), None)


def validate(config: DictConfig) -> None:
    """verl's own checks, before anything starts."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from recipe.gtpo.plugin import assert_registered

    assert_registered()
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError) as e:
        raise ConfigError(str(e) or one_line(e)) from e


def finished(config: DictConfig, record: RunRecord, checkpoint: int | None) -> bool:
    """Whether the run folder holds a run that has done all its steps, and said what came of the last one.

    Not known where the epochs decide (total_training_steps=null): verl then finds that there is no step left.
    """
    total = config.trainer.total_training_steps
    if checkpoint is None or not total:
        return False
    return checkpoint >= total and any(line["step"] >= total for line in record.read_metrics())


def train(config: DictConfig, record: RunRecord) -> None:
    """One run, from the tool server to the summary. Raises what ended it early."""
    record.write_start(config.seed)
    end_on_sigterm(record)
    _train(config, record)


class TaskRunnerAfterRay:
    """What verl starts as its task runner, once Ray has come up in this process, and has taken SIGTERM over."""

    def __init__(self, runner: Any, record: RunRecord) -> None:
        self._runner, self._record = runner, record

    def options(self, **kwargs: Any) -> TaskRunnerAfterRay:
        return TaskRunnerAfterRay(self._runner.options(**kwargs), self._record)

    def remote(self) -> Any:
        end_on_sigterm(self._record)
        return self._runner.remote()


def _train(config: DictConfig, record: RunRecord) -> None:
    from verl.trainer.main_ppo import run_ppo

    from recipe.gtpo.task_runner import GTPOTaskRunner

    with tool_server(config, say) as server:
        with open_dict(config):
            variables = config.ray_kwargs.ray_init.runtime_env.setdefault("env_vars", {})
            variables["GTPO_TOOL_SERVER_URL"] = config.tool_server.url
            variables["TENSORBOARD_DIR"] = os.environ["TENSORBOARD_DIR"]  # a Ray that runs has not got this process's
            if config.tool_server.token is not None:
                variables["GTPO_TOOL_SERVER_TOKEN"] = config.tool_server.token
        check_tools(config, variables, say)
        say("starting Ray, the policy and the rollout servers")
        empty_cache()  # of preparing data and models: from here on this process waits
        with watch_machine(server, record, config.watchdog.poll_seconds) as ending:
            try:
                with naming_lost_part(server, record), Progress(record, config.trainer.total_training_steps):
                    run_ppo(config, task_runner_class=TaskRunnerAfterRay(GTPOTaskRunner, record))
            finally:
                ending.set()
                keep_logs(record)
                ray.shutdown()  # may wait for what is dead


def keep_logs(record: RunRecord) -> None:
    """Copy the workers' output out of Ray's temporary session folder."""
    # Ray has no public name for the folder of the session it is in; tests/gtpo/test_plugin.py breaks when it moves.
    node = ray._private.worker._global_node
    if node is None:
        return
    folder = node.get_logs_dir_path()
    try:
        record.keep_logs(folder)
    except OSError:  # a full disk; what ended the run is on its way to the last line
        say(f"warning: the workers' output could not be copied, it stays in {folder}")


def run(config: DictConfig) -> int:
    """Everything from the composed config to the last line. Returns the exit status: 0 after a complete run."""
    began = time.monotonic()
    # Started with `&` by a script, the process inherits an ignored SIGINT, and nothing could interrupt the run: neither
    # the watch on the tool server, nor whoever stops it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    record = RunRecord(Path(config.run_dir).resolve())
    started: RunRecord | None = None  # before the folder is known to be this start's, its cause is another one's
    try:
        for look in first_checks(config, dict(HydraConfig.get().runtime.choices)).values():
            look(say)
        prepare(config, say)
        validate(config)
        claim(record, config)
        record.drop_cause()
        started = record
        if "triton" not in sys.modules:  # which comes with vLLM, and ends with a page on all that was not collected
            gc.freeze()  # all is imported; the process ends a second sooner when it does not look for cycles in verl
        gc.enable()
        resumes = config.trainer.resume_mode == "auto"
        checkpoint = latest_checkpoint(config.trainer.default_local_dir) if resumes else None
        if finished(config, record, checkpoint) and not config.trainer.val_only:
            summarize(record, config)
            say("this run is complete, nothing was trained; to train again, set seed= or run_dir=")
            return 0
        if checkpoint is not None:
            say(f"going on from the checkpoint of step {checkpoint}")
        train(config, record)
        if config.trainer.val_only:
            evaluation = record.read_evaluations()[-1]
            accuracy = validation_accuracy(evaluation["metrics"])
            say(f"step {evaluation['step']}: held-out accuracy {accuracy:.3f}; see {record.dir}/evaluations.jsonl")
        else:
            summarize(record, config, seconds=time.monotonic() - began)
        return 0
    except (ConfigError, RecordError) as e:
        return end("gtpo", str(e), record=started)
    except ServerStartError as e:
        head, _, log = str(e).partition("\n")
        if log:
            print(log, file=sys.stderr)
        return end("gtpo", f"{head} {last_line(log)}" if log else head, record=started)
    except KeyboardInterrupt:
        if started is not None and (cause := started.read_cause()):  # of the watch that sent it
            return end("gtpo", cause)
        return end("gtpo", "interrupted", 130, started)
    except SystemExit:
        if not sigterm_came():
            raise
        return end("gtpo", TERMINATED, TERMINATED_STATUS, started)
    except Exception as e:
        return end_over(e, "gtpo", started)


@hydra.main(config_path="config", config_name="gtpo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    status = run(config)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    gc.disable()  # the imports to come leave no garbage, and looking for it takes a second of their five
    register()
    end_on_sigterm()
    call_hydra(main, "gtpo")
