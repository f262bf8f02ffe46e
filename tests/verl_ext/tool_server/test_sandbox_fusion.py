"""What is made of a SandboxFusion service's answer: the text for the model says only what the service said."""

from __future__ import annotations

from typing import Any

import pytest

from verl_ext.tool_server import ExecutionRequest, ExecutionResult
from verl_ext.tool_server.backends.sandbox_fusion import result_of

pytestmark = pytest.mark.unit


def answered(timeout: float | None = None, **run_result: Any) -> ExecutionResult:
    return result_of(ExecutionRequest("", timeout=timeout), {"run_result": run_result}, timeout or 10.0)


@pytest.mark.parametrize(
    ("stdout", "stderr", "text"),
    [("a", "b", "a\nb"), ("a\n", "b\n", "a\nb\n"), ("", "b", "b"), ("a", None, "a"), (None, None, "")],
)
def test_each_stream_starts_a_line(stdout: str | None, stderr: str | None, text: str) -> None:
    assert answered(stdout=stdout, stderr=stderr, return_code=1).output == text


@pytest.mark.parametrize(
    ("timeout", "note"), [(None, "[timeout: stopped]"), (2.5, "[timeout: stopped after 2.5 s]")], ids=str
)
def test_a_limit_nobody_named_is_not_named(timeout: float | None, note: str) -> None:
    result = answered(timeout, stdout="so far", status="TimeLimitExceeded")
    assert result.output == f"so far\n{note}" and result.outcome == "timeout"


def test_a_long_text_is_cut_in_the_middle_and_says_so() -> None:
    result = answered(stdout="a" * 10**6 + "z", return_code=0)
    assert result.truncated and len(result.output) < 70_000 and result.output.endswith("z")
    assert "characters cut ...]" in result.output and not answered(stdout="a", return_code=0).truncated
