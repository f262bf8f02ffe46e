"""The objects that cross every boundary of the tool server: a request, its limits, and its result.

Client, HTTP API, dispatcher and backends all speak these types, so a result means the same thing whichever way it
came. Standard library only: importing this module costs a client nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KIB = 1024
MIB = 1024 * KIB
MAX_ID = 128  # characters in a request or session id


class Outcome(str, enum.Enum):
    """How one execution ended: a closed set, every consumer may switch on it.

    Derived from facts the kernel reports about the process (wait status, resource usage) and from what the server
    did to it. What the program claims about itself can only choose between ``ok``, ``error`` and ``memory``, all of
    which it could have brought about honestly.
    """

    OK = "ok"  # ran to its end, exit status 0
    ERROR = "error"  # an uncaught exception (traceback shown) or a non-zero exit status
    SYNTAX_ERROR = "syntax_error"  # did not compile; nothing of it ran
    TIMEOUT = "timeout"  # wall-clock or CPU limit
    MEMORY = "memory"  # an uncaught MemoryError under the memory limit
    OUTPUT_LIMIT = "output_limit"  # killed for writing more than the hard output limit
    CRASH = "crash"  # died of a signal of its own making (segmentation fault, abort, forbidden system call ABI)
    INFRA = "infra"  # the server's fault: says nothing about the program, must never be charged to the model


class Isolation(str, enum.Enum):
    """What stands between the executed code and the machine; stamped on every result."""

    STRONG = "strong"  # namespaces + landlock + seccomp + rlimits, private scratch directory
    STANDARD = "standard"  # landlock + seccomp + rlimits, no writable path at all
    NONE = "none"  # nothing but rlimits: only with --unsafe-no-isolation
    UNKNOWN = "unknown"  # not ours to say: another service ran it, or nothing ran at all


@dataclass(frozen=True)
class Limits:
    """What one execution may use. The server's values are ceilings: a request can lower its wall time, not raise it."""

    wall_seconds: float = 15.0
    cpu_seconds: int = 5  # the kernel counts RLIMIT_CPU in whole seconds
    memory_bytes: int = 512 * MIB  # address space beyond what the preloaded interpreter already maps
    open_files: int = 64
    threads: int = 64  # not where the server shares its user with others: see `SPARE_TASKS` in worker.py
    scratch_bytes: int = 16 * MIB  # size of the private /tmp (strong tier; there is none in standard)
    code_bytes: int = 256 * KIB
    stdin_bytes: int = 1 * MIB
    output_kept_bytes: int = 64 * KIB  # per stream: half from the head, half from the tail
    output_kill_bytes: int = 8 * MIB  # stdout + stderr together


def check_seconds(name: str, value: object) -> None:
    """Raise ``ValueError`` naming the field unless ``value`` is absent or a positive number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):  # type: ignore[operator]
        raise ValueError(f"{name!r} must be a positive number of seconds")


@dataclass(frozen=True)
class ExecutionRequest:
    """One program to run.

    ``request_id`` makes a request idempotent: sent again (a lost connection, a retry) it is answered with the first
    execution's result instead of running twice.
    """

    code: str
    timeout: float | None = None  # seconds of wall time; None: the server's limit
    stdin: str | None = None
    session_id: str | None = None  # None: stateless
    echo: bool = True  # show the value of a last expression, as the REPL does
    request_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExecutionRequest:
        """Build from untrusted JSON. Raises ``ValueError`` naming the first field that is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a request must be a JSON object, not {type(data).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if not isinstance(data.get("code"), str):
            raise ValueError("'code' must be a string")
        check_seconds("timeout", data.get("timeout"))
        for name in ("stdin", "session_id"):
            if data.get(name) is not None and not isinstance(data[name], str):
                raise ValueError(f"{name!r} must be a string")
        if not isinstance(data.get("echo", True), bool):
            raise ValueError("'echo' must be true or false")
        for name in ("session_id", "request_id"):
            if isinstance(data.get(name), str) and not 0 < len(data[name]) <= MAX_ID:
                raise ValueError(f"{name!r} must have 1 to {MAX_ID} characters")
        if data.get("request_id") is None:
            data = {k: v for k, v in data.items() if k != "request_id"}
        elif not isinstance(data["request_id"], str):
            raise ValueError("'request_id' must be a string")
        return cls(**data)


@dataclass(frozen=True)
class ExecutionResult:
    """What became of one program. ``output`` is the text to show the model; the rest is for logs and rewards."""

    outcome: Outcome
    output: str  # stdout (with the echo), then stderr (with the traceback), then a line on how it was stopped
    stdout: str
    stderr: str
    request_id: str
    isolation: Isolation
    seconds: float = 0.0  # wall time from fork to death
    cpu_seconds: float = 0.0  # user + system, as the kernel counted it
    queue_seconds: float = 0.0  # time spent waiting for a free worker
    peak_rss_bytes: int = 0
    exit_code: int | None = None  # None when a signal ended it
    signal: int | None = None
    truncated: bool = False  # some output was cut; the text says where
    timeout: float | None = None  # the wall limit that was in force, seconds
    attempts: int = 1  # executions started for this answer; 2 when a dead worker's work was done again
    detail: str = ""  # for infra: what went wrong, for the operator
    busy: bool = False  # for infra: nothing went wrong, all workers were taken for too long; ask again

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["outcome"] = self.outcome.value
        data["isolation"] = self.isolation.value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExecutionResult:
        """Inverse of :meth:`to_dict`. Raises ``ValueError``/``TypeError`` on anything else."""
        fields = dict(data)
        fields["outcome"] = Outcome(fields["outcome"])
        fields["isolation"] = Isolation(fields["isolation"])
        return cls(**fields)

    @classmethod
    def infra(cls, request_id: str, detail: str, isolation: Isolation, **fields: Any) -> ExecutionResult:
        """A result that says: we failed, the program is not to blame. ``output`` tells the model only that."""
        text = "[tool unavailable: the execution service failed, not your code]"
        return cls(Outcome.INFRA, text, "", "", request_id, isolation, detail=detail, **fields)
