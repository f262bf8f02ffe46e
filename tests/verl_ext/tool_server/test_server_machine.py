"""What the server takes of its machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from verl_ext.tool_server import machine
from verl_ext.tool_server.__main__ import parse_arguments
from verl_ext.tool_server.backends.local import LocalBackend
from verl_ext.tool_server.machine import processors

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 128), ("800000 100000", 8), ("150000 100000", 1), ("50000 100000", 1), ("nonsense", 128)],
)
def test_a_container_s_quota_of_processors_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    """Whoever counts them: programs beyond it would wait for each other, and end as timeouts of the model's."""
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    assert processors() == parse_arguments([]).workers == LocalBackend().workers == expected
