"""How a command ends that was not to end yet: on SIGTERM, by a process that died, with one last line."""

from __future__ import annotations

import signal
import sys
import traceback
from contextlib import suppress

import ray

from recipe.gtpo.run.errors import TERMINATED, TERMINATED_STATUS, how_it_died, one_line, plain
from recipe.gtpo.run.record import RecordError, RunRecord


def end_on_sigterm(record: RunRecord | None = None) -> None:
    """SIGTERM (of `kill`, a batch system, a container that ends) goes up through every `finally`, as SystemExit.

    To be called again once Ray has come up in this process: Ray takes SIGTERM over, its handler ends Ray's servers
    first, and the process aborts over their loss without a last line. The cause is written at once: where Ray's servers
    get the signal too, their loss may abort the process all the same.
    """

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the way up takes seconds, and is not to be cut short
        if record is not None:
            record.write_cause(TERMINATED)
        raise SystemExit(TERMINATED_STATUS)

    signal.signal(signal.SIGTERM, terminate)


def sigterm_came() -> bool:
    """Whether a SystemExit is that of `end_on_sigterm`. Ray, which it meets at work, makes one of its own of it."""
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def end_of(error: Exception) -> str:
    """Of an end that nobody wrote down. The trainer writes its own down, unless it is killed itself."""
    died = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    if isinstance(error, died) and not isinstance(error, ray.exceptions.RayTaskError):
        return f"the trainer's process died: {how_it_died(str(error))}"
    return one_line(error)


def end(program: str, cause: str, status: int = 1, record: RunRecord | None = None, then: str = "") -> int:
    """Say the last line of `program`, and return the exit status.

    Args:
        record: of the start that ends, which keeps the cause unless it has one. None as long as the folder is not this
            start's: what stands there is another one's.
        then: what the line says behind the cause.
    """
    cause = plain(cause)
    if record is not None:
        record.write_cause(cause.partition("\n")[0])
    print(f"{program}: error: {cause}{then}", file=sys.stderr, flush=True)
    return status


def end_over(error: Exception, program: str, record: RunRecord | None, then: str = "") -> int:
    """End over an error that nobody has put in words. Its traceback is in the logs, or where they take nothing, here.

    The last line has the cause that the record knows, if there is one: the error may be a consequence of that.
    """
    cause, report, where = end_of(error), "".join(traceback.format_exception(error)), ""
    if record is not None:
        cause = record.write_cause(cause)
        with suppress(OSError, RecordError):
            record.write_traceback(report)
            where = f" (whole report: {record.logs})"
    if not where:
        print(report, file=sys.stderr)
    return end(program, cause, then=where + then)
