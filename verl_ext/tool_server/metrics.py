"""The dispatcher's counters in Prometheus' text exposition format. Nothing is sampled or labelled per request."""

from __future__ import annotations

from collections.abc import Sequence

from verl_ext.tool_server.dispatcher import Dispatcher
from verl_ext.tool_server.types import Outcome


def render_metrics(dispatcher: Dispatcher) -> str:
    """Return the whole page."""
    counters = dispatcher.counters
    isolation = f'isolation="{dispatcher.tier.isolation.value}"'
    page: list[str] = []

    def family(name: str, kind: str, text: str, samples: Sequence[tuple[str, float]]) -> None:
        page.append(f"# HELP tool_server_{name} {text}\n# TYPE tool_server_{name} {kind}\n")
        page.extend(f"tool_server_{name}{{{labels}}} {value:g}\n" for labels, value in samples)

    outcomes = [(f'{isolation},outcome="{o.value}"', counters.outcomes[o.value]) for o in Outcome]
    family("executions_total", "counter", "Answers given, by outcome.", outcomes)
    for name, kind, text, value in (
        ("execution_seconds_total", "counter", "Wall time of executions.", counters.seconds),
        ("execution_cpu_seconds_total", "counter", "CPU time of executions.", counters.cpu_seconds),
        ("queue_seconds_total", "counter", "Time executions waited for a worker.", counters.queue_seconds),
        ("rejected_total", "counter", "Requests not served: the queue full, or the wait too long.", counters.rejected),
        ("retried_total", "counter", "Executions started again after an outside cause.", counters.retried),
        ("zygotes_started_total", "counter", "Zygotes started.", counters.zygotes_started),
        ("zygotes_lost_total", "counter", "Zygotes that died at work.", counters.zygotes_lost),
        ("zygotes", "gauge", "Zygotes alive.", len(dispatcher.zygotes)),
        ("sessions", "gauge", "Sessions open.", len(dispatcher.sessions)),
        ("workers", "gauge", "Executions that may run at once.", dispatcher.workers),
        ("running", "gauge", "Executions running.", dispatcher.running),
        ("waiting", "gauge", "Executions waiting for a worker.", dispatcher.waiting),
    ):
        family(name, kind, text, [(isolation, value)])
    return "".join(page)
