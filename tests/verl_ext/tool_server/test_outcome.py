"""From wait status and bytes to an outcome and the text for the model."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_ext.tool_server import ExecutionRequest, Isolation, Limits, Outcome
from verl_ext.tool_server.channel import Capture, RawRun
from verl_ext.tool_server.outcome import build_result, classify, join_output, strip_library_paths
from verl_ext.tool_server.runtime import Runtime

pytestmark = pytest.mark.unit
LIMITS = Limits(cpu_seconds=5, output_kept_bytes=64, output_kill_bytes=1000)
RUNTIME = Runtime(Path("/cache/tree"), "inside-1")
KILLED = int(signal.SIGKILL)


def raw(
    status: int = 0, killed: str = "", cpu: float = 0.1, out: bytes = b"", err: bytes = b"", marks: bytes = b"R"
) -> RawRun:
    stdout, stderr = Capture(LIMITS.output_kept_bytes), Capture(LIMITS.output_kept_bytes)
    stdout.add(out)
    return RawRun(status, killed, 0.2, cpu, 1000, stdout, stderr, marks)


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (raw(0), Outcome.OK),
        (raw(1 << 8), Outcome.ERROR),
        (raw(3 << 8), Outcome.ERROR),
        (raw(1 << 8, marks=b"S"), Outcome.SYNTAX_ERROR),
        (raw(1 << 8, marks=b"RS"), Outcome.ERROR),  # a forged mark comes after the true one
        (raw(1 << 8, marks=b"RM"), Outcome.MEMORY),
        (raw(0, marks=b"RM"), Outcome.OK),
        (raw(KILLED, killed="wall"), Outcome.TIMEOUT),
        (raw(KILLED, cpu=4.9), Outcome.TIMEOUT),
        (raw(KILLED), Outcome.INFRA),  # neither we nor the CPU limit: somebody outside
        (raw(KILLED, killed="output", out=b"x" * 2000), Outcome.OUTPUT_LIMIT),
        (raw(0, out=b"x" * 2000), Outcome.OUTPUT_LIMIT),  # ended by itself before the kill arrived
        (raw(int(signal.SIGSEGV)), Outcome.CRASH),
        (raw(int(signal.SIGXCPU)), Outcome.CRASH),  # sent by the program itself
        (raw(70 << 8, marks=b""), Outcome.INFRA),  # never started
        (raw(int(signal.SIGSEGV), marks=b""), Outcome.CRASH),  # the parser gave up on it
    ],
)
def test_outcome_follows_from_facts(run: RawRun, outcome: Outcome) -> None:
    assert classify(run, LIMITS) is outcome


@given(st.lists(st.binary(max_size=300), max_size=30), st.integers(2, 100))
def test_capture_conserves_head_tail_and_count(chunks: list[bytes], kept: int) -> None:
    capture = Capture(kept)
    for chunk in chunks:
        capture.add(chunk)
    data, half = b"".join(chunks), kept // 2
    text = capture.text()
    assert capture.total == len(data)
    if len(data) <= 2 * half:
        assert capture.cut == 0 and text == data.decode("utf-8", "replace")
    else:
        assert capture.cut == len(data) - 2 * half
        assert text.startswith(data[:half].decode("utf-8", "replace"))
        assert text.endswith(data[-half:].decode("utf-8", "replace"))
        assert f"[... {capture.cut} bytes cut ...]" in text


@given(
    st.lists(st.binary(max_size=60), min_size=1, max_size=4),
    st.lists(st.integers(1, 70), max_size=6),
    st.integers(2, 100),
)
def test_what_follows_a_line_mark_starts_a_line(shown: list[bytes], cuts: list[int], kept: int) -> None:
    """However the bytes arrive and however many marks, each mark in one piece."""
    mark = b"\xff\xfemark\xfe\xff"
    marked, plain = Capture(kept, mark), Capture(kept)
    expected = b""
    for k, data in enumerate(shown):
        for piece in ([mark] if k else []) + _pieces(data, cuts):
            marked.add(piece)
        expected += (b"\n" if expected and data and not expected.endswith(b"\n") else b"") + data
    plain.add(expected)
    assert (marked.text(), marked.total, marked.cut) == (plain.text(), plain.total, plain.cut)
    in_one = Capture(kept, mark)
    in_one.add(mark.join(shown))
    assert in_one.text() == plain.text()


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    pieces = []
    for size in (*cuts, len(data)):
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@given(st.integers(0, 5000))
def test_capture_memory_is_bounded(chunks: int) -> None:
    capture = Capture(100)
    for _ in range(chunks):
        capture.add(b"x" * 97)
    assert len(capture._head) + len(capture._tail) <= 1000


def test_output_is_stdout_then_stderr_then_the_note() -> None:
    assert join_output("a", "b", "[n]", 100) == ("a\nb\n[n]", False)
    assert join_output("", "", "", 100) == ("", False)
    assert join_output("a\n", "", "[n]", 100) == ("a\n[n]", False)


def test_cut_output_keeps_head_and_tail_and_says_so() -> None:
    text, cut = join_output("a" * 80 + "z" * 80, "", "", 100)
    assert cut and text == "a" * 50 + "\n[... 60 characters cut ...]\n" + "z" * 50


def test_results_say_how_the_program_was_stopped() -> None:
    def output(run: RawRun) -> str:
        return build_result(ExecutionRequest(""), run, LIMITS, Isolation.STRONG, RUNTIME, 15.0, 0.0, 1).output

    assert output(raw(KILLED, killed="wall", out=b"1\n")) == "1\n[timeout: stopped after 15 s of wall time]"
    assert output(raw(KILLED, cpu=5.0)) == "[timeout: stopped after 5 s of CPU time]"
    assert output(raw(int(signal.SIGSEGV))) == "[crash: killed by SIGSEGV]"
    assert output(raw(3 << 8)) == "[exit status 3]"
    assert "not your code" in output(raw(KILLED))


@pytest.mark.parametrize(
    ("isolation", "session", "run", "outcome", "number"),
    [
        (Isolation.STRONG, None, raw((128 + 15) << 8), Outcome.CRASH, 15),
        (Isolation.STRONG, None, raw((128 + 11) << 8, marks=b""), Outcome.CRASH, 11),  # the parser gave up on it
        (Isolation.STRONG, None, raw((128 + 15) << 8, marks=b"RE"), Outcome.ERROR, None),  # it left by itself
        (Isolation.STRONG, None, raw((128 + 9) << 8), Outcome.ERROR, None),  # nobody but us sends that one
        (Isolation.STRONG, None, raw((128 + 19) << 8), Outcome.ERROR, None),
        (Isolation.STRONG, None, raw(255 << 8), Outcome.ERROR, None),
        (Isolation.STRONG, None, raw(70 << 8, marks=b""), Outcome.INFRA, None),
        (Isolation.STRONG, "s", raw((128 + 15) << 8), Outcome.ERROR, None),  # there the kernel itself kills
        (Isolation.STANDARD, None, raw((128 + 15) << 8), Outcome.ERROR, None),
        (Isolation.STANDARD, None, raw(15), Outcome.CRASH, 15),
    ],
)
def test_a_death_by_signal_is_told_from_a_status(
    isolation: Isolation, session: str | None, run: RawRun, outcome: Outcome, number: int | None
) -> None:
    request = ExecutionRequest("", session_id=session)
    result = build_result(request, run, LIMITS, isolation, RUNTIME, 15.0, 0.0, 1)
    assert (result.outcome, result.signal) == (outcome, number)


def test_tracebacks_name_library_files_without_host_paths() -> None:
    import sys

    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for root in ("/opt/tool", "/cache/tree"):
        lines = [f'  File "{root}/site/numpy/linalg.py"', f'  File "{root}/lib/{version}/json/decoder.py"']
        text = strip_library_paths("\n".join(lines), RUNTIME)
        assert text == '  File "numpy/linalg.py"\n  File "json/decoder.py"'
