"""How the command ends: its last line, and what it leaves in a folder that may be another run's.

Real: the command from its first check to its last line, the record, the status screen. Fake: what is looked at and
trained.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from types import SimpleNamespace

import pytest
import ray
from composition import compose, compose_with_choices
from full_disk import full_disk
from omegaconf import OmegaConf

from recipe.gtpo import main
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.status import describe
from verl_ext.tool_server.launch import ServerStartError

pytestmark = pytest.mark.unit


def raising(error):
    def function(*_):
        raise error

    return function


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """A start of the command on one folder: (exit status, last line)."""
    choices = compose_with_choices()[1]
    fake = SimpleNamespace(get=lambda: SimpleNamespace(runtime=SimpleNamespace(choices=choices)))
    monkeypatch.setattr(main, "HydraConfig", fake)
    monkeypatch.setattr(main, "validate", lambda config: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def start(*overrides, look=lambda say: None, train=lambda config, record: None):
        monkeypatch.setattr(main, "first_checks", lambda config, choices: {"all": look})
        monkeypatch.setattr(main, "prepare", lambda config, say: OmegaConf.resolve(config))
        monkeypatch.setattr(main, "_train", train)
        status = main.run(compose(f"run_dir={tmp_path}/run", *overrides))
        return status, capsys.readouterr().err.strip().splitlines()[-1]

    yield start
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def record(tmp_path):
    return RunRecord(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [
        (ConfigError("tools: there is none"), 1, "tools: there is none"),
        (ServerStartError("the tool server did not start\nlog\nno room"), 1, "the tool server did not start no room"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("boom"), 1, "RuntimeError: boom"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_a_start_stands_in_its_folder(command, record, error, status, cause):
    found, said = command(train=raising(error))
    report = f" (whole report: {record.logs})" if type(error) is RuntimeError else ""
    assert (found, said) == (status, f"gtpo: error: {cause}{report}") and record.read_cause() == cause
    screen, ended = describe(record, time.time())
    assert ended and screen[1].endswith(f"ended early: {cause}")
    command(train=raising(RuntimeError("another")))
    assert record.read_cause() == "RuntimeError: another"  # that start's own


def test_a_start_that_is_refused_after_its_entry_says_why_in_the_folder(command, record):
    """A token or an address that the tool server refuses is known only when it is asked."""
    status, said = command("tool_server.url=http://127.0.0.1:9", train=main._train)
    assert status == 1 and "127.0.0.1:9 does not answer" in said
    assert len(record.read_starts()) == 1 and "127.0.0.1:9 does not answer" in record.read_cause()


@pytest.mark.parametrize("before", [RuntimeError("boom"), None], ids=["ended-early", "not-ended"])
@pytest.mark.parametrize(
    ("refused", "status", "said"),
    [
        ({"look": raising(ConfigError("trainer.test_freq=ten: a whole number is needed"))}, 1, "test_freq=ten"),
        ({"look": raising(KeyboardInterrupt())}, 130, "gtpo: error: interrupted"),
        ({"look": raising(ZeroDivisionError("of a check"))}, 1, "gtpo: error: ZeroDivisionError: of a check"),
        (("seed=2",), 1, "belongs to a run with another config: "),
    ],
    ids=["typo", "ctrl-c", "fault", "another-config"],
)
def test_a_command_that_never_started_changes_nothing_of_the_run_that_is_there(
    command, record, before, refused, status, said
):
    with contextlib.suppress(Ended):
        command(train=raising(before or Ended()))
    files = files_of(record)
    arguments, keywords = (refused, {}) if isinstance(refused, tuple) else ((), refused)
    found = command(*arguments, **keywords)
    assert found[0] == status and said in found[1]
    assert files_of(record) == files and record.read_cause() == (before and "RuntimeError: boom")


class Ended(BaseException):
    """A kill, which no handler catches."""


def files_of(record):
    return {path: path.read_bytes() for path in record.dir.rglob("*") if path.is_file()}


def test_a_full_disk_does_not_take_the_last_line(command, record):
    with contextlib.ExitStack() as stack:

        def train(config, record):
            stack.enter_context(full_disk())
            raise RuntimeError("no room for a checkpoint")

        assert command(train=train) == (1, "gtpo: error: RuntimeError: no room for a checkpoint")
    assert record.read_cause() is None


def test_a_full_disk_does_not_take_what_a_watch_has_found(command):
    with contextlib.ExitStack() as stack:

        def train(config, record):
            stack.enter_context(full_disk())
            record.write_cause("the tool server died: pid 7")
            raise KeyboardInterrupt  # which the watch then sends

        assert command(train=train) == (1, "gtpo: error: the tool server died: pid 7")


def test_logs_that_cannot_be_kept_do_not_replace_the_error(tmp_path, monkeypatch, capsys):
    node = SimpleNamespace(get_logs_dir_path=lambda: str(tmp_path / "ray"))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/worker.err").write_text("all of it")
    with full_disk():
        main.keep_logs(RunRecord(tmp_path / "run"))
    assert "the workers' output could not be copied, it stays in" in capsys.readouterr().out
