"""The client's promises: programs are never retried, failures of the service are, all under one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from verl_ext.tool_server import ExecutionRequest, ExecutionResult, Isolation, Outcome, ToolClient
from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.client import is_ray

pytestmark = pytest.mark.unit


def result(request: ExecutionRequest, outcome: Outcome = Outcome.OK) -> ExecutionResult:
    return ExecutionResult(outcome, request.code, request.code, "", request.request_id, Isolation.STRONG)


class FakeBackend:
    """Answers each call with the next script step; remembers what it was asked."""

    def __init__(self, *steps: Callable[[Sequence[ExecutionRequest]], Any]) -> None:
        self.steps = list(steps)
        self.asked: list[list[str]] = []

    async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        self.asked.append([request.request_id for request in requests])
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        answer = step(requests)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def close(self) -> None:
        pass


def unavailable(**options: Any) -> Callable[[Sequence[ExecutionRequest]], Any]:
    def step(requests: Sequence[ExecutionRequest]) -> Any:
        raise BackendUnavailable("down", **options)

    return step


def all_ok(requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
    return [result(request) for request in requests]


def all_infra(requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
    return [ExecutionResult.infra(request.request_id, "lost", Isolation.STRONG) for request in requests]


def run(backend: FakeBackend, codes: Sequence[Any] = ("1",), **options: Any) -> list[ExecutionResult]:
    async def go() -> list[ExecutionResult]:
        async with ToolClient(backend, **options) as client:
            return await client.run_batch(codes)

    return asyncio.run(go())


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.INFRA])
def test_a_programs_own_failure_is_not_retried(outcome: Outcome) -> None:
    backend = FakeBackend(lambda requests: [result(r, outcome) for r in requests])
    assert run(backend)[0].outcome is outcome
    assert len(backend.asked) == 1


def test_infra_is_retried_with_the_same_id() -> None:
    backend = FakeBackend(all_infra, all_ok)
    assert run(backend)[0].ok
    assert backend.asked[0] == backend.asked[1]


def test_only_what_failed_is_asked_again() -> None:
    backend = FakeBackend(lambda rs: [all_ok(rs)[0], all_infra(rs)[1]], all_ok)
    results = run(backend, ["a", "b"])
    assert [r.output for r in results] == ["a", "b"]
    assert len(backend.asked[0]) == 2 and len(backend.asked[1]) == 1


def test_results_come_in_the_order_of_requests() -> None:
    backend = FakeBackend(lambda requests: list(reversed(all_ok(requests))))
    assert [r.output for r in run(backend, list("abcdef"))] == list("abcdef")


def test_a_service_that_stays_away_is_infra_not_an_exception() -> None:
    backend = FakeBackend(unavailable())
    (answer,) = run(backend, attempts=3)
    assert answer.outcome is Outcome.INFRA and answer.detail == "down" and len(backend.asked) == 3


def test_being_busy_does_not_use_up_attempts() -> None:
    busy = unavailable(busy=True, retry_after=0.01)
    backend = FakeBackend(busy, busy, busy, busy, all_ok)
    assert run(backend, attempts=1)[0].ok


def test_finding_nobody_there_does_not_use_up_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.tool_server.client._LONGEST_PAUSE_SECONDS", 0.1)
    backend = FakeBackend(*[unavailable(away=True)] * 6, all_ok)
    assert run(backend, attempts=1)[0].ok
    assert len({ids[0] for ids in backend.asked}) == 1 and len(backend.asked) == 7


@pytest.mark.parametrize("options", [{"away_seconds": 0.5}, {"deadline": 0.5}])
def test_looking_for_one_that_stays_away_ends(options: dict[str, float]) -> None:
    started = time.monotonic()
    (answer,) = run(FakeBackend(unavailable(away=True)), attempts=1, **options)
    assert (answer.outcome, answer.detail) == (Outcome.INFRA, "down")
    assert 0.4 < time.monotonic() - started < 2


def test_one_that_was_there_meanwhile_is_looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.tool_server.client._LONGEST_PAUSE_SECONDS", 0.2)
    away, busy = unavailable(away=True), unavailable(busy=True)
    assert run(FakeBackend(*[away, away, busy] * 4, all_ok), away_seconds=1)[0].ok


def test_it_can_be_looked_for_only_once() -> None:
    backend = FakeBackend(unavailable(away=True))
    assert run(backend, away_seconds=0)[0].outcome is Outcome.INFRA and len(backend.asked) == 1


def kept_waiting(requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
    return [ExecutionResult.infra(r.request_id, "waited", Isolation.STRONG, busy=True) for r in requests]


def test_waiting_in_the_queue_does_not_use_up_attempts() -> None:
    backend = FakeBackend(*[kept_waiting] * 6, all_ok)
    assert run(backend, attempts=1)[0].ok
    assert len({ids[0] for ids in backend.asked}) == 1 and len(backend.asked) == 7


def test_waiting_in_the_queue_ends_with_the_deadline() -> None:
    started = time.monotonic()
    (answer,) = run(FakeBackend(kept_waiting), deadline=0.5)
    assert (answer.outcome, answer.busy, answer.detail) == (Outcome.INFRA, True, "waited")
    assert 0.4 < time.monotonic() - started < 2


def test_one_that_fails_does_not_end_the_wait_of_another() -> None:
    """In a batch the attempts are counted for each: here the first always fails, the second is kept waiting."""

    def step(requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        return [(all_infra if r.code == "a" else kept_waiting)([r])[0] for r in requests]

    backend = FakeBackend(*[step] * 6, all_ok)
    failed, waited = run(backend, ["a", "b"], attempts=2)
    assert failed.outcome is Outcome.INFRA and waited.ok
    assert [len(ids) for ids in backend.asked] == [2, 2, 1, 1, 1, 1, 1]


def test_a_sessions_turn_that_only_waited_is_asked_again() -> None:
    backend = FakeBackend(kept_waiting, all_ok)
    (answer,) = run(backend, [ExecutionRequest("x", session_id="s")])
    assert answer.ok and len(backend.asked) == 2


def test_the_pause_is_at_least_what_the_service_asked_for() -> None:
    started = time.monotonic()
    assert run(FakeBackend(unavailable(busy=True, retry_after=0.4), all_ok))[0].ok
    assert time.monotonic() - started >= 0.4


def test_the_deadline_ends_a_call_that_hangs() -> None:
    started = time.monotonic()
    (answer,) = run(FakeBackend(lambda requests: asyncio.sleep(60)), deadline=0.2)
    assert answer.outcome is Outcome.INFRA and "deadline" in answer.detail
    assert time.monotonic() - started < 2


def test_the_deadline_covers_the_pauses() -> None:
    started = time.monotonic()
    (answer,) = run(FakeBackend(unavailable(busy=True, retry_after=60)), deadline=0.2)
    assert answer.outcome is Outcome.INFRA and time.monotonic() - started < 2


def test_a_rejected_request_is_an_exception_at_once() -> None:
    def refuse(requests: Sequence[ExecutionRequest]) -> Any:
        raise RequestRejected("too large")

    backend = FakeBackend(refuse)
    with pytest.raises(RequestRejected, match="too large"):
        run(backend)
    assert len(backend.asked) == 1


def test_a_sessions_infra_answer_is_final() -> None:
    backend = FakeBackend(all_infra)
    (answer,) = run(backend, [ExecutionRequest("x", session_id="s")])
    assert answer.outcome is Outcome.INFRA and len(backend.asked) == 1


def test_an_empty_batch_asks_nobody() -> None:
    backend = FakeBackend(all_ok)
    assert run(backend, []) == [] and backend.asked == []


@pytest.mark.parametrize(
    ("url", "ray"),
    [("ray", True), ("ray://strong", True), ("http://ray:8000", False), ("https://rays", False), ("rays", False)],
)
def test_a_url_that_stands_for_the_nodes_of_a_ray_cluster(url: str, ray: bool) -> None:
    assert is_ray(url) == ray and not is_ray(None)


def test_isolation_is_part_of_such_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ToolClient, "from_ray", lambda **options: asked.append(options))
    ToolClient.from_url("ray")
    ToolClient.from_url("ray://strong", deadline=5.0)
    assert asked == [{"isolation": "auto"}, {"isolation": "strong", "deadline": 5.0}]
