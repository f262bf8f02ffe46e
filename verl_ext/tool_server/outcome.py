"""From the kernel's account of a process to an :class:`ExecutionResult`. Pure functions, no I/O."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

from verl_ext.tool_server.channel import RawRun
from verl_ext.tool_server.runtime import Runtime
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Isolation, Limits, Outcome

# Status bytes, as inside/runner.py writes them (it cannot be imported here: it is not part of this process's world).
_SYNTAX_ERROR, _MEMORY, _EXIT = b"S", b"M", b"E"
# As inside/signals.py ends a program that is init of a pid namespace, where the kernel ends any other itself.
_SIGNAL_STATUS = 128
_NEVER_HANDLED = (signal.SIGKILL, signal.SIGSTOP)
# The kernel enforces RLIMIT_CPU by counting timer ticks and reports usage by exact accounting; they differ by percents.
_CPU_LIMIT_REACHED = 0.75


def classify(run: RawRun, limits: Limits) -> Outcome:
    """Name what happened. Facts the program cannot influence come first, its own hints last.

    The filter forbids a program to send itself SIGKILL, so one that neither we nor the CPU limit sent came from
    outside (an operator, the kernel's out-of-memory killer): not the program's fault.
    """
    if run.stdout.total + run.stderr.total > limits.output_kill_bytes:
        return Outcome.OUTPUT_LIMIT
    if os.WIFSIGNALED(run.status):
        if os.WTERMSIG(run.status) != signal.SIGKILL:
            return Outcome.CRASH
        if run.killed == "wall" or run.cpu_seconds >= _CPU_LIMIT_REACHED * limits.cpu_seconds:
            return Outcome.TIMEOUT
        return Outcome.INFRA
    if not run.marks:
        return Outcome.INFRA  # the child could not be confined, so the program was never started
    if run.marks.startswith(_SYNTAX_ERROR):
        return Outcome.SYNTAX_ERROR
    if os.WEXITSTATUS(run.status) == 0:
        return Outcome.OK
    return Outcome.MEMORY if run.marks.endswith(_MEMORY) else Outcome.ERROR


def with_signal(run: RawRun) -> RawRun:
    """In the tier ``strong``: the account as any other process would have left it if a signal of its own ended it.

    A program that exits with such a status behind the interpreter's back claims a death it could also have died.
    """
    number = os.WEXITSTATUS(run.status) - _SIGNAL_STATUS if os.WIFEXITED(run.status) else 0
    if not 0 < number < signal.NSIG or number in _NEVER_HANDLED or _EXIT in run.marks[1:]:
        return run
    return dataclasses.replace(run, status=number)


def build_result(
    request: ExecutionRequest,
    run: RawRun,
    limits: Limits,
    isolation: Isolation,
    runtime: Runtime,
    wall_seconds: float,
    queue_seconds: float,
    attempts: int,
) -> ExecutionResult:
    """The result to hand out, its texts cut and freed of host paths."""
    if isolation is Isolation.STRONG and request.session_id is None:
        run = with_signal(run)
    outcome = classify(run, limits)
    stdout, stderr = run.stdout.text(), strip_library_paths(run.stderr.text(), runtime)
    signalled = os.WIFSIGNALED(run.status)
    common: dict[str, Any] = {
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "peak_rss_bytes": run.peak_rss_bytes,
        "queue_seconds": queue_seconds,
        "timeout": wall_seconds,
        "attempts": attempts,
    }
    if outcome is Outcome.INFRA:
        detail = "killed from outside" if signalled else f"the child could not be confined: {stderr[-500:].strip()}"
        return ExecutionResult.infra(request.request_id, detail, isolation, **common)
    note = _note(outcome, run, limits, wall_seconds)
    output, cut = join_output(stdout, stderr, note, limits.output_kept_bytes)
    return ExecutionResult(
        outcome=outcome,
        output=output,
        stdout=stdout,
        stderr=stderr,
        request_id=request.request_id,
        isolation=isolation,
        exit_code=None if signalled else os.WEXITSTATUS(run.status),
        signal=os.WTERMSIG(run.status) if signalled else None,
        truncated=bool(cut or run.stdout.cut or run.stderr.cut),
        **common,
    )


def _note(outcome: Outcome, run: RawRun, limits: Limits, wall_seconds: float) -> str:
    """The line that tells the model how its program was stopped; empty when a traceback says it all."""
    if outcome is Outcome.TIMEOUT:
        what = f"{wall_seconds:g} s of wall time" if run.killed == "wall" else f"{limits.cpu_seconds} s of CPU time"
        return f"[timeout: stopped after {what}]"
    if outcome is Outcome.OUTPUT_LIMIT:
        return f"[output limit: stopped after writing more than {limits.output_kill_bytes} bytes]"
    if outcome is Outcome.CRASH:
        return f"[crash: killed by {_name(os.WTERMSIG(run.status))}]"
    if outcome is Outcome.ERROR and not run.stderr.total:
        return f"[exit status {os.WEXITSTATUS(run.status)}]"
    return ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # a real-time signal


def join_output(stdout: str, stderr: str, note: str, kept: int) -> tuple[str, bool]:
    """The text for the model: stdout, stderr, note; at most ``kept`` characters. Returns it and whether it was cut."""
    parts = [part for part in (stdout, stderr) if part]
    text = "".join(part if part.endswith("\n") or part is parts[-1] else part + "\n" for part in parts)
    cut = len(text) > kept
    if cut:
        half = kept // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters cut ...]\n{text[-half:]}"
    if note:
        text = text + ("" if not text or text.endswith("\n") else "\n") + note
    return text, cut


def strip_library_paths(text: str, runtime: Runtime) -> str:
    """Name library files relative to their package (``numpy/linalg/_linalg.py``): tracebacks show no host path."""
    for root in runtime.visible_roots:
        for prefix in runtime.library_prefixes:
            text = text.replace(f"{root}/{prefix}", "")
    return text
